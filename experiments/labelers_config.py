"""The flags of compare_labelers.py, and its labelers."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import constitution
import policy_grids as grids
from ai_feedback import RULES

from instructjax.evaluation.grid import from_here, parse_flags
from instructjax.miniature import critics
from instructjax.ranges import Count, Finite, NotNegative

EXPERIMENTS = Path(__file__).resolve().parent
PEOPLE, CRITIC, MIXED = "people", "critic", "mixed"
ABLE = ("followed", "padding", "rude")  # what the base model that reads critics can judge


@dataclass(frozen=True, kw_only=True)
class Config(grids.PolicyConfig):
    """The labelers."""

    OWN = MappingProxyType({"ai_flags": ("pairs",)})
    FREE = MappingProxyType({"ai_flags": ("seed",)})

    out: Path | None = Path("runs/labelers")
    people: tuple[str, ...] = ()
    """Source of people's labels: functions and reward models, as for --reward of
    run_ppo.py. By default the miniature's training labelers, one for each prompt."""
    labelers: tuple[str, ...] = ()
    """Language models that label, preferably chat models. By default only the miniature's."""
    noise: tuple[NotNegative, ...] = (0.0, 3.0)
    """Standard deviations of the errors of rule-based critics, in units of the judge's utility. The
    miniature has such critics, one for each noise and each --place_bias."""
    place_bias: tuple[Finite, ...] = (0.0, 2.0)
    """What rule-based critics add to their rating of the response that is shown first, in units of
    the judge's utility."""
    prompts: Count = 8000
    """Number of prompts that the policy answers twice. Those whose two responses people find equal
    give no pair."""
    ai_flags: str = ""
    """Further flags of each ai_feedback.py of --labelers, quoted as one argument. They may have
    --seed, because a model labels once for all seeds."""
    rm_flags: str = ""
    """Further flags of each run_rm.py, quoted as one argument."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, named in (("--people", self.people), ("--labelers", self.labelers)):
            if not named and not self.in_miniature:
                raise ValueError(f"{flag}: only the miniature has some of its own; name one")
        names = [Path(model).name for model in self.labelers]
        taken = [PEOPLE, *self.critics]
        if len({*taken, *names}) < len(taken) + len(names):
            raise ValueError(f"--labelers: two of one name, or a name in use: {', '.join(names)}")

    @property
    def people_specs(self) -> tuple[str, ...]:
        return self.people or (f"{from_here(EXPERIMENTS)}/reproduce.py:training_labelers",)

    @property
    def critics(self) -> dict[str, dict[str, Any]]:
        """The flags of each ai_feedback.py by a critic of the miniature, by name."""
        if not self.in_miniature:
            return {}
        overall = {"only_principles": critics.OVERALL}
        asked: dict[str, dict[str, Any]] = {}
        for noise, bias in itertools.product(self.noise, self.place_bias):
            rules = {"model": RULES, "noise": noise, "place_bias": bias}
            asked.setdefault(MIXED, rules)
            asked[f"rules-{noise:g}-{bias:g}"] = rules | overall
        made = {"model": self.directory / CRITIC, "principles": constitution.MINIATURE}
        return asked | {CRITIC: made | {"only_principles": ABLE}}

    @property
    def asked(self) -> dict[str, dict[str, Any]]:
        """The flags of each ai_feedback.py, by the name of its labeler."""
        words = parse_flags(self.ai_flags)
        return self.critics | {Path(x).name: {"model": x, **words} for x in self.labelers}

    def labels_of(self, name: str, seed: int) -> str:
        """The run of a labeler's labels. A model labels once for all seeds, as it takes long."""
        of_rules = self.asked[name]["model"] == RULES
        return f"labels-{name}-{seed}" if of_rules else f"labels-{name}"
