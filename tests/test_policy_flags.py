"""Flags of a grid's runs: what the grid sets itself is refused, however it is written."""

from dataclasses import fields
from pathlib import Path

import compare_algorithms
import compare_revisions
import ensembles
import labelers_config
import overoptimise
import pytest
import red_team_config
import rewarded_soups
import run_rounds

GRIDS = (
    *(compare_algorithms, compare_revisions, ensembles, labelers_config, overoptimise),
    *(red_team_config, rewarded_soups, run_rounds),
)
REFUSED = (
    *("--model x", "--models x", "--seed 7", "--seed=7", "--data jsonl:x", "--gold x.py:f"),
    *("--reward x.py:f", "--reward.weights 1 2", "--reward.combine min", "--reward.spread 2"),
    *("--out x", "--resume", "--max_new_tokens 5", "--max-new-tokens 5", "--max-new_tokens=5"),
)
# What a grid does not set, as its flags' texts say.
ALLOWED = {
    (labelers_config, "ai_flags", "--seed 7"),
    (labelers_config, "ai_flags", "--seed=7"),
    (red_team_config, "rl_flags", "--gold x.py:f"),
}


@pytest.mark.parametrize("script", GRIDS, ids=lambda script: script.__name__)
def test_what_a_grid_sets_is_refused(script):
    names = [each.name for each in fields(script.Config) if each.name.endswith("_flags")]
    assert {"ppo_flags", "evaluate_flags"} <= {*names}
    for name in names:
        for given in REFUSED:
            words = {"out": Path("OUT"), name: f"--mesh data=1 {given}"}
            if (script, name, given) in ALLOWED:
                script.Config(**words)
                continue
            flag = given.replace("=", " ").split()[0][2:].replace("-", "_")
            with pytest.raises(
                ValueError, match=rf"^--{name}: --{flag} is set by this script's own"
            ):
                script.Config(**words)


@pytest.mark.parametrize(
    ("script", "name", "flag"),
    [
        (labelers_config, "ai_flags", "pairs"),
        (compare_revisions, "revise_flags", "revisions"),
        (red_team_config, "attack_flags", "max-attack-tokens"),
        (red_team_config, "sft_flags", "data.split-by"),
        (red_team_config, "ppo_flags", "data.validation"),
    ],
)
def test_what_one_grid_sets_is_refused_too(script, name, flag):
    with pytest.raises(ValueError, match=f"--{name}: --{flag.replace('-', '_')} is set by"):
        script.Config(out=Path("OUT"), **{name: f"--{flag} 3"})
