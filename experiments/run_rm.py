"""Train the reward model on ranked responses: the paper's second step (InstructGPT, section 3.5).

    python experiments/run_rm.py                                             # the miniature
    python experiments/run_rm.py --model runs/sft --data jsonl:ranked.jsonl  # your model and data
    python experiments/run_rm.py --preset instructgpt-6b --model runs/sft --data jsonl:ranked.jsonl
    python experiments/run_rm.py --folds 5 --by labeler --out runs/rm-folds  # seen, unseen labelers
    python experiments/run_rm.py --ensemble 4 --out runs/rm-ensemble         # seeds in one step

Without --preset, the miniature's data get the preset `miniature`, and other data get `small`, which
is for models of less than 1B parameters. The preset instructgpt-6b has the paper's values, and
brackets below say where the paper states them.

Hardware: two CPU cores suffice for the miniature: 2,454 steps, 98 s. run_pretrain.py and run_sft.py
run first if runs/sft does not exist.

OUT gets export/ and, with --lora.rank, adapter/; with --ensemble 2 also export-1/ and adapter-1/.

Result: on test prompts the reward model orders 70 % of the pairs as the training labelers did, and
71 % as held-out labelers did. The noise-free judge reaches 77 and 79 %, a bag of words 59 %, and
length 51 %.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import run_sft
import tyro
from rich.console import Console
from rich.table import Table

from instructjax import data, hosts, models, reward, sharding, state, train
from instructjax.data import (
    DataConfig,
    Dataset,
    PackedComparisonRows,
    Stream,
)
from instructjax.data.batches import fitting, row_length
from instructjax.evaluation import baselines, figures, folds, gold, ranking, report
from instructjax.evaluation.figures import plot_curves
from instructjax.ranges import Count, CountFrom2, NotNegative, Positive, ShareBelow1
from instructjax.run import Run, checks, lora, main, pretrained
from instructjax.run.flags import Adam, RunConfig, parse, preset_of
from instructjax.run.lora import LoRA

# ------------------------------------------------------------------------------------- config


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """The reward model."""

    FIXED = (
        *(*RunConfig.FIXED, "demonstrations", "epochs", "learning_rate", "dropout"),
        *("length", "warmup", "adam", "lora", "ensemble", "folds", "by"),
    )
    SHOWN = ("learning_rate", "warmup", "batch_size", "epochs")

    out: Path = Path("runs/rm")
    model: str = "runs/sft"
    data: DataConfig = field(default_factory=DataConfig)
    """Comparisons to learn from."""
    demonstrations: DataConfig = field(default_factory=lambda: DataConfig(""))
    """Demonstrations whose mean score becomes 0 at the end, by a shift of the bias. [Section 3.5]
    By default the miniature's with --data miniature. With other data there are none by default,
    and the bias stays as it is."""
    length: CountFrom2 | None = None
    """Tokens of a row, which packs comparisons. A comparison is a prompt and all its responses.
    By default the least multiple of 128 that holds the longest comparison, and at most 4,096.
    It may exceed the model's context, which holds a prompt and one response.
    A longer comparison is dropped and counted, also with --data.overlong truncate."""
    batch_size: Count = 8
    """Rows of an update. The script says how many comparisons they hold.
    [App. C.2: 64 prompts, each with all its pairs]"""
    epochs: Positive = 1.0
    """Passes over the comparisons. --steps overrides it. [App. C.2: 1]"""
    learning_rate: NotNegative = 1e-5
    """Peak of the learning rate, which then decays to a tenth along a cosine. [App. C.2: 9e-6]"""
    warmup: NotNegative = 0.1
    """Steps over which the learning rate rises to its peak, linearly.
    A number below 1 is a share of all steps. [Paper silent]"""
    adam: Adam = field(default_factory=Adam)
    lora: LoRA = field(default_factory=LoRA)
    dropout: ShareBelow1 = 0.0
    """Dropout rate of what each sublayer adds to the residual stream. [Paper silent]"""
    ensemble: Count = 1
    """Number of reward models, of different seeds, that are trained together. [Paper: 1]"""
    folds: CountFrom2 | None = None
    """Number of runs for cross-validation. Each leaves out another part of the values of --by.
    By default there is one run, on all values."""
    by: str = "labeler"
    """Field of the records whose values --folds splits into parts."""
    group_by: tuple[str, ...] = ()
    """Fields of the records to report accuracy by. The miniature's category is always added."""
    eval_every: Count | None = None
    """Steps from one validation to the next. By default only the last step has one."""
    microbatches: Count = 1
    """Parts of a batch for gradient accumulation. More parts take less memory.
    Fewer parts are used if a device would otherwise have no row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds is not None and self.ensemble > 1:
            raise ValueError(f"--folds {self.folds}: not with --ensemble {self.ensemble}")
        if self.folds is not None and self.checkpoints is not None:
            raise ValueError(
                f"--checkpoints {self.checkpoints}: not with --folds, each of which keeps its own"
            )
        if not self.by:
            raise ValueError("--by: needs a field of the records, such as labeler")


PAPER = Config(
    model=tyro.MISSING,
    data=DataConfig(tyro.MISSING, max_prompt=1024, max_response=1024),  # App. C: context
    batch_size=64,  # App. C.2: 64 prompts, up to 2,304 pairs; a row here may hold several prompts
    epochs=1,  # App. C.2: a second epoch overfits
    learning_rate=9e-6,  # App. C.2, cosine to 10 %
    warmup=0,  # the paper is silent
    model_dtype="bfloat16",  # App. C: fp16, with fp32 masters
    remat="dots",  # ours
)
MINIATURE = Config(  # ours
    length=288, batch_size=6, epochs=2.4, learning_rate=5e-4, warmup=0, unroll=2
)
PRESETS = {
    "miniature": MINIATURE,
    "quick": dataclasses.replace(  # for a first look; see run_ppo.py
        MINIATURE, out=Path("runs/quick/rm"), model="runs/quick/sft", epochs=0.6
    ),
    # For models below 1B. In brackets: where a value is from.
    "small": Config(
        batch_size=8,  # rows [ours]
        epochs=1,  # [App. C.2: a second epoch overfits; Huang et al. 2024, arXiv 2403.17031]
        # [ours, near App. C.2's 9e-6. Huang et al. take 3e-6 from 1B up, TRL's RewardConfig 1e-4.]
        learning_rate=1e-5,
        warmup=0.1,  # [ours]
        microbatches=4,  # [ours]
        remat="full",  # [TRL checkpoints activations too]
    ),
    "instructgpt-6b": PAPER,  # the paper's one RM, for policies of all sizes
}
LONGEST = 4096  # tokens of a row without --length, at most
TEST = 1200  # comparisons on the miniature's test prompts, half of them by held-out labelers


def check(config: Config) -> None:
    """Raises ValueError or OSError for flags that cannot work, before anything is loaded or run."""
    model, first = models.PRESETS["miniature"], []
    if config.data.spec == "miniature" and missing_sft(config.model) is not None:
        first = [Path(config.model)]
    runs = [dataclasses.replace(config, out=out) for out in outs_of(config)]
    mesh, *_ = [checks.check_run(each, "rm", first) for each in runs]
    checks.check_rows("--batch_size", config.batch_size, 1, mesh)
    if not first:
        model = pretrained.check(config.model, mesh, tokenizer=config.tokenizer)
        lora.check(config.lora, config.model, model, config.tokenizer)
    checks.check_tokens(model, checks.data_tokens("--data", config.data))
    data.check(config.data, "comparisons")
    if config.demonstrations.spec:
        data.check(config.demonstrations, "demonstrations", "--demonstrations")


def run_rm(config: Config, fold: int | None = None) -> dict[str, Any]:
    """Trains and evaluates a reward model, or an ensemble of them.

    Args:
      fold: number of the fold to leave out, with --folds.

    Returns:
      the contents of results.json.
    """
    began = time.perf_counter()
    print(config.headline)
    miniature = config.data.spec == "miniature"
    if miniature:
        ensure_sft(config.model)
    with Run(config, stage="rm") as run:
        # -------------------------------------------------------------------------- model, data

        mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
        config = checks.fit_microbatches(config, mesh)
        shard = sharding.constrainer(mesh)
        base, base_params, tokenizer, origin = lora.load(
            config.lora,
            config.model,
            mesh,
            config.model_dtype,
            config.seed,
            tokenizer=config.tokenizer,
            template=config.data.template,
        )
        base = config.compute(base)

        reader = pretrained.reader(base, tokenizer)
        read = functools.partial(reader, context=base.max_length)
        seen = read(config.data, "comparisons", split="train")
        unseen = read(config.data, "comparisons", split="validation")
        length = config.length or min(row_length([seen, unseen]), LONGEST)
        seen, unseen = fitting(seen, length), fitting(unseen, length)
        groups = {"held-out prompts": unseen}
        if fold is not None:
            assert config.folds is not None
            seen, groups = folds.leave_out(seen, unseen, config.by, fold, config.folds, config.seed)
        elif miniature:
            groups = {
                "training labelers": gold.comparisons(tokenizer, TEST // 2),
                "held-out labelers": gold.comparisons(tokenizer, TEST // 2, held_out=True),
            }
        spec = config.demonstrations.spec or ("miniature" if miniature else "")
        demonstrations = None
        if spec:
            source = dataclasses.replace(config.demonstrations, spec=spec)
            demonstrations = fitting(read(source, "demonstrations", split="validation"), length)

        streamed = functools.partial(
            Stream,
            batch_size=config.batch_size,
            host_rows=sharding.own_rows(mesh, config.batch_size),
        )
        rows_of = functools.partial(PackedComparisonRows, length=length)
        rows = rows_of(seen)
        prompts = config.batch_size * len(seen) / len(rows)
        print(f"  an update of {config.batch_size:,} rows holds {prompts:,.1f} prompts on average")
        N = config.ensemble
        streams = [streamed(rows, seed=config.seed + member) for member in range(N)]
        put = functools.partial(jax.make_array_from_process_local_data, sharding.batched(mesh))

        # ------------------------------------------------------------------- optimizer, step

        total = config.steps
        if total is None:
            total = math.ceil(config.epochs * len(rows) / config.batch_size)
        model, params = with_reward_head(base, base_params, config.seed, mesh)
        trained, frozen = models.split(params)
        tx, step_fn = make_step(config, model, trained, mesh, total)
        current = state.create(trained, tx)
        if N > 1:  # each leaf, each batch and each key gets a leading axis of members
            heads = (
                with_reward_head(base, base_params, config.seed + i, mesh)[1] for i in range(1, N)
            )
            others = [state.create(models.split(params)[0], tx) for params in heads]
            current = jax.tree.map(lambda *leaves: jnp.stack(leaves), current, *others)
            step_fn = vmap_members(step_fn)
            del others
        step_key = jax.random.key(config.seed)
        current, start, meta = run.restore(current, lora.frozen_weights(origin))
        del params, base_params, trained

        # ------------------------------------------------------------------------- evaluation

        score_of = jax.jit(
            functools.partial(reward.score, config=model, shard=shard),
            out_shardings=sharding.replicated(mesh),
        )

        def member(i: int) -> models.Params:
            own = current.params if N == 1 else jax.tree.map(lambda x: x[i], current.params)
            return models.whole(own, frozen)

        @run.phase("scoring comparisons")
        def scores_of(dataset: Dataset) -> np.ndarray:
            """Each member's scores of each response: [N, n, K] for n comparisons."""
            rows = rows_of(dataset)
            batches = [jax.tree.map(put, b) for b in streamed(rows, seed=0).once()]
            scores = []
            for i in range(N):
                params = member(i)
                of_rows = np.concatenate([score_of(params, batch=b) for b in batches])
                scores.append(rows.by_comparison(of_rows))
            return np.stack(scores)

        def evaluate(step: int) -> np.ndarray:
            """Logs the accuracy on validation pairs, and writes the scores of two comparisons.

            Returns:
              `scores_of` the validation comparisons.
            """
            of_members = scores_of(unseen)
            scores = of_members.mean(0)
            pairs = ranking.pairs_of(scores, unseen.ranks)
            run.log(step, {"validation/accuracy": ranking.share(pairs)})
            for record, row in zip(unseen.records[:2], scores, strict=False):
                shown = {"prompt": record.prompt, "responses": record.responses}
                ranked = {"ranks": record.ranks, "scores": row[: len(record.ranks)].tolist()}
                run.metrics.sample(step, shown | ranked)
            return of_members

        # ------------------------------------------------------------------------------- loop

        unseen_scores = None  # of the last step; a finished run that resumes has made none
        batches = zip(*(stream.iterate(start) for stream in streams), strict=True)
        for step, of_members in zip(run.steps(start, total), batches, strict=False):
            key = jax.random.fold_in(step_key, step)
            batch = jax.tree.map(put, of_members[0])
            if N > 1:
                batch = jax.tree.map(
                    lambda *x: jnp.stack(x), *(jax.tree.map(put, b) for b in of_members)
                )
                key = jax.random.split(key, N)
            current, metrics = step_fn(current, batch, key, frozen)
            run.log(step, metrics, tokens=N * config.batch_size * rows.tokens)
            if step == total and demonstrations is not None:
                # Section 3.5: demonstrations have a mean score of 0. Done before the save, so that
                # the checkpoint is shifted as the export is.
                means = scores_of(demonstrations).mean((1, 2))
                shifted = reward.center(current.params, means if N > 1 else means[0])
                current = dataclasses.replace(current, params=shifted)
                meta = {"demonstrations": means.tolist()}
            if (config.eval_every and step % config.eval_every == 0) or step == total:
                unseen_scores = evaluate(step)
            if run.should_save(step):
                run.save(step, current, meta)

        # ------------------------------------------------------------------------ export, report

        # Member 0 is last: with export/ a run counts as finished.
        exports: list[Path] = []
        for i in reversed(range(N)):
            exports = lora.export(config.out, origin, model, member(i), tokenizer, i) + exports

        scores = {
            name: unseen_scores
            if dataset is unseen and unseen_scores is not None
            else scores_of(dataset)
            for name, dataset in groups.items()
        }
        methods = {"reward model": {name: every.mean(0) for name, every in scores.items()}}
        if miniature:
            methods["judge"] = {name: gold.judged(data) for name, data in groups.items()}
        for name, features in (("bag of words", baselines.bags), ("length", baselines.lengths)):
            methods[name] = baselines.linear(features, seen, groups)
        fields = (*config.group_by, *(("category",) if miniature else ()))
        results = {
            "accuracy": ranking.accuracies(methods, groups, fields),
            "members": {
                name: [ranking.share(ranking.pairs_of(x, groups[name].ranks)) for x in of_members]
                for name, of_members in scores.items()
            },
            "demonstrations": meta.get("demonstrations"),
            "steps": total,
            "seconds": time.perf_counter() - began,
        }
        if jax.process_index() != 0:
            return results
        (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        ours = {label: row["reward model"] for label, row in results["accuracy"].items()}
        pairs = {
            name: ranking.pairs_of(x.mean(0), groups[name].ranks) for name, x in scores.items()
        }
        figures.accuracies(ours, config.out / "accuracy.png")
        figures.reliability(ranking.joined(list(pairs.values())), config.out / "calibration.png")
        panels = {
            "loss": ("rm/loss",),
            "accuracy": ("rm/accuracy", "validation/accuracy"),
            "learning rate": ("optim/learning_rate",),
        }
        plot_curves(config.out, panels, config.out / "curves.png")
        report.write_for(config.out)
        centered = "not shifted: no --demonstrations were given"
        if demonstrations is not None:
            centered = "by the bias, from " + ", ".join(f"{x:+.3f}" for x in meta["demonstrations"])
        summary = {"steps": total, "comparisons": len(seen), "demonstrations to 0": centered}
        if N > 1:
            for name, shares in results["members"].items():
                summary[f"members on {name}"] = (
                    f"{100 * np.mean(shares):.1f} +- {100 * np.std(shares):.1f} %"
                )
                spread = scores[name].std(0)[groups[name].ranks > 0].mean()
                summary[f"spread of a score on {name}"] = float(spread)
        summary["seconds"] = results["seconds"]
        files = ("metrics.jsonl", "samples.jsonl", "results.json", "report.html")
        pictures = ("accuracy.png", "calibration.png", "curves.png")
        wrote = [*(config.out / name for name in (*files, *pictures)), *exports]
        by_reward = f"--keep reward --reward_model {config.out} --out {config.out}-sft"
        accuracy = ranking.table_of(results["accuracy"])
        run.finish(summary, wrote, config.command_of("run_sft.py", by_reward), [accuracy])
        return results


def make_step(
    config: Config,
    model: models.ModelConfig,
    params: models.Params,
    mesh: jax.sharding.Mesh,
    total: int,
) -> tuple[optax.GradientTransformation, train.TrainStep]:
    """The optimizer and the jitted step of one member, which preflight.py compiles for a pod.

    Args:
      params: what is trained: arrays, or ShapeDtypeStructs that carry shardings.
      total: number of steps after which the learning rate is a tenth of its peak.
    """
    schedule = train.cosine(config.learning_rate, total, config.warmup)
    tx = train.adam(schedule, **dataclasses.asdict(config.adam))
    dropped = dataclasses.replace(model, dropout=config.dropout)
    loss_fn = functools.partial(reward.loss_fn, config=dropped, shard=config.constrainer(mesh))
    layout = state.shardings(params, tx)
    return tx, train.make_train_step(loss_fn, tx, config.microbatches, layout, schedule)


def vmap_members(step_fn: train.TrainStep) -> train.TrainStep:
    """One program that makes a step of every member, and averages their metrics.

    Every leaf of the state and of the batch, and the key, get a leading axis of members. What is
    frozen they share.
    """

    def step(
        members: state.TrainState,
        batch: train.Batch,
        keys: jax.Array,
        frozen: models.Params | None = None,
    ) -> tuple[state.TrainState, train.Metrics]:
        members, metrics = jax.vmap(step_fn, (0, 0, 0, None))(members, batch, keys, frozen or {})
        return members, jax.tree.map(jnp.mean, metrics)

    return jax.jit(step, donate_argnums=0)


def with_reward_head(
    base: models.ModelConfig, params: models.Params, seed: int, mesh: jax.sharding.Mesh
) -> tuple[models.ModelConfig, models.Params]:
    """A language model with a new scalar head in place of its unembedding (section 3.5).

    A reward model is returned as it is.
    """
    if base.scalar_head:
        return base, params
    config, params = models.with_scalar_head(params, base, jax.random.key(seed))
    axes, head = models.logical_axes(config)["score"], params["score"]
    head = sharding.put(head, sharding.shardings(axes, head, mesh))
    return config, {**params, "score": head}


# ------------------------------------------------------------------------------ several runs


def run_folds(config: Config) -> None:
    """Makes a run for each fold, in OUT/fold-N, and prints their mean accuracies.

    Accuracy is reported apart for values of --by that a run trained on, and for those left out.
    """
    outs = outs_of(config)
    for fold, out in enumerate(outs):
        print(f"--- fold {fold + 1} of {config.folds}: {out}")
        if not (config.resume and hosts.agree((out / "results.json").exists())):
            run_rm(dataclasses.replace(config, out=out), fold)
    if jax.process_index() != 0:
        return
    of_folds = [json.loads((out / "results.json").read_text())["accuracy"] for out in outs]
    results = folds.summary(of_folds, config.by)
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    table = Table("", "mean, %", "+-", title=f"{config.folds} folds over {config.by}: {config.out}")
    for name, row in results.items():
        table.add_row(name, f"{100 * row['mean']:.1f}", f"{100 * row['spread']:.1f}")
    Console().print(table)
    print(f"wrote {config.out / 'results.json'}")


def outs_of(config: Config) -> list[Path]:
    """The run directory of each fold, with --folds, or of the only run."""
    if config.folds is None:
        return [config.out]
    return [config.out / f"fold-{fold}" for fold in range(config.folds)]


def missing_sft(model: str) -> run_sft.Config | None:
    """The preset of run_sft.py that makes `model`, if one does and it is not there."""
    preset = preset_of(run_sft.PRESETS, model)
    return None if preset is None or pretrained.finished(preset.out) else preset


def ensure_sft(model: str) -> None:
    """Runs or resumes run_sft.py if there is a `missing_sft`."""
    if (preset := missing_sft(model)) is not None:
        print(f"{model} is not there yet: running run_sft.py first")
        run_sft.run_sft(dataclasses.replace(preset, resume=True))


def cli(argv: Sequence[str] | None = None) -> None:
    config = parse(Config, PRESETS, __doc__, argv, check)
    if config.folds is None:
        run_rm(config)
    else:
        run_folds(config)


if __name__ == "__main__":
    main(cli)
