r"""Serves a page on which people rank and rate responses: `pip install 'instructjax[label]'`.

    python -m instructjax.label --data jsonl:samples.jsonl --out labels.db
    python -m instructjax.label --data jsonl:runs/evaluation/responses.jsonl --pairs --out wins.db
    python -m instructjax.label --data jsonl:prompts.jsonl --write --out demonstrations.db
    python -m instructjax.label --out labels.db --export runs/labels          # and no page

A row of --data is a comparison (`prompt`, `responses`) or one response (`prompt`, `response`,
`model`), as evaluate.py writes them. Labelers see neither the model nor the order of the data.
The server may be stopped at any time: what a page shows as sent is in the database.

Result: --out, a SQLite database; with --export the files DIR/comparisons.jsonl for run_rm.py,
DIR/demonstrations.jsonl for run_sft.py and DIR/rankings.jsonl for `evaluate.py --labels`.
"""

import contextlib
import dataclasses
import importlib.util
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from instructjax import data, ranges, usage
from instructjax.data import DataConfig, DataError
from instructjax.label import deck, export, screens
from instructjax.label.desk import Desk
from instructjax.label.screens import Kind
from instructjax.label.store import Store
from instructjax.ranges import Count, Range, Seed, Share

Port = Annotated[int, Range(lambda x: 0 <= x < 2**16, "must be from 0 to 65535")]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is labeled, by how many, and where the labels are kept."""

    data: Annotated[str, tyro.conf.arg(metavar="SPEC")] = "miniature"
    """What to label: `jsonl:PATH`, or another SPEC as of the training scripts."""
    out: Path = Path("labels.db")
    """Database of the labels. An existing one is continued."""
    export: Path | None = None
    """Directory to write the records for training to, from the database. No page is served."""
    pairs: bool = False
    """Show two responses at a time, of two models, and ask which is better: for win rates."""
    write: bool = False
    """Show prompts alone, and ask for a demonstration."""
    screens: Count | None = None
    """Number of screens, from the start of the data. By default all."""
    raters: Count = 1
    """Number of labelers who get each shared screen."""
    shared: Share = 1.0
    """Share of the screens that go to --raters labelers; each other screen goes to one labeler."""
    screening: Annotated[str | None, tyro.conf.arg(metavar="SPEC")] = None
    """Comparisons with known `ranks`, and perhaps `flags`, that each labeler does first. By default
    all labelers are admitted. [appendix B.1]"""
    admit: Share = 0.6
    """Lowest agreement with --screening at which a labeler is admitted: on the pairs that it
    orders, and on its flags if it has any."""
    host: str = "127.0.0.1"
    """Address to serve at. Any address but loopback needs a token, which is part of the address
    that is printed at the start."""
    port: Port = 8000
    """Port to serve at; 0 takes a free one."""
    seed: Seed = 0
    """Seed of each labeler's order of screens and of responses, and of which screens are shared."""

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.pairs and self.write:
            raise ValueError("--write: choose it or --pairs")

    @property
    def kind(self) -> Kind:
        return "write" if self.write else "pairs" if self.pairs else "rank"


def check(config: Config) -> None:
    """Raises ValueError or OSError for flags that cannot work, before anything is written."""
    if config.export is not None:
        if not config.out.is_file():
            raise FileNotFoundError(f"--out {config.out}: no such database to export")
        if config.export.exists() and not config.export.is_dir():
            raise NotADirectoryError(f"--export {config.export}: is not a directory")
        return
    for name in ("starlette", "uvicorn", "krippendorff"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"the page needs {name}: pip install 'instructjax[label]'")
    record = "prompts" if config.write else "comparisons"
    data.check(DataConfig(config.data), record, held_out=False)
    if config.screening is not None:
        data.check(DataConfig(config.screening), "comparisons", "--screening", held_out=False)
    if config.out.is_dir() or not config.out.parent.is_dir():
        raise NotADirectoryError(f"--out {config.out}: is a directory, or is in none")


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
      ValueError: there is no such address here, or its port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror}") from error


def serve(config: Config, store: Store, listener: socket.socket) -> None:
    """Serves the pages until a signal.

    Raises:
      DataError: a row cannot be shown.
    """
    import uvicorn

    from instructjax.label.guard import is_loopback
    from instructjax.label.server import make_app

    known = [] if config.screening is None else screens.read_known(config.screening)
    dealt = deck.deal(
        screens.read(config.data, config.kind, most=config.screens),
        known,
        raters=config.raters,
        share=config.shared,
        seed=config.seed,
    )
    desk = Desk(store, dealt, config.admit)
    desk.open()
    port = listener.getsockname()[1]
    host = socket.gethostname() if config.host in ("0.0.0.0", "::") else config.host
    host = f"[{host}]" if ":" in host else host
    token = None if is_loopback(config.host) else store.about("token")
    query = "" if token is None else f"?token={token}"
    print(f"labels are kept in {config.out}")
    print(f"labeling:  http://{host}:{port}/{query}")
    print(f"agreement: http://{host}:{port}/agreement", flush=True)
    settings: dict[str, Any] = {"http": "h11", "loop": "asyncio", "ws": "none", "lifespan": "off"}
    # No log of requests: the token is in the address of the first.
    settings |= {"access_log": False, "log_level": "warning", "server_header": False}
    app = make_app(desk, token, port)
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=3, **settings))
    server.run(sockets=[listener])


def cli(argv: Sequence[str] | None = None) -> None:
    """Exits with 2 on wrong usage, with 1 on data that cannot be used."""
    keywords: Any = {"args": argv, "description": __doc__, "use_underscores": True}
    with contextlib.ExitStack() as stack:
        opened: list[Any] = []

        def parse() -> Config:
            config = tyro.cli(Config, prog="python -m instructjax.label", **keywords)
            out, to = config.out.expanduser(), config.export  # of `--out=~/labels.db`
            return dataclasses.replace(config, out=out, export=to and to.expanduser())

        def check_and_open(config: Config) -> None:
            check(config)
            if config.export is None:
                opened.append(stack.enter_context(bind(config.host, config.port)))
            try:
                opened.append(stack.enter_context(contextlib.closing(Store(config.out))))
            except ValueError as error:
                raise ValueError(f"--out {error}") from error

        config = usage.read(parse, check_and_open)
        try:
            if config.export is not None:
                export.write(opened[0], config.export)
            else:
                serve(config, opened[1], opened[0])
        except KeyboardInterrupt:
            pass
        except (DataError, ValueError) as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
