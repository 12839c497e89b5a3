"""The reward model on ranked responses: the paper's second step (InstructGPT, section 3.5).

    python experiments/run_rm.py                                             # the miniature
    python experiments/run_rm.py --preset instructgpt-6b --model runs/sft --data jsonl:ranked.jsonl
    python experiments/run_rm.py --folds 5 --by labeler --out runs/rm-folds  # seen, unseen labelers
    python experiments/run_rm.py --ensemble 4 --out runs/rm-ensemble         # seeds in one step

Hardware: two CPU cores suffice for the miniature: 750 steps in 150 s, after two minutes of
run_pretrain.py and run_sft.py, which run first where runs/sft is not there.
Result: of the pairs on held-out customers' prompts 67 % in the training labelers' order and 70 % in
that of held-out ones. The noise-free judge reaches 78 and 80 %, a bag of words 61, length 51.
"""

import dataclasses
import functools
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import run_sft
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from instructjax import figures, hf, losses, models, pretrained, reward, sharding, state, train
from instructjax.config import RunConfig, parse
from instructjax.data import ComparisonRows, DataConfig, Dataset, Record, Stream, encode, load
from instructjax.data.columns import lookup
from instructjax.metrics import plot_curves
from instructjax.reward import Pairs
from instructjax.run import Run, main

# ------------------------------------------------------------------------------------- config


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """The reward model."""

    FIXED = (
        *(*RunConfig.FIXED, "tokenizer", "demonstrations", "epochs", "learning_rate", "dropout"),
        *("multiple", "ensemble", "folds", "by"),
    )

    out: Path = Path("runs/rm")
    model: str = "runs/sft"
    tokenizer: str | None = None
    """A Hugging Face directory or hub name; default: the model's own."""
    data: DataConfig = field(default_factory=DataConfig)
    """Comparisons."""
    demonstrations: DataConfig = field(default_factory=lambda: DataConfig(""))
    """They score 0 on average in the end. Empty: the miniature's where --data is, or else none, and
    the bias stays."""
    multiple: int = 8
    """Prompt and response are padded to a multiple of this many tokens together."""
    batch_size: int = 16
    """Prompts of a step, each with all its pairs."""
    epochs: float = 1.0
    """Passes over the comparisons; --steps overrides it."""
    learning_rate: float = 5e-4
    """The peak, from which a cosine goes to 10 %, without warm-up."""
    dropout: float = 0.0
    """Of what each sublayer adds to the residual."""
    ensemble: int = 1
    """Reward models of different seeds, trained as one."""
    folds: int | None = None
    """Instead of one run, this many: each leaves out another part of the values of --by."""
    by: str = "labeler"
    """A field of the records, of which --folds makes parts."""
    group_by: tuple[str, ...] = ()
    """Fields of the records to report accuracy by; the miniature's adds its category."""
    model_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matmuls; parameters are float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: full is least memory."""
    unroll: int = 1
    """Layers to a turn of the scan; all of them is fastest for small models on CPU."""
    eval_every: int | None = None
    """Steps from one validation to the next; the last step always has one."""
    microbatches: int = 1
    """Shares of a batch whose gradients are accumulated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ensemble < 1:
            raise ValueError(f"--ensemble {self.ensemble}: must be at least 1")
        if self.folds is not None and (self.folds < 2 or self.ensemble > 1):
            raise ValueError(f"--folds {self.folds}: at least 2, and without --ensemble")


PAPER = Config(
    model=tyro.MISSING,
    data=DataConfig(tyro.MISSING, max_prompt=1024, max_response=1024),  # App. C: context
    multiple=128,  # ours
    batch_size=64,  # App. C.2: 64 prompts, up to 2,304 comparisons
    epochs=1,  # App. C.2: more of them overfit at once
    learning_rate=9e-6,  # App. C.2, cosine to 10 %
    model_dtype="bfloat16",  # App. C: fp16, with fp32 masters
    remat="dots",  # ours
)
PRESETS = {
    "miniature": Config(unroll=4),  # ours
    "instructgpt-6b": PAPER,  # the paper's one RM, for policies of all sizes
}
HELD_OUT = 600  # the miniature's comparisons by held-out labelers
# Of the miniature's: a few of its responses are three times as long as most, and all of them would
# be padded to the longest. Cut, they are read up to their last token.
LIMITS = {"max_prompt": 32, "max_response": 24, "overlong": "truncate"}


def run_rm(config: Config, fold: int | None = None) -> dict[str, Any]:
    """Trains and evaluates; returns what results.json holds."""
    began = time.perf_counter()
    miniature = config.data.spec == "miniature"
    if miniature:
        ensure_sft(config.model)
    with Run(config, stage="rm") as run:
        # -------------------------------------------------------------------------- model, data

        mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
        shard = sharding.constrainer(mesh)
        base, base_params, tokenizer = pretrained.load(
            config.model, mesh, tokenizer=config.tokenizer, seed=config.seed
        )
        computed = {"dtype": config.model_dtype, "remat": config.remat, "unroll": config.unroll}
        base = dataclasses.replace(base, **computed)

        read = functools.partial(load, tokenizer=tokenizer, context=base.max_length)
        source, given = config.data, (config.data.max_prompt, config.data.max_response)
        if miniature and given == (None, None):
            source = dataclasses.replace(source, **LIMITS)
        seen = read(source, "comparisons", split="train")
        unseen = read(source, "comparisons", split="validation")
        groups = {"held-out prompts": unseen}
        if fold is not None:
            seen, groups = leave_out(seen, unseen, config, fold)
        elif miniature:
            groups = {
                "training labelers": unseen,
                "held-out labelers": held_out_labelers(tokenizer),
            }
        spec = config.demonstrations.spec or ("miniature" if miniature else "")
        demonstrations = None
        if spec:
            source = dataclasses.replace(config.demonstrations, spec=spec)
            demonstrations = read(source, "demonstrations", split="validation")

        streamed = functools.partial(
            Stream,
            batch_size=config.batch_size,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
        )
        rows = ComparisonRows(seen, config.multiple)
        print(f"  a row: a prompt of {rows.P} tokens, {seen.ranks.shape[1]} responses of {rows.R}")
        N = config.ensemble
        streams = [streamed(rows, seed=config.seed + member) for member in range(N)]
        put = functools.partial(jax.make_array_from_process_local_data, sharding.batched(mesh))

        # ------------------------------------------------------------------- optimizer, step

        total = config.steps
        if total is None:
            total = math.ceil(config.epochs * len(rows) / config.batch_size)
        schedule = optax.cosine_decay_schedule(config.learning_rate, max(total, 1), alpha=0.1)
        tx = train.adam(schedule)

        model, params = born(base, base_params, config.seed, mesh)
        dropped = dataclasses.replace(model, dropout=config.dropout)
        loss_fn = functools.partial(reward.loss_fn, config=dropped, shard=shard)
        layout = state.shardings(params, tx)
        step_fn = train.make_train_step(loss_fn, tx, config.microbatches, layout)
        current = state.create(params, tx)
        if N > 1:  # each leaf, each batch and each key gets a leading axis of members
            others = [
                state.create(born(base, base_params, config.seed + i, mesh)[1], tx)
                for i in range(1, N)
            ]
            current = jax.tree.map(lambda *leaves: jnp.stack(leaves), current, *others)
            step_fn = jax.jit(jax.vmap(step_fn), donate_argnums=0)
            del others
        step_key = jax.random.key(config.seed)
        current, start, meta = run.restore(current)
        del params, base_params

        # ------------------------------------------------------------------------- evaluation

        score_of = jax.jit(
            functools.partial(reward.score, config=model, shard=shard),
            out_shardings=sharding.replicated(mesh),
        )

        def member(i: int) -> models.Params:
            return current.params if N == 1 else jax.tree.map(lambda x: x[i], current.params)

        def scores_of(dataset: Dataset) -> np.ndarray:
            """Each member's scores of each response: [N, n, K]."""
            every = []
            for i in range(N):
                params, found = member(i), []
                for batch in streamed(ComparisonRows(dataset, config.multiple), seed=0).once():
                    found.append(np.asarray(score_of(params, batch=jax.tree.map(put, batch))))
                every.append(np.concatenate(found)[: len(dataset)])
            return np.stack(every)

        def evaluate(step: int) -> None:
            """Logs accuracy on the first group; shows a few of its comparisons."""
            dataset = next(iter(groups.values()))
            scores = scores_of(dataset).mean(0)
            pairs = reward.pairs_of(scores, dataset.ranks, dataset.ranks > 0)
            share = float(((pairs.gap > 0) + 0.5 * (pairs.gap == 0)).mean())
            run.log(step, {"validation/accuracy": share})
            for record, row in zip(dataset.records[:2], scores, strict=False):
                shown = {"prompt": record.prompt, "responses": record.responses}
                ranked = {"ranks": record.ranks, "scores": row[: len(record.ranks)].tolist()}
                run.metrics.sample(step, shown | ranked)

        # ------------------------------------------------------------------------------- loop

        batches = zip(*(stream.iterate(start) for stream in streams), strict=True)
        for step, several in zip(run.steps(start, total), batches, strict=False):
            key = jax.random.fold_in(step_key, step)
            batch = jax.tree.map(put, several[0])
            if N > 1:
                batch = jax.tree.map(
                    lambda *x: jnp.stack(x), *(jax.tree.map(put, b) for b in several)
                )
                key = jax.random.split(key, N)
            current, metrics = step_fn(current, batch, key)
            metrics = {name: jnp.mean(value) for name, value in metrics.items()}
            metrics |= {"optim/learning_rate": jnp.asarray(schedule(step - 1))}
            tokens = N * config.batch_size * (rows.P + rows.R * seen.ranks.shape[1])
            run.log(step, metrics, tokens=tokens)
            if step == total and demonstrations is not None:
                # App. C.2: labeler demonstrations score 0 on average. The checkpoint has it too.
                means = scores_of(demonstrations).mean((1, 2))
                moved = reward.center(current.params, means if N > 1 else means[0])
                current, meta = (
                    dataclasses.replace(current, params=moved),
                    {"demonstrations": means.tolist()},
                )
            if (config.eval_every and step % config.eval_every == 0) or step == total:
                evaluate(step)
            if run.should_save(step):
                run.save(step, current, meta)

        # ------------------------------------------------------------------------ what came of it

        exports = [config.out / ("export" if i == 0 else f"export-{i}") for i in range(N)]
        for i, export in enumerate(exports):
            hf.save(export, model, member(i), tokenizer)

        scores = {name: scores_of(dataset) for name, dataset in groups.items()}
        methods = {"reward model": {name: every.mean(0) for name, every in scores.items()}}
        if miniature:
            methods["judge"] = {name: judged(data) for name, data in groups.items()}
        for name, features in (("bag of words", bags), ("length", lengths)):
            methods[name] = baseline(features, seen, groups)
        fields = (*config.group_by, *(("category",) if miniature else ()))
        results = {
            "accuracy": accuracies(methods, groups, fields),
            "members": {
                name: [reward.accuracy(pairs_of(one, groups[name]))[0] for one in every]
                for name, every in scores.items()
            },
            "demonstrations": meta.get("demonstrations"),
            "steps": total,
            "seconds": time.perf_counter() - began,
        }
        if jax.process_index() != 0:
            return results
        (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        ours = {label: row["reward model"] for label, row in results["accuracy"].items()}
        every_pair = [pairs_of(methods["reward model"][name], groups[name]) for name in groups]
        figures.accuracies(ours, config.out / "accuracy.png")
        figures.reliability(joined(every_pair), config.out / "calibration.png")
        panels = {
            "loss": ("rm/loss",),
            "accuracy": ("rm/accuracy", "validation/accuracy"),
            "learning rate": ("optim/learning_rate",),
        }
        plot_curves(config.out, panels, config.out / "curves.png")
        run.console.print(table_of(results["accuracy"]))
        centered = "not moved: no --demonstrations were given"
        if demonstrations is not None:
            centered = "by the bias, from " + ", ".join(f"{x:+.3f}" for x in meta["demonstrations"])
        summary = {"steps": total, "comparisons": len(seen), "demonstrations to 0": centered}
        if N > 1:
            for name, found in results["members"].items():
                summary[f"members on {name}"] = (
                    f"{100 * np.mean(found):.1f} +- {100 * np.std(found):.1f} %"
                )
                spread = scores[name].std(0)[groups[name].ranks > 0].mean()
                summary[f"spread of a score on {name}"] = float(spread)
        summary["seconds"] = results["seconds"]
        files = "metrics.jsonl samples.jsonl results.json accuracy.png calibration.png curves.png"
        wrote = [*(config.out / name for name in files.split()), *exports]
        by_reward = f"--keep reward --reward_model {config.out} --out {config.out}-sft"
        run.finish(summary, wrote, f"python experiments/run_sft.py {by_reward}")
        return results


def born(
    base: models.ModelConfig, params: models.Params, seed: int, mesh: jax.sharding.Mesh
) -> tuple[models.ModelConfig, models.Params]:
    """The SFT model with a scalar for its unembedding; a reward model keeps the one it has."""
    if base.scalar_head:
        return base, params
    config, params = models.with_scalar_head(params, base, jax.random.key(seed))
    layout = sharding.shardings(models.logical_axes(config), params, mesh)
    return config, jax.device_put(params, layout)


# ------------------------------------------------------------------------------ several runs


def run_folds(config: Config) -> None:
    """A run for each fold, in OUT/fold-N; accuracy on values of --by that it trained on or not."""
    assert config.folds is not None
    found = []
    for fold in range(config.folds):
        out = config.out / f"fold-{fold}"
        print(f"--- fold {fold + 1} of {config.folds}: {out}")
        if config.resume and (out / "results.json").exists():
            found.append(json.loads((out / "results.json").read_text()))
        else:
            found.append(run_rm(dataclasses.replace(config, out=out), fold))
    results = {}
    for side in (f"{config.by} seen", f"{config.by} unseen"):
        rows = [one["accuracy"][side] for one in found]
        for method in rows[0].keys() - {"pairs"}:
            shares = [row[method][0] for row in rows]
            results[f"{method}, {side}"] = {
                "mean": np.mean(shares),
                "spread": np.std(shares, ddof=1),
            }
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    table = Table("", "mean, %", "+-", title=f"{config.folds} folds over {config.by}: {config.out}")
    for name, row in results.items():
        table.add_row(name, f"{100 * row['mean']:.1f}", f"{100 * row['spread']:.1f}")
    Console().print(table)
    print(f"wrote {config.out / 'results.json'}")


def leave_out(
    seen: Dataset, unseen: Dataset, config: Config, fold: int
) -> tuple[Dataset, dict[str, Dataset]]:
    """Training data without the fold's values of --by; validation data with and without them."""
    assert config.folds is not None
    values = sorted({value_of(record, config.by) for record in (*seen.records, *unseen.records)})
    if len(values) < config.folds:
        raise ValueError(f"--folds {config.folds}: there are {len(values)} values of {config.by}")
    order = np.random.default_rng(config.seed).permutation(len(values))
    left_out = {values[i] for i in order[fold :: config.folds]}

    def part(dataset: Dataset, out: bool) -> Dataset:
        held = [value_of(record, config.by) in left_out for record in dataset.records]
        if out not in held:
            raise ValueError(f"--by {config.by}: fold {fold} has no comparisons on one side")
        return dataset.take(np.array(held) == out)

    names = f"{config.by} seen", f"{config.by} unseen"
    return part(seen, False), {names[0]: part(unseen, False), names[1]: part(unseen, True)}


def ensure_sft(model: str) -> None:
    """Runs run_sft.py with its defaults, or finishes it, if `model` is to come from it."""
    out = run_sft.Config().out
    if Path(model) == out and not (out / "export" / "config.json").exists():
        print(f"{out} is not there yet: running run_sft.py first")
        preset = dataclasses.replace(run_sft.PRESETS["miniature"], preset="miniature")
        run_sft.run_sft(dataclasses.replace(preset, resume=True))


# ------------------------------------------------------------------- what accuracy is compared


def held_out_labelers(tokenizer: Any) -> Dataset:
    """The miniature's comparisons, on held-out customers' prompts, by labelers never trained on."""
    from instructjax import miniature

    records = []
    for i, row in enumerate(miniature.comparisons(0, HELD_OUT, "valid", held_out=True)):
        if len(set(row["ranks"])) > 1:
            responses, ranks = tuple(row["responses"]), tuple(row["ranks"])
            where = f"miniature: held-out labelers {i}"
            records.append(Record(where, row, row["prompt"], responses, ranks, row["labeler"]))
    return encode(records, "comparisons", tokenizer)


def judged(dataset: Dataset) -> np.ndarray:
    """The miniature's noise-free judge: what a perfect reward model would say. [n, K]"""
    from instructjax.miniature import judge

    found = np.zeros(dataset.ranks.shape)
    for i, record in enumerate(dataset.records):
        found[i, : len(record.responses)] = [
            judge(dict(record.row), response).utility for response in record.responses
        ]
    return found


def lengths(dataset: Dataset, train_set: Dataset) -> np.ndarray:
    """Tokens of each response: [n, K, 1]."""
    return dataset.response.lengths[..., None].astype(np.float32)


def bags(dataset: Dataset, train_set: Dataset, most: int = 1000) -> np.ndarray:
    """How often each of the commonest tokens of the training responses occurs: [n, K, F]."""

    def responses(of: Dataset):
        return ((i, k, of.response[i, k]) for i, k in np.argwhere(of.ranks > 0))

    every = np.bincount(np.concatenate([ids for *_, ids in responses(train_set)]))
    common = np.argsort(-every, kind="stable")[: min(most, np.count_nonzero(every))]
    column = np.full(
        1 + max(len(every), *(int(ids.max()) + 1 for *_, ids in responses(dataset))), -1
    )
    column[common] = np.arange(len(common))
    found = np.zeros((*dataset.ranks.shape, len(common)), np.float32)
    for i, k, ids in responses(dataset):
        at = column[ids]
        np.add.at(found[i, k], at[at >= 0], 1)
    return found


def baseline(
    features: Callable[[Dataset, Dataset], np.ndarray], seen: Dataset, groups: dict[str, Dataset]
) -> dict[str, np.ndarray]:
    """Scores linear in features of a response: logistic regression on the pairs' differences.

    It has few weights, and is fitted to the first 3,000 comparisons: more change nothing.
    """
    seen = seen.take(np.arange(len(seen)) < 3000)
    x_BKF = features(seen, seen)
    scale = x_BKF[seen.ranks > 0].std(0) + 1e-6
    x_BKF, ranks_BK = jnp.asarray(x_BKF / scale), jnp.asarray(seen.ranks)

    def loss(w_F: jax.Array) -> jax.Array:
        loss_B = losses.pairwise_ranking(x_BKF @ w_F, ranks_BK, ranks_BK > 0)
        return jnp.mean(loss_B) + 1e-3 * jnp.vdot(w_F, w_F)

    tx = optax.adam(optax.cosine_decay_schedule(0.1, 100))

    def fit(carry, _):
        w_F, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss)(w_F), opt_state)
        return (optax.apply_updates(w_F, updates), opt_state), None

    w_F = jnp.zeros(len(scale))
    (w_F, _), _ = jax.jit(lambda carry: jax.lax.scan(fit, carry, length=100))((w_F, tx.init(w_F)))
    weights = np.asarray(w_F) / scale
    return {name: features(dataset, seen) @ weights for name, dataset in groups.items()}


def value_of(record: Record, name: str) -> str:
    """A field of a record; raises ValueError where it has none."""
    if name == "labeler" and record.labeler is not None:
        return record.labeler
    try:
        return str(lookup(record.row, name))
    except KeyError:
        raise ValueError(f"{record.where}: no field '{name}' to group by") from None


def pairs_of(scores: np.ndarray, dataset: Dataset, keep: Any = slice(None)) -> Pairs:
    """The strict pairs of a data set's records, or of some of them."""
    ranks = dataset.ranks[keep]
    return reward.pairs_of(scores[keep], ranks, ranks > 0)


def joined(several: Sequence[Pairs]) -> Pairs:
    """Pairs of several data sets as of one."""
    first = np.cumsum([0, *(pairs.prompt.max(initial=0) + 1 for pairs in several)])
    return Pairs(
        np.concatenate([pairs.gap for pairs in several]),
        np.concatenate([pairs.distance for pairs in several]),
        np.concatenate([pairs.prompt + at for pairs, at in zip(several, first, strict=False)]),
    )


def accuracies(
    methods: dict[str, dict[str, np.ndarray]], groups: dict[str, Dataset], fields: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Of each method on each part of the held-out pairs: label -> method -> (share, low, high).

    The parts are the groups, the values of each field (the 20 commonest), and ranks apart.
    """
    parts: dict[str, dict[str, Any]] = {name: {name: slice(None)} for name in groups}
    for field_name in fields:
        values = {name: [value_of(r, field_name) for r in d.records] for name, d in groups.items()}
        common = Counter(itertools.chain(*values.values())).most_common(20)
        for value, _ in common:
            keep = {name: np.array(found) == value for name, found in values.items()}
            parts[f"{field_name}: {value}"] = keep
    found: dict[str, dict[str, Any]] = {}
    for label, keep in parts.items():
        found[label] = {
            method: reward.accuracy(joined([pairs_of(scores[n], groups[n], keep[n]) for n in keep]))
            for method, scores in methods.items()
        }
        pairs = joined([pairs_of(methods["reward model"][n], groups[n], keep[n]) for n in keep])
        found[label]["pairs"] = len(pairs.gap)
    every = {
        m: joined([pairs_of(scores[n], groups[n]) for n in groups]) for m, scores in methods.items()
    }
    for distance in (1, 2, 3, 4):
        row = {}
        for method, pairs in every.items():
            near = pairs.distance == distance if distance < 4 else pairs.distance >= 4
            few = Pairs(pairs.gap[near], pairs.distance[near], pairs.prompt[near])
            row |= {method: reward.accuracy(few), "pairs": len(few.gap)}
        if row["pairs"]:
            found[f"ranks apart: {distance}{' or more' * (distance == 4)}"] = row
    return found


def table_of(found: dict[str, dict[str, Any]]) -> Table:
    """Per cent of the pairs in the labelers' order; of the reward model with half its interval."""
    others = [name for name in next(iter(found.values())) if name not in ("pairs", "reward model")]
    title = "Held-out pairs in the labelers' order, %"
    columns = ("", "pairs", "reward model", *others)
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for label, row in found.items():
        share, low, high = (100 * x for x in row["reward model"])
        ours = f"{share:.1f} +- {(high - low) / 2:.1f}"
        rest = (f"{100 * row[name][0]:.1f}" for name in others)
        table.add_row(label, f"{row['pairs']:,}", ours, *rest)
    return table


def cli(argv: Sequence[str] | None = None) -> None:
    config = parse(Config, PRESETS, __doc__, argv)
    if config.folds is None:
        run_rm(config)
    else:
        run_folds(config)


if __name__ == "__main__":
    main(cli)
