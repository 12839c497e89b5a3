"""InstructGPT-style RLHF in JAX: SFT, reward models on ranked responses, and PPO-ptx.

Read the files in this order; imports point upwards only:

    models/       one decoder with family switches; KV cache; scalar head; log-probs without logits
    hf/           Hugging Face checkpoints in and out, without torch
    sharding.py   mesh, logical axes -> mesh axes
    hosts.py      several processes as one run
    state.py      TrainState
    train.py      make_train_step(loss_fn, tx, microbatches)
    masked.py     the only reductions
    losses.py     losses as functions of arrays
    sft.py        the loss of packed rows
    reward.py     the reward model's scores and loss
    draw.py       one token from its logits
    decode.py     prefill, and a decode loop that refills its slots
    sampler.py    generate -> Rollout
    advantages.py KL, token rewards, GAE, whitening
    responses.py  rows of a rollout, and models on them
    offload.py    frozen models
    rewards.py    what a response is worth
    ppo.py        experience, the PPO-ptx losses, one update
    evaluation/   figures of reward models and policies
    config.py     flags: frozen dataclasses of the scripts; presets
    checkpoint.py atomic, asynchronous checkpoints
    metrics.py    metrics.jsonl, samples.jsonl, the progress line, curves
    process.py    what a run settles for its process: signals, memory, its directory
    run.py        one run in one directory, from its config to its exit code
    pretrained.py what --model names
    figures.py    the reward model's pictures
    data/         records -> tokens -> sharded, resumable batches
    preflight/    what a program will need on a TPU slice, compiled without one
    miniature/    a procedural world to run the whole paper in, no download

The axis alphabet. An array that crosses a function boundary carries its shape as a suffix:

    B  sequences                 D  width of the residual stream
    T  positions (T = P + R)     N  attention heads
    S  key / cache positions     G  key/value heads; H head dimension
    P  prompt positions          F  MLP width
    R  response positions        V  vocabulary (padded to a multiple of 128)
    K  ranked responses of one   L  layers
       prompt                    M  minibatches
"""

import importlib.util
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports a submodule on first use, so that `import instructjax` costs nothing."""
    if importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
