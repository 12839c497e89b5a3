"""Policies on held-out prompts: scores, KL, lengths, and win rates against one another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Sampled:
    """Responses of one policy to some prompts, and what was found of each."""

    prompts: Sequence[str]
    texts: Sequence[str]
    score_B: np.ndarray  # of the reward
    length_B: np.ndarray  # tokens, EOS included
    ended_B: np.ndarray  # bool, whether it ends in EOS
    kl_B: np.ndarray | None = None  # nats, k1 summed over the response; None without a reference
    utility_B: np.ndarray | None = None  # of the miniature's gold judge

    def means(self) -> dict[str, float]:
        """The mean of each figure, by the field's names for it."""
        found = {
            "score": self.score_B,
            "kl": self.kl_B,
            "length": self.length_B,
            "eos_fraction": self.ended_B,
            "utility": self.utility_B,
        }
        return {k: float(np.mean(values)) for k, values in found.items() if values is not None}


def win_rate(ours: np.ndarray, theirs: np.ndarray, draws: int = 1000) -> tuple[float, float, float]:
    """How often the first is better, a tie counting half, with a 95 % bootstrap over prompts.

    Args:
      ours, theirs: utilities [n] of responses to the same prompts, sampled independently.

    Returns:
      (share, low, high)
    """
    won = (ours > theirs) + 0.5 * (ours == theirs)
    low, high = interval(won, draws)
    return float(won.mean()), low, high


def interval(values: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean."""
    picks = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def results(sampled: Mapping[str, Sampled], text_losses: Mapping[str, float]) -> dict[str, Any]:
    """What results.json holds of several policies; win rates are against the first of them.

    Args:
      sampled: by the policy's name.
      text_losses: of each, on held-out pretraining text, nats a token; NaN where there is none.
    """
    base, found = next(iter(sampled.values())), {}
    for name, one in sampled.items():
        row: dict[str, Any] = {**one.means(), "score_interval": interval(one.score_B)}
        if one is not base and one.utility_B is not None and base.utility_B is not None:
            row["win_rate"] = win_rate(one.utility_B, base.utility_B)
        found[name] = row | {"text_loss": text_losses[name]}
    # JSON has no NaN: what was not measured is not there.
    return {
        name: {key: value for key, value in row.items() if value == value}
        for name, row in found.items()
    }


def table(rows: Mapping[str, Any], prompts: int) -> Table:
    """`results` on the terminal."""
    columns = {
        "score": lambda row: "{:+.2f}\n({:+.2f} to {:+.2f})".format(
            row["score"], *row["score_interval"]
        ),
        "kl": lambda row: f"{row['kl']:.2f}",
        "length": lambda row: f"{row['length']:.1f}",
        "eos_fraction": lambda row: f"{row['eos_fraction']:.1%}",
        "utility": lambda row: f"{row['utility']:+.2f}",
        "win_rate": lambda row: "{:.1%}\n({:.1%} to {:.1%})".format(*row["win_rate"]),
        "text_loss": lambda row: f"{row['text_loss']:.3f}",
    }
    titles = {
        "kl": "KL, nats",
        "eos_fraction": "ends",
        "utility": "gold utility",
        "win_rate": "wins by gold",
        "text_loss": "text loss",
    }
    rows = {name: row for name, row in rows.items() if isinstance(row, Mapping)}
    shown = [key for key in columns if any(key in row for row in rows.values())]
    made = Table(title=f"on {prompts:,} held-out prompts, one response each")
    made.add_column("")
    for key in shown:
        made.add_column(titles.get(key, key), justify="right")
    for name, row in rows.items():
        made.add_row(name, *(columns[key](row) if key in row else "" for key in shown))
    return made


def samples_table(title: str, before: Sampled, now: Sampled, count: int = 3) -> Table:
    """A few prompts, each with its response before training and now, and their scores."""
    made = Table(title=title, show_lines=True, expand=True)
    for name, ratio in (("prompt", 3), ("before", 4), ("now", 4)):
        made.add_column(name, ratio=ratio, overflow="fold")
    for i in range(min(count, len(now.texts))):
        old, new = (f"{one.texts[i].strip()}  [{one.score_B[i]:+.2f}]" for one in (before, now))
        made.add_row(*map(escape, (now.prompts[i].strip(), old, new)))
    return made
