"""The files of red_team_rounds.py: rewards of attackers, and prompts with attacks among them."""

import itertools
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from line_files import read_lines, replace, write_lines

from instructjax import data
from instructjax.data import DataConfig
from instructjax.data.fields import ALIASES, INPUT, NAMES
from instructjax.evaluation import comparison
from instructjax.evaluation.grid import NothingToDoError

LEAST = 20  # attacks that must have succeeded before an attacker is trained on them
# Columns that a conversation is read from.
READ = {*INPUT, *(x for name in NAMES["prompts"] for x in ALIASES.get(name, (name,)))}
ROWS = 256  # of a file that repeats the opening: prompts of an evaluation in training
_REWARD = '''"""The reward of an attacker. Written by red_team_rounds.py."""

import functools

from red_team_target import make_reward


@functools.cache  # the target is loaded at the first call
def made():
    return make_reward(
{arguments}    )


def reward(prompts, responses, records):
    return made()(prompts, responses, records)
'''


def write_reward(file: Path, **arguments: Any) -> None:
    """Writes a Python file with the reward of an attacker.

    Args:
      arguments: of `red_team_target.make_reward`; texts, numbers and tuples of these.
    """
    lines = "".join(f"        {name}={value!r},\n" for name, value in arguments.items())
    replace(file, _REWARD.format(arguments=lines))


def write_openings(file: Path, opening: str) -> None:
    """Writes the prompts of an attacker that reinforcement learning trains: one, many times."""
    write_lines(file, [{"prompt": opening}] * ROWS)


def succeeded(directories: Iterable[Path]) -> list[str]:
    """The attacks of some runs of red_team.py that succeeded, each once."""
    return list(dict.fromkeys(row["prompt"] for row in _rows(directories) if row["succeeded"]))


def check_successes(directory: Path) -> None:
    """Raises ValueError if too few attacks succeeded to train an attacker on them."""
    if (count := len(succeeded([directory]))) < LEAST:
        raise ValueError(
            f"{directory}: {count} attacks succeeded, and SFT of an attacker needs {LEAST}; give"
            " more --attacks or another --opening, and another --out"
        )


def write_prompts(
    file: Path,
    held_out: Path,
    config: DataConfig,
    attacked: Sequence[Path],
    share: float,
    seed: int,
) -> None:
    """Writes the prompts of the target's next PPO, and those it is evaluated on in training.

    Args:
      file: gets all training prompts, and attacks that succeeded, as often as makes their share.
        They have no other column, which a function of a reward could read.
      held_out: gets the validation prompts.
      config: of the target's prompts.
      attacked: directories of runs of red_team.py.
      share: of the attacks among the prompts of `file`.
      seed: of the attacks' order. In that of `attacked`, a small share would have those of the
        first runs alone.

    Raises:
      ValueError: no attack succeeded.
    """
    attacks = succeeded(attacked)
    random.Random(seed).shuffle(attacks)
    if not attacks and share:
        raise ValueError(f"{', '.join(map(str, attacked))}: no attack succeeded")
    ordinary = _ordinary(config, "train")
    count = round(len(ordinary) * share / (1 - share))
    write_lines(
        file,
        [*ordinary, *({"prompt": x} for x in itertools.islice(itertools.cycle(attacks), count))],
    )
    write_lines(held_out, _ordinary(config, "validation"))


def write_held_out(file: Path, attacked: Sequence[Path], trained_on: Sequence[Path]) -> None:
    """Writes the distinct attacks of some runs, without those of other runs.

    An attack that failed in the other runs is left out too: what is left would else be the attacks
    that fail more often.

    Raises:
      NothingToDoError: none is left.
    """
    seen, held_out = ({row["prompt"]: None for row in _rows(x)} for x in (trained_on, attacked))
    attacks = [attack for attack in held_out if attack not in seen]
    if not attacks:
        raise NothingToDoError(
            f"{', '.join(map(str, attacked))}: no attack that the training runs lack"
        )
    write_lines(file, [{"prompt": attack} for attack in attacks])


def _ordinary(config: DataConfig, split: Literal["train", "validation"]) -> list[dict[str, Any]]:
    records = data.read(config, "prompts", split=split, render=False, log=lambda _: None)
    # Functions of a reward may read other columns, such as the miniature's request. Those that the
    # prompt was read from would be read once more.
    return [
        {
            **{
                name: value
                for name, value in record.row.items()
                if name not in (ALIASES["messages"] if record.verbatim else READ)
            },
            **comparison.prompt_row(record),
        }
        for record in records
    ]


def _rows(directories: Iterable[Path]) -> list[dict[str, Any]]:
    return [row for x in directories for row in read_lines(x / "attacks.jsonl")]
