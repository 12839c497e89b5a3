"""Model directories with one fault each, of many kinds, and what the error about each must name.

These are faults of files and of config.json; `bad_weights` and `bad_tokenizers` have the others.
`faults_models.py` loads the directories and counts.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from instructjax import hf, miniature, models
from instructjax.models import ModelConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
SIZES = {
    "gpt2": ["vocab_size", "n_layer", "n_embd", "n_head", "n_inner", "n_positions"],
    "llama": [
        *("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings"),
    ],
}
NO_OBJECTS = {
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "a string": b'"x"',
    "nothing": b"",
    "half": b'{"a": ',
    "deep": b"[" * 100_000,
    "no UTF-8": b'{"a": "\xff"}',
    "binary": bytes(range(256)),
    "a number of 5,000 digits": b'{"a": ' + b"1" * 5000 + b"}",
}
Damage = Callable[[Path], Any]  # of a directory


def _terabyte(file: Path) -> None:
    with open(file, "wb") as stream:
        stream.truncate(2**40)  # takes no room on the disk


NO_FILES: dict[str, Damage] = {
    "a FIFO": os.mkfifo,
    "a directory": Path.mkdir,
    "a link to nothing": lambda file: file.symlink_to("nowhere"),
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a link to a device": lambda file: file.symlink_to("/dev/zero"),
    "a file of a terabyte": _terabyte,
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A whole directory, what damages it, and what the error must name."""

    variant: str
    damage: Damage
    names: tuple[str, ...]  # the file, key or tensor
    model: str = "gpt2"  # of `write_whole`
    harmless: str | None = None  # why the directory may load as the whole one does, if it may
    dtype: str = "float32"  # that the weights are cast to


def write_whole(root: Path) -> None:
    """Writes the directories gpt2, llama, and reward: a llama with a scalar head."""
    tokenizer = miniature.tokenizer()
    gpt2 = ModelConfig(
        len(tokenizer), 2, 16, heads=4, mlp_width=32, max_length=32, eos_ids=(2,), bos_id=1
    )
    llama = dataclasses.replace(
        gpt2, family="llama", kv_heads=2, norm="rms", positions="rotary", gated=True,
        activation="silu", tied=False, qkv_bias=False, out_bias=False, mlp_bias=False,
    )  # fmt: skip
    reward = dataclasses.replace(llama, scalar_head=True, pad_id=0)
    for name, config in (("gpt2", gpt2), ("llama", llama), ("reward", reward)):
        hf.save(root / name, config, models.init(config, jax.random.key(0)), tokenizer)


# --- damages ---


def write(file: str, content: bytes) -> Damage:
    return lambda directory: (directory / file).write_bytes(content)


def edit(file: str, **keys: Any) -> Damage:
    """Sets keys of a JSON file."""

    def damage(directory: Path) -> None:
        content = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps(content | keys))

    return damage


def instead(file: str, make: Damage | None = None) -> Damage:
    """Removes a file, and makes something of its name."""

    def damage(directory: Path) -> None:
        (directory / file).unlink(missing_ok=True)
        if make is not None:
            make(directory / file)

    return damage


def all_of(*damages: Damage) -> Damage:
    return lambda directory: [damage(directory) for damage in damages]


def marker(directory: Path) -> Path:
    """What a hostile directory creates if its code is run."""
    return directory.parent / "ran"


# --- kinds ---


def faults(names: tuple[str, ...], damages: dict[str, Damage], **more: Any) -> list[Fault]:
    """Faults about which the error must name the same."""
    return [Fault(variant, damage, names, **more) for variant, damage in damages.items()]


_JSON = (CONFIG, GENERATION, TOKENIZER, SETTINGS, "special_tokens_map.json", INDEX)
_WRONG_SIZES = {
    "zero": 0,
    "negative": -1,
    "of 10^12": 10**12,
    "of 400 digits": 10**400,
    "a boolean": True,
    "NaN": float("nan"),
    "a fraction": 1.5,
    "a string": "16",
    "a list": [16],
}


def _files() -> Iterator[tuple[str, list[Fault]]]:
    for file in _JSON:
        weights = [instead(WEIGHTS)] if file == INDEX else []
        yield (
            f"{file}: no JSON object",
            [
                Fault(name, all_of(*weights, write(file, text)), (file,))
                for name, text in NO_OBJECTS.items()
            ],
        )
    for name, make in NO_FILES.items():
        yield (
            f"{name} in place of a file",
            [
                Fault(
                    file, all_of(*([instead(WEIGHTS)] * (file == INDEX)), instead(file, make)),
                    (file,),
                )
                for file in (*_JSON, TEMPLATE, WEIGHTS)
            ],
        )  # fmt: skip
    missing = {CONFIG: (CONFIG,), WEIGHTS: (WEIGHTS,), TOKENIZER: ("--tokenizer",)}
    yield "a file is missing", [Fault(f, instead(f), names) for f, names in missing.items()]


def _config() -> Iterator[tuple[str, list[Fault]]]:
    def of_keys(*rows: tuple[str, str, Any]) -> list[Fault]:
        return [Fault(f"{m} {k}", edit(CONFIG, **{k: v}), (CONFIG, k), m) for m, k, v in rows]

    for name, value in _WRONG_SIZES.items():
        rows = [(family, key, value) for family, keys in SIZES.items() for key in keys]
        yield f"sizes: {name}", of_keys(*rows)
    yield (
        "sizes that do not fit together",
        of_keys(
            *(("gpt2", "n_embd", 15), ("gpt2", "n_head", 3), ("gpt2", "n_head", 32)),
            *(("llama", "num_key_value_heads", 3), ("llama", "head_dim", 3)),
            *(("llama", "head_dim", 5), ("llama", "layer_types", ["full_attention"] * 3)),
        ),
    )
    layers = [("gpt2", "n_layer", n) for n in (10_001, 10**6, 2**31 - 1)]
    yield "a million layers", of_keys(*layers, ("llama", "num_hidden_layers", 10**6))
    containers = ("architectures", "auto_map", "id2label", "label2id", "quantization_config")
    containers += ("layer_types", "rope_parameters", "rope_scaling", "model_type")
    yield "lists and objects: a number", of_keys(*(("reward", key, 3) for key in containers))
    wrong: dict[str, tuple[Any, ...]] = {
        "num_labels": (2, 10**12, "x", -1),
        "reward_bias": ("x", "1", True, {}, float("nan"), 10**400),
    }
    rows = [("reward", key, value) for key, values in wrong.items() for value in values]
    yield "reward models: labels and bias", of_keys(*rows)
    wrong = {
        "model_type": ("x", "bert", ""),
        "activation_function": ("x", 3),
        "layer_norm_epsilon": (-1.0, "x", float("nan")),
        "tie_word_embeddings": ("no", 1),
        "scale_attn_weights": (False, "x"),
        "dtype": ("x", "int8", 3),
        "quantization_config": ({"quant_method": "gptq"},),
        "configuration_files": (["config.4.0.0.json"], "x"),
    }
    rows = [("gpt2", key, value) for key, values in wrong.items() for value in values]
    yield "switches that are not implemented", of_keys(*rows)
    ropes: dict[str, dict[str, Any]] = {
        "rope_theta": {"rope_type": "default", "rope_theta": 0.0},
        "rope_type": {"rope_type": "x", "rope_theta": 1e4},
        "factor": {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "x": 3},
        "original_max_position_embeddings": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
            "original_max_position_embeddings": 0,
        },
        "attention_factor": {"rope_type": "yarn", "rope_theta": 1e4, "attention_factor": "x"},
        "short_factor": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": ["x"]},
        "mscale": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mscale": "x"},
        "full_attention": {"full_attention": 3},
        "rope_type = '[]'": {"rope_type": [], "rope_theta": 1e4},
        "rope_type = 'None'": {"full_attention": {"rope_theta": 1e4}},
        "longrope": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0],
            "long_factor": [1.0], "original_max_position_embeddings": 16,
        },
    }  # fmt: skip
    yield (
        "rotary embeddings",
        [
            Fault(name, edit(CONFIG, rope_parameters=keys), (CONFIG, name), "llama")
            for name, keys in ropes.items()
        ],
    )
    ids = ["x", [2, "x"], {}, [None], True, -5, 1.5, 10**12, 299, [2, 299], float("nan")]
    for file in (CONFIG, GENERATION):
        yield (
            f"{file}: ends that are no ids of the vocabulary",
            [Fault(str(i), edit(file, eos_token_id=i), (file, "eos_token_id")) for i in ids],
        )


def kinds() -> Iterator[tuple[str, list[Fault]]]:
    """The faults of files and of config.json, by their kind."""
    yield from _files()
    yield from _config()
