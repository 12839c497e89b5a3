"""Scores a run's last samples with and without the end of a response: what is EOS worth to a judge?

    python benchmarks/score_ends.py runs/ppo --reward runs/rm runs/judge

Reads RUN/samples_after.jsonl, which run_ppo.py and swap_loss.py write: one response to each
held-out prompt from the model at the start and from the trained one. Each reward model scores every
response twice: with EOS behind it, like the responses that it was trained on, and without, like a
response that is cut. A chat model's EOS is its end of turn.

Hardware: one CPU core, a few seconds for 60 responses and a model of 135M parameters.
Result: a Markdown table. Intervals are 95 %, over responses.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from instructjax import scoring, sharding
from instructjax.data import template
from instructjax.data.tokens import tokenise
from instructjax.evaluation import statistics
from instructjax.run import pretrained

BATCH = 16


@dataclass(frozen=True)
class Config:
    """A run and its judges."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory with samples_after.jsonl."""
    reward: tuple[str, ...]
    """Reward models: run directories, Hugging Face directories or names on the hub."""


def scores(reward: str, mesh: Mesh, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """[2, B]: a reward model's scores without and with EOS behind the response."""
    config, params, tokenizer = pretrained.load(reward, mesh, flag="--reward", scalar_head=True)
    score = scoring.scorer(config, mesh)
    prompt_ids = [tokenise([text], tokenizer, bos=True)[0].tolist() for text in prompts]
    response_ids = [tokenise([text], tokenizer, response=True)[0].tolist() for text in responses]
    P, R = (max(map(len, ids)) for ids in (prompt_ids, response_ids))
    end = end_of(tokenizer)
    found = np.zeros((2, len(prompts)))
    for ends in (0, 1):
        for first in range(0, len(prompts), BATCH):
            rows = {
                "prompt_BP": np.zeros((BATCH, P), np.int32),
                "prompt_mask_BP": np.zeros((BATCH, P), bool),
                "tokens_BR": np.zeros((BATCH, R + 1), np.int32),
                "mask_BR": np.zeros((BATCH, R + 1), bool),
            }
            part = range(first, min(first + BATCH, len(prompts)))
            for row, i in enumerate(part):
                prompt = prompt_ids[i]
                response = response_ids[i] + [end] * ends
                rows["prompt_BP"][row, P - len(prompt) :] = prompt
                rows["prompt_mask_BP"][row, P - len(prompt) :] = True
                rows["tokens_BR"][row, : len(response)] = response
                rows["mask_BR"][row, : len(response)] = True
            found[ends, part] = np.asarray(score(params, rows))[: len(part)]
    return found


def end_of(tokenizer: Any) -> int:
    """The token that ended the responses that a reward model was trained on."""
    chat = template.recorded(tokenizer) != "plain" and getattr(tokenizer, "chat_template", None)
    return next(iter(template.end_of_turn(tokenizer) if chat else ()), tokenizer.eos_token_id)


def main(config: Config) -> None:
    file = config.run / "samples_after.jsonl"
    if not file.is_file():
        sys.exit(f"error: {file}: no such file; run_ppo.py and swap_loss.py write it")
    lines = file.read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    prompts = [row["prompt"] for row in rows]
    print("| judge | responses of | without EOS | with EOS | worth of EOS |\n|---|---|---|---|---|")
    models = [name for name in rows[0] if name != "prompt"]
    responses = [row[model] for model in models for row in rows]
    for reward in config.reward:
        both = scores(reward, mesh, prompts * len(models), responses)
        for model, (cut_B, ended_B) in zip(
            models, both.reshape(2, len(models), -1).swapaxes(0, 1), strict=True
        ):
            cells = [
                f"{value:+.2f} ({low:+.2f} to {high:+.2f})"
                for value, low, high in map(statistics.mean, (cut_B, ended_B, ended_B - cut_B))
            ]
            print(f"| {reward} | {model} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
