"""The state that training carries from step to step. It holds arrays only."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from instructjax.models import Params


@flax.struct.dataclass
class TrainState:
    """The state of one model in training."""

    step: jax.Array  # int32 [], number of updates made
    params: Params  # float32 master weights
    opt_state: optax.OptState  # such as Adam's moments, which have their parameters' shapes


def create(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """A state at step 0, laid out as the parameters are.

    The parameters are copied, because a step donates its state and would delete the caller's
    reference model. Drop the caller's copy if nothing else needs it.

    Args:
      params: arrays on one device, or on a mesh (from `hf.load(path, mesh)`, or `init` jitted with
        out_shardings).
      tx: the optimizer.
    """

    def build(params: Params) -> TrainState:
        copied = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), copied, tx.init(copied))

    return jax.jit(build, out_shardings=shardings(params, tx))(params)


def shardings(params: Params, tx: optax.GradientTransformation) -> Any:
    """A TrainState of its leaves' shardings: moments lie where their parameter lies.

    Args:
      params: arrays, or ShapeDtypeStructs that carry shardings.
      tx: the optimizer.
    """
    param_shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    everywhere: Any = jax.tree.leaves(param_shardings)[0]
    if isinstance(everywhere, jax.sharding.NamedSharding):
        everywhere = everywhere.update(spec=jax.sharding.PartitionSpec())
    # Without this, jit(tx.init) would leave Adam's moments on one device. Statistics that have
    # another shape than their parameter (Adafactor's rows and columns) are small, so every device
    # has a copy of them.
    opt_state = optax.tree_utils.tree_map_params(
        tx,
        lambda kept, param, where: where if kept.shape == param.shape else everywhere,
        jax.eval_shape(tx.init, params),
        params,
        param_shardings,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, param_shardings, opt_state)
