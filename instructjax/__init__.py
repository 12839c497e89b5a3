"""InstructGPT-style RLHF in JAX: SFT, reward models on ranked responses, and PPO-ptx.

Read the files in this order. A module imports only those above it.

    ranges.py      numbers with a range, as types of flags and of config.json
    usage.py       command lines: a wrong flag is one line on stderr and exit code 2
    masked.py      sums and means under a mask: the only reductions
    losses.py      losses as functions of arrays
    advantages.py  KL estimates, token rewards, GAE, whitening
    models/        one decoder with family switches; KV cache; log-probabilities without logits
    sharding.py    the mesh; logical axes -> mesh axes
    rendezvous.py  which processes are missing at the start of a run
    heartbeat.py   which process has fallen silent
    hosts.py       several processes as one run
    state.py       TrainState
    train.py       make_train_step(loss_fn, tx, microbatches)
    sft.py         the loss of packed rows
    reward.py      the reward model's scores and loss
    offload.py     frozen models; arrays in host memory
    sampler/       generate: prompts -> Rollout
    rollout.py     rows of a rollout, batches of them, and models on them
    ppo/           experience, the PPO-ptx losses, the parts of an update
    hf/            Hugging Face checkpoints in and out, without torch
    data/          records -> tokens -> sharded, resumable batches
    run/           one run in one directory: flags, checkpoints, metrics, signals, exit codes
    scoring.py     --reward: reward models and functions -> a score for each response
    evaluation/    accuracy of reward models, win rates of policies, figures
    label/         a page on which people rank and rate responses

experiments/run_ppo.py puts them together. Two tools are not part of this order:

    miniature/     a procedural world to run the whole paper in, without a download
    preflight/     what a program will need on a TPU slice, compiled without one

The axis alphabet. An array that crosses a function boundary carries its shape as a suffix:

    B  sequences                 D  width of the residual stream
    T  positions (T = P + R)     N  attention heads
    S  key / cache positions     G  key/value heads; H head dimension
    P  prompt positions          F  MLP width
    R  response positions        V  vocabulary (padded to a multiple of 128)
    K  ranked responses of one   L  layers
       prompt                    M  minibatches
    J  rank of an adapter
"""

import importlib.util
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports a submodule on first use, so that `import instructjax` costs nothing."""
    if importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
