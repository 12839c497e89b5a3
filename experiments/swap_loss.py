"""Other algorithms, each in some forty lines: DPO, GRPO, RLOO. To read, to copy, to change.

    python experiments/swap_loss.py dpo                     # on the miniature's comparisons
    python experiments/swap_loss.py grpo --samples 8        # on its prompts and reward model
    python experiments/swap_loss.py rloo --reward my_file.py:my_function --data jsonl:prompts.jsonl

An algorithm is a stream of data, what is done to a batch before its update, and a loss. The model
that it starts from stays as the reference; there is no value net. See docs/swap-a-loss.md.

Hardware: two CPU cores suffice for the miniature, once run_rm.py has made runs/sft and runs/rm.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from instructjax import hf, losses, rollout, sampler, scoring, sharding, state, train
from instructjax.advantages import kl_estimate
from instructjax.data import ComparisonRows, DataConfig, Dataset, PromptRows, Stream, load
from instructjax.evaluation.figures import plot_curves
from instructjax.evaluation.policies import win_rate
from instructjax.masked import masked_mean, masked_sum
from instructjax.models import ModelConfig, Params
from instructjax.run import Run, main, pretrained
from instructjax.run.flags import RunConfig, parse
from instructjax.scoring import RewardConfig
from instructjax.train import Batch

Loss = tuple[jax.Array, tuple[jax.Array, train.Metrics]]  # what a `train.LossFn` returns


class Start(NamedTuple):
    """The model that training starts from and is held to; no update changes it."""

    mesh: jax.sharding.Mesh
    model: ModelConfig
    params: Params
    tokenizer: Any


class Algorithm(NamedTuple):
    """All that the loop needs."""

    stream: Stream
    # (params, a batch of the stream, key) -> (rows on their devices, their tokens, metrics)
    prepare: Callable[[Params, dict[str, Any], jax.Array], tuple[Batch, int, train.Metrics]]
    loss_fn: train.LossFn  # of those rows
    held_out: Dataset  # prompts for the comparison at the end


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """The flags of all three."""

    CURVES: ClassVar[tuple[str, ...]] = ()  # what curves.png shows
    FIXED = (*RunConfig.FIXED, "beta", "learning_rate", "max_new_tokens", "reward", "samples")

    preset: tyro.conf.Suppress[str] = ""
    model: str = "runs/sft"
    """The policy at the start, which is the reference too."""
    data: DataConfig = field(default_factory=DataConfig)
    """Comparisons for DPO; prompts for GRPO and RLOO."""
    steps: int = 100
    """Updates in all, those before a --resume included."""
    batch_size: int = 16
    """Prompts of an update, with all responses to each."""
    learning_rate: float = 3e-4
    """Of Adam, constant."""
    max_new_tokens: int = 32
    """Longest sampled response, in tokens."""


# ---------------------------------------------------------------------------------------- DPO


@dataclass(frozen=True, kw_only=True)
class DPO(Config):
    """Direct preference optimisation, on comparisons (Rafailov et al. 2023, arXiv 2305.18290)."""

    CURVES = ("loss", "dpo/accuracy", "dpo/margin")

    out: Path = Path("runs/dpo")
    beta: float = 0.1
    """Strength of the pull to the reference."""


def response_logp(params: Params, batch: Batch, **model: Any) -> jax.Array:
    """logp_BK of whole responses, EOS included, in rows of `data.ComparisonRows`."""
    B, K, R = batch["responses_BKR"].shape
    rows = {name: jnp.repeat(batch[name], K, axis=0) for name in ("prompt_BP", "prompt_mask_BP")}
    rows["tokens_BR"] = batch["responses_BKR"].reshape(B * K, R)
    rows["mask_BR"] = batch["response_mask_BKR"].reshape(B * K, R)
    return rollout.token_logp(params, rows, **model).sum(1).reshape(B, K)


def dpo_pairs(logp_BK: jax.Array, ref_logp_BK: jax.Array, beta: float) -> jax.Array:
    """loss_BKK: `losses.dpo` at [b, w, l] of response w of prompt b as chosen, l as rejected."""
    of_chosen = jax.vmap(losses.dpo, (None, 1, None, 1, None), out_axes=1)
    of_all = jax.vmap(of_chosen, (1, None, 1, None, None), out_axes=1)
    return of_all(logp_BK, logp_BK, ref_logp_BK, ref_logp_BK, beta)


def dpo_loss(params: Params, batch: Batch, key: Any, *, beta: float, **model: Any) -> Loss:
    """Mean over prompts of the mean over their strict pairs."""
    logp_BK = response_logp(params, batch, **model)
    pairs_BKK = losses.strict_pairs(batch["ranks_BK"], batch["mask_BK"])
    live_B = jnp.any(pairs_BKK, axis=(1, 2))
    of_prompts = lambda x_BKK: masked_mean(masked_mean(x_BKK, pairs_BKK, (1, 2)), live_B)  # noqa: E731
    loss_BKK = dpo_pairs(logp_BK, batch["ref_logp_BK"], beta)
    reward_BK = beta * (logp_BK - batch["ref_logp_BK"])  # the implicit one, but for a constant
    margin_BKK = reward_BK[:, :, None] - reward_BK[:, None, :]
    metrics = {"dpo/accuracy": of_prompts(margin_BKK > 0), "dpo/margin": of_prompts(margin_BKK)}
    return of_prompts(loss_BKK), (jnp.sum(live_B, dtype=jnp.float32), metrics)


def dpo(config: DPO, start: Start) -> Algorithm:
    """The reference's log-probabilities are computed by the frozen start, a batch at a time."""
    read = functools.partial(load, config.data, "comparisons", start.tokenizer)
    context = start.model.max_length
    seen, unseen = (read(split=split, context=context) for split in ("train", "validation"))
    model: Any = {"config": start.model, "shard": config.constrainer(start.mesh)}
    logp_of = jax.jit(functools.partial(response_logp, **model))

    def prepare(params: Params, batch: dict[str, Any], key: jax.Array):
        rows = rollout.put(batch, start.mesh)
        rows["ref_logp_BK"] = logp_of(start.params, rows)
        return rows, int(batch["response_mask_BKR"].sum()), {}

    stream = Stream(ComparisonRows(seen, multiple=8), config.batch_size, seed=config.seed)
    loss_fn = functools.partial(dpo_loss, beta=config.beta, **model)
    return Algorithm(stream, prepare, loss_fn, unseen)


# ------------------------------------------------------------------------------- GRPO and RLOO


@dataclass(frozen=True, kw_only=True)
class Online(Config):
    """The flags of those that learn from their own samples."""

    CURVES = ("objective/score", "objective/kl", "rollout/length")

    reward: RewardConfig = field(default_factory=RewardConfig)
    """What a response is worth."""
    samples: int = 4
    """Responses to each prompt: the group that each is compared with."""
    batch_size: int = 32
    learning_rate: float = 1e-4
    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2:
            raise ValueError(f"--samples {self.samples}: a group needs at least 2")


# (score_GK, kl_GK) -> advantage_GK, of G prompts with K responses each
Advantage = Callable[[np.ndarray, np.ndarray], np.ndarray]


def online(config: Online, start: Start, advantage: Advantage, loss: Any) -> Algorithm:
    """Groups of responses, each paid by its own group alone; one update a rollout."""
    R, K = config.max_new_tokens, config.samples
    read = functools.partial(load, config.data, "prompts", start.tokenizer)
    context = start.model.max_length - R + 1
    seen, unseen = (read(split=split, context=context) for split in ("train", "validation"))
    P = min(-(-int(seen.prompt.lengths.max()) // 32) * 32, start.model.max_length - R)
    reward = scoring.load(config.reward, start.mesh, start.tokenizer, "float32")
    model: Any = {"config": start.model, "shard": config.constrainer(start.mesh)}
    everywhere = sharding.replicated(start.mesh)
    logp_of = jax.jit(functools.partial(rollout.token_logp, **model), out_shardings=everywhere)

    def prepare(params: Params, batch: dict[str, Any], key: jax.Array):
        keywords = {"samples_per_prompt": K, "indices": batch["indices"], "mesh": start.mesh}
        sampled = sampler.generate(
            params, start.model, batch["prompts"], key, max_new_tokens=R, **keywords
        )
        records = [record for record in batch["records"] for _ in range(K)]
        rows = rollout.left_padded([x for x in batch["prompts"] for _ in range(K)], P)
        for name in ("tokens_BR", "mask_BR", "logp_BR"):
            rows[name] = jax.device_get(getattr(sampled, name))

        def over(fn: Callable[[Batch], jax.Array]) -> np.ndarray:
            return rollout.map_batches(fn, rows, config.batch_size, [R], start.mesh)

        texts = start.tokenizer.batch_decode(rollout.token_ids(rows), skip_special_tokens=True)
        score_B, _ = reward.score(over, [record.prompt for record in records], texts, records)
        rows["ref_logp_BR"] = over(functools.partial(logp_of, start.params))
        kl_B = (rows["logp_BR"] - rows["ref_logp_BR"]).sum(1)
        advantage_GK = advantage(score_B.reshape(-1, K), kl_B.reshape(-1, K))
        rows["advantage_B"] = advantage_GK.reshape(-1).astype(np.float32)
        length_B = rows["mask_BR"].sum(1)
        means = {"objective/score": score_B, "objective/kl": kl_B, "rollout/length": length_B}
        metrics = {name: x_B.mean() for name, x_B in means.items()}
        return rollout.put(rows, start.mesh), int(length_B.sum()), metrics

    stream = Stream(PromptRows(seen), config.batch_size, seed=config.seed)
    return Algorithm(stream, prepare, functools.partial(loss, **model), unseen)


# ---- GRPO ----


@dataclass(frozen=True, kw_only=True)
class GRPO(Online):
    """Group-relative policy optimisation, on prompts (Shao et al. 2024, arXiv 2402.03300)."""

    out: Path = Path("runs/grpo")
    beta: float = 0.04
    """Of the KL to the reference, in the loss [section 4.2: 0.04]."""


def grpo_advantages(score_GK: np.ndarray, eps: float = 1e-4) -> np.ndarray:
    """(score - mean of the group) / (standard deviation of the group + eps) (section 4.1.2)."""
    score_GK = score_GK.astype(np.float64)  # in which equal scores have exactly their mean
    centred_GK = score_GK - score_GK.mean(1, keepdims=True)
    return centred_GK / (score_GK.std(1, keepdims=True) + eps)


def grpo_loss(
    params: Params, rows: Batch, key: Any, *, beta: float, clip: float = 0.2, **model: Any
) -> Loss:
    """PPO's loss plus beta k3, averaged over each response, then over responses (eq. 3 and 4).

    In the first update of a rollout the ratio is 1; the clip is for those who make several.
    """
    logp_BR = rollout.token_logp(params, rows, **model)
    mask_BR, live_B = rows["mask_BR"], jnp.any(rows["mask_BR"], axis=1)
    of_rows = lambda x_BR: masked_mean(masked_mean(x_BR, mask_BR, 1), live_B)  # noqa: E731
    advantage_BR = jnp.broadcast_to(rows["advantage_B"][:, None], mask_BR.shape)
    loss_BR = losses.ppo_clip(logp_BR, rows["logp_BR"], advantage_BR, clip)
    kl_BR = kl_estimate(logp_BR, rows["ref_logp_BR"], "k3")
    metrics = {"policy/kl_k3": of_rows(kl_BR)}
    return of_rows(loss_BR + beta * kl_BR), (jnp.sum(live_B, dtype=jnp.float32), metrics)


def grpo(config: GRPO, start: Start) -> Algorithm:
    """The reward is the score alone: the KL is in the loss."""
    loss = functools.partial(grpo_loss, beta=config.beta)
    return online(config, start, lambda score_GK, kl_GK: grpo_advantages(score_GK), loss)


# ---- RLOO ----


@dataclass(frozen=True, kw_only=True)
class RLOO(Online):
    """REINFORCE, leave-one-out baseline, on prompts (Ahmadian et al. 2024, arXiv 2402.14740)."""

    out: Path = Path("runs/rloo")
    beta: float = 0.03
    """Of the KL to the reference, in the reward."""


def rloo_advantages(reward_GK: np.ndarray) -> np.ndarray:
    """Each reward less the mean of the others in its group."""
    reward_GK = reward_GK.astype(np.float64)  # in which equal rewards give exactly 0
    others_GK = reward_GK.sum(1, keepdims=True) - reward_GK
    return reward_GK - others_GK / (reward_GK.shape[1] - 1)


def rloo_loss(params: Params, rows: Batch, key: Any, **model: Any) -> Loss:
    """REINFORCE, where a whole response is one action; averaged over responses."""
    logp_BR = rollout.token_logp(params, rows, **model)
    loss_B = -rows["advantage_B"] * masked_sum(logp_BR, rows["mask_BR"], 1)
    live_B = jnp.any(rows["mask_BR"], axis=1)
    return masked_mean(loss_B, live_B), (jnp.sum(live_B, dtype=jnp.float32), {})


def rloo(config: RLOO, start: Start) -> Algorithm:
    """The reward of a response is its score less beta KL."""

    def advantage(score_GK: np.ndarray, kl_GK: np.ndarray) -> np.ndarray:
        return rloo_advantages(score_GK - config.beta * kl_GK)

    return online(config, start, advantage, rloo_loss)


# ------------------------------------------------------------------------------------ the loop


def swap_loss(config: Config) -> None:
    """Trains by the algorithm whose config it is given."""
    began, name = time.perf_counter(), type(config).__name__.lower()
    with Run(config, stage=name) as run:
        mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        if config.batch_size % parts:
            raise ValueError(f"--batch_size {config.batch_size}: not a multiple of {parts} devices")
        start = Start(mesh, *pretrained.load(config.model, mesh, seed=config.seed))
        if start.model.scalar_head:
            raise ValueError(f"--model {config.model}: a reward model, not a language model")
        chosen: Any = {DPO: dpo, GRPO: grpo, RLOO: rloo}[type(config)]
        algorithm: Algorithm = chosen(config, start)

        tx, key = train.adam(config.learning_rate), jax.random.key(config.seed)
        layout = state.shardings(start.params, tx)
        step_fn = train.make_train_step(algorithm.loss_fn, tx, shardings=layout)
        current, done, _ = run.restore(state.create(start.params, tx))
        batches = algorithm.stream.iterate(done)
        for step, batch in zip(run.steps(done, config.steps), batches, strict=False):
            step_key = jax.random.fold_in(key, step)
            rows, tokens, found = algorithm.prepare(current.params, batch, step_key)
            current, metrics = step_fn(current, rows, step_key)
            run.log(step, metrics | found, tokens=tokens)
            if run.should_save(step):
                run.save(step, current)

        hf.save(config.out / "export", start.model, current.params, start.tokenizer)
        summary = {"steps": config.steps, **compare(config, start, current.params, algorithm)}
        if jax.process_index() == 0:
            curves = {name: [name] for name in config.CURVES}
            plot_curves(config.out, curves, config.out / "curves.png")
            summary["seconds"] = time.perf_counter() - began
            wrote = [config.out / name for name in ("metrics.jsonl", "curves.png", "export")]
            run.finish(summary, wrote, f"python experiments/sample.py --model {config.out}")


def compare(config: Config, start: Start, params: Params, algorithm: Algorithm) -> dict[str, Any]:
    """Prints responses to held-out prompts before and after; in the miniature, who wins."""
    held_out = algorithm.held_out
    fits = held_out.prompt.lengths + config.max_new_tokens <= start.model.max_length
    held_out = held_out.take(fits & (np.cumsum(fits) <= 256))
    prompts = [held_out.prompt[i].tolist() for i in range(len(held_out))]
    key, texts = jax.random.key(config.seed), []
    for weights in (start.params, params):
        keywords = {"max_new_tokens": config.max_new_tokens, "mesh": start.mesh}
        tokens = sampler.generate(weights, start.model, prompts, key, **keywords).responses()
        texts.append(start.tokenizer.batch_decode(tokens, skip_special_tokens=True))
    for record, before, after in list(zip(held_out.records, *texts, strict=True))[:3]:
        print(f"{record.prompt}\n  before: {before.strip()}\n  after:  {after.strip()}")
    if config.data.spec != "miniature":
        return {}
    from instructjax.miniature import judge

    rows = [dict(record.row) for record in held_out.records]
    before, after = (
        np.array([judge(*x).utility for x in zip(rows, y, strict=True)]) for y in texts
    )
    share, low, high = win_rate(after, before)
    return {
        "gold utility": f"{before.mean():+.2f} at the start, {after.mean():+.2f} now",
        "wins against the start by gold": f"{share:.1%} ({low:.1%} to {high:.1%})",
        "held-out prompts": len(prompts),
    }


def cli(argv: Sequence[str] | None = None) -> None:
    algorithms: Any = DPO | GRPO | RLOO
    swap_loss(parse(algorithms, {}, __doc__, argv))


if __name__ == "__main__":
    main(cli)
