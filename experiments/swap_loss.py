"""Train by DPO, GRPO, RLOO or RAFT, each in some forty lines: a file to read, copy and change.

    python experiments/swap_loss.py dpo                     # on the miniature's comparisons
    python experiments/swap_loss.py grpo --samples 8        # on its prompts and reward model
    python experiments/swap_loss.py rloo --reward my_file.py:my_function --data jsonl:prompts.jsonl
    python experiments/swap_loss.py raft --samples 8        # SFT on the best of 8 samples

An algorithm is a stream of data, a function that prepares a batch for its update, and a loss. The
model that training starts from is the reference. There is no value net. See docs/swap-a-loss.md.

Hardware: two CPU cores suffice for the miniature, once run_rm.py has made runs/sft and runs/rm.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from ppo_config import SamplingConfig

from instructjax import data, losses, models, rollout, scoring, sharding, state, train
from instructjax.advantages import kl_estimate
from instructjax.data import ComparisonRows, DataConfig, Dataset, PromptRows, Stream
from instructjax.evaluation import gold, policies
from instructjax.masked import masked_mean, masked_sum
from instructjax.models import ModelConfig, Params
from instructjax.ranges import Count, CountFrom2, CountOrZero, NotNegative
from instructjax.run import Run, adapters, checks, lora, main, pretrained
from instructjax.run.flags import parse
from instructjax.scoring import RewardConfig
from instructjax.train import Batch, Metrics

Loss = tuple[jax.Array, tuple[jax.Array, Metrics]]  # the value of a `train.LossFn`


class Start(NamedTuple):
    """The model that training starts from, which is the reference too. No update changes it."""

    mesh: jax.sharding.Mesh
    model: ModelConfig
    params: Params
    tokenizer: Any
    base: adapters.Base | None = None  # with LoRA, what reward models may be adapters of


class Algorithm(NamedTuple):
    """What the training loop needs of an algorithm."""

    stream: Stream
    # (params, batch of the stream, key) -> (batch for the loss, on devices; its tokens; metrics)
    prepare: Callable[[Params, Batch, jax.Array], tuple[Batch, int, Metrics]]
    loss_fn: train.LossFn
    held_out: Dataset  # its prompts are for the comparison at the end
    reward: scoring.Rewards | None = None  # what scores the responses, if training samples any


@dataclass(frozen=True, kw_only=True)
class Config(SamplingConfig):
    """The flags of all algorithms."""

    CURVES: ClassVar[tuple[str, ...]] = ()  # the metrics that curves.png shows
    FIXED = (
        *(*SamplingConfig.FIXED, "beta", "learning_rate", "lora", "max_new_tokens"),
        *("reward", "samples"),
    )

    preset: tyro.conf.Suppress[str] = ""
    model: str = "runs/sft"
    """The policy to start from, which stays as the reference.
    A preset, a run directory, a Hugging Face directory or a hub name."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data to train on: comparisons for DPO, prompts for GRPO, RLOO and RAFT."""
    steps: CountOrZero = 100
    """Number of updates in all, including those before a --resume."""
    batch_size: Count = 16
    """Prompts of an update, each with all its responses. [Ours]"""
    microbatches: Count = 1
    """Parts of a batch for gradient accumulation. More parts take less memory.
    The reference runs on as many parts."""
    learning_rate: NotNegative = 3e-4
    """Learning rate of Adam, which is constant. [Ours]"""
    eval_prompts: Count = 256
    """Held-out prompts of each evaluation, and of the comparison with the start at the end."""
    eval_every: Count | None = None
    """Updates between evaluations on held-out prompts. The last update has one too. By default the
    comparison at the end is the only one."""


# ---------------------------------------------------------------------------------------- DPO


@dataclass(frozen=True, kw_only=True)
class DPO(Config):
    """Direct preference optimisation, on comparisons (Rafailov et al. 2023, arXiv 2305.18290)."""

    CURVES = ("loss", "dpo/accuracy", "dpo/margin")

    out: Path = Path("runs/dpo")
    beta: NotNegative = 0.1
    """DPO's beta, the weight of the KL to the reference. [Rafailov et al., App. B: 0.1]"""


def response_logp(params: Params, batch: Batch, **model: Any) -> jax.Array:
    """Log-probabilities of whole responses, EOS included: logp_BK.

    Args:
      batch: rows of `data.ComparisonRows`.
      model: `config` and `shard` of the model.
    """
    B, K, R = batch["responses_BKR"].shape
    rows = {name: jnp.repeat(batch[name], K, axis=0) for name in ("prompt_BP", "prompt_mask_BP")}
    rows["tokens_BR"] = batch["responses_BKR"].reshape(B * K, R)
    rows["mask_BR"] = batch["response_mask_BKR"].reshape(B * K, R)
    return rollout.token_logp(params, rows, **model).sum(1).reshape(B, K)


def dpo_pairs(logp_BK: jax.Array, ref_logp_BK: jax.Array, beta: float) -> jax.Array:
    """`losses.dpo` for all pairs of the responses to a prompt.

    Returns:
      loss_BKK; at [b, w, l] response w to prompt b is the chosen one, and l the rejected one.
    """
    of_chosen = jax.vmap(losses.dpo, (None, 1, None, 1, None), out_axes=1)
    of_all = jax.vmap(of_chosen, (1, None, 1, None, None), out_axes=1)
    return of_all(logp_BK, logp_BK, ref_logp_BK, ref_logp_BK, beta)


def dpo_loss(params: Params, batch: Batch, key: Any, *, beta: float, **model: Any) -> Loss:
    """The DPO loss (eq. 7), averaged over a prompt's strict pairs, then over the prompts.

    Args:
      batch: rows of `data.ComparisonRows`, with ref_logp_BK.
    """
    logp_BK = response_logp(params, batch, **model)
    pairs_BKK = losses.strict_pairs(batch["ranks_BK"], batch["mask_BK"])
    live_B = jnp.any(pairs_BKK, axis=(1, 2))
    of_prompts = lambda x_BKK: masked_mean(masked_mean(x_BKK, pairs_BKK, (1, 2)), live_B)  # noqa: E731
    loss_BKK = dpo_pairs(logp_BK, batch["ref_logp_BK"], beta)
    # The implicit reward, up to a constant of the prompt (section 4).
    reward_BK = beta * (logp_BK - batch["ref_logp_BK"])
    margin_BKK = reward_BK[:, :, None] - reward_BK[:, None, :]
    metrics = {"dpo/accuracy": of_prompts(margin_BKK > 0), "dpo/margin": of_prompts(margin_BKK)}
    return of_prompts(loss_BKK), (jnp.sum(live_B, dtype=jnp.float32), metrics)


def dpo(config: DPO, start: Start) -> Algorithm:
    """DPO on comparisons. The frozen start gives the reference's log-probabilities."""
    read, context = pretrained.reader(start.model, start.tokenizer), start.model.max_length
    seen, unseen = (
        read(config.data, "comparisons", split=split, context=context)
        for split in ("train", "validation")
    )
    model: Any = {"config": start.model, "shard": config.constrainer(start.mesh)}
    everywhere = sharding.replicated(start.mesh)
    logp_of = jax.jit(functools.partial(response_logp, **model), out_shardings=everywhere)

    def prepare(params: Params, batch: Batch, key: jax.Array) -> tuple[Batch, int, Metrics]:
        ref_logp_BK = np.zeros(batch["ranks_BK"].shape, np.float32)
        for i in range(config.microbatches):
            part = {name: x[i :: config.microbatches] for name, x in batch.items()}
            ref_logp_BK[i :: config.microbatches] = logp_of(
                start.params, rollout.put(part, start.mesh)
            )
        rows = rollout.put(batch | {"ref_logp_BK": ref_logp_BK}, start.mesh)
        return rows, int(batch["response_mask_BKR"].sum()), {}

    stream = Stream(ComparisonRows(seen, multiple=8), config.batch_size, seed=config.seed)
    loss_fn = functools.partial(dpo_loss, beta=config.beta, **model)
    return Algorithm(stream, prepare, loss_fn, unseen)


# ------------------------------------------------------------------------ GRPO, RLOO and RAFT


@dataclass(frozen=True, kw_only=True)
class Online(Config):
    """The flags of the algorithms that learn from their own samples."""

    CURVES = ("objective/score", "objective/kl", "rollout/length")

    reward: RewardConfig = field(default_factory=RewardConfig)
    """What scores a response: reward models, functions, or both."""
    samples: CountFrom2 = 4
    """Number of responses to each prompt. They are the group that an advantage is relative to.
    [Ours]"""
    batch_size: Count = 32
    learning_rate: NotNegative = 1e-4
    beta: NotNegative


# (score_GK, kl_GK) -> advantage_GK, for G prompts with K responses each
Advantage = Callable[[np.ndarray, np.ndarray], np.ndarray]


def online(
    config: Online, start: Start, advantage: Advantage, loss: Any, positive_only: bool = False
) -> Algorithm:
    """Samples K responses to each prompt, and makes one update per rollout.

    Args:
      advantage: compares a response with its group.
      loss: the loss of the rows, with `config` and `shard` still to be bound.
      positive_only: the loss is of the rows with a positive advantage alone.
    """
    R, K = config.max_new_tokens, config.samples
    read, context = pretrained.reader(start.model, start.tokenizer), start.model.max_length - R + 1
    seen, unseen = (
        read(config.data, "prompts", split=split, context=context)
        for split in ("train", "validation")
    )
    P = min(-(-int(seen.prompt.lengths.max()) // 32) * 32, start.model.max_length - R)
    reward = scoring.load(
        config.reward, start.mesh, start.tokenizer, config.model_dtype, base=start.base
    )
    model: Any = {"config": start.model, "shard": config.constrainer(start.mesh)}
    everywhere = sharding.replicated(start.mesh)
    logp_of = jax.jit(functools.partial(rollout.token_logp, **model), out_shardings=everywhere)

    def prepare(params: Params, batch: Batch, key: jax.Array) -> tuple[Batch, int, Metrics]:
        prompts, size = batch["prompts"], config.batch_size // config.microbatches
        keywords = {"samples_per_prompt": K, "max_new_tokens": R, "mesh": start.mesh}
        # A response's noise depends on the key and its row, so a prompt that stands twice in the
        # batch gets two groups of responses.
        sampled, _ = rollout.sample(
            params, start.model, prompts, key, size=config.sample_batch, **keywords
        )
        records = [record for record in batch["records"] for _ in range(K)]
        rows = rollout.left_padded([prompt for prompt in prompts for _ in range(K)], P) | sampled

        def map_rows(fn: Callable[[Batch], jax.Array]) -> np.ndarray:
            return rollout.map_batches(fn, rows, size, [R], start.mesh)

        texts = start.tokenizer.batch_decode(rollout.token_ids(rows), skip_special_tokens=True)
        score_B, _ = reward.score(map_rows, [record.prompt for record in records], texts, records)
        if config.model_dtype != "float32":  # the sampler's rounding differs from the loss's
            rows["logp_BR"] = map_rows(functools.partial(logp_of, params))
        rows["ref_logp_BR"] = map_rows(functools.partial(logp_of, start.params))
        kl_B = (rows["logp_BR"] - rows["ref_logp_BR"]).sum(1)
        advantage_GK = advantage(score_B.reshape(-1, K), kl_B.reshape(-1, K))
        rows["advantage_B"] = advantage_GK.reshape(-1).astype(np.float32)
        length_B = rows["mask_BR"].sum(1)
        means = {"objective/score": score_B, "objective/kl": kl_B, "rollout/length": length_B}
        metrics = {name: x_B.mean() for name, x_B in means.items()}
        if positive_only:
            kept_B = rows["advantage_B"] > 0
            metrics["objective/kept_score"] = score_B[kept_B].mean()
            rows = {name: x[kept_B] for name, x in rows.items()}
        return rollout.put(rows, start.mesh), int(length_B.sum()), metrics

    stream = Stream(PromptRows(seen), config.batch_size, seed=config.seed)
    return Algorithm(stream, prepare, functools.partial(loss, **model), unseen, reward)


# ---- GRPO ----


@dataclass(frozen=True, kw_only=True)
class GRPO(Online):
    """Group-relative policy optimisation, on prompts (Shao et al. 2024, arXiv 2402.03300)."""

    out: Path = Path("runs/grpo")
    beta: NotNegative = 0.04
    """Weight of the KL to the reference, in the loss. [Section 4.2: 0.04]"""


def grpo_advantages(score_GK: np.ndarray, eps: float = 1e-4) -> np.ndarray:
    """(score - mean of the group) / (standard deviation of the group + eps) (section 4.1.2)."""
    score_GK = score_GK.astype(np.float64)  # so that equal scores are exactly their mean
    centred_GK = score_GK - score_GK.mean(1, keepdims=True)
    return centred_GK / (score_GK.std(1, keepdims=True) + eps)


def grpo_loss(
    params: Params, rows: Batch, key: Any, *, beta: float, clip: float = 0.2, **model: Any
) -> Loss:
    """PPO's loss plus beta k3, averaged over each response, then over responses (eq. 3 and 4).

    The ratio is 1 in the first update of a rollout. The clip is for a loop that makes more updates.
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
    """GRPO on prompts. The KL is in the loss, so the advantage is of the score alone."""
    loss = functools.partial(grpo_loss, beta=config.beta)
    return online(config, start, lambda score_GK, kl_GK: grpo_advantages(score_GK), loss)


# ---- RLOO ----


@dataclass(frozen=True, kw_only=True)
class RLOO(Online):
    """REINFORCE, leave-one-out baseline, on prompts (Ahmadian et al. 2024, arXiv 2402.14740)."""

    out: Path = Path("runs/rloo")
    beta: NotNegative = 0.03
    """Weight of the KL to the reference, in the reward. [Ours]"""


def rloo_advantages(reward_GK: np.ndarray) -> np.ndarray:
    """Each reward minus the mean of the other rewards in its group."""
    reward_GK = reward_GK.astype(np.float64)  # so that equal rewards give exactly 0
    others_GK = reward_GK.sum(1, keepdims=True) - reward_GK
    return reward_GK - others_GK / (reward_GK.shape[1] - 1)


def rloo_loss(params: Params, rows: Batch, key: Any, **model: Any) -> Loss:
    """The REINFORCE loss with a whole response as one action, averaged over responses."""
    logp_BR = rollout.token_logp(params, rows, **model)
    loss_B = -rows["advantage_B"] * masked_sum(logp_BR, rows["mask_BR"], 1)
    live_B = jnp.any(rows["mask_BR"], axis=1)
    return masked_mean(loss_B, live_B), (jnp.sum(live_B, dtype=jnp.float32), {})


def rloo(config: RLOO, start: Start) -> Algorithm:
    """RLOO on prompts. The reward of a response is its score minus beta KL."""

    def advantage(score_GK: np.ndarray, kl_GK: np.ndarray) -> np.ndarray:
        return rloo_advantages(score_GK - config.beta * kl_GK)

    return online(config, start, advantage, rloo_loss)


# ---- RAFT ----


@dataclass(frozen=True, kw_only=True)
class RAFT(Online):
    """Reward-ranked fine-tuning, on prompts (Dong et al. 2023, arXiv 2304.06767)."""

    CURVES = (*Online.CURVES, "objective/kept_score")
    FIXED = (*Online.FIXED, "keep")

    out: Path = Path("runs/raft")
    beta: NotNegative = 0.0
    """Weight of the KL to the reference, in the reward. [Section 3.1 has it as an option]"""
    keep: Literal["best", "random"] = "best"
    """Which response of a group is learned: the one of the highest reward, or, as a control, a
    random one."""


def raft_advantages(reward_GK: np.ndarray, keep: Literal["best", "random"]) -> np.ndarray:
    """1 for the response of each group that is kept, and 0 for the others.

    The samples of a group are independent, so the first is a random one.
    """
    G, K = reward_GK.shape
    kept_G = reward_GK.argmax(1) if keep == "best" else np.zeros(G, int)
    return np.eye(K)[kept_G]


def raft_loss(params: Params, rows: Batch, key: Any, **model: Any) -> Loss:
    """The loss of SFT: cross-entropy of the responses, averaged over their tokens (step 3)."""
    logp_BR = rollout.token_logp(params, rows, **model)
    weight = jnp.sum(rows["mask_BR"], dtype=jnp.float32)
    return -masked_mean(logp_BR, rows["mask_BR"]), (weight, {})


def raft(config: RAFT, start: Start) -> Algorithm:
    """RAFT on prompts, with one update for each set of samples."""

    def advantage(score_GK: np.ndarray, kl_GK: np.ndarray) -> np.ndarray:
        return raft_advantages(score_GK - config.beta * kl_GK, config.keep)

    return online(config, start, advantage, raft_loss, positive_only=True)


# ------------------------------------------------------------------------------------ the loop


def check(config: Config) -> None:
    """Raises ValueError or OSError for flags that cannot work, before anything is loaded."""
    mesh = checks.check_run(config, type(config).__name__.lower())
    checks.check_rows("--batch_size", config.batch_size, 1, mesh)
    model = pretrained.check(config.model, mesh, tokenizer=config.tokenizer, scalar_head=False)
    lora.check(config.lora, config.model, model, config.tokenizer)
    check_lengths(config, model)
    if isinstance(config, Online):
        scoring.check(config.reward, mesh)
    if config.gold:
        scoring.check(RewardConfig(config.gold), mesh, "--gold")
    data.check(config.data, "comparisons" if isinstance(config, DPO) else "prompts")


def check_lengths(config: Config, model: ModelConfig | None) -> None:
    """Raises ValueError if a flag asks for more tokens than the model's context holds."""
    R = config.max_new_tokens
    room = checks.data_tokens("--data", config.data, 1 if isinstance(config, DPO) else R)
    checks.check_tokens(model, [("--max_new_tokens", R, 1), *room])


def swap_loss(config: Config) -> None:
    """Trains by the algorithm that the config's class belongs to."""
    began, name = time.perf_counter(), type(config).__name__.lower()
    with Run(config, stage=name) as run:
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
        base = lora.shared_base(origin, model, params)
        start = Start(mesh, model, params, tokenizer, base)
        algorithms: Any = {DPO: dpo, GRPO: grpo, RLOO: rloo, RAFT: raft}
        algorithm: Algorithm = algorithms[type(config)](config, start)
        held_out = prompts_that_fit(config, start.model, algorithm.held_out)
        judge = gold.load_judge(config.gold, config.data.spec, mesh, tokenizer, config.model_dtype)
        assess = make_assess(config, start, algorithm.reward, judge, held_out)
        # A key for each policy, because a win rate is of independent samples.
        before_key, now_key = jax.random.split(jax.random.key(config.seed))
        with run.phase("sampling responses of the start to held-out prompts"):
            before = assess(start.params, before_key)

        tx, key = train.adam(config.learning_rate), jax.random.key(config.seed)
        layout = state.shardings(trained, tx)
        step_fn = train.make_train_step(algorithm.loss_fn, tx, config.microbatches, layout)
        current, done, _ = run.restore(state.create(trained, tx), lora.frozen_weights(origin))
        if config.eval_every and not done:
            policies.log(run, 0, before, before)
        batches = algorithm.stream.iterate(done)
        for step, batch in zip(run.steps(done, config.steps), batches, strict=False):
            step_key = jax.random.fold_in(key, step)
            with run.phase("preparing the batch of the update"):
                policy = models.whole(current.params, frozen)
                rows, tokens, rollout_metrics = algorithm.prepare(policy, batch, step_key)
                del policy  # the step donates it
            current, metrics = step_fn(current, rows, step_key, frozen)
            run.log(step, metrics | rollout_metrics, tokens=tokens)
            if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
                with run.phase("evaluating on held-out prompts"):
                    now = assess(models.whole(current.params, frozen), now_key)
                    policies.log(run, step, before, now)
            if run.should_save(step):
                run.save(step, current)

        policy = models.whole(current.params, frozen)
        lora.export(config.out, origin, start.model, policy, start.tokenizer)
        with run.phase("comparing with the start on held-out prompts"):
            after = assess(policy, now_key)
        run.console.print(policies.samples_table("held-out prompts", before, after))
        curves = {metric: [metric] for metric in config.CURVES}
        sampled = {"start": before, type(config).__name__: after}
        policies.finish(run, sampled, time.perf_counter() - began, curves)


def prompts_that_fit(config: Config, model: ModelConfig, held_out: Dataset) -> Dataset:
    """The first --eval_prompts held-out prompts that leave room for a response."""
    fits = held_out.prompt.lengths + config.max_new_tokens <= model.max_length
    if not fits.any():
        raise ValueError(
            f"--max_new_tokens {config.max_new_tokens}: no held-out prompt leaves room for a"
            f" response in the model's {model.max_length} tokens"
        )
    return held_out.take(fits & (np.cumsum(fits) <= config.eval_prompts))


def make_assess(
    config: Config,
    start: Start,
    reward: scoring.Rewards | None,
    judge: gold.Judge | None,
    held_out: Dataset,
) -> Callable[[Params, jax.Array], policies.Sampled]:
    """A function of (params, key) that samples responses to held-out prompts and measures them."""
    R = config.max_new_tokens
    prompts = [held_out.prompt[i].tolist() for i in range(len(held_out))]
    model: Any = {"config": start.model, "shard": config.constrainer(start.mesh)}
    everywhere = sharding.replicated(start.mesh)
    logp_of = jax.jit(functools.partial(rollout.token_logp, **model), out_shardings=everywhere)

    def assess(params: Params, key: jax.Array) -> policies.Sampled:
        responses, _ = rollout.sample(
            params,
            start.model,
            prompts,
            key,
            size=config.sample_batch,
            max_new_tokens=R,
            mesh=start.mesh,
        )
        rows = rollout.left_padded(prompts, max(map(len, prompts))) | responses

        def run_model(fn: Callable[[Batch], jax.Array]) -> np.ndarray:
            size = config.batch_size // config.microbatches
            return rollout.map_batches(fn, rows, size, [R], start.mesh)

        texts = start.tokenizer.batch_decode(rollout.token_ids(rows), skip_special_tokens=True)
        logp_BR, ref_logp_BR = (
            run_model(functools.partial(logp_of, x)) for x in (params, start.params)
        )
        return policies.measure(
            rows,
            held_out.records,
            texts,
            start.model.eos_ids,
            run_model,
            reward=reward,
            judge=judge,
            kl_B=(logp_BR - ref_logp_BR).sum(1, where=rows["mask_BR"]),
        )

    return assess


def cli(argv: Sequence[str] | None = None) -> None:
    algorithms: Any = DPO | GRPO | RLOO | RAFT
    swap_loss(parse(algorithms, {}, __doc__, argv, check))


if __name__ == "__main__":
    main(cli)
