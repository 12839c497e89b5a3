"""Pretrain a base model on text. It takes the place of GPT-3, whose weights are not public.

    python experiments/run_pretrain.py                                # the miniature's base model
    python experiments/run_pretrain.py --model tiny --tokenizer DIR --data 'jsonl:books/*.txt'

Without --preset, the miniature's data get the preset `miniature`, and other data get `small`, which
is for models of less than 1B parameters.

Hardware: two CPU cores suffice for the miniature: 857 steps, 45 s.

Result: the miniature's base model reaches a validation loss of 0.63 nats a token. It writes the
miniature's sentences, and knows its facts and its myths. It does not follow requests.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from instructjax import data, hf, models, sampler, sft, sharding, state, train
from instructjax.data import DataConfig, PackedRows, Stream
from instructjax.evaluation import report
from instructjax.evaluation.figures import plot_curves
from instructjax.ranges import Count, CountFrom2, NotNegative, Positive
from instructjax.run import Run, checks, main, pretrained
from instructjax.run.flags import Adam, RunConfig, parse

# ------------------------------------------------------------------------------------- config


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Pretraining. All default values are ours: the paper starts from GPT-3."""

    FIXED = (*RunConfig.FIXED, "length", "learning_rate", "warmup", "adam", "epochs")
    SHOWN = ("learning_rate", "warmup", "batch_size", "epochs")

    out: Path = Path("runs/pretrain")
    model: str = "miniature"
    data: DataConfig = field(default_factory=DataConfig)
    """Text to learn from."""
    length: CountFrom2 | None = None
    """Tokens of a packed row. By default 512, or the model's context if that is less."""
    batch_size: Count = 16
    """Packed rows of an update."""
    epochs: Positive = 1.0
    """Passes over the text. --steps overrides it."""
    learning_rate: NotNegative = 6e-4
    """Peak of the learning rate, which then decays to a tenth along a cosine."""
    warmup: NotNegative = 0.05
    """Steps over which the learning rate rises to its peak, linearly.
    A number below 1 is a share of all steps."""
    adam: Adam = field(default_factory=Adam)
    eval_every: Count = 200
    """Steps from one validation with samples to the next. The last step always has one."""
    eval_batches: Count = 16
    """Number of validation batches, taken from the start of the validation data."""
    microbatches: Count = 1
    """Parts of a batch for gradient accumulation. More parts take less memory.
    Fewer parts are used if a device would otherwise have no row."""


MINIATURE = Config(length=128, epochs=2, learning_rate=4e-3, warmup=40, unroll=2)
PRESETS = {
    "miniature": MINIATURE,
    # The first of four steps for a first look, which `run_ppo.py --preset quick` runs.
    "quick": dataclasses.replace(MINIATURE, out=Path("runs/quick/pretrain"), epochs=0.4),
    # For models below 1B. In brackets: where a value is from.
    "small": Config(
        learning_rate=6e-4,  # [GPT-3 of 125M: Brown et al. 2020, arXiv 2005.14165, table 2.1]
        adam=Adam(weight_decay=0.1),  # [GPT-3, App. B; and the betas and the clip of Adam()]
        remat="full",  # [ours]
    ),
}


def check(config: Config) -> None:
    """Raises ValueError or OSError for flags that cannot work, before anything is loaded."""
    mesh = checks.check_run(config, "pretrain")
    checks.check_rows("--batch_size", config.batch_size, 1, mesh)
    model = pretrained.check(config.model, mesh, tokenizer=config.tokenizer, scalar_head=False)
    check_lengths(config, model)
    data.check(config.data, "text")


def check_lengths(config: Config, model: models.ModelConfig | None) -> None:
    """Raises ValueError if a flag asks for more tokens than the model's context holds."""
    checks.check_tokens(model, [("--length", config.length, 0)])


def run_pretrain(config: Config) -> None:
    began = time.perf_counter()
    print(config.headline)
    with Run(config, stage="pretrain") as run:
        # -------------------------------------------------------------------------- model, data

        mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
        config = checks.fit_microbatches(config, mesh)
        model, params, tokenizer = pretrained.load(
            config.model, mesh, tokenizer=config.tokenizer, seed=config.seed, scalar_head=False
        )
        check_lengths(config, model)
        length = config.length or min(512, model.max_length)
        model = config.compute(model)

        read = pretrained.reader(model, tokenizer)
        text = read(config.data, "text", split="train")
        unseen = read(config.data, "text", split="validation")
        rows, unseen_rows = PackedRows(text, length), PackedRows(unseen, length)
        streamed = functools.partial(
            Stream,
            batch_size=config.batch_size,
            seed=config.seed,
            host_rows=sharding.own_rows(mesh, config.batch_size),
        )
        stream, validation = streamed(rows), streamed(unseen_rows)
        put = functools.partial(jax.make_array_from_process_local_data, sharding.batched(mesh))

        # ------------------------------------------------------------------- optimizer, step

        total = config.steps
        if total is None:
            total = math.ceil(config.epochs * len(rows) / config.batch_size)
        schedule = train.cosine(config.learning_rate, total, config.warmup)
        tx = train.adam(schedule, **dataclasses.asdict(config.adam))
        shard = config.constrainer(mesh)
        loss_fn = functools.partial(sft.loss_fn, config=model, shard=shard)
        layout = state.shardings(params, tx)
        step_fn = train.make_train_step(loss_fn, tx, config.microbatches, layout, schedule)
        loss_of = jax.jit(lambda params, batch: loss_fn(params, batch, None))

        step_key, sample_key = jax.random.split(jax.random.key(config.seed))
        current, start, _ = run.restore(state.create(params, tx))
        del params

        # ------------------------------------------------------------------------- evaluation

        # The first tokens of a few pages, for the model to continue.
        openings = [unseen.response[i, 0][:8].tolist() for i in range(min(4, len(unseen)))]
        longest = min(48, model.max_length - 8)

        @run.phase("validating")
        def evaluate(step: int) -> None:
            losses, weights = [], []
            for batch, _ in zip(validation.once(), range(config.eval_batches), strict=False):
                mean, (weight, _) = loss_of(current.params, jax.tree.map(put, batch))
                losses.append(float(mean))
                weights.append(float(weight))
            run.log(step, {"validation/loss": float(np.average(losses, weights=weights))})
            key = jax.random.fold_in(sample_key, step)
            rollout = sampler.generate(
                current.params, model, openings, key, max_new_tokens=longest, mesh=mesh
            )
            for opening, response in zip(openings, rollout.responses(), strict=True):
                texts = tokenizer.decode(opening), tokenizer.decode(response)
                run.metrics.sample(step, dict(zip(("prompt", "response"), texts, strict=True)))

        # ------------------------------------------------------------------------------- loop

        for step, batch in zip(run.steps(start, total), stream.iterate(start), strict=False):
            key = jax.random.fold_in(step_key, step)
            current, metrics = step_fn(current, jax.tree.map(put, batch), key)
            run.log(step, metrics, tokens=config.batch_size * length)
            if step % config.eval_every == 0 or step == total:
                evaluate(step)
            if run.should_save(step):
                run.save(step, current)

        # ------------------------------------------------------------------------ export, report

        hf.save(config.out / "export", model, current.params, tokenizer)
        if jax.process_index() != 0:
            return
        panels = {
            "nats a token": ("loss", "validation/loss"),
            "gradient norm": ("optim/grad_norm",),
            "learning rate": ("optim/learning_rate",),
        }
        plot_curves(config.out, panels, config.out / "curves.png")
        text = (config.out / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        losses = [line["validation/loss"] for line in lines if "validation/loss" in line]
        summary = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(current.params)),
            "steps": total,
            "tokens": total * config.batch_size * length,
            "validation loss, nats a token": losses[-1] if losses else math.nan,
            "seconds": time.perf_counter() - began,
        }
        report.write_for(config.out)
        names = ("metrics.jsonl", "samples.jsonl", "curves.png", "report.html")
        files = [config.out / name for name in names]
        next_command = config.command_of("run_sft.py", f"--model {config.out}")
        run.finish(summary, [*files, config.out / "export"], next_command)


def cli(argv: Sequence[str] | None = None) -> None:
    run_pretrain(parse(Config, PRESETS, __doc__, argv, check))


if __name__ == "__main__":
    main(cli)
