r"""PPO-ptx: the paper's third step, against a reward model or your own function (section 3.5).

    python experiments/run_ppo.py                                   # the miniature, from nothing
    python experiments/run_ppo.py --preset quick                    # a first look, in fewer steps
    python experiments/run_ppo.py --preset instructgpt-6b --model runs/sft --reward runs/rm \
        --data jsonl:prompts.jsonl --pretrain 'jsonl:books/*.txt'
    python experiments/run_ppo.py --model runs/sft --reward runs/rm --data jsonl:prompts.jsonl \
        --ptx.coef 0                                                # plain PPO on your own data
    python experiments/run_ppo.py --reward my_file.py:my_function --loss my_file.py:my_policy_loss

Without --preset, the miniature's data get the preset `miniature`, and other data get `small`, which
is for models of less than 1B parameters.

PPO-ptx maximises, with x a prompt and y a response (InstructGPT, eq. 2),

    E[r(x, y) - beta log(pi(y|x) / pi_ref(y|x))] + gamma E[log pi(pretraining text)].

An iteration:

    1. The policy samples one response to each prompt of a batch.
    2. The reward model scores each response.
    3. The policy, the reference and the value net run on the rollout. The reference is the policy
       as it was at the start.
    4. Each token earns -beta (log pi - log pi_ref). The last token also earns the score.
    5. GAE turns rewards and values into advantages and returns.
    6. For each minibatch, Adam follows the gradient of PPO's clipped loss plus gamma times the
       gradient of the language-modelling loss of pretraining text.
    7. The value net follows the gradient of its own clipped loss.

Hardware: two CPU cores suffice for the miniature: 120 iterations, 195 s. run_sft.py and run_rm.py
run first where runs/sft and runs/rm are missing.
OUT gets export/ and, with --lora.rank, adapter/ (docs/lora.md).
Result: by the gold judge the policy wins 66 % (63 to 68) against SFT on held-out prompts, at 1.5
nats of KL. Its loss on pretraining text falls from 3.9 to 1.5.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import run_rm
import run_sft
from jax.sharding import Mesh
from ppo_config import PRESETS, Config

from instructjax import (
    advantages,
    data,
    hf,
    losses,
    ppo,
    rollout,
    sampler,
    scoring,
    sft,
    sharding,
    state,
    train,
)
from instructjax.data import DataConfig, Dataset, PackedRows, PromptRows, Record, Stream
from instructjax.evaluation import gold, policies
from instructjax.models import PRESETS as MODELS
from instructjax.models import ModelConfig, Params, split, whole
from instructjax.offload import Offloaded, freeze, to_host
from instructjax.run import RESUMABLE, Run, adapters, checks, lora, main, parse, pretrained
from instructjax.run.flags import preset_of
from instructjax.run.process import return_memory
from instructjax.train import Batch, Metrics

ENOUGH_END = 0.8  # share of the first responses that end, below which `cut_responses` warns
PANELS = {  # of curves.png
    "score": ("objective/score", "validation/score"),
    "KL, nats a response": ("objective/kl", "validation/kl"),
    "length, tokens": ("rollout/length", "validation/length"),
    "entropy, nats a response": ("objective/entropy",),
    "value net": ("value/loss", "value/explained_variance"),
    "pretraining text, nats a token": ("ptx/loss", "ptx/validation_loss"),
}

# --------------------------------------------------------------------------------------- the loop


def run_ppo(config: Config) -> dict[str, Any]:
    """Trains and evaluates; returns what results.json holds."""
    began = time.perf_counter()
    print(config.headline)
    ensure_sft_and_rm(config)
    with Run(config, stage="ppo") as run:
        flags = config.ppo
        mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())

        # The four models: policy, reference, reward model, value net.
        model, params, tokenizer, origin = load_policy(config, mesh)
        check_lengths(config, model)
        base = lora.shared_base(origin, model, params)
        reward = scoring.load(
            config.reward, mesh, tokenizer, config.model_dtype, config.offload, base=base
        )
        judge = gold.load_judge(config.gold, config.data.spec, mesh, tokenizer, config.model_dtype)
        reference = None
        if flags.beta > 0:
            reference = to_host(
                freeze(start_of(origin, params), config.model_dtype), config.offload
            )
        policy, value_model, value = load_value_net(config, mesh, model, params, tokenizer, base)
        (policy, frozen), (value, value_frozen) = split(policy), split(value or {})
        frozen_weights = lora.frozen_weights(origin) | value_weights(config, base)

        # Prompts and pretraining text, each split in two.
        context = model.max_length - config.max_new_tokens + 1
        read = pretrained.reader(model, tokenizer)
        prompts, held_out = (
            read(config.data, "prompts", split=split, context=context)
            for split in ("train", "validation")
        )
        stream = Stream(PromptRows(prompts), config.batch_size, seed=config.seed)
        text_stream, held_out_text = load_text(config, read, mesh)
        total = config.steps
        if total is None:
            total = math.ceil(len(prompts) / config.batch_size)

        # What is compiled, and what is measured. SFT is assessed before there are optimizers.
        lengths = np.concatenate([prompts.prompt.lengths, held_out.prompt.lengths])
        programs = Programs(
            *(config, model, value_model, policy, value, mesh, sampler.buckets(lengths.tolist())),
            *(frozen, value_frozen),
        )
        widths = programs.prompt_widths, programs.response_widths
        padded = (" or ".join(map(str, sizes)) for sizes in widths)
        print("  prompts are padded to {} tokens, responses to {}".format(*padded))
        seed_key = jax.random.key(config.seed)
        eval_key, before_key = jax.random.split(jax.random.fold_in(seed_key, 2**31 - 1))
        evaluation = Evaluation(
            programs, tokenizer, reward, judge, reference, held_out, held_out_text
        )
        with run.phase(f"evaluating SFT on {config.final_prompts} prompts"):
            before = evaluation.assess(params, before_key, config.final_prompts)
        if warning := cut_responses(config, float(before.ended_B.mean())):
            run.console.print(f"warning: {warning}")

        training = TrainingState(
            ppo.PPOState(
                policy=state.create(policy, programs.policy_tx),
                value=None if not value else state.create(value, programs.value_tx),
                ema=jax.tree.map(jnp.copy, policy) if flags.ema else None,
                beta=sharding.put(jnp.float32(flags.beta), sharding.replicated(mesh)),
            ),
            config.offload,
            run.checkpoints.wait,
        )
        del params, policy, value, base
        training.state, start, meta = run.restore(training.state, frozen_weights)

        def evaluate(step: int) -> None:
            doing = f"evaluating on {config.eval_prompts} prompts"
            with run.phase(doing, "evaluation"), training.sampling() as policy_params:
                now = evaluation.assess(policy_params, eval_key, config.eval_prompts)
            policies.log(run, step, before, now)

        if start == 0:
            evaluate(0)
        if meta.get("stopped"):
            total = start
        texts = itertools.repeat([])  # of each update
        if text_stream is not None:
            texts = map(programs.text_batches, text_stream.iterate(start * config.updates))
        for step, batch in zip(run.steps(start, total), stream.iterate(start), strict=False):
            # 1. Sample one response to each prompt. The noise depends on the episode's number.
            key = jax.random.fold_in(seed_key, step)
            episodes = range((step - 1) * config.batch_size, step * config.batch_size)
            doing = f"sampling {config.batch_size} responses"
            with run.phase(doing, "rollout"), training.sampling() as policy_params:
                rows, live_fraction = programs.sample(
                    policy_params, batch["prompts"], episodes, key
                )

            # 2. Score them.
            with run.phase("scoring the responses", "score"):
                score_B, score_terms = evaluation.score(rows, batch["records"])

            with run.phase("computing log-probabilities, values and advantages", "experience"):
                # 3. Log-probabilities and values of each token.
                sampler_logp_BR = rows["logp_BR"]
                if programs.rescore:
                    rows["logp_BR"] = programs.logp(training.state.policy.params, rows)
                ref_logp_BR = evaluation.reference_logp(rows)
                rows["value_BR"] = programs.values(training.state, rows)

                # 4 and 5. Rewards, advantages, returns.
                experience, metrics = programs.make_experience(
                    logp_BR=rows["logp_BR"],
                    ref_logp_BR=ref_logp_BR,
                    value_BR=rows["value_BR"],
                    mask_BR=rows["mask_BR"],
                    score_B=score_B,
                    ended_B=rollout.ended(rows, model.eos_ids),
                    beta=training.state.beta,
                )
                rows |= jax.device_get(experience)

            # 6 and 7. Update the policy and the value net on each minibatch.
            updates = []
            with run.phase("updating the policy and the value net", "update"):
                for index, text in zip(minibatches(config, step), texts, strict=False):
                    batches, tokens = programs.minibatch(rows, index)
                    training.state, update = programs.update(training.state, batches, tokens, text)
                    updates.append(jax.device_get(update))
                training.state = programs.adapt_beta(training.state, metrics)
                jax.block_until_ready(training.state)

            # Log, evaluate, save.
            metrics |= iteration_metrics(rows, sampler_logp_BR, score_terms, updates)
            metrics["rollout/live_fraction"] = live_fraction
            metrics["optim/learning_rate"] = programs.learning_rate((step - 1) * config.updates)
            run.log(step, metrics, tokens=int(rows["mask_BR"].sum()))
            stopped = flags.max_kl is not None and float(metrics["objective/kl"]) > flags.max_kl
            if step % config.eval_every == 0 or step == total or stopped:
                evaluate(step)
            if run.should_save(step) or stopped:
                run.save(step, training.state, {"stopped": stopped})
            if stopped:
                print(f"step {step}: objective/kl exceeds --ppo.max_kl {flags.max_kl}; stopping")
                break

        if run.stopping:  # asked for in the iteration that --ppo.max_kl ended
            sys.exit(RESUMABLE)

        # Export the policy, and compare it with SFT.
        weights = {"averaged": training.state.ema, "last": training.state.policy.params}
        trained = {
            f"PPO, {name} weights": ppo.without_value_head(params)
            for name, params in weights.items()
            if params is not None
        }
        del weights
        final = programs.whole(next(iter(trained.values())))
        lora.export(config.out, origin, model, final, tokenizer)
        del final
        training.drop()
        sampled = {"SFT": before}
        for name, params in trained.items():
            with run.phase(f"evaluating {name} on {config.final_prompts} prompts"):
                sampled[name] = evaluation.assess(params, eval_key, config.final_prompts)
        panels = PANELS
        if judge is not None:
            panels = panels | {"win rate against SFT": ("validation/win_rate",)}
        return policies.finish(run, sampled, time.perf_counter() - began, panels)


def cut_responses(config: Config, ended: float) -> str | None:
    """A warning if reward models are going to score many responses that are cut.

    They learn from whole responses, whose last token is EOS. What they say at another token is an
    accident, and the policy may learn no more than to end, or not to.

    Args:
      ended: share of the responses of the policy at the start that ended.
    """
    functions = all(map(scoring.is_function, config.reward.spec))
    if functions or config.ppo.missing_eos != "none" or ended >= ENOUGH_END:
        return None
    return (
        f"{1 - ended:.0%} of SFT's responses are cut at --max_new_tokens {config.max_new_tokens}."
        " A reward model that was trained on whole responses scores cut ones arbitrarily: raise"
        " --max_new_tokens, or give --ppo.missing_eos penalty or fixed"
    )


def minibatches(config: Config, step: int) -> list[np.ndarray]:
    """Row numbers of each update of an iteration: a new order each epoch, from (seed, step)."""
    random = np.random.default_rng([config.seed, step])
    orders = [random.permutation(config.batch_size) for _ in range(config.ppo.epochs)]
    return [index for order in orders for index in order.reshape(-1, config.ppo.minibatch)]


def iteration_metrics(
    rows: Batch,
    sampler_logp_BR: np.ndarray,
    score_terms: dict[str, float],
    updates: list[dict[str, Any]],
) -> dict[str, Any]:
    """What an iteration logs besides the metrics of its experience."""
    metrics = {name: float(np.mean([update[name] for update in updates])) for name in updates[0]}
    metrics |= {f"reward/{name}": mean for name, mean in score_terms.items()}
    metrics["rollout/tokens"] = int(rows["prompt_mask_BP"].sum() + rows["mask_BR"].sum())
    # Without --ppo.rescore, the first minibatch of the policy that sampled shows the mismatch.
    metrics["rollout/logp_mismatch"] = updates[0]["policy/logp_change"]
    if rows["logp_BR"] is not sampler_logp_BR:
        mismatch_BR = np.abs(rows["logp_BR"] - sampler_logp_BR)
        metrics["rollout/logp_mismatch"] = mismatch_BR[rows["mask_BR"]].mean()
    return metrics


class TrainingState:
    """The PPOState between phases. It makes room for the sampler.

    Sampling needs the most memory, since weights are then gathered over data and fsdp. With
    --offload everything that is trained, except the policy's weights, moves to host memory.
    """

    def __init__(self, ppo_state: ppo.PPOState, offload: bool, wait_for_save: Callable[[], None]):
        self.state: Any = ppo_state
        self._offload, self._wait_for_save = offload, wait_for_save

    @contextlib.contextmanager
    def sampling(self) -> Iterator[Params]:
        """Gives the policy's parameters. `state` is not to be used meanwhile."""
        return_memory()
        params = self.state.policy.params
        if self._offload:
            self._wait_for_save()  # a save in the background holds the arrays on the devices
            without_params = to_host(self._with_params(None), True)
            self.state = without_params.tree
        yield params
        if self._offload:
            self.state = without_params.on_device()
            self.state = self._with_params(params)
        return_memory()

    def drop(self) -> None:
        """Frees the optimizers and the value net."""
        self._wait_for_save()
        self.state = None

    def _with_params(self, params: Params | None) -> ppo.PPOState:
        policy: Any = dataclasses.replace(self.state.policy, params=params)
        return dataclasses.replace(self.state, policy=policy)


# ------------------------------------------------------ the flags, bound to the library's functions


class Programs:
    """Everything that an iteration compiles, with the flags bound. preflight.py compiles the same.

    Args:
      value_model, value: None where the value head is on the policy's trunk.
      policy, value: what is trained: arrays, or ShapeDtypeStructs that carry shardings.
      prompt_widths: tokens that prompts are padded to; see `sampler.buckets`.
      frozen, value_frozen: what the policy and the value net have besides; see `models.split`.
        Wherever a method takes parameters, these are added.
    """

    def __init__(
        self,
        config: Config,
        model: ModelConfig,
        value_model: ModelConfig | None,
        policy: Params,
        value: Params | None,
        mesh: Mesh,
        prompt_widths: Sequence[int] = (),
        frozen: Params | None = None,
        value_frozen: Params | None = None,
    ):
        flags, shard = config.ppo, config.constrainer(mesh)
        self.frozen, self.value_frozen = frozen or {}, value_frozen or {}
        replicated = sharding.replicated(mesh)
        self.config, self.model, self.mesh = config, model, mesh
        self.prompt_widths = prompt_widths
        longest = config.max_new_tokens
        self.response_widths = sampler.buckets(
            range(1, longest + 1), flags.buckets, 8, longest=longest
        )
        self.rescore = config.model_dtype != "float32" if flags.rescore is None else flags.rescore

        # Log-probabilities, values, experience.
        behaviour: Any = {"config": model, "temperature": config.temperature, "shard": shard}
        token_logp = functools.partial(rollout.token_logp, **behaviour)
        token_values = (
            functools.partial(ppo.head_values, config=model, shard=shard)
            if value_model is None
            else functools.partial(rollout.token_values, config=value_model, shard=shard)
        )
        self.token_logp = jax.jit(token_logp, out_shardings=replicated)
        self.token_values = jax.jit(token_values, out_shardings=replicated)
        self.make_experience = jax.jit(
            functools.partial(
                ppo.make_experience,
                gamma=flags.gamma,
                lam=flags.lam,
                missing_eos=flags.missing_eos,
                missing_eos_value=flags.missing_eos_score,
                clip_score=flags.clip_score,
                whiten_rewards=flags.whiten_rewards,
                whiten_advantages=flags.whiten_advantages,
            )
        )

        # Optimizers.
        self.learning_rate = self._warmup(flags.learning_rate)
        adam = functools.partial(train.adam, **dataclasses.asdict(config.adam))
        self.policy_tx = adam(self.learning_rate)
        self.value_tx = adam(self._warmup(flags.value_learning_rate))
        policy_layout = state.shardings(policy, self.policy_tx)

        # Losses, their gradients, and the steps of the optimizers.
        loss = losses.ppo_clip if config.loss is None else load_loss(config.loss)
        behaviour |= {"loss": loss, "clip": flags.clip}
        if value_model is None:
            coefs = {"value_clip": flags.value_clip, "value_coef": flags.value_coef}
            policy_loss = functools.partial(ppo.joint_loss, **behaviour, **coefs)
        else:
            policy_loss = functools.partial(ppo.policy_loss, **behaviour)
        ptx_loss = functools.partial(ppo.ptx_loss, config=model, shard=shard)
        self.policy_gradient = ppo.Gradient(policy_loss, policy_layout.params, self.frozen)
        self.ptx_gradient = ppo.Gradient(ptx_loss, policy_layout.params, self.frozen)
        self.policy_step = ppo.make_step(self.policy_tx, policy_layout, flags.ema)
        self.value_gradient = self.value_step = None
        if value_model is not None and value:
            value_loss = functools.partial(
                ppo.value_loss, config=value_model, clip=flags.value_clip, shard=shard
            )
            value_layout = state.shardings(value, self.value_tx)
            self.value_gradient = ppo.Gradient(value_loss, value_layout.params, self.value_frozen)
            self.value_step = ppo.make_step(self.value_tx, value_layout)
        self.ptx_loss = jax.jit(functools.partial(ptx_loss, key=None))
        self.count_targets = jax.jit(sft.count_targets)

    def _warmup(self, peak: float) -> optax.Schedule:
        """A constant learning rate after a linear warm-up from a tenth of it (App. C.4)."""
        updates = max(1, self.config.ppo.warmup * self.config.updates)
        return optax.linear_schedule(0.1 * peak, peak, updates)

    def whole(self, params: Params) -> Params:
        """All of a policy's parameters."""
        return whole(params, self.frozen)

    def sample(
        self, params: Params, prompts: Sequence[Sequence[int]], episodes: Any, key: jax.Array
    ) -> tuple[Batch, float]:
        """Rows of a rollout with a response to each prompt, and the share of live slots.

        Args:
          episodes: int for each prompt; its noise depends on this number and on the key alone.
        """
        config = self.config
        responses, live_fraction = rollout.sample(
            ppo.without_value_head(self.whole(params)),
            self.model,
            prompts,
            key,
            size=config.sample_batch,
            indices=episodes,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            widths=self.prompt_widths,
            mesh=self.mesh,
        )
        width = min(self.prompt_widths[-1], self.model.max_length - config.max_new_tokens)
        return rollout.left_padded(prompts, width) | responses, live_fraction

    def run_model(self, rows: Batch, fn: Callable[[Batch], jax.Array]) -> np.ndarray:
        """A function of a batch, for all rows of a rollout; see `rollout.map_batches`."""
        size = self.config.ppo.minibatch
        return rollout.map_batches(fn, rows, size, self.response_widths, self.mesh)

    def logp(self, params: Params, rows: Batch) -> np.ndarray:
        """logp_BR of the response tokens under a policy, at the sampling temperature."""
        return self.run_model(rows, functools.partial(self.token_logp, self.whole(params)))

    def values(self, ppo_state: ppo.PPOState, rows: Batch) -> np.ndarray:
        """value_BR of the state before each response token."""
        if ppo_state.value is None:
            params = self.whole(ppo_state.policy.params)
        else:
            params = whole(ppo_state.value.params, self.value_frozen)
        return self.run_model(rows, functools.partial(self.token_values, params))

    def minibatch(self, rows: Batch, index: np.ndarray) -> tuple[list[Batch], int]:
        """Some rows on their devices, and their live response tokens.

        The rows are sorted by length and split into --ppo.microbatches batches.
        """
        size = self.config.ppo.minibatch // self.config.ppo.microbatches
        batches = rollout.batches(rows, index, size, self.response_widths)
        tokens = int(rows["mask_BR"][index].sum())
        return [rollout.put(batch, self.mesh) for _, batch in batches], tokens

    def text_batches(self, batch: dict[str, np.ndarray]) -> list[Batch]:
        """An update's pretraining text on its devices, in --ptx.microbatches batches."""
        count, layout = self.config.ptx.microbatches, sharding.batched(self.mesh)
        put = functools.partial(jax.make_array_from_process_local_data, layout)
        return [{name: put(x[i::count]) for name, x in batch.items()} for i in range(count)]

    def update(
        self, ppo_state: ppo.PPOState, minibatch: list[Batch], tokens: int, text: list[Batch]
    ) -> tuple[ppo.PPOState, Metrics]:
        """One update of the policy and of the value net. The state is donated.

        Args:
          minibatch, tokens: from `minibatch`.
          text: from `text_batches`; empty: plain PPO.
        """
        policy, value = ppo_state.policy, ppo_state.value
        # The gradient of ppo.policy_loss, with losses.ppo_clip or --loss.
        grads, metrics = self.policy_gradient(policy.params, minibatch, tokens)
        if text:
            text_tokens = jax.block_until_ready(self.count_targets(text))
            grads, text_metrics = self.ptx_gradient(
                policy.params, text, text_tokens, self.config.ptx.coef, grads
            )
            metrics |= text_metrics
        policy, ema, norm = self.policy_step(policy, ppo_state.ema, grads)
        metrics["optim/grad_norm"] = jax.block_until_ready(norm)
        del grads  # frees memory for the value net's gradient
        if value is not None:
            assert self.value_gradient is not None
            assert self.value_step is not None
            grads, value_metrics = self.value_gradient(value.params, minibatch, tokens)
            value, _, norm = self.value_step(value, None, grads)
            metrics |= value_metrics | {"optim/value_grad_norm": norm}
        return ppo.PPOState(policy, value, ema, ppo_state.beta), metrics

    def adapt_beta(self, ppo_state: ppo.PPOState, metrics: Metrics) -> ppo.PPOState:
        """Moves beta towards --ppo.kl_target, if there is one."""
        flags = self.config.ppo
        if flags.kl_target is None:
            return ppo_state
        beta = advantages.adapt_beta(
            ppo_state.beta,
            metrics["objective/kl"],
            self.config.batch_size,
            target=flags.kl_target,
            horizon=flags.kl_horizon,
        )
        beta = jax.device_put(beta, sharding.replicated(self.mesh))
        return dataclasses.replace(ppo_state, beta=beta)


def load_loss(spec: str) -> ppo.PolicyLoss:
    """A user's array loss, checked to return [B, R]."""
    function = scoring.load_function(spec, "--loss")

    def loss(logp_BR, old_logp_BR, advantages_BR, clip):
        loss_BR = function(logp_BR, old_logp_BR, advantages_BR, clip)
        if jnp.shape(loss_BR) != logp_BR.shape:
            raise ValueError(
                f"--loss {spec}: returned shape {list(jnp.shape(loss_BR))} for responses of"
                f" {list(logp_BR.shape)}; it must return the loss of each token, unreduced"
            )
        return loss_BR

    return loss


# ------------------------------------------------------------------------------ held-out prompts


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores rollouts, and assesses policies on held-out prompts and text."""

    programs: Programs
    tokenizer: Any
    reward: scoring.Rewards
    judge: gold.Judge | None
    reference: Offloaded | None
    held_out: Dataset
    held_out_text: Stream | None

    def texts(self, rows: Batch) -> list[str]:
        return self.tokenizer.batch_decode(rollout.token_ids(rows), skip_special_tokens=True)

    def score(self, rows: Batch, records: Sequence[Record]) -> tuple[np.ndarray, dict[str, float]]:
        """(score_B, mean of each term) of a rollout; see `scoring.Rewards.score`."""
        run_model = functools.partial(self.programs.run_model, rows)
        prompts = [record.prompt for record in records]
        return self.reward.score(run_model, prompts, self.texts(rows), records)

    def reference_logp(self, rows: Batch) -> np.ndarray | None:
        """logp_BR under the reference, if there is one."""
        if self.reference is None:
            return None
        return self.programs.logp(self.reference.on_device(), rows)

    def assess(self, params: Params, key: jax.Array, count: int) -> policies.Sampled:
        """One response to each of the first `count` held-out prompts, and the ptx loss."""
        count = min(count, len(self.held_out))
        records = self.held_out.records[:count]
        prompts = [self.held_out.prompt[i].tolist() for i in range(count)]
        rows, _ = self.programs.sample(params, prompts, range(count), key)
        kl_B = None
        if (ref_logp_BR := self.reference_logp(rows)) is not None:
            rescored = self.programs.rescore
            logp_BR = self.programs.logp(params, rows) if rescored else rows["logp_BR"]
            kl_B = (logp_BR - ref_logp_BR).sum(1, where=rows["mask_BR"])
        return policies.measure(
            rows,
            records,
            self.texts(rows),
            self.programs.model.eos_ids,
            functools.partial(self.programs.run_model, rows),
            reward=self.reward,
            judge=self.judge,
            kl_B=kl_B,
            text_loss=self.text_loss(params),
        )

    def text_loss(self, params: Params) -> float | None:
        """Nats a token of up to 16 batches of held-out pretraining text."""
        if self.held_out_text is None:
            return None
        means, tokens = [], []
        for batch, _ in zip(self.held_out_text.once(), range(16), strict=False):
            for part in self.programs.text_batches(batch):
                mean, (weight, _) = self.programs.ptx_loss(self.programs.whole(params), part)
                means.append(float(mean))
                tokens.append(float(weight))
        return float(np.average(means, weights=tokens))


# ------------------------------------------------------------------------------- models and data


def earlier_steps(config: Config) -> list[tuple[str, Any, Callable[..., Any]]]:
    """(run directory, config, function) of the miniature's steps that the flags rely on."""
    if config.data.spec != "miniature":
        return []
    steps: list[Any] = [(config.model, run_sft.PRESETS, run_sft.run_sft)]
    steps += [(spec, run_rm.PRESETS, run_rm.run_rm) for spec in config.reward.spec]
    named = [(out, preset_of(presets, out), run_script) for out, presets, run_script in steps]
    return [step for step in named if step[1] is not None]


def check(config: Config) -> None:
    """Raises ValueError or OSError for flags that cannot work, before anything is loaded or run."""
    first = [Path(out) for out, _, _ in earlier_steps(config)]
    first = [out for out in first if not pretrained.finished(out)]
    named = [config.model, *config.reward.spec, config.value_model or "", *config.gold]
    coming = [name for name in named if Path(name) in first]  # as the flags spell them
    mesh = checks.check_run(config, "ppo", first)
    checks.check_rows("--ppo.minibatch", config.ppo.minibatch, config.ppo.microbatches, mesh)
    text = text_source(config)
    if text.spec:
        rows = config.ppo.minibatch * config.ptx.ratio
        flag = "--ppo.minibatch x --ptx.ratio"
        checks.check_rows(flag, rows, config.ptx.microbatches, mesh)
        data.check(text, "text", "--pretrain")
    model = MODELS["miniature"]
    if config.model not in coming:
        model = pretrained.check(config.model, mesh, tokenizer=config.tokenizer, scalar_head=False)
        lora.check(config.lora, config.model, model, config.tokenizer)
    check_lengths(config, model)
    scoring.check(config.reward, mesh, "--reward", coming)
    if config.value_model is not None and config.value_model not in coming:
        pretrained.check(config.value_model, mesh, flag="--value_model", scalar_head=True)
    if config.gold:
        scoring.check(scoring.RewardConfig(config.gold), mesh, "--gold", coming)
    if config.loss is not None:
        scoring.load_function(config.loss, "--loss")
    data.check(config.data, "prompts")


def check_lengths(config: Config, model: ModelConfig | None) -> None:
    """Raises ValueError if a flag asks for more tokens than the model's context holds."""
    R = config.max_new_tokens
    lengths = [("--max_new_tokens", R, 1), *checks.data_tokens("--data", config.data, R)]
    if text_source(config).spec:
        lengths.append(("--ptx.length", config.ptx.length, 0))
    checks.check_tokens(model, lengths)


def ensure_sft_and_rm(config: Config) -> None:
    """Runs the miniature's earlier steps by their presets, or finishes them, where needed."""
    for out, preset, run_script in earlier_steps(config):
        if pretrained.finished(Path(out)):
            print(f"{out} is there: {run_script.__name__}.py is not run again")
            continue
        print(f"{out} is not there yet: running {run_script.__name__}.py first")
        run_script(dataclasses.replace(preset, resume=True))


def load_policy(config: Config, mesh: Mesh) -> tuple[ModelConfig, Params, Any, lora.Origin | None]:
    """(config, parameters, tokenizer, origin of the adapters) of --model; see `lora.load`."""
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
    return config.compute(model), params, tokenizer, origin


def start_of(origin: lora.Origin | None, params: Params) -> Params:
    """What the reference has in place of the policy's trained parameters.

    Of LoRA that is the adapter that --model came with, or nothing: the base with its adapter off.
    """
    return split(params)[0] if origin is None or origin.adapter is not None else {}


def value_source(config: Config) -> tuple[str, str] | None:
    """(flag, model) of the reward model that the value net begins as; None if it is none."""
    reward_models = [spec for spec in config.reward.spec if not scoring.is_function(spec)]
    path = config.value_model or next(iter(reward_models), None)
    if config.ppo.value == "shared" or path is None:
        return None
    return "--value_model" if config.value_model else "--reward", path


def value_weights(config: Config, base: adapters.Base | None) -> dict[str, tuple[str, str]]:
    """With LoRA, a value net's frozen weights that are not the policy's; for `Run.restore`."""
    source = value_source(config)
    if base is None or source is None or scoring.adapter_on(base, source[1]) is not None:
        return {}
    flag, path = source
    return {flag: (path, hf.fingerprint(pretrained.export_of(path, flag)))}


def load_value_net(
    config: Config,
    mesh: Mesh,
    model: ModelConfig,
    params: Params,
    tokenizer: Any,
    base: adapters.Base | None = None,
) -> tuple[Params, ModelConfig | None, Params | None]:
    """(the policy's parameters, the value net's config and parameters).

    The value net starts as a copy of the reward model, bias included (App. C.4). Where rewards are
    functions alone it starts as the policy with a new head. With --ppo.value shared there is none:
    the head is among the policy's parameters. With LoRA it is an adapter and a head: on the
    policy's base if the reward model is, else on the reward model's frozen weights.
    """
    if config.ppo.value == "shared":
        return ppo.with_value_head(params, model.width, mesh), None, None
    if (source := value_source(config)) is None:
        return params, *run_rm.with_reward_head(model, params, config.seed, mesh)
    flag, path = source
    dtype = "float32" if base is None else config.model_dtype
    value_model, value = scoring.load_model(path, mesh, tokenizer, dtype, flag, base)
    if base is not None and "adapter" not in value:
        value_model, new = lora.with_adapter(config.lora, value_model, mesh, config.seed)
        value = {**value, **new}
    return params, config.compute(value_model), value


def text_source(config: Config) -> DataConfig:
    """--pretrain, or the miniature's text with its prompts; an empty SPEC: there is none."""
    if config.data.spec == "miniature" and not config.pretrain.spec:
        return dataclasses.replace(config.pretrain, spec="miniature")
    return config.pretrain


def load_text(
    config: Config, read: Callable[..., Dataset], mesh: Mesh
) -> tuple[Stream | None, Stream | None]:
    """Pretraining text to train on, if --ptx.coef is not 0, and held-out text to measure.

    Args:
      read: from `pretrained.reader`.
    """
    source = text_source(config)
    if not source.spec:
        return None, None
    size = config.ptx.ratio * config.ppo.minibatch
    train_text, held_out_text = (
        Stream(
            PackedRows(read(source, "text", split=split), config.ptx.length),
            size,
            seed=config.seed,
            host_rows=sharding.own_rows(mesh, size),
        )
        for split in ("train", "validation")
    )
    return train_text if config.ptx.coef else None, held_out_text


def cli(argv: Sequence[str] | None = None) -> None:
    run_ppo(parse(Config, PRESETS, __doc__, argv, check))


if __name__ == "__main__":
    main(cli)
