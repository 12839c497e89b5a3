"""The parts of an update: a gradient summed over batches, and an optimizer step with an average."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from instructjax.models import Params
from instructjax.state import TrainState
from instructjax.train import Batch, LossFn, Metrics, of_whole


@flax.struct.dataclass
class PPOState:
    """Everything that training changes."""

    policy: TrainState
    value: TrainState | None  # None where the value head is on the policy's trunk
    ema: Params | None  # moving average of the policy's weights, which is exported; or no average
    beta: jax.Array  # float32 [], coefficient of the KL penalty


class Gradient:
    """Adds up the gradient of a mean over batches that may differ in shape.

    Args:
      loss_fn: see `train.LossFn`. It gets no key, since dropout is off in PPO.
      layout: shardings of the gradients, which are those of the parameters.
      frozen: what the model has besides the trained parameters; see `models.split`.
    """

    def __init__(self, loss_fn: LossFn, layout: Any = None, frozen: Params | None = None):
        self.loss_fn, self.frozen = loss_fn, frozen or {}
        # Compiled twice a shape: to begin a sum, where grads and metrics are None, and to add.
        self.add = jax.jit(self._add, donate_argnums=(0, 1), out_shardings=(layout, None))

    def __call__(
        self, params: Params, batches: Sequence[Batch], weight: Any, coef: float = 1.0, grads=None
    ) -> tuple[Params, Metrics]:
        """(grads + coef * gradient of the mean over all batches, metrics averaged likewise).

        Args:
          weight: live tokens of all batches together, on a device or not.
          grads: what to add to; donated.
        """
        metrics: Any = None
        for batch in batches:
            grads, metrics = self.add(grads, metrics, params, batch, coef, weight, self.frozen)
        return grads, metrics  # type: ignore[return-value]  # there is at least one batch

    def _add(self, grads, metrics, params, batch, coef, weight, frozen=None):
        loss_fn = of_whole(self.loss_fn, frozen or {})

        def weighted_loss(params: Params):
            no_key: Any = None
            mean, (tokens, batch_metrics) = loss_fn(params, batch, no_key)
            share = tokens / weight
            return coef * share * mean, {name: share * x for name, x in batch_metrics.items()}

        terms = jax.grad(weighted_loss, has_aux=True)(params)
        return tuple(
            term if total is None else jax.tree.map(jnp.add, total, term)
            for total, term in zip((grads, metrics), terms, strict=True)
        )


def make_step(
    tx: optax.GradientTransformation, layout: Any = None, ema_decay: float = 0.0
) -> Callable[[TrainState, Params | None, Params], tuple[TrainState, Params | None, jax.Array]]:
    """Compiles step(state, ema, grads) -> (state, ema, norm of the gradients before clipping).

    Args:
      tx: the optimizer that made the state, which is donated, as is `ema`.
      layout: `state.shardings(params, tx)` on a mesh.
      ema_decay: decay of the average of the weights, an update (App. C.4: 0.992); 0: `ema` is None.
    """

    def step(state: TrainState, ema: Params | None, grads: Params):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        if ema is not None:
            ema = jax.tree.map(
                lambda old, new: ema_decay * old + (1 - ema_decay) * new, ema, params
            )
        return TrainState(state.step + 1, params, opt_state), ema, optax.tree.norm(grads)

    layouts = (layout, layout and layout.params, None) if ema_decay else (layout, None, None)
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=layouts)
