"""Supervised fine-tuning on demonstrations: the paper's first step (InstructGPT, section 3.5).

    python experiments/run_sft.py                                         # the miniature
    python experiments/run_sft.py --model NAME --data jsonl:demos.jsonl   # your model and data
    python experiments/run_sft.py --preset instructgpt-1.3b --model DIR --data jsonl:demos.jsonl
    python experiments/run_sft.py --keep reward --reward_model runs/rm --out runs/sft-by-reward

Without --preset, the miniature's data get the preset `miniature`, and other data get `small`, which
is for models of less than 1B parameters. The presets instructgpt-* have the paper's values, and
brackets below say where the paper states them.

Hardware: two CPU cores suffice for the miniature: 1,272 steps, 38 s. run_pretrain.py runs first if
runs/pretrain does not exist.

Result: the mean utility of sampled responses, by the miniature's gold judge, rises from -2.8 to
+2.2. The best possible is 4.
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

from instructjax import data, models, rollout, scoring, sft, sharding, state, train
from instructjax.data import DataConfig, Dataset, PackedRows, Stream
from instructjax.data.batches import row_length
from instructjax.evaluation import report, statistics
from instructjax.evaluation.figures import plot_curves
from instructjax.ranges import Count, CountFrom2, NotNegative, Positive, ShareBelow1
from instructjax.run import Run, checks, lora, main, pretrained
from instructjax.run.checkpoint import abstract
from instructjax.run.flags import Adam, RunConfig, parse, preset_of
from instructjax.run.lora import LoRA

# ------------------------------------------------------------------------------------- config


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Supervised fine-tuning."""

    # The last line decides which checkpoint is exported.
    FIXED = (
        *(*RunConfig.FIXED, "pretrain", "pretrain_share", "length", "epochs", "learning_rate"),
        *("dropout", "keep", "reward_model", "eval_every", "eval_prompts", "max_new_tokens"),
        *("warmup", "adam", "lora"),
    )
    SHOWN = ("learning_rate", "warmup", "batch_size", "epochs")

    out: Path = Path("runs/sft")
    model: str = "runs/pretrain"
    data: DataConfig = field(default_factory=DataConfig)
    """Demonstrations to learn from."""
    pretrain: DataConfig = field(default_factory=DataConfig)
    """Pretraining text to mix in, if --pretrain_share is above 0."""
    pretrain_share: ShareBelow1 = 0.0
    """Share of the packed rows that are pretraining text. [App. C.3: 10 % for PPO's start]"""
    length: CountFrom2 | None = None
    """Tokens of a packed row. [App. C: 2k]
    By default the least multiple of 128 that holds the longest demonstration, and at most 2,048 or
    the model's context.
    A longer demonstration is dropped or cut, as --data.overlong says."""
    batch_size: Count = 8
    """Packed rows of an update. [App. C.1: 32, and 8 for 175B]"""
    epochs: Positive = 2.0
    """Passes over the demonstrations. --steps overrides it. [Section 3.5: 16]"""
    learning_rate: NotNegative = 2e-5
    """Peak of the learning rate, which then decays to a tenth along a cosine.
    [App. C.1: 9.65e-6, and 5.03e-6 for 175B]"""
    warmup: NotNegative = 0.1
    """Steps over which the learning rate rises to its peak, linearly.
    A number below 1 is a share of all steps. [App. C.1: none]"""
    adam: Adam = field(default_factory=Adam)
    lora: LoRA = field(default_factory=LoRA)
    dropout: ShareBelow1 = 0.0
    """Dropout rate of what each sublayer adds to the residual stream. [Section 3.5: 0.2]"""
    keep: Literal["loss", "reward"] = "loss"
    """The checkpoint to export: the one of the lowest validation loss, or of the highest reward.
    Reward is the mean score of responses to validation prompts. [Section 3.5: reward]"""
    reward_model: str | None = None
    """The reward model for --keep reward: a run directory or a Hugging Face directory.
    By default no reward model scores the responses to validation prompts."""
    eval_every: Count | None = None
    """Steps from one validation to the next, by default an epoch. The last step always has one."""
    eval_prompts: Count = 256
    """Number of validation prompts to sample a response to.
    If neither a reward model nor the miniature's judge scores the responses, 4 are sampled."""
    sample_batch: Count = 16
    """Prompts to sample responses to at a time. Fewer take less memory for the same tokens."""
    max_new_tokens: Count = 128
    """Longest sampled response, in tokens. [App. C: 1k]"""
    microbatches: Count = 1
    """Parts of a batch for gradient accumulation. More parts take less memory.
    Fewer parts are used if a device would otherwise have no row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep == "reward" and self.reward_model is None:
            raise ValueError("--keep reward needs --reward_model DIR")


# InstructGPT. A row here packs several demonstrations; the paper is silent on packing.
PAPER = Config(
    model=tyro.MISSING,  # GPT-3's weights are not public
    data=DataConfig(tyro.MISSING, max_prompt=1024, max_response=1024),  # App. C: context
    length=2048,  # App. C
    warmup=0,  # App. C.1; silent on C.3
    sample_batch=32,  # ours
    max_new_tokens=1024,  # App. C
    model_dtype="bfloat16",  # App. C: fp16, with fp32 masters
    remat="dots",  # ours
)
BASELINE = dataclasses.replace(PAPER, epochs=16, dropout=0.2)  # section 3.5, App. C.1
PPO_INIT = dataclasses.replace(  # App. C.3: 2 epochs, 10 % pretraining data
    PAPER, epochs=2, pretrain=DataConfig(tyro.MISSING), pretrain_share=0.1
)
MINIATURE = Config(  # ours
    length=128,
    epochs=6,
    learning_rate=2e-3,
    warmup=0,
    sample_batch=256,
    max_new_tokens=48,
    unroll=2,
)
PRESETS = {
    "miniature": MINIATURE,
    "quick": dataclasses.replace(  # for a first look; see run_ppo.py
        MINIATURE, out=Path("runs/quick/sft"), model="runs/quick/pretrain", epochs=1.5
    ),
    # For models below 1B. In brackets: where a value is from.
    "small": Config(
        batch_size=8,  # rows [ours; SmolLM2's recipe takes 128 sequences, for 460k demonstrations]
        epochs=2,  # [SmolLM2: alignment-handbook, recipes/smollm2/sft/config_smol.yaml]
        # [TRL's SFTConfig. SmolLM2's recipe takes 1e-3, from a base model: far too much for a model
        # that has been fine-tuned. Huang et al. 2024 (arXiv 2403.17031) take 3e-6 from 1B up.]
        learning_rate=2e-5,
        warmup=0.1,  # [SmolLM2]
        max_new_tokens=128,  # [ours]
        microbatches=2,  # [ours]
        remat="full",  # [TRL checkpoints activations too]
    ),
    # App. C.1
    "instructgpt-1.3b": dataclasses.replace(BASELINE, learning_rate=9.65e-6, batch_size=32),
    "instructgpt-6b": dataclasses.replace(BASELINE, learning_rate=9.65e-6, batch_size=32),
    "instructgpt-175b": dataclasses.replace(BASELINE, learning_rate=5.03e-6, batch_size=8),
    # App. C.3
    "instructgpt-1.3b-ppo-init": dataclasses.replace(PPO_INIT, learning_rate=5e-6, batch_size=32),
    "instructgpt-6b-ppo-init": dataclasses.replace(PPO_INIT, learning_rate=1.04e-5, batch_size=32),
    "instructgpt-175b-ppo-init": dataclasses.replace(PPO_INIT, learning_rate=2.45e-6, batch_size=8),
}
LONGEST = 2048  # tokens of a row without --length, at most [App. C]
SHOWN = 4  # responses of an evaluation that go to samples.jsonl


def missing_base(model: str) -> run_pretrain.Config | None:
    """The preset of run_pretrain.py that makes `model`, if one does and it is not there."""
    preset = preset_of(run_pretrain.PRESETS, model)
    return None if preset is None or pretrained.finished(preset.out) else preset


def check(config: Config) -> None:
    """Raises ValueError or OSError for flags that cannot work, before anything is loaded or run."""
    model, first = models.PRESETS["miniature"], []
    if config.data.spec == "miniature" and missing_base(config.model) is not None:
        first = [Path(config.model)]
    mesh = checks.check_run(config, "sft", first)
    checks.check_rows("--batch_size", config.batch_size, 1, mesh)
    if not first:
        model = pretrained.check(config.model, mesh, tokenizer=config.tokenizer, scalar_head=False)
        lora.check(config.lora, config.model, model, config.tokenizer)
    check_lengths(config, model)
    if config.reward_model is not None:
        pretrained.check(config.reward_model, mesh, flag="--reward_model", scalar_head=True)
    data.check(config.data, "demonstrations")
    if config.pretrain_share:
        data.check(config.pretrain, "text", "--pretrain", held_out=False)


def check_lengths(config: Config, model: models.ModelConfig | None) -> None:
    """Raises ValueError if a flag asks for more tokens than the model's context holds."""
    lengths = [("--length", config.length, 0), ("--max_new_tokens", config.max_new_tokens, 1)]
    checks.check_tokens(model, [*lengths, *checks.data_tokens("--data", config.data)])


def ensure_base(model: str) -> None:
    """Runs or resumes run_pretrain.py if there is a `missing_base`."""
    if (preset := missing_base(model)) is not None:
        print(f"{model} is not there yet: running run_pretrain.py first")
        run_pretrain.run_pretrain(dataclasses.replace(preset, resume=True))


def run_sft(config: Config) -> None:
    began = time.perf_counter()
    print(config.headline)
    miniature = config.data.spec == "miniature"
    if miniature:
        ensure_base(config.model)
    score_name = {"loss": "validation/loss", "reward": "validation/reward"}[config.keep]
    mode: Literal["min", "max"] = "min" if config.keep == "loss" else "max"
    with Run(config, "sft", best_metric=score_name, best_mode=mode) as run:
        # -------------------------------------------------------------------------- model, data

        mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
        config = checks.fit_microbatches(config, mesh)
        model, params, tokenizer, origin = lora.load(
            config.lora,
            config.model,
            mesh,
            config.model_dtype,
            config.seed,
            tokenizer=config.tokenizer,
            template=config.data.template,
            scalar_head=False,
        )
        trained, frozen = models.split(params)
        check_lengths(config, model)
        model = config.compute(model)

        share = config.pretrain_share
        seen, unseen, length = load_demonstrations(config, tokenizer, model)
        sources, weights = [PackedRows(seen, length)], [1 - share]
        if share:
            text = pretrained.reader(model, tokenizer)(config.pretrain, "text", split="train")
            sources, weights = [*sources, PackedRows(text, length)], [*weights, share]
        streamed = functools.partial(
            Stream,
            batch_size=config.batch_size,
            seed=config.seed,
            host_rows=sharding.own_rows(mesh, config.batch_size),
        )
        stream = streamed(sources, weights=weights)
        validation = streamed(PackedRows(unseen, length))
        put = functools.partial(jax.make_array_from_process_local_data, sharding.batched(mesh))

        # ------------------------------------------------------------------- optimizer, step

        # Steps of a pass over the demonstrations.
        epoch = max(1, math.ceil(len(sources[0]) / (config.batch_size * (1 - share))))
        total = config.steps if config.steps is not None else math.ceil(config.epochs * epoch)
        eval_every = config.eval_every or epoch
        tx, loss_fn, step_fn = make_step(config, model, trained, mesh, total)
        loss_of = jax.jit(lambda params, batch: loss_fn(params, batch, None))

        step_key, sample_key = jax.random.split(jax.random.key(config.seed))
        frozen_weights = lora.frozen_weights(origin)
        current, start, _ = run.restore(state.create(trained, tx), frozen_weights)

        def whole() -> models.Params:
            """All parameters as they are now."""
            return models.whole(current.params, frozen)

        # ------------------------------------------------------------------------- evaluation

        fits = unseen.prompt.lengths + config.max_new_tokens <= model.max_length
        measured = miniature or config.reward_model is not None
        count = config.eval_prompts if measured else min(config.eval_prompts, SHOWN)
        held_out = unseen.take(fits & (np.cumsum(fits) <= count))
        if not len(held_out):
            raise ValueError(
                f"--max_new_tokens {config.max_new_tokens}: no validation prompt leaves room for"
                f" that in the model's context of {model.max_length}"
            )
        prompts = [held_out.prompt[i].tolist() for i in range(len(held_out))]
        padded = rollout.left_padded(prompts, max(map(len, prompts)))
        score_of = None
        if config.reward_model is not None:
            shared = lora.shared_base(origin, model, params)
            reward_config, reward_params = scoring.load_model(
                config.reward_model,
                mesh,
                tokenizer,
                "float32" if shared is None else config.model_dtype,
                "--reward_model",
                shared,
            )
            score_of = functools.partial(scoring.scorer(reward_config, mesh), reward_params)

        @run.phase("sampling responses to validation prompts")
        def respond(params: models.Params) -> train.Batch:
            """Rows of a response to each held-out prompt, at temperature 1, always with one key."""
            sampled, _ = rollout.sample(
                params,
                model,
                prompts,
                sample_key,
                size=config.sample_batch,
                max_new_tokens=config.max_new_tokens,
                mesh=mesh,
            )
            return padded | sampled

        def utilities(rows: train.Batch) -> np.ndarray:
            """utility_B of the responses, by the miniature's gold judge."""
            from instructjax.evaluation import gold

            texts = tokenizer.batch_decode(rollout.token_ids(rows), skip_special_tokens=True)
            return gold.utilities(held_out.records, texts)

        @run.phase("validating")
        def evaluate(step: int) -> float:
            """Logs the step's validation figures. Returns the one that picks the checkpoint."""
            losses, weights = [], []
            for batch in validation.once():
                mean, (weight, _) = loss_of(whole(), jax.tree.map(put, batch))
                losses.append(float(mean))
                weights.append(float(weight))
            figures = {"validation/loss": float(np.average(losses, weights=weights))}
            rows = respond(whole())
            if score_of is not None:
                score_B = rollout.map_batches(
                    score_of, rows, config.sample_batch, [config.max_new_tokens], mesh
                )
                figures["validation/reward"] = float(np.mean(score_B))
            if miniature:
                figures["validation/utility"] = float(utilities(rows).mean())
            run.log(step, figures)
            for record, ids in zip(held_out.records[:SHOWN], rollout.token_ids(rows), strict=False):
                text = tokenizer.decode(ids)
                run.metrics.sample(step, {"prompt": record.prompt, "response": text})
            return figures[score_name]

        base = utilities(respond(params)) if miniature else None
        del params, trained

        # ------------------------------------------------------------------------------- loop

        if start == 0:
            evaluate(0)
        for step, batch in zip(run.steps(start, total), stream.iterate(start), strict=False):
            key = jax.random.fold_in(step_key, step)
            current, metrics = step_fn(current, jax.tree.map(put, batch), key, frozen)
            run.log(step, metrics, tokens=config.batch_size * length)
            if step % eval_every == 0 or step == total:
                run.save(step, current, score=evaluate(step))
            elif run.should_save(step):
                run.save(step, current)

        # ------------------------------------------------------------------------ export, report

        best = run.checkpoints.best()
        current = dataclasses.replace(current, opt_state=())  # frees its memory
        if best is not None and best != total:
            target = abstract(current.params)
            jax.tree.map(lambda leaf: leaf.delete(), current.params)
            best_params = run.checkpoints.restore_params(best, target)
            current = dataclasses.replace(current, params=best_params)
        exports = lora.export(config.out, origin, model, whole(), tokenizer)
        panels: dict[str, Sequence[str]] = {"nats a token": ("loss", "validation/loss")}
        summary = {"steps": total, "kept checkpoint": best, "by": score_name}
        if best is not None:
            summary[score_name] = run.checkpoints.score(best)
        if score_of is not None:
            panels["reward model's score"] = ("validation/reward",)
        if base is not None:
            tuned = utilities(respond(whole()))
            panels["gold judge's mean utility"] = ("validation/utility",)
            summary["gold utility, base model"] = with_interval(base)
            summary["gold utility, this model"] = with_interval(tuned)
            summary["prompts behind them"] = len(held_out)
        summary["seconds"] = time.perf_counter() - began
        if jax.process_index() != 0:
            return
        plot_curves(config.out, panels, config.out / "curves.png")
        report.write_for(config.out)
        names = ("metrics.jsonl", "samples.jsonl", "curves.png", "report.html")
        files = [config.out / name for name in names]
        next_command = config.command_of("run_rm.py", f"--model {config.out}")
        run.finish(summary, [*files, *exports], next_command)


# ------------------------------------------------------------------------------------- helpers


def load_demonstrations(
    config: Config, tokenizer: Any, model: models.ModelConfig
) -> tuple[Dataset, Dataset, int]:
    """(demonstrations to train on, those for validation, tokens of a row).

    A demonstration that does not fit a row is dropped or cut, as --data.overlong says.
    """
    longest = config.length or min(LONGEST, model.max_length)
    read = pretrained.reader(model, tokenizer)
    seen, unseen = (
        read(config.data, "demonstrations", split=split, context=longest)
        for split in ("train", "validation")
    )
    return seen, unseen, config.length or min(longest, row_length([seen, unseen]))


def make_step(
    config: Config,
    model: models.ModelConfig,
    params: models.Params,
    mesh: jax.sharding.Mesh,
    total: int,
) -> tuple[optax.GradientTransformation, Callable[..., Any], train.TrainStep]:
    """The optimizer, the loss and the jitted step, which preflight.py compiles for a pod.

    Args:
      params: what is trained: arrays, or ShapeDtypeStructs that carry shardings.
      total: number of steps after which the learning rate is a tenth of its peak.
    """
    schedule = train.cosine(config.learning_rate, total, config.warmup)
    tx = train.adam(schedule, **dataclasses.asdict(config.adam))
    dropped = dataclasses.replace(model, dropout=config.dropout)
    loss_fn = functools.partial(sft.loss_fn, config=dropped, shard=config.constrainer(mesh))
    layout = state.shardings(params, tx)
    step = train.make_train_step(loss_fn, tx, config.microbatches, layout, schedule)
    return tx, loss_fn, step


def with_interval(values: np.ndarray) -> str:
    """The mean with its 95 % interval, a bootstrap over prompts."""
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*statistics.mean(values))


def cli(argv: Sequence[str] | None = None) -> None:
    run_sft(parse(Config, PRESETS, __doc__, argv, check))


if __name__ == "__main__":
    main(cli)
