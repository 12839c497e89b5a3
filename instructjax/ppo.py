"""PPO-ptx (InstructGPT, section 3.5 and App. C.4): from a scored rollout to an update.

make_experience   rewards, advantages and returns of a whole rollout
policy_loss, ...  what is minimised, over rows as in responses.py
make_update       gradients of a minibatch and of pretraining text, one update, EMA
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from instructjax import advantages, losses, models, responses, sft, sharding
from instructjax.masked import masked_mean, masked_sum
from instructjax.models import ModelConfig, Params, Shard
from instructjax.responses import Rows
from instructjax.state import TrainState
from instructjax.train import LossFn, Metrics

# (logp_BR, old_logp_BR, advantages_BR, clip) -> loss_BR, as `losses.ppo_clip`
PolicyLoss = Callable[[jax.Array, jax.Array, jax.Array, float], jax.Array]
ValueLoss = Callable[[jax.Array, jax.Array, jax.Array, float], jax.Array]


@flax.struct.dataclass
class PPOState:
    """All that training changes."""

    policy: TrainState
    value: TrainState | None  # None where the value head is on the policy's trunk
    ema: Params  # exponential moving average of the policy, what is exported
    beta: jax.Array  # float32 [], of the KL penalty


# ------------------------------------------------------------------------------------ experience


def make_experience(
    logp_BR: jax.Array,
    ref_logp_BR: jax.Array,
    value_BR: jax.Array,
    mask_BR: jax.Array,
    score_B: jax.Array,
    ended_B: jax.Array,
    beta: jax.Array,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    missing_eos: advantages.MissingEOS = "none",
    missing_eos_value: float = 1.0,
    clip_score: float | None = None,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
) -> tuple[dict[str, jax.Array], Metrics]:
    """Rewards, advantages and returns of a whole rollout, from all devices at once.

    Args:
      logp_BR, ref_logp_BR: of the policy that sampled and of the reference, at the temperature of
        sampling.
      value_BR: of the state before each token.
      mask_BR: live tokens, EOS included.
      score_B: of each whole response.
      ended_B: whether its last live token is an EOS.
      beta: of the KL penalty.
      missing_eos, missing_eos_value: see `advantages.score_ended`.
      clip_score: scores are clipped to +- this.
      whiten_rewards: to variance 1, the mean kept.

    Returns:
      (advantage_BR and return_BR, metrics by the field's names)
    """
    live_B = jnp.any(mask_BR != 0, axis=1)
    score_B = advantages.score_ended(score_B, ended_B, missing_eos, missing_eos_value)
    if clip_score is not None:
        score_B = jnp.clip(score_B, -clip_score, clip_score)
    kl_BR = advantages.kl_estimate(logp_BR, ref_logp_BR)
    reward_BR = advantages.token_rewards(score_B, kl_BR, mask_BR, beta)
    paid_BR = (
        advantages.whiten(reward_BR, mask_BR, shift_mean=False) if whiten_rewards else reward_BR
    )
    advantage_BR, return_BR = advantages.gae(paid_BR, value_BR, mask_BR, gamma, lam)

    def summed(x_BR: jax.Array) -> jax.Array:  # over a response, averaged over responses
        return masked_mean(masked_sum(x_BR, mask_BR, axis=1), live_B)

    length_B = jnp.sum(mask_BR != 0, axis=1, dtype=jnp.int32)
    return_mean = masked_mean(return_BR, mask_BR)
    return_variance = masked_mean((return_BR - return_mean) ** 2, mask_BR)
    error = masked_mean((return_BR - value_BR) ** 2, mask_BR)
    metrics = {
        "objective/score": masked_mean(score_B, live_B),
        "objective/score_std": jnp.sqrt(
            masked_mean((score_B - masked_mean(score_B, live_B)) ** 2, live_B)
        ),
        "objective/kl": summed(kl_BR),
        "objective/kl_k3": summed(advantages.kl_estimate(logp_BR, ref_logp_BR, "k3")),
        "objective/beta": beta,
        "objective/reward": summed(reward_BR),
        # The sampled tokens' own surprise: an unbiased estimate that costs nothing.
        "objective/entropy": summed(-logp_BR),
        # As lm-human-preferences: a constant error counts against the value net.
        "value/explained_variance": 1 - error / jnp.maximum(return_variance, 1e-8),
        "value/mean": masked_mean(value_BR, mask_BR),
        "rollout/length": masked_mean(length_B.astype(jnp.float32), live_B),
        "rollout/eos_fraction": masked_mean(ended_B.astype(jnp.float32), live_B),
    }
    if whiten_advantages:
        advantage_BR = advantages.whiten(advantage_BR, mask_BR, shift_mean=True)
    return {"advantage_BR": advantage_BR, "return_BR": return_BR}, metrics


# -------------------------------------------------------------------------------------- the losses


def policy_loss(
    params: Params,
    rows: Rows,
    key: jax.Array | None,
    *,
    config: ModelConfig,
    loss: PolicyLoss = losses.ppo_clip,
    clip: float = 0.2,
    temperature: float = 1.0,
    shard: Shard = models.unsharded,
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """Mean of an array loss over response tokens; a `train.LossFn` once its keywords are bound.

    Args:
      rows: those of a rollout, with the behaviour's logp_BR and advantage_BR.
      key: not used: dropout is off in PPO.
      loss: (logp_BR, old_logp_BR, advantages_BR, clip) -> loss_BR.
    """
    del key
    logp_BR = responses.token_logp(
        params, rows, config=config, temperature=temperature, shard=shard
    )
    mean, metrics = _policy_terms(logp_BR, rows, loss, clip)
    return mean, (_tokens(rows), metrics)


def value_loss(
    params: Params,
    rows: Rows,
    key: jax.Array | None,
    *,
    config: ModelConfig,
    loss: ValueLoss = losses.value_clip,
    clip: float = 0.2,
    shard: Shard = models.unsharded,
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """Mean of an array loss over response tokens; see `policy_loss`.

    Args:
      rows: those of a rollout, with value_BR of the time of the rollout and return_BR.
      loss: (value_BR, old_value_BR, return_BR, clip) -> loss_BR.
    """
    del key
    value_BR = responses.token_values(params, rows, config=config, shard=shard)
    mean, metrics = _value_terms(value_BR, rows, loss, clip)
    return mean, (_tokens(rows), metrics)


def joint_loss(
    params: Params,
    rows: Rows,
    key: jax.Array | None,
    *,
    config: ModelConfig,
    loss: PolicyLoss = losses.ppo_clip,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
    temperature: float = 1.0,
    shard: Shard = models.unsharded,
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """Policy and value loss over one trunk, as in lm-human-preferences: `policy + coef * value`.

    Args:
      params: of a policy, with `value_head` beside its own leaves; see `with_value_head`.
    """
    del key
    hidden_BRD = responses.hidden_states(params, config, rows, shard)
    unembed_VD = models.unembedding(params)
    logp_BR = models.token_logp(
        hidden_BRD, unembed_VD, rows["tokens_BR"], config, temperature=temperature, shard=shard
    )
    policy, policy_metrics = _policy_terms(logp_BR, rows, loss, clip)
    value_BR = _head_values(params, hidden_BRD, config)
    value, value_metrics = _value_terms(value_BR, rows, losses.value_clip, value_clip)
    return policy + value_coef * value, (_tokens(rows), policy_metrics | value_metrics)


def ptx_loss(
    params: Params,
    batch: dict[str, Any],
    key: jax.Array | None,
    *,
    config: ModelConfig,
    shard: Shard = models.unsharded,
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """The language-modelling loss of pretraining text, a mean over tokens (ours: paper silent)."""
    mean, (tokens, _) = sft.loss_fn(params, batch, key, config=config, shard=shard)
    return mean, (tokens, {"ptx/loss": mean})


def with_value_head(params: Params, width: int, mesh: Mesh) -> Params:
    """A policy with a value head of zeros on its trunk (lm-human-preferences)."""
    head = {"kernel": jnp.zeros(width), "bias": jnp.zeros(())}
    return {**params, "value_head": jax.device_put(head, sharding.replicated(mesh))}


def without_value_head(params: Params) -> Params:
    """The policy alone, as it is exported."""
    return {name: leaf for name, leaf in params.items() if name != "value_head"}


def head_values(
    params: Params, rows: Rows, *, config: ModelConfig, shard: Shard = models.unsharded
) -> jax.Array:
    """value_BR of the head that `with_value_head` put on the trunk, 0 where masked."""
    hidden_BRD = responses.hidden_states(params, config, rows, shard)
    return jnp.where(rows["mask_BR"] != 0, _head_values(params, hidden_BRD, config), 0)


def _head_values(params: Params, hidden_BRD: jax.Array, config: ModelConfig) -> jax.Array:
    config = dataclasses.replace(config, scalar_head=True)
    return models.scalars({"score": params["value_head"]}, config, hidden_BRD)


def _policy_terms(logp_BR: jax.Array, rows: Rows, loss: PolicyLoss, clip: float) -> Any:
    mask_BR, old_BR = rows["mask_BR"], rows["logp_BR"]
    # What is behind the mask must not overflow: 0 * inf in the backward pass would be NaN.
    logp_BR = jnp.where(mask_BR != 0, logp_BR, old_BR)
    mean = masked_mean(loss(logp_BR, old_BR, rows["advantage_BR"], clip), mask_BR)
    change_BR = logp_BR - old_BR
    ratio_BR = jnp.exp(change_BR)
    clipped_BR = (jnp.abs(ratio_BR - 1) > clip).astype(jnp.float32)
    return mean, {
        "policy/loss": mean,
        "policy/ratio": masked_mean(ratio_BR, mask_BR),
        "policy/approx_kl": masked_mean(change_BR**2 / 2, mask_BR),
        "policy/clip_fraction": masked_mean(clipped_BR, mask_BR),
        "policy/logp_change": masked_mean(jnp.abs(change_BR), mask_BR),
    }


def _value_terms(value_BR: jax.Array, rows: Rows, loss: ValueLoss, clip: float) -> Any:
    mask_BR, old_BR = rows["mask_BR"], rows["value_BR"]
    value_BR = jnp.where(mask_BR != 0, value_BR, old_BR)  # see _policy_terms
    mean = masked_mean(loss(value_BR, old_BR, rows["return_BR"], clip), mask_BR)
    clipped_BR = (jnp.abs(value_BR - old_BR) > clip).astype(jnp.float32)
    return mean, {"value/loss": mean, "value/clip_fraction": masked_mean(clipped_BR, mask_BR)}


def _tokens(rows: Rows) -> jax.Array:
    return jnp.sum(rows["mask_BR"] != 0, dtype=jnp.float32)


# -------------------------------------------------------------------------------------- the update


@dataclass(frozen=True)
class Term:
    """A share of an update's gradient: coef times the gradient of a mean over all its batches."""

    add: Callable[..., tuple[Params, Metrics]]  # of `make_adder`
    batches: Sequence[Rows]  # on their devices; of any shapes
    weight: Any  # of all batches together: live tokens, on a device or not
    coef: float = 1.0


def make_adder(loss_fn: LossFn, layout: Any = None) -> Callable[..., tuple[Params, Metrics]]:
    """Compiles `add(grads, sums, params, batch, coef, weight) -> (grads, sums)`.

    It adds coef times the batch's share of the gradient of a mean over `weight` tokens, so that
    batches of several shapes, and terms with different denominators, make one gradient.

    Args:
      loss_fn: see `train.LossFn`; it is given no key.
      layout: shardings of the gradients, those of the parameters.
    """

    no_key: Any = None  # dropout is off

    def add(grads, sums, params, batch, coef, weight):
        def share_of(params):
            mean, (tokens, metrics) = loss_fn(params, batch, no_key)
            share = tokens / weight
            return coef * share * mean, {name: share * x for name, x in metrics.items()}

        own, metrics = jax.grad(share_of, has_aux=True)(params)
        if grads is not None:
            own = jax.tree.map(jnp.add, grads, own)
        if sums is not None:
            metrics = jax.tree.map(jnp.add, sums, metrics)
        return own, metrics

    return jax.jit(add, donate_argnums=(0, 1), out_shardings=(layout, None))


def gradient(params: Params, terms: Sequence[Term]) -> tuple[Params, Metrics]:
    """The sum of terms, with the metrics of each."""
    grads: Any = None
    metrics: Metrics = {}
    for term in terms:
        sums = None
        for batch in term.batches:
            grads, sums = term.add(grads, sums, params, batch, term.coef, term.weight)
        metrics |= sums or {}
    return grads, metrics


def make_update(
    policy_loss: LossFn,
    value_loss: LossFn | None,
    ptx_loss: LossFn | None,
    policy_tx: optax.GradientTransformation,
    value_tx: optax.GradientTransformation | None,
    *,
    ptx_coef: float = 27.8,
    ema_decay: float = 0.992,
    layout: "PPOState | None" = None,
) -> Callable[..., tuple[PPOState, Metrics]]:
    """One update of policy and value net from a minibatch; each program compiles once a shape.

    Args:
      policy_loss, value_loss, ptx_loss: see `train.LossFn`; no value_loss where the policy's has
        the value in it, no ptx_loss for plain PPO.
      policy_tx, value_tx: the optimizers that made the state's.
      ptx_coef: gamma of the paper's eq. 2 (App. C.4: 27.8), of a mean over tokens.
      ema_decay: of the weights, an update (App. C.4: 0.992).
      layout: shardings of the state on a mesh.

    Returns:
      update(state, batches, tokens, ptx_batches=()) -> (state, metrics): batches are the minibatch
      in one or several shapes (see `responses.batches`), tokens the live ones of them all;
      ptx_batches are rows of `data.PackedRows`. The state is donated.
    """
    policy_layout = None if layout is None else layout.policy
    value_layout = None if layout is None else layout.value
    add_policy = make_adder(policy_loss, policy_layout and policy_layout.params)
    add_ptx: Any = ptx_loss and make_adder(ptx_loss, policy_layout and policy_layout.params)
    add_value: Any = value_loss and make_adder(value_loss, value_layout and value_layout.params)
    step_policy = _make_step(policy_tx, policy_layout, ema_decay)
    step_value: Any = value_tx and _make_step(value_tx, value_layout)

    @jax.jit
    def count_targets(ptx_batches: Sequence[Rows]) -> jax.Array:
        counts = [jnp.sum(sft.target_weights(batch)) for batch in ptx_batches]
        return sum(counts, jnp.zeros(()))

    def update(
        state: PPOState,
        batches: Sequence[Rows],
        tokens: float,
        ptx_batches: Sequence[Rows] = (),
    ) -> tuple[PPOState, Metrics]:
        # Programs that do not wait for one another are kept apart, as in responses.map_batches.
        terms = [Term(add_policy, batches, tokens)]
        if add_ptx:
            if not ptx_batches:
                raise ValueError("an update with a ptx_loss needs ptx_batches")
            ptx_tokens = jax.block_until_ready(count_targets(ptx_batches))
            terms.append(Term(add_ptx, ptx_batches, ptx_tokens, ptx_coef))
        grads, metrics = gradient(state.policy.params, terms)
        policy, ema, norm = step_policy(state.policy, state.ema, grads)
        metrics |= {"optim/grad_norm": jax.block_until_ready(norm)}
        del grads  # before the value net's need the room
        value = state.value
        if value is not None:
            grads, found = gradient(value.params, [Term(add_value, batches, tokens)])
            value, _, norm = step_value(value, None, grads)
            metrics |= found | {"optim/value_grad_norm": norm}
        return PPOState(policy, value, ema, state.beta), metrics

    return update


def _make_step(tx: optax.GradientTransformation, layout: Any, ema_decay: float = 0.0) -> Any:
    def step(state: TrainState, ema: Params | None, grads: Params):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        if ema is not None:
            ema = jax.tree.map(
                lambda old, new: ema_decay * old + (1 - ema_decay) * new, ema, params
            )
        state = TrainState(state.step + 1, params, opt_state)
        return state, ema, optax.tree.norm(grads)

    out = (layout, layout and layout.params, None) if ema_decay else (layout, None, None)
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out)
