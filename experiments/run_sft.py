"""Supervised fine-tuning on demonstrations: the paper's first step (InstructGPT, section 3.5).

    python experiments/run_sft.py                                         # the miniature
    python experiments/run_sft.py --preset instructgpt-1.3b --model DIR --data jsonl:demos.jsonl
    python experiments/run_sft.py --keep reward --reward_model runs/rm --out runs/sft-by-reward

Hardware: two CPU cores suffice for the miniature: 1,272 steps, 38 s, after those of
run_pretrain.py, which runs first where runs/pretrain is not there.
Result: the gold judge's mean utility of sampled responses rises from -2.8 to +2.2 (of 4).
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import run_pretrain
import tyro

from instructjax import hf, models, reward, sampler, sft, sharding, state, train
from instructjax.data import ComparisonRows, DataConfig, Dataset, PackedRows, Stream, load
from instructjax.data.tokens import Spans
from instructjax.evaluation.figures import plot_curves
from instructjax.run import Run, main, pretrained
from instructjax.run.checkpoint import abstract
from instructjax.run.flags import RunConfig, parse

# ------------------------------------------------------------------------------------- config


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Supervised fine-tuning."""

    FIXED = (
        *(*RunConfig.FIXED, "tokenizer", "pretrain", "pretrain_share", "length", "epochs"),
        *("learning_rate", "dropout", "keep", "reward_model"),
    )

    out: Path = Path("runs/sft")
    model: str = "runs/pretrain"
    tokenizer: str | None = None
    """A Hugging Face directory or hub name; default: the model's own."""
    data: DataConfig = field(default_factory=DataConfig)
    """Demonstrations."""
    pretrain: DataConfig = field(default_factory=DataConfig)
    """Text, of which --pretrain_share of the rows is."""
    pretrain_share: float = 0.0
    """Share of the packed rows that are pretraining text."""
    length: int = 128
    """Tokens of a packed row; a longer demonstration is dropped, or cut (--data.overlong)."""
    batch_size: int = 8
    """Packed rows of a step."""
    epochs: float = 4.0
    """Passes over the demonstrations; --steps overrides it."""
    learning_rate: float = 2e-3
    """The peak, from which a cosine goes to 10 %, without warm-up."""
    dropout: float = 0.0
    """Of what each sublayer adds to the residual."""
    keep: Literal["loss", "reward"] = "loss"
    """What picks the checkpoint to export: validation loss, or --reward_model's mean score of
    sampled responses to validation prompts, as in the paper."""
    reward_model: str | None = None
    """A reward model's run or Hugging Face directory: scores sampled responses."""
    eval_every: int | None = None
    """Steps from one validation to the next; default: an epoch. The last step always has one."""
    eval_prompts: int = 256
    """Validation prompts to sample responses to."""
    sample_batch: int = 256
    """Prompts to sample responses to at a time."""
    max_new_tokens: int = 48
    """Of a sampled response."""
    model_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matmuls; parameters are float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: full is least memory."""
    unroll: int = 1
    """Layers to a turn of the scan; all of them is fastest for small models on CPU."""
    microbatches: int = 1
    """Shares of a batch whose gradients are accumulated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.pretrain_share < 1:
            raise ValueError(f"--pretrain_share {self.pretrain_share}: must be from 0 to below 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout}: must be from 0 to below 1")
        if self.keep == "reward" and self.reward_model is None:
            raise ValueError("--keep reward needs --reward_model DIR")


# InstructGPT. A row of ours packs several demonstrations; the paper is silent on packing.
PAPER = Config(
    model=tyro.MISSING,  # GPT-3's weights are not public
    data=DataConfig(tyro.MISSING, max_prompt=1024, max_response=1024),  # App. C: context
    length=2048,  # App. C
    sample_batch=32,  # ours
    max_new_tokens=1024,  # App. C
    model_dtype="bfloat16",  # App. C: fp16, with fp32 masters
    remat="dots",  # ours
)
BASELINE = dataclasses.replace(PAPER, epochs=16, dropout=0.2)  # section 3.5, App. C.1
PPO_INIT = dataclasses.replace(  # App. C.3: 2 epochs, 10 % pretraining data
    PAPER, epochs=2, pretrain=DataConfig(tyro.MISSING), pretrain_share=0.1
)
PRESETS = {
    "miniature": Config(epochs=6, unroll=2),  # ours
    # App. C.1
    "instructgpt-1.3b": dataclasses.replace(BASELINE, learning_rate=9.65e-6, batch_size=32),
    "instructgpt-6b": dataclasses.replace(BASELINE, learning_rate=9.65e-6, batch_size=32),
    "instructgpt-175b": dataclasses.replace(BASELINE, learning_rate=5.03e-6, batch_size=8),
    # App. C.3
    "instructgpt-1.3b-ppo-init": dataclasses.replace(PPO_INIT, learning_rate=5e-6, batch_size=32),
    "instructgpt-6b-ppo-init": dataclasses.replace(PPO_INIT, learning_rate=1.04e-5, batch_size=32),
    "instructgpt-175b-ppo-init": dataclasses.replace(PPO_INIT, learning_rate=2.45e-6, batch_size=8),
}


def ensure_base(model: str) -> None:
    """Runs run_pretrain.py with its defaults, or finishes it, if `model` is to come from it."""
    out = run_pretrain.Config().out
    if Path(model) == out and not pretrained.finished(out):
        print(f"{out} is not there yet: running run_pretrain.py first")
        preset = dataclasses.replace(run_pretrain.PRESETS["miniature"], preset="miniature")
        run_pretrain.run_pretrain(dataclasses.replace(preset, resume=True))


def run_sft(config: Config) -> None:
    began = time.perf_counter()
    miniature = config.data.spec == "miniature"
    if miniature:
        ensure_base(config.model)
    score_name = {"loss": "validation/loss", "reward": "validation/reward"}[config.keep]
    mode: Literal["min", "max"] = "min" if config.keep == "loss" else "max"
    with Run(config, "sft", best_metric=score_name, best_mode=mode) as run:
        # -------------------------------------------------------------------------- model, data

        mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
        model, params, tokenizer = pretrained.load(
            config.model, mesh, tokenizer=config.tokenizer, seed=config.seed
        )
        if model.scalar_head:
            raise ValueError(f"--model {config.model}: a reward model, not a language model")
        if config.length > model.max_length:
            raise ValueError(f"--length {config.length}: the model's context is {model.max_length}")
        computed = {"dtype": config.model_dtype, "remat": config.remat, "unroll": config.unroll}
        model = dataclasses.replace(model, **computed)

        share = config.pretrain_share
        seen = load(config.data, "demonstrations", tokenizer, split="train", context=config.length)
        unseen = load(
            config.data, "demonstrations", tokenizer, split="validation", context=config.length
        )
        sources, weights = [PackedRows(seen, config.length)], [1 - share]
        if share:
            text = load(config.pretrain, "text", tokenizer, split="train")
            sources, weights = [*sources, PackedRows(text, config.length)], [*weights, share]
        streamed = functools.partial(
            Stream,
            batch_size=config.batch_size,
            seed=config.seed,
            host_rows=sharding.own_rows(mesh, config.batch_size),
        )
        stream = streamed(sources, weights=weights)
        validation = streamed(PackedRows(unseen, config.length))
        put = functools.partial(jax.make_array_from_process_local_data, sharding.batched(mesh))

        # ------------------------------------------------------------------- optimizer, step

        epoch = max(1, math.ceil(len(sources[0]) / (config.batch_size * (1 - share))))  # steps
        total = config.steps if config.steps is not None else math.ceil(config.epochs * epoch)
        eval_every = config.eval_every or epoch
        tx, loss_fn, step_fn = make_step(config, model, params, mesh, total)
        loss_of = jax.jit(lambda params, batch: loss_fn(params, batch, None))

        step_key, sample_key = jax.random.split(jax.random.key(config.seed))
        current, start, _ = run.restore(state.create(params, tx))

        # ------------------------------------------------------------------------- evaluation

        fits = unseen.prompt.lengths + config.max_new_tokens <= model.max_length
        asked = unseen.take(fits & (np.cumsum(fits) <= config.eval_prompts))
        if not len(asked):
            raise ValueError(
                f"--max_new_tokens {config.max_new_tokens}: no validation prompt leaves room for"
                f" that in the model's context of {model.max_length}"
            )
        score = None
        if config.reward_model is not None:
            score = load_scorer(config.reward_model, asked, tokenizer, config.sample_batch, mesh)

        def respond(params: models.Params) -> list[list[int]]:
            """A response to each validation prompt at temperature 1; with the same noise always."""
            prompts = [asked.prompt[i].tolist() for i in range(len(asked))]
            responses = []
            for i in range(0, len(asked), config.sample_batch):
                part = prompts[i : i + config.sample_batch]
                rollout = sampler.generate(
                    params,
                    model,
                    part,
                    sample_key,
                    max_new_tokens=config.max_new_tokens,
                    indices=range(i, i + len(part)),
                    mesh=mesh,
                )
                responses += rollout.responses()
            return responses

        def utilities(responses: list[list[int]]) -> np.ndarray:
            """The miniature's gold judge on the responses."""
            from instructjax.miniature import judge

            texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
            pairs = zip(asked.records, texts, strict=True)
            return np.array([judge(dict(record.row), text).utility for record, text in pairs])

        def evaluate(step: int) -> float:
            """Logs the step's validation figures; returns the one that picks the checkpoint."""
            losses, weights = [], []
            for batch in validation.once():
                mean, (weight, _) = loss_of(current.params, jax.tree.map(put, batch))
                losses.append(float(mean))
                weights.append(float(weight))
            found = {"validation/loss": float(np.average(losses, weights=weights))}
            responses = respond(current.params)
            if score is not None:
                found["validation/reward"] = float(np.mean(score(responses)))
            if miniature:
                found["validation/utility"] = float(utilities(responses).mean())
            run.log(step, found)
            for record, response in zip(asked.records[:4], responses, strict=False):
                text = tokenizer.decode(response)
                run.metrics.sample(step, {"prompt": record.prompt, "response": text})
            return found[score_name]

        base = utilities(respond(params)) if miniature else None
        del params

        # ------------------------------------------------------------------------------- loop

        if start == 0:
            evaluate(0)
        for step, batch in zip(run.steps(start, total), stream.iterate(start), strict=False):
            key = jax.random.fold_in(step_key, step)
            current, metrics = step_fn(current, jax.tree.map(put, batch), key)
            run.log(step, metrics, tokens=config.batch_size * config.length)
            if step % eval_every == 0 or step == total:
                run.save(step, current, score=evaluate(step))
            elif run.should_save(step):
                run.save(step, current)

        # ------------------------------------------------------------------------ what came of it

        best = run.checkpoints.best()
        if best is not None and best != total:
            target = abstract(current)
            jax.tree.map(lambda leaf: leaf.delete(), current)
            current, _ = run.checkpoints.restore(best, target)
        hf.save(config.out / "export", model, current.params, tokenizer)
        panels: dict[str, Sequence[str]] = {"nats a token": ("loss", "validation/loss")}
        summary = {"steps": total, "kept checkpoint": best, "by": score_name}
        if best is not None:
            summary[score_name] = run.checkpoints.restore(best, abstract(current))[1]["score"]
        if score is not None:
            panels["reward model's score"] = ("validation/reward",)
        if base is not None:
            tuned = utilities(respond(current.params))
            panels["gold judge's mean utility"] = ("validation/utility",)
            summary["gold utility, base model"] = interval(base)
            summary["gold utility, this model"] = interval(tuned)
            summary["prompts behind them"] = len(asked)
        summary["seconds"] = time.perf_counter() - began
        if jax.process_index() != 0:
            return
        plot_curves(config.out, panels, config.out / "curves.png")
        files = [config.out / name for name in ("metrics.jsonl", "samples.jsonl", "curves.png")]
        next_command = f"python experiments/run_rm.py --model {config.out}"
        run.finish(summary, [*files, config.out / "export"], next_command)


# ------------------------------------------------------------------------------------- helpers


def make_step(
    config: Config,
    model: models.ModelConfig,
    params: models.Params,
    mesh: jax.sharding.Mesh,
    total: int,
) -> tuple[optax.GradientTransformation, Callable[..., Any], train.TrainStep]:
    """(optimizer, loss, jitted step); preflight.py compiles the same for a pod.

    Args:
      params: arrays, or ShapeDtypeStructs that carry shardings.
      total: steps, at which the learning rate is a tenth of its peak.
    """
    schedule = optax.cosine_decay_schedule(config.learning_rate, max(total, 1), alpha=0.1)
    tx = train.adam(schedule)
    dropped = dataclasses.replace(model, dropout=config.dropout)
    loss_fn = functools.partial(sft.loss_fn, config=dropped, shard=config.constrainer(mesh))
    layout = state.shardings(params, tx)
    step = train.make_train_step(loss_fn, tx, config.microbatches, layout, schedule)
    return tx, loss_fn, step


def load_scorer(
    path: str, asked: Dataset, tokenizer: Any, batch_size: int, mesh: jax.sharding.Mesh
) -> Callable[[list[list[int]]], np.ndarray]:
    """Responses to the prompts of `asked` -> the scores that the reward model at `path` gives."""
    config, params, own = pretrained.load(path, mesh)
    if not config.scalar_head:
        raise ValueError(f"--reward_model {path}: a language model, not a reward model")
    theirs = own.get_vocab()
    if any(theirs.get(token) != i for token, i in tokenizer.get_vocab().items()):
        raise ValueError(f"--reward_model {path}: its tokenizer is not the model's")
    score_of = jax.jit(
        functools.partial(reward.score, config=config, shard=sharding.constrainer(mesh)),
        out_shardings=sharding.replicated(mesh),
    )

    def score(responses: list[list[int]]) -> np.ndarray:
        stop = np.cumsum([len(response) for response in responses])
        start = np.concatenate([[0], stop[:-1]])
        ids = np.concatenate([np.asarray(response, np.int32) for response in responses])
        answered = dataclasses.replace(asked, response=Spans(ids, start[:, None], stop[:, None]))
        batches = Stream(ComparisonRows(answered), batch_size, seed=0).once()
        where = sharding.batched(mesh)
        scores = [np.asarray(score_of(params, batch=jax.device_put(b, where))) for b in batches]
        return np.concatenate(scores)[: len(responses), 0]

    return score


def interval(values: np.ndarray) -> str:
    """The mean with its 95 % interval, a bootstrap over prompts."""
    picks = np.random.default_rng(0).integers(0, len(values), (1000, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return f"{values.mean():+.2f} ({low:+.2f} to {high:+.2f})"


def cli(argv: Sequence[str] | None = None) -> None:
    run_sft(parse(Config, PRESETS, __doc__, argv))


if __name__ == "__main__":
    main(cli)
