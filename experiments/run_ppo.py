"""PPO-ptx: the paper's third step, against a reward model or your own function (section 3.5).

    python experiments/run_ppo.py                                   # the miniature, from nothing
    python experiments/run_ppo.py --preset instructgpt-6b --model runs/sft --reward runs/rm \
        --data jsonl:prompts.jsonl --pretrain 'jsonl:books/*.txt'
    python experiments/run_ppo.py --reward my_file.py:my_function --loss my_file.py:my_policy_loss

Hardware: two CPU cores suffice for the miniature: 60 iterations, 100 s, after those
of run_sft.py and run_rm.py, which run first where their runs are not there.
Result: by the gold judge the policy wins 62 % (58 to 65) against SFT on held-out prompts, at 1.2
nats of KL, and its loss on pretraining text falls from 3.8 to 1.8.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import run_rm
import run_sft
import tyro

from instructjax import (
    advantages,
    hf,
    losses,
    models,
    ppo,
    pretrained,
    responses,
    rewards,
    sampler,
    sharding,
    state,
    train,
)
from instructjax.config import RunConfig, parse
from instructjax.data import DataConfig, PackedRows, PromptRows, Record, Stream, load
from instructjax.evaluation import policies
from instructjax.evaluation.policies import Sampled
from instructjax.metrics import plot_curves
from instructjax.offload import freeze, rest
from instructjax.responses import Rows
from instructjax.rewards import RewardConfig
from instructjax.run import Run, main

# ------------------------------------------------------------------------------------- config


@dataclass(frozen=True, kw_only=True)
class PPO:
    """The algorithm."""

    minibatch: int = 16
    """Episodes of an update [App. C.4: 64]."""
    epochs: int = 1
    """Passes over a rollout, each in a new order [App. C.4: 1]."""
    microbatches: int = 1
    """Shares of a minibatch, sorted by length, whose gradients are added [ours]."""
    buckets: int = 2
    """Lengths that batches of responses are padded to; more waste less, compile longer [ours]."""
    clip: float = 0.2
    """Bound of the policy's ratio [App. C.4: 0.2]."""
    value_clip: float = 0.2
    """Bound of the value's change; `inf` is none [paper silent; 0.2 in lm-human-preferences]."""
    beta: float = 0.02
    """Of the KL penalty; 0 drops the reference model [App. C.4: 0.02]."""
    kl_target: float | None = None
    """Nats, summed over a response: beta adapts to reach them [paper: fixed beta]."""
    kl_horizon: float = 10_000
    """Episodes over which an adaptive beta reacts [lm-human-preferences: 10,000]."""
    max_kl: float | None = None
    """Stops the run, finished, once objective/kl is over this many nats [ours]."""
    gamma: float = 1.0
    """Discount [App. C.4: none]."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation [paper silent; 0.95 in lm-human-preferences]."""
    whiten_advantages: bool = True
    """Advantages of a rollout to mean 0 and variance 1 [paper silent; as lm-human-preferences]."""
    whiten_rewards: bool = False
    """Rewards of a rollout to variance 1, their mean kept [paper silent]."""
    clip_score: float | None = None
    """Scores are clipped to +- this [paper silent]."""
    missing_eos: advantages.MissingEOS = "none"
    """A response without EOS gets its score, that less a penalty, or a fixed one [paper silent]."""
    missing_eos_value: float | None = None
    """The penalty, 1 by default, or the fixed score, -1 by default [paper silent]."""
    rescore: bool | None = None
    """Behaviour log-probabilities from another pass of the policy, and not the sampler's own;
    default: only in bfloat16, where the two differ [ours]."""
    value: Literal["separate", "shared"] = "separate"
    """A value net of its own [App. C.4], or a head on the policy's trunk [lm-human-preferences]."""
    value_coef: float = 0.1
    """Of the value loss on a shared trunk [lm-human-preferences: 0.1]."""
    learning_rate: float = 1e-4
    """Of the policy, constant after the warm-up [App. C.4 swept 2.55e-6 to 2.55e-5]."""
    value_learning_rate: float = 3e-4
    """Of the value net [App. C.4: 9e-6, 5e-6 for 175B]."""
    warmup: int = 10
    """Iterations from a tenth of the learning rates up to them [App. C.4: 10]."""
    ema: float = 0.95
    """Decay of the exported average of the policy's weights, an update [App. C.4: 0.992]."""


@dataclass(frozen=True, kw_only=True)
class PTX:
    """Pretraining gradients."""

    coef: float = 27.8
    """Of the pretraining gradient; 0 is plain PPO [App. C.4: 27.8]."""
    ratio: int = 8
    """Rows of pretraining text to an episode [App. C.4: 8]."""
    length: int = 128
    """Tokens of a row [paper silent]."""
    microbatches: int = 1
    """Shares of an update's text whose gradients are added [ours]."""


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """PPO-ptx."""

    FIXED = (*RunConfig.FIXED, "tokenizer", "pretrain", "reward", "loss", "ppo", "ptx")

    out: Path = Path("runs/ppo")
    model: str = "runs/sft"
    """The policy at the start, which is the KL reference too."""
    tokenizer: str | None = None
    """A Hugging Face directory or hub name; default: the model's own."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts."""
    pretrain: DataConfig = field(default_factory=lambda: DataConfig(""))
    """Text, for the pretraining gradients. Empty: the miniature's where --data is, or else none,
    which needs --ptx.coef 0."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What a response is worth."""
    value_model: str | None = None
    """What the value net starts from; default: the first reward model, or the policy with a new
    head where rewards are functions alone."""
    loss: str | None = None
    """A policy loss in place of PPO's, `my_file.py:my_policy_loss`; called as `losses.ppo_clip`."""
    batch_size: int = 64
    """Episodes of an iteration: prompts, with one response each [App. C.4: 512]."""
    max_new_tokens: int = 32
    """Longest response, in tokens [App. C: 1k]."""
    temperature: float = 1.0
    """Of sampling, and of all log-probabilities [App. C.4: 1]."""
    ppo: PPO = field(default_factory=PPO)
    ptx: PTX = field(default_factory=PTX)
    eval_every: int = 25
    """Iterations from one evaluation on held-out prompts to the next; the last always has one."""
    eval_prompts: int = 128
    """Held-out prompts of an evaluation."""
    final_prompts: int = 512
    """Held-out prompts of the report at the end."""
    offload: bool = False
    """Reference and reward models rest in host memory while they are not used."""
    model_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matmuls, and of frozen models; trained parameters are float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: full is least memory."""
    unroll: int = 1
    """Layers to a turn of the scan; all of them is fastest for small models on CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.ppo.minibatch:
            raise ValueError(
                f"--batch_size {self.batch_size}: not a multiple of --ppo.minibatch"
                f" {self.ppo.minibatch}"
            )
        if self.ppo.minibatch % self.ppo.microbatches:
            raise ValueError(
                f"--ppo.minibatch {self.ppo.minibatch}: not a multiple of --ppo.microbatches"
                f" {self.ppo.microbatches}"
            )
        if self.ptx.coef and self.ppo.minibatch * self.ptx.ratio % self.ptx.microbatches:
            raise ValueError(
                f"--ptx.microbatches {self.ptx.microbatches}: does not divide the"
                f" {self.ppo.minibatch * self.ptx.ratio} rows of text of an update"
            )
        if self.ptx.coef and not self.pretrain.spec and self.data.spec != "miniature":
            raise ValueError("--pretrain SPEC is needed for PPO-ptx; --ptx.coef 0 is plain PPO")
        if self.temperature <= 0:
            raise ValueError(f"--temperature {self.temperature}: must be positive")


PAPER = Config(
    model=tyro.MISSING,  # the 2-epoch SFT model of App. C.3, not the SFT baseline
    data=DataConfig(tyro.MISSING, max_prompt=1024),  # App. C: prompts over 1k tokens are dropped
    pretrain=DataConfig(tyro.MISSING),
    reward=RewardConfig(tyro.MISSING),  # section 3.5: one 6B reward model for all policies
    batch_size=512,  # App. C.4
    steps=500,  # App. C.4: 256k episodes
    max_new_tokens=1024,  # App. C: responses of at most 1k tokens
    temperature=1.0,  # App. C.4
    ppo=PPO(
        minibatch=64,  # App. C.4
        epochs=1,  # App. C.4
        clip=0.2,  # App. C.4
        value_clip=0.2,  # ours: the paper is silent
        beta=0.02,  # App. C.4
        gamma=1.0,  # App. C.4: no discount
        lam=0.95,  # ours, as in the earlier OpenAI code
        learning_rate=8.05e-6,  # ours: the highest that did not diverge without ptx (App. C.4)
        value_learning_rate=9e-6,  # App. C.4
        warmup=10,  # App. C.4, from a tenth
        ema=0.992,  # App. C.4
        buckets=4,  # ours
    ),
    ptx=PTX(
        coef=27.8,  # App. C.4
        ratio=8,  # App. C.4
        length=2048,  # ours: the context
        microbatches=8,  # ours
    ),
    eval_prompts=512,  # ours
    model_dtype="bfloat16",  # App. C: fp16, with fp32 masters
    remat="dots",  # ours
)
PRESETS = {
    # All ours. Text rows at 8 to an episode would take most of the time; at 27.8 their gradient
    # pulls this small policy back to a base model that is not trained out; and an average over
    # 125 updates would lag so short a run. A reward model of this size is soon exploited: a
    # larger beta.
    "miniature": Config(
        steps=60,
        batch_size=256,
        eval_every=20,
        unroll=2,
        ppo=PPO(minibatch=64, learning_rate=3e-4, value_learning_rate=1e-3, beta=0.15),
        ptx=PTX(coef=0.03, ratio=1, length=64),
    ),
    "instructgpt-1.3b": PAPER,
    "instructgpt-6b": PAPER,
    "instructgpt-175b": dataclasses.replace(
        PAPER,
        ppo=dataclasses.replace(
            PAPER.ppo,
            learning_rate=2.45e-6,  # ours: that of its SFT
            value_learning_rate=5e-6,  # App. C.4
        ),
    ),
}


def run_ppo(config: Config) -> dict[str, Any]:
    """Trains and evaluates; returns what results.json holds."""
    began = time.perf_counter()
    miniature = config.data.spec == "miniature"
    if miniature:
        ensure_sft_and_rm(config)
    with Run(config, stage="ppo") as run:
        flags, temperature = config.ppo, config.temperature

        # ------------------------------------------------------------------------- the four models

        mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
        shard = sharding.constrainer(mesh)
        check_rows(config, mesh)
        model, params, tokenizer = pretrained.load(
            config.model, mesh, tokenizer=config.tokenizer, seed=config.seed
        )
        if model.scalar_head:
            raise ValueError(f"--model {config.model}: a reward model, not a language model")
        computed = {"dtype": config.model_dtype, "remat": config.remat, "unroll": config.unroll}
        model = dataclasses.replace(model, **computed)
        reward = rewards.load(config.reward, mesh, tokenizer, config.model_dtype, config.offload)
        reference = None
        if flags.beta > 0 or flags.kl_target is not None:
            reference = rest(freeze(params, config.model_dtype), config.offload)

        policy, value, value_model = params, None, None
        if flags.value == "shared":
            policy = ppo.with_value_head(params, model.width, mesh)
        else:
            value_model, value = load_value_net(config, mesh, model, params, tokenizer)

        # ------------------------------------------------------------------------------- the data

        R = config.max_new_tokens
        read = functools.partial(load, tokenizer=tokenizer)
        fits = model.max_length - R + 1
        seen = read(config.data, "prompts", split="train", context=fits)
        unseen = read(config.data, "prompts", split="validation", context=fits)
        lengths = np.concatenate([half.prompt.lengths for half in (seen, unseen)])
        widths = sampler.buckets(lengths.tolist())
        P = min(widths[-1], model.max_length - R)
        buckets = responses.bucket_sizes(R, flags.buckets)
        prompt_sizes, sizes = (" or ".join(map(str, x)) for x in (widths, buckets))
        print(f"  prompts are padded to {prompt_sizes} tokens, responses to {sizes}")
        stream = Stream(PromptRows(seen), config.batch_size, seed=config.seed)

        updates = flags.epochs * config.batch_size // flags.minibatch  # of an iteration
        text = unseen_text = None
        pretrain = config.pretrain
        if miniature and not pretrain.spec:
            pretrain = dataclasses.replace(pretrain, spec="miniature")
        if pretrain.spec:
            packed = functools.partial(PackedRows, length=config.ptx.length)
            size = config.ptx.ratio * flags.minibatch
            own = sharding.own_rows(mesh, size)
            streamed = functools.partial(Stream, batch_size=size, seed=config.seed, own=own)
            text = streamed(packed(read(pretrain, "text", split="train")))
            unseen_text = streamed(packed(read(pretrain, "text", split="validation")))
        put_text = functools.partial(jax.make_array_from_process_local_data, sharding.batched(mesh))

        # ------------------------------------------------------------- losses, optimizers, state

        def schedule(peak: float) -> optax.Schedule:
            """Constant, after a line from a tenth of it (App. C.4)."""
            return optax.linear_schedule(0.1 * peak, peak, max(1, flags.warmup * updates))

        learning_rate = schedule(flags.learning_rate)
        policy_tx = train.adam(learning_rate)
        value_tx = train.adam(schedule(flags.value_learning_rate))
        policy_keywords = {
            "config": model,
            "loss": losses.ppo_clip if config.loss is None else load_loss(config.loss),
            "clip": flags.clip,
            "temperature": temperature,
            "shard": shard,
        }
        if value_model is None:
            coefs = {"value_clip": flags.value_clip, "value_coef": flags.value_coef}
            policy_loss = functools.partial(ppo.joint_loss, **policy_keywords, **coefs)
            value_loss = None
        else:
            policy_loss = functools.partial(ppo.policy_loss, **policy_keywords)
            value_loss = functools.partial(
                ppo.value_loss, config=value_model, clip=flags.value_clip, shard=shard
            )
        text_loss = functools.partial(ppo.ptx_loss, config=model, shard=shard)

        current = ppo.PPOState(
            policy=state.create(policy, policy_tx),
            value=None if value is None else state.create(value, value_tx),
            ema=jax.tree.map(jnp.copy, policy),
            beta=jax.device_put(jnp.float32(flags.beta), sharding.replicated(mesh)),
        )
        update = ppo.make_update(
            policy_loss,
            value_loss,
            text_loss if config.ptx.coef else None,
            policy_tx,
            value_tx,
            ptx_coef=config.ptx.coef,
            ema_decay=flags.ema,
            layout=jax.tree.map(lambda x: x.sharding, current),
        )
        seed_key = jax.random.key(config.seed)
        eval_key, before_key = jax.random.split(jax.random.fold_in(seed_key, 2**31 - 1))
        total = config.steps
        if total is None:
            total = math.ceil(len(seen) / config.batch_size)
        current, start, meta = run.restore(current)
        del policy, value

        # ------------------------------------------------------------------------------ a rollout

        def roll_out(params: models.Params, prompts, indices, key: jax.Array) -> tuple[Rows, float]:
            """A response to each prompt, and the share of the sampler's slots that were live."""
            sampled = sampler.generate(
                ppo.without_value_head(params),
                model,
                prompts,
                key,
                max_new_tokens=R,
                temperature=temperature,
                indices=indices,
                widths=widths,
                mesh=mesh,
            )
            names = ("tokens_BR", "mask_BR", "logp_BR")
            rows = {name: sharding.fetch(getattr(sampled, name)) for name in names}
            return responses.left_padded(prompts, P) | rows, float(sampled.live_fraction)

        def over(rows: Rows, fn: Callable[..., jax.Array], *frozen: Any) -> np.ndarray:
            of_rows = functools.partial(fn, *frozen)
            return responses.map_batches(of_rows, rows, flags.minibatch, buckets, mesh)

        compiled = functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
        logp_of = compiled(
            functools.partial(
                responses.token_logp, config=model, temperature=temperature, shard=shard
            )
        )
        values = ppo.head_values if value_model is None else responses.token_values
        value_of = compiled(functools.partial(values, config=value_model or model, shard=shard))

        def score(rows: Rows, records: Sequence[Record]) -> tuple[np.ndarray, dict[str, float]]:
            texts = tokenizer.batch_decode(responses.token_ids(rows), skip_special_tokens=True)
            prompts = [record.prompt for record in records]
            return reward.score(functools.partial(over, rows), prompts, texts, records)

        experience = jax.jit(
            functools.partial(
                ppo.make_experience,
                gamma=flags.gamma,
                lam=flags.lam,
                missing_eos=flags.missing_eos,
                missing_eos_value=missing_eos_value(flags),
                clip_score=flags.clip_score,
                whiten_rewards=flags.whiten_rewards,
                whiten_advantages=flags.whiten_advantages,
            )
        )
        rescore = config.model_dtype != "float32" if flags.rescore is None else flags.rescore

        # ----------------------------------------------------------------------------- evaluation

        def assess(params: models.Params, key: jax.Array, count: int) -> Sampled:
            """One response to each of the first held-out prompts, at the training temperature."""
            count = min(count, len(unseen))
            records = unseen.records[:count]
            prompts = [unseen.prompt[i].tolist() for i in range(count)]
            rows, _ = roll_out(params, prompts, range(count), key)
            kl_B = None
            if reference is not None:
                own_BR = over(rows, logp_of, params) if rescore else rows["logp_BR"]
                ref_BR = over(rows, logp_of, reference.awake())
                kl_B = (own_BR - ref_BR).sum(1, where=rows["mask_BR"])
            texts = tokenizer.batch_decode(responses.token_ids(rows), skip_special_tokens=True)
            return Sampled(
                prompts=[record.prompt for record in records],
                texts=texts,
                score_B=score(rows, records)[0],
                kl_B=kl_B,
                length_B=rows["mask_BR"].sum(1),
                ended_B=responses.ended(rows, model.eos_ids),
                utility_B=gold_utilities(records, texts) if miniature else None,
            )

        text_loss_of = jax.jit(lambda params, batch: text_loss(params, batch, None))

        def held_out_text_loss(params: models.Params) -> float:
            """Nats a token of up to 16 batches of held-out pretraining text."""
            means, tokens = [], []
            for batch, _ in zip(unseen_text.once() if unseen_text else [], range(16), strict=False):
                mean, (weight, _) = text_loss_of(params, jax.tree.map(put_text, batch))
                means.append(float(mean))
                tokens.append(float(weight))
            return float(np.average(means, weights=tokens)) if means else math.nan

        def evaluate(step: int) -> None:
            now = assess(current.policy.params, eval_key, config.eval_prompts)
            found = {f"validation/{name}": value for name, value in now.means().items()}
            if unseen_text is not None:
                found["ptx/validation_loss"] = held_out_text_loss(current.policy.params)
            if now.utility_B is not None and before.utility_B is not None:
                count = len(now.utility_B)
                found["validation/win_rate"] = policies.win_rate(
                    now.utility_B, before.utility_B[:count]
                )[0]
            run.log(step, found)
            for prompt, text, scored in zip(now.prompts[:4], now.texts, now.score_B, strict=False):
                shown = {"prompt": prompt, "response": text, "score": float(scored)}
                run.metrics.sample(step, shown)
            run.console.print(policies.samples_table(f"iteration {step:,}", before, now))

        before = assess(params, before_key, config.final_prompts)
        before_text = held_out_text_loss(params)
        del params

        # ----------------------------------------------------------------------------------- loop

        if start == 0:
            evaluate(0)
        if meta.get("stopped"):
            total = start
        shuffled_text = text.iterate(start * updates) if text and config.ptx.coef else None
        for step, asked in zip(run.steps(start, total), stream.iterate(start), strict=False):
            clock = [time.perf_counter()]
            policy_params = current.policy.params
            key = jax.random.fold_in(seed_key, step)
            rows, live = roll_out(policy_params, asked["prompts"], asked["indices"], key)
            clock.append(time.perf_counter())

            score_B, terms = score(rows, asked["records"])
            value_params = policy_params if current.value is None else current.value.params
            rows["value_BR"] = over(rows, value_of, value_params)
            sampled_BR = rows["logp_BR"]
            if rescore:
                rows["logp_BR"] = over(rows, logp_of, policy_params)
            ref_BR = rows["logp_BR"]  # without a reference the KL is 0
            if reference is not None:
                ref_BR = over(rows, logp_of, reference.awake())
            names = ("logp_BR", "value_BR", "mask_BR")
            logp_BR, value_BR, mask_BR = (rows[name] for name in names)
            made, metrics = experience(
                logp_BR,
                ref_BR,
                value_BR,
                mask_BR,
                score_B,
                responses.ended(rows, model.eos_ids),
                current.beta,
            )
            rows |= jax.device_get(made)
            metrics |= {f"reward/{name}": value for name, value in terms.items()}
            clock.append(time.perf_counter())

            found: list[dict[str, float]] = []
            for index in minibatches(config, step):
                size = flags.minibatch // flags.microbatches
                parts = [
                    responses.put(part, mesh)
                    for _, part in responses.batches(rows, index, size, buckets)
                ]
                texts = []
                if shuffled_text is not None:
                    texts = [jax.tree.map(put_text, x) for x in shares(next(shuffled_text), config)]
                current, one = update(current, parts, int(mask_BR[index].sum()), texts)
                found.append(jax.device_get(one))
            metrics |= {name: float(np.mean([x[name] for x in found])) for name in found[0]}
            mismatch = found[0]["policy/logp_change"]  # of the policy as it sampled
            if rescore:
                mismatch = np.abs(logp_BR - sampled_BR)[mask_BR].mean()
            metrics |= {
                "rollout/logp_mismatch": mismatch,
                "rollout/live_fraction": live,
                "optim/learning_rate": jnp.asarray(learning_rate((step - 1) * updates)),
            }
            if flags.kl_target is not None:
                beta = advantages.adapt_beta(
                    current.beta,
                    metrics["objective/kl"],
                    config.batch_size,
                    target=flags.kl_target,
                    horizon=flags.kl_horizon,
                )
                beta = jax.device_put(beta, sharding.replicated(mesh))
                current = dataclasses.replace(current, beta=beta)
            jax.block_until_ready(current)
            clock.append(time.perf_counter())
            for name, seconds in zip(("rollout", "score", "update"), np.diff(clock), strict=True):
                metrics[f"time/{name}"] = seconds
            run.log(step, metrics, tokens=int(mask_BR.sum()))

            stopped = flags.max_kl is not None and float(metrics["objective/kl"]) > flags.max_kl
            if step % config.eval_every == 0 or step == total or stopped:
                evaluate(step)
            if run.should_save(step) or stopped:
                run.save(step, current, {"stopped": stopped})
            if stopped:
                print(f"--ppo.max_kl {flags.max_kl}: objective/kl is over it at step {step}")
                break

        # ------------------------------------------------------------------------ what came of it

        strip = ppo.without_value_head
        hf.save(config.out / "export", model, strip(current.ema), tokenizer)
        after = {
            "PPO, averaged weights": strip(current.ema),
            "PPO, last weights": strip(current.policy.params),
        }
        sampled = {"SFT": before}
        losses_of_text = {"SFT": before_text}
        for name, trained in after.items():
            sampled[name] = assess(trained, eval_key, config.final_prompts)
            losses_of_text[name] = held_out_text_loss(trained)
        return report(config, run, sampled, losses_of_text, time.perf_counter() - began)


# ------------------------------------------------------------------------------------- helpers


def ensure_sft_and_rm(config: Config) -> None:
    """Runs the miniature's earlier steps with their defaults, or finishes them, where needed."""
    for path, default, script in (
        (config.model, run_sft.Config().out, "run_sft.py"),
        *((spec, run_rm.Config().out, "run_rm.py") for spec in config.reward.spec),
    ):
        if Path(path) != default:
            continue
        if pretrained.finished(default):
            print(f"{default} is there: {script} is not run again")
            continue
        print(f"{default} is not there yet: running {script} first")
        if script == "run_sft.py":
            preset = dataclasses.replace(run_sft.PRESETS["miniature"], preset="miniature")
            run_sft.run_sft(dataclasses.replace(preset, resume=True))
        else:
            preset = dataclasses.replace(run_rm.PRESETS["miniature"], preset="miniature")
            run_rm.run_rm(dataclasses.replace(preset, resume=True))


def check_rows(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Every batch must divide over the devices that share it."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = {
        "--ppo.minibatch over --ppo.microbatches": config.ppo.minibatch // config.ppo.microbatches,
        "--ppo.minibatch x --ptx.ratio over --ptx.microbatches": (
            config.ppo.minibatch * config.ptx.ratio // config.ptx.microbatches
        ),
    }
    for name, count in rows.items():
        if count % parts:
            raise ValueError(
                f"{name} is {count} rows, which do not divide over data x fsdp of {parts} devices"
            )


def missing_eos_value(flags: PPO) -> float:
    if flags.missing_eos_value is not None:
        return flags.missing_eos_value
    return -1.0 if flags.missing_eos == "fixed" else 1.0


def load_value_net(
    config: Config,
    mesh: jax.sharding.Mesh,
    model: models.ModelConfig,
    params: models.Params,
    tokenizer: Any,
) -> tuple[models.ModelConfig, models.Params]:
    """The reward model's copy (App. C.4), bias included; or the policy's with a new head."""
    found = [spec for spec in config.reward.spec if not rewards.is_function(spec)]
    path = config.value_model or (found[0] if found else None)
    if path is None:
        return run_rm.born(model, params, config.seed, mesh)
    own, params = rewards.load_model(path, mesh, tokenizer, "float32", "--value_model")
    computed = {"dtype": config.model_dtype, "remat": config.remat, "unroll": config.unroll}
    return dataclasses.replace(own, **computed), params


def load_loss(spec: str) -> ppo.PolicyLoss:
    """A user's array loss, which must return [B, R]."""
    function = rewards.load_function(spec, "--loss")

    def loss(logp_BR, old_logp_BR, advantages_BR, clip):
        loss_BR = function(logp_BR, old_logp_BR, advantages_BR, clip)
        if jnp.shape(loss_BR) != logp_BR.shape:
            raise ValueError(
                f"--loss {spec}: returned shape {list(jnp.shape(loss_BR))} for responses of"
                f" {list(logp_BR.shape)}; it must return the loss of each token, unreduced"
            )
        return loss_BR

    return loss


def minibatches(config: Config, step: int) -> list[np.ndarray]:
    """Row numbers of each update of an iteration: a new order each epoch, of (seed, step) alone."""
    random = np.random.default_rng([config.seed, step])
    orders = [random.permutation(config.batch_size) for _ in range(config.ppo.epochs)]
    return [part for order in orders for part in order.reshape(-1, config.ppo.minibatch)]


def shares(batch: dict[str, np.ndarray], config: Config) -> list[dict[str, np.ndarray]]:
    """An update's text in --ptx.microbatches parts."""
    count = config.ptx.microbatches
    return [{name: x[i::count] for name, x in batch.items()} for i in range(count)]


def gold_utilities(records: Sequence[Record], texts: Sequence[str]) -> np.ndarray:
    """The miniature's gold judge on responses."""
    from instructjax.miniature import judge

    pairs = zip(records, texts, strict=True)
    return np.array([judge(dict(record.row), text).utility for record, text in pairs])


def report(
    config: Config,
    run: Run,
    sampled: dict[str, Sampled],
    text_losses: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    """Prints and writes what came of it."""
    base = sampled["SFT"]
    results = policies.results(sampled, text_losses) | {"seconds": seconds}
    if jax.process_index() != 0:
        return results
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    with (config.out / "samples_after.jsonl").open("w", encoding="utf-8") as file:
        for i, prompt in enumerate(base.prompts):
            line = {"prompt": prompt} | {name: one.texts[i] for name, one in sampled.items()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    panels = {
        "score": ("objective/score", "validation/score"),
        "KL, nats a response": ("objective/kl", "validation/kl"),
        "length, tokens": ("rollout/length", "validation/length"),
        "entropy, nats a response": ("objective/entropy",),
        "value net": ("value/loss", "value/explained_variance"),
        "pretraining text, nats a token": ("ptx/loss", "ptx/validation_loss"),
    }
    if base.utility_B is not None:
        panels["wins against SFT"] = ("validation/win_rate",)
    plot_curves(config.out, panels, config.out / "curves.png")
    run.console.print(policies.table(results, len(base.prompts)))
    names = ("metrics.jsonl", "samples.jsonl", "samples_after.jsonl", "results.json", "curves.png")
    wrote = [*(config.out / name for name in names), config.out / "export"]
    next_command = f"python experiments/sample.py --model {config.out}"
    run.finish({"seconds": seconds}, wrote, next_command)
    return results


def cli(argv: Sequence[str] | None = None) -> None:
    run_ppo(parse(Config, PRESETS, __doc__, argv))


if __name__ == "__main__":
    main(cli)
