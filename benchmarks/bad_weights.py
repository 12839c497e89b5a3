"""Model directories with one fault each, beside `bad_models`: weights, and code of models."""

import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from bad_models import (
    CONFIG,
    INDEX,
    SETTINGS,
    WEIGHTS,
    Damage,
    Fault,
    all_of,
    edit,
    faults,
    marker,
)  # fmt: skip
from safetensors.numpy import load_file, save_file

EMBEDDING, MATRIX = "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"
BIAS, LAST = "transformer.ln_f.bias", "transformer.h.1.mlp.c_proj.bias"


# --- damages ---


def data(change: Callable[[bytes], bytes]) -> Damage:
    """Changes the bytes of weights, and code of models."""
    return lambda directory: (directory / WEIGHTS).write_bytes(
        change((directory / WEIGHTS).read_bytes())
    )


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Changes the header of the weights; `change` returns an object, or bytes that are none."""

    def damaged(content: bytes) -> bytes:
        (size,) = struct.unpack("<Q", content[:8])
        new = change(json.loads(content[8 : 8 + size]))
        new = new if isinstance(new, bytes) else json.dumps(new).encode()
        return struct.pack("<Q", len(new)) + new + content[8 + size :]

    return data(damaged)


def tensors(change: Callable[[dict[str, np.ndarray]], Any], dtype: Any = np.float32) -> Damage:
    """Casts the weights, and changes them."""

    def damage(directory: Path) -> None:
        content = {name: x.astype(dtype) for name, x in load_file(directory / WEIGHTS).items()}
        change(content)
        save_file(content, directory / WEIGHTS)

    return damage


def last(count: int, value: float, name: str = MATRIX) -> Callable[[dict[str, np.ndarray]], None]:
    """A change that sets the last values of a tensor."""

    def change(content: dict[str, np.ndarray]) -> None:
        content[name].reshape(-1)[-count:] = value

    return change


def tensor(name: str, make: Callable[[np.ndarray], np.ndarray], source: str = "") -> Damage:
    """Puts what is made of a tensor in its place, or under another name."""

    def change(content: dict[str, np.ndarray]) -> None:
        content[name] = np.ascontiguousarray(make(content[source or name]))

    return tensors(change)


def index(weight_map: Any, name: str = "part.safetensors") -> Damage:
    """Renames the weights to part.safetensors, and writes an index.

    Args:
      weight_map: of the index, or a file's name that stands for all tensors.
    """

    def damage(directory: Path) -> None:
        names = list(load_file(directory / WEIGHTS))
        os.rename(directory / WEIGHTS, directory / name)
        made = weight_map(names) if callable(weight_map) else weight_map
        (directory / INDEX).write_text(json.dumps({"weight_map": made}))

    return damage


class Hostile:
    """Creates the marker when it is unpickled."""

    def __init__(self, directory: Path):
        self.file = str(marker(directory))

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.file, "w")


def _pickles(*names: str) -> Damage:
    def damage(directory: Path) -> None:
        (directory / WEIGHTS).unlink()
        for name in names:
            (directory / name).write_bytes(pickle.dumps(Hostile(directory)))

    return damage


def _code(directory: Path) -> None:
    """Modules that create the marker, for keys to name."""
    text = f"open({str(marker(directory))!r}, 'w')\nclass Hostile: pass\n"
    for module in ("configuration", "modeling", "tokenization"):
        (directory / f"{module}_hostile.py").write_text(text)


# --- kinds ---


def _twice(header: dict[str, Any]) -> bytes:
    """A header that ends in a tensor that it has had."""
    again = json.dumps({EMBEDDING: header[EMBEDDING]})
    return f"{json.dumps(header)[:-1]}, {again[1:]}".encode()


def _files() -> Iterator[tuple[str, list[Fault]]]:
    sizes = (0, 1, 4, 7, 8, 9, 100, 2000, -1000, -1)
    cuts = {f"[:{n}]": data(lambda x, n=n: x[:n]) for n in sizes}
    yield "weights that are cut", faults((WEIGHTS,), cuts)
    changes: dict[str, Callable[[bytes], bytes]] = {
        "a byte more": lambda x: x + b"\0",
        "a byte before": lambda x: b"\0" + x,
        "zeros": lambda x: bytes(len(x)),
        "a header of 2^64 - 1 bytes": lambda x: b"\xff" * 8 + x[8:],
        "a page of HTML": lambda x: b"<!DOCTYPE html>" * 99,
        "a pointer of git-lfs": lambda x: b"version https://git-lfs.github.com/spec/v1\n",
        "a zip file": lambda x: b"PK\x03\x04" + x,
    }
    other = {name: data(change) for name, change in changes.items()}
    yield "weights that are something else", faults((WEIGHTS,), other)
    keys: list[dict[str, Any]] = [
        *({"dtype": x} for x in ("F64", "U32", "F8_E4M3", "X", None)),
        *({"shape": x} for x in ([-1, 16], [2**62, 16], [1.5], [True, 16], None)),
        *({"data_offsets": x} for x in ([-4, 60], [100, 4], [0, 2**40], [0], [2**64, 2**65])),
    ]
    headers = {str(k): header(lambda h, k=k: h | {EMBEDDING: h[EMBEDDING] | k}) for k in keys}
    yield "a header with wrong values", faults((WEIGHTS,), headers)
    yield "a header that names a tensor twice", faults((WEIGHTS, EMBEDDING), {"": header(_twice)})
    headers = {
        "a list": header(lambda h: []),
        "empty": header(lambda h: {}),
        "deep": header(lambda h: b'{"a":' + b"[" * 100_000),
        "no UTF-8": header(lambda h: b'{"\xff": 1}'),
        "metadata that is a list": header(lambda h: {"__metadata__": []} | h | {"x": []}),
    }
    yield "a header that is none", faults((WEIGHTS,), headers)


def _index() -> Iterator[tuple[str, list[Fault]]]:
    names = ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\..", "", ".", ".."]
    names += ["none.safetensors", "a\0b", "\ud800", "x" * 5000, "a\nb", "~/x", 3, None, ["x"], True]
    maps = {ascii(x)[:30]: index(lambda n, x=x: dict.fromkeys(n, x)) for x in names}
    yield "an index that points outside, or to nothing", faults((INDEX,), maps)
    maps = {str(x): index(x) for x in ({}, [], None, "x", 3)}
    yield "an index without files", faults((INDEX, "weight_map"), maps)
    part = index(lambda names: dict.fromkeys(names, "part"), "whole")
    made: dict[str, Damage] = {
        "a directory": lambda directory: (directory / "part").mkdir(),
        "a FIFO": lambda directory: os.mkfifo(directory / "part"),
        "a link to a text": lambda directory: (directory / "part").symlink_to(CONFIG),
        "a link to itself": lambda directory: (directory / "part").symlink_to("part"),
    }
    parts = {name: all_of(part, make) for name, make in made.items()}
    yield "an index that points to no weights", faults(("part",), parts)


def _tensors() -> Iterator[tuple[str, list[Fault]]]:
    absent = [EMBEDDING, MATRIX, BIAS, "transformer.wpe.weight"]
    yield (
        "tensors that are missing",
        [Fault(n, tensors(lambda t, n=n: t.pop(n)), (n,)) for n in absent],
    )
    extra = {"x": EMBEDDING, "transformer.h.2.ln_1.bias": BIAS, "a\x1b[31mb": BIAS}
    yield (
        "tensors that nothing reads",
        [Fault(ascii(n), tensor(n, np.copy, s), (ascii(n)[1:-1],)) for n, s in extra.items()],
    )
    shapes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "transposed": np.transpose,
        "flat": np.ravel,
        "a row more": lambda x: np.concatenate([x, x[:1]]),
        "empty": lambda x: x[:0],
        "an axis more": lambda x: x[None],
        "a number": lambda x: x[0, :1].reshape(()),
    }
    integers = {t: lambda x, t=t: x.astype(t) for t in ("int8", "int32", "bool")}
    for kind, says, makes in (
        ("tensors of another shape", "not [", shapes),
        ("tensors of integers", "integers", integers),
    ):
        yield (
            kind,
            [
                Fault(f"{n} {name}", tensor(n, make), (n, says))
                for n in (EMBEDDING, MATRIX)
                for name, make in makes.items()
            ],
        )
    dtypes = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    values = {"NaN": (np.nan, 1), "inf": (np.inf, 3), "-inf": (-np.inf, 512)}
    yield (
        "weights that are not finite",
        [
            Fault(f"{name} in {d}", tensors(last(count, value), dtype), (MATRIX, f"{count} values"))
            for d, dtype in dtypes.items()
            for name, (value, count) in values.items()
        ],
    )
    yield (
        "weights that float16 cannot hold",
        [
            Fault(str(x), tensors(last(2, x)), (MATRIX, "float16"), dtype="float16")
            for x in (1e5, -1e30)
        ],
    )
    wrong = {
        "n_layer": {1: "transformer.h.1.", 3: "transformer.h.2.", 9000: CONFIG},
        "vocab_size": {5000: EMBEDDING, 2**31 - 1: EMBEDDING},
        "n_inner": {33: MATRIX, 2**31 - 1: MATRIX},
        "n_positions": {31: "transformer.wpe.weight", 2**31 - 1: "transformer.wpe.weight"},
        "n_embd": {20: EMBEDDING, 2**31 - 4: EMBEDDING},
    }
    yield (
        "sizes that the weights contradict",
        [
            Fault(f"{key} {size}", edit(CONFIG, **{key: size}), (name,))
            for key, names in wrong.items()
            for size, name in names.items()
        ],
    )


def _code_of_models() -> Iterator[tuple[str, list[Fault]]]:
    pickles = ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt")
    made = [Fault(name, _pickles(name), (name,)) for name in pickles]
    made += [Fault("a pickle of another name", _pickles("model.pkl"), (WEIGHTS,))]
    yield "pickles that run code", [*made, Fault(WEIGHTS, _pickles(WEIGHTS), (WEIGHTS,))]
    classes = {
        "AutoConfig": "configuration_hostile.Hostile",
        "AutoModelForCausalLM": "modeling_hostile.Hostile",
        "AutoTokenizer": ["tokenization_hostile.Hostile", "tokenization_hostile.Hostile"],
    }
    keys: dict[str, tuple[str, dict[str, Any]]] = {
        "auto_map of config.json": (CONFIG, {}),
        "with trust_remote_code in config.json": (CONFIG, {"trust_remote_code": True}),
        "auto_map of tokenizer_config.json": (SETTINGS, {}),
        "with its class": (SETTINGS, {"tokenizer_class": "Hostile"}),
        "with trust_remote_code": (SETTINGS, {"trust_remote_code": True}),
    }
    yield (
        "modules that run code",
        [
            Fault(
                name,
                all_of(_code, edit(file, auto_map=classes, **more)),
                (file,),
                harmless="the class of transformers is taken, not the module",
            )
            for name, (file, more) in keys.items()
        ]
        + [
            Fault(
                "a model_type of its own",
                all_of(_code, edit(CONFIG, auto_map=classes, model_type="hostile")),
                (CONFIG, "model_type"),
            )
        ],
    )


def kinds() -> Iterator[tuple[str, list[Fault]]]:
    """The faults of weights and of code, by their kind."""
    yield from _files()
    yield from _index()
    yield from _tensors()
    yield from _code_of_models()
