"""What run_ppo.py compiles besides the sampler; preflight.py compiles the same for a pod."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ppo_config import PPO, Config

from instructjax import losses, ppo, rollout, scoring, sharding, state, train
from instructjax.models import ModelConfig, Params


@dataclass(frozen=True)
class Programs:
    """Jitted functions, and the optimizers behind them.

    Attributes:
      learning_rate: of the policy, by update.
      policy_tx, value_tx: the optimizers.
      update: see `ppo.make_update`.
      experience: see `ppo.make_experience`.
      logp_of: (params, rows) -> logp_BR, replicated.
      value_of: (params, rows) -> value_BR, replicated; of the policy's where they share a trunk.
      text_loss_of: (params, batch of text) -> (mean, (tokens, metrics)).
    """

    learning_rate: optax.Schedule
    policy_tx: optax.GradientTransformation
    value_tx: optax.GradientTransformation
    update: ppo.Update
    experience: Callable[..., tuple[dict[str, jax.Array], train.Metrics]]
    logp_of: Callable[..., jax.Array]
    value_of: Callable[..., jax.Array]
    text_loss_of: Callable[..., tuple[jax.Array, tuple[jax.Array, train.Metrics]]]


def make_programs(
    config: Config,
    model: ModelConfig,
    value_model: ModelConfig | None,
    policy: Params,
    value: Params | None,
    mesh: Mesh,
) -> Programs:
    """Binds the flags to the library's functions, and jits them.

    Args:
      value_model, value: None where the value head is on the policy's trunk.
      policy, value: arrays, or ShapeDtypeStructs that carry shardings.
    """
    flags, shard = config.ppo, config.constrainer(mesh)
    bound = {"config": model, "temperature": config.temperature, "shard": shard}

    def schedule(peak: float) -> optax.Schedule:
        """Constant, after a line from a tenth of it (App. C.4)."""
        return optax.linear_schedule(0.1 * peak, peak, max(1, flags.warmup * config.updates))

    learning_rate = schedule(flags.learning_rate)
    policy_tx = train.adam(learning_rate)
    value_tx = train.adam(schedule(flags.value_learning_rate))

    clipped = {"loss": losses.ppo_clip if config.loss is None else load_loss(config.loss)}
    clipped |= {"clip": flags.clip}
    if value_model is None:
        coefs = {"value_clip": flags.value_clip, "value_coef": flags.value_coef}
        policy_loss = functools.partial(ppo.joint_loss, **bound, **clipped, **coefs)
        value_loss = None
        values = functools.partial(ppo.head_values, config=model, shard=shard)
    else:
        policy_loss = functools.partial(ppo.policy_loss, **bound, **clipped)
        value_loss = functools.partial(
            ppo.value_loss, config=value_model, clip=flags.value_clip, shard=shard
        )
        values = functools.partial(rollout.token_values, config=value_model, shard=shard)
    text_loss = functools.partial(ppo.ptx_loss, config=model, shard=shard)

    update = ppo.make_update(
        policy_loss,
        value_loss,
        text_loss if config.ptx.coef else None,
        policy_tx,
        value_tx,
        ptx_coef=config.ptx.coef,
        ema_decay=flags.ema,
        policy_layout=state.shardings(policy, policy_tx),
        value_layout=None if value is None else state.shardings(value, value_tx),
    )
    experience = functools.partial(
        ppo.make_experience,
        gamma=flags.gamma,
        lam=flags.lam,
        missing_eos=flags.missing_eos,
        missing_eos_value=missing_eos_value(flags),
        clip_score=flags.clip_score,
        whiten_rewards=flags.whiten_rewards,
        whiten_advantages=flags.whiten_advantages,
    )
    replicated = functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    return Programs(
        learning_rate=learning_rate,
        policy_tx=policy_tx,
        value_tx=value_tx,
        update=update,
        experience=jax.jit(experience),
        logp_of=replicated(functools.partial(rollout.token_logp, **bound)),
        value_of=replicated(values),
        text_loss_of=jax.jit(functools.partial(text_loss, key=None)),
    )


def missing_eos_value(flags: PPO) -> float:
    if flags.missing_eos_value is not None:
        return flags.missing_eos_value
    return -1.0 if flags.missing_eos == "fixed" else 1.0


def load_loss(spec: str) -> ppo.PolicyLoss:
    """A user's array loss, which must return [B, R]."""
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
