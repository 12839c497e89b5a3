"""One update: gradients of a minibatch and of pretraining text, two optimizers, an average."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from instructjax import sft
from instructjax.models import Params
from instructjax.rollout import Rows
from instructjax.state import TrainState
from instructjax.train import LossFn, Metrics


@flax.struct.dataclass
class PPOState:
    """All that training changes."""

    policy: TrainState
    value: TrainState | None  # None where the value head is on the policy's trunk
    ema: Params | None  # exponential moving average of the policy, what is exported; or none kept
    beta: jax.Array  # float32 [], of the KL penalty


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


@dataclass(frozen=True)
class Update:
    """One update of policy and value net from a minibatch; see `make_update`.

    Attributes, of which the functions are jitted, and compile once a shape:
      add_policy, add_ptx, add_value: of `make_adder`; None where there is no such loss.
      step_policy: (TrainState, ema, grads) -> (TrainState, ema, norm).
      step_value: the same with None for ema; None where there is no value net.
      ptx_coef: gamma of the paper's eq. 2, of a mean over tokens.
    """

    add_policy: Callable[..., tuple[Params, Metrics]]
    add_ptx: Callable[..., tuple[Params, Metrics]] | None
    add_value: Callable[..., tuple[Params, Metrics]] | None
    step_policy: Callable[..., Any]
    step_value: Callable[..., Any] | None
    ptx_coef: float

    def __call__(
        self,
        state: PPOState,
        batches: Sequence[Rows],
        tokens: float,
        ptx_batches: Sequence[Rows] = (),
    ) -> tuple[PPOState, Metrics]:
        """The state, which is donated, after an update, and the update's metrics.

        Args:
          batches: the minibatch in one or several shapes (see `rollout.batches`).
          tokens: the live ones of them all.
          ptx_batches: rows of `data.PackedRows`.

        Raises:
          ValueError: there is a loss of pretraining text, and no text.
        """
        # Programs that do not wait for one another are kept apart, as in rollout.map_batches.
        terms = [Term(self.add_policy, batches, tokens)]
        if self.add_ptx is not None:
            if not ptx_batches:
                raise ValueError("an update with a ptx_loss needs ptx_batches")
            ptx_tokens = jax.block_until_ready(_count_targets(ptx_batches))
            terms.append(Term(self.add_ptx, ptx_batches, ptx_tokens, self.ptx_coef))
        grads, metrics = gradient(state.policy.params, terms)
        policy, ema, norm = self.step_policy(state.policy, state.ema, grads)
        metrics |= {"optim/grad_norm": jax.block_until_ready(norm)}
        del grads  # before the value net's need the room
        value = state.value
        if value is not None and self.add_value is not None and self.step_value is not None:
            grads, found = gradient(value.params, [Term(self.add_value, batches, tokens)])
            value, _, norm = self.step_value(value, None, grads)
            metrics |= found | {"optim/value_grad_norm": norm}
        return PPOState(policy, value, ema, state.beta), metrics


def make_update(
    policy_loss: LossFn,
    value_loss: LossFn | None,
    ptx_loss: LossFn | None,
    policy_tx: optax.GradientTransformation,
    value_tx: optax.GradientTransformation | None,
    *,
    ptx_coef: float = 27.8,
    ema_decay: float = 0.992,
    policy_layout: Any = None,
    value_layout: Any = None,
) -> Update:
    """Compiles an update.

    Args:
      policy_loss, value_loss, ptx_loss: see `train.LossFn`; no value_loss where the policy's has
        the value in it, no ptx_loss for plain PPO.
      policy_tx, value_tx: the optimizers that made the state's.
      ptx_coef: gamma of the paper's eq. 2 (App. C.4: 27.8), of a mean over tokens.
      ema_decay: of the weights, an update (App. C.4: 0.992); 0 where the state has no average.
      policy_layout, value_layout: `state.shardings(params, tx)` on a mesh.
    """

    def adder(loss_fn: Any, layout: Any) -> Any:
        return loss_fn and make_adder(loss_fn, layout and layout.params)

    return Update(
        add_policy=adder(policy_loss, policy_layout),
        add_ptx=adder(ptx_loss, policy_layout),
        add_value=adder(value_loss, value_layout),
        step_policy=_make_step(policy_tx, policy_layout, ema_decay),
        step_value=value_tx and _make_step(value_tx, value_layout),
        ptx_coef=ptx_coef,
    )


@jax.jit
def _count_targets(ptx_batches: Sequence[Rows]) -> jax.Array:
    counts = [jnp.sum(sft.target_weights(batch)) for batch in ptx_batches]
    return sum(counts, jnp.zeros(()))


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
