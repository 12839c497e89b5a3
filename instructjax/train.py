"""Makes a train step from a loss: `step(state, batch, key) -> (state, metrics)`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from instructjax.models import Params, whole
from instructjax.state import TrainState

Batch = Any  # a pytree of arrays whose first dimension is the batch's
Metrics = dict[str, jax.Array]  # scalars by name
# (params, batch, key) -> (mean, (weight, metrics)). The mean is over `weight` tokens or prompts, a
# number that does not depend on params. The metrics are means over the same. All are finite where
# the weight is 0.
LossFn = Callable[[Params, Batch, jax.Array], tuple[jax.Array, tuple[jax.Array, Metrics]]]
# (state, batch, key) -> (state, metrics); with an adapter also (state, batch, key, frozen).
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Adam with InstructGPT's betas (App. C), after clipping the gradient's global norm.

    The paper is silent on epsilon, weight decay and clipping, so these defaults are ours.

    Args:
      weight_decay: each step also subtracts this times the learning rate times the parameter, of
        every parameter, as torch's AdamW does (Loshchilov and Hutter 2019, arXiv 1711.05101).
    """
    betas: Any = {"b1": b1, "b2": b2, "eps": eps}
    tx = optax.adam(learning_rate, **betas)
    if weight_decay:
        tx = optax.adamw(learning_rate, **betas, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), tx)


def cosine(peak: float, steps: int, warmup: float = 0) -> optax.Schedule:
    """A learning rate that rises linearly to its peak and decays to a tenth of it along a cosine.

    Args:
      steps: step at which the learning rate is a tenth of its peak.
      warmup: number of steps of the rise or, below 1, their share of all steps. The first of n
        steps of the rise has the learning rate peak / (n + 1).
    """
    rise = min(round(warmup if warmup >= 1 else warmup * steps), steps)
    if not rise:
        return optax.cosine_decay_schedule(peak, max(steps, 1), alpha=0.1)
    return optax.warmup_cosine_decay_schedule(
        peak / (rise + 1), peak, rise, max(steps, rise + 1), end_value=0.1 * peak
    )


def accumulate_gradients(
    loss_fn: LossFn, params: Params, batch: Batch, key: jax.Array, microbatches: int = 1
) -> tuple[Params, Metrics]:
    """Gradient and metrics of a batch, by gradient accumulation over microbatches.

    Microbatches are averaged by their weight. So the result is that of the whole batch, however
    unevenly its live tokens are spread.

    Args:
      loss_fn: see `LossFn`.
      batch: each leaf's first dimension is a multiple of `microbatches`.
      microbatches: number of parts. One part's activations are in memory at a time.

    Returns:
      (gradients, metrics), with `loss` among the metrics. All are 0 if the total weight is 0.

    Raises:
      ValueError: the batch does not divide into that many equal parts.
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
            # Row r goes to microbatch r % M, so that each spans all devices of a sharded batch.
            rows = x.shape[0]
            if rows % microbatches:
                raise ValueError(
                    f"a batch of {rows} rows has no {microbatches} equal microbatches: choose a"
                    " number of microbatches that divides it"
                )
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


def of_whole(loss_fn: LossFn, frozen: Params) -> LossFn:
    """The loss as a function of the trained parameters alone; see `models.whole`."""
    return lambda trained, batch, key: loss_fn(whole(trained, frozen), batch, key)


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
      shardings: on a mesh, `state.shardings(params, tx)`. Gradients and the new state are laid out
        by it, as the old state is, so that the step compiles once.
      schedule: the optimizer's learning-rate schedule, for the metrics.

    Returns:
      step(state, batch, key) -> (state, metrics). The metrics are `loss`, those of loss_fn,
      `optim/grad_norm` (before clipping) and, with a schedule, `optim/learning_rate`. With a fourth
      argument `frozen`, the loss is of these parameters too; see `models.split`. They are not
      donated, and get no gradient.
    """

    def step(
        state: TrainState, batch: Batch, key: jax.Array, frozen: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        of_trained = of_whole(loss_fn, frozen or {})
        grads, metrics = accumulate_gradients(of_trained, state.params, batch, key, microbatches)
        if shardings is not None:  # lets the compiler reduce-scatter instead of all-reduce
            grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = {**metrics, "optim/grad_norm": optax.tree.norm(grads)}
        if schedule is not None:
            metrics["optim/learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
