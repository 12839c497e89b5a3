"""A train step from a loss: `step(state, batch, key) -> (state, metrics)`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from instructjax.models import Params
from instructjax.state import TrainState

Batch = Any  # a pytree of arrays whose first dimension is the batch's
Metrics = dict[str, jax.Array]
# (params, batch, key) -> (mean, (weight, metrics)): a mean over `weight` tokens or prompts, which
# does not depend on params, and metrics that are means over the same. Finite at weight 0.
LossFn = Callable[[Params, Batch, jax.Array], tuple[jax.Array, tuple[jax.Array, Metrics]]]
TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


def adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Adam with the paper's betas (App. C), after clipping the gradient's global norm.

    The paper is silent on epsilon and on clipping; these defaults are ours.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm), optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)
    )


def accumulate_gradients(
    loss_fn: LossFn, params: Params, batch: Batch, key: jax.Array, microbatches: int = 1
) -> tuple[Params, Metrics]:
    """Gradient and metrics of a batch, a share of its rows at a time.

    Microbatches are averaged by their weight, so the result is that of the whole batch however
    unevenly its live tokens are spread.

    Args:
      loss_fn: see `LossFn`.
      batch: each leaf's first dimension is a multiple of microbatches.
      microbatches: shares; one is in memory at a time.

    Returns:
      (gradients, metrics), `loss` among the metrics. All 0 if the whole weight is 0.
    """

    def weighted(params, batch, key):
        mean, (weight, metrics) = loss_fn(params, batch, key)
        weight = jnp.asarray(weight, jnp.float32)
        sums = {name: value * weight for name, value in {"loss": mean, **metrics}.items()}
        return mean * weight, (weight, sums)

    gradient = jax.grad(weighted, has_aux=True)
    if microbatches == 1:
        grads, (weight, metrics) = gradient(params, batch, key)
    else:

        def share(x):
            # Row r goes to microbatch r % M: each then spans all devices of a sharded batch.
            rows = x.shape[0]
            if rows % microbatches:
                raise ValueError(f"a batch of {rows} has no {microbatches} equal microbatches")
            return x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)

        def add(total, xs):
            microbatch, key = xs
            return jax.tree.map(jnp.add, total, gradient(params, microbatch, key)), None

        keys = jax.random.split(key, microbatches)
        shares = jax.tree.map(share, batch)
        first = jax.tree.map(lambda x: x[0], shares)
        shapes = jax.eval_shape(gradient, params, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, (weight, metrics)), _ = jax.lax.scan(add, zeros, (shares, keys))
    total = jnp.where(weight > 0, weight, 1)
    return jax.tree.map(lambda x: x / total, (grads, metrics))


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    microbatches: int = 1,
    shardings: Any = None,
    schedule: optax.Schedule | None = None,
) -> TrainStep:
    """Compiles a train step, which donates its state.

    Args:
      loss_fn: (params, batch, key) -> (mean, (weight, metrics)); see `LossFn`.
      tx: the optimizer that made the state.
      microbatches: see `accumulate_gradients`.
      shardings: `state.shardings(params, tx)` on a mesh: gradients and the new state are laid
        out as the old one, so that the step compiles once.
      schedule: the optimizer's, of its learning rate.

    Returns:
      step(state, batch, key) -> (state, metrics) with `loss`, the loss_fn's own metrics,
      `optim/grad_norm` (before clipping) and, with a schedule, `optim/learning_rate`.
    """

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        grads, metrics = accumulate_gradients(loss_fn, state.params, batch, key, microbatches)
        if shardings is not None:  # a reduce-scatter in place of an all-reduce
            grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = {**metrics, "optim/grad_norm": optax.tree.norm(grads)}
        if schedule is not None:
            metrics["optim/learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
