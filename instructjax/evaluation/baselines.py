"""What a reward model has to beat: the length of a response, and the words in it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from instructjax import losses
from instructjax.data import Dataset


def lengths(dataset: Dataset, train_set: Dataset) -> np.ndarray:
    """Tokens of each response: [n, K, 1]."""
    return dataset.response.lengths[..., None].astype(np.float32)


def bags(dataset: Dataset, train_set: Dataset, most: int = 1000) -> np.ndarray:
    """How often each of the commonest tokens of the training responses occurs: [n, K, F]."""

    def responses(of: Dataset):
        return ((i, k, of.response[i, k]) for i, k in np.argwhere(of.ranks > 0))

    every = np.bincount(np.concatenate([ids for *_, ids in responses(train_set)]))
    common = np.argsort(-every, kind="stable")[: min(most, np.count_nonzero(every))]
    column = np.full(
        1 + max(len(every), *(int(ids.max()) + 1 for *_, ids in responses(dataset))), -1
    )
    column[common] = np.arange(len(common))
    found = np.zeros((*dataset.ranks.shape, len(common)), np.float32)
    for i, k, ids in responses(dataset):
        at = column[ids]
        np.add.at(found[i, k], at[at >= 0], 1)
    return found


def linear(
    features: Callable[[Dataset, Dataset], np.ndarray], seen: Dataset, groups: dict[str, Dataset]
) -> dict[str, np.ndarray]:
    """Scores linear in features of a response: logistic regression on the pairs' differences.

    It has few weights, and is fitted to the first 3,000 comparisons: more change nothing.
    """
    seen = seen.take(np.arange(len(seen)) < 3000)
    x_BKF = features(seen, seen)
    scale = x_BKF[seen.ranks > 0].std(0) + 1e-6
    x_BKF, ranks_BK = jnp.asarray(x_BKF / scale), jnp.asarray(seen.ranks)

    def loss(w_F: jax.Array) -> jax.Array:
        loss_B = losses.pairwise_ranking(x_BKF @ w_F, ranks_BK, ranks_BK > 0)
        return jnp.mean(loss_B) + 1e-3 * jnp.vdot(w_F, w_F)

    tx = optax.adam(optax.cosine_decay_schedule(0.1, 100))

    def fit(carry, _):
        w_F, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss)(w_F), opt_state)
        return (optax.apply_updates(w_F, updates), opt_state), None

    w_F = jnp.zeros(len(scale))
    (w_F, _), _ = jax.jit(lambda carry: jax.lax.scan(fit, carry, length=100))((w_F, tx.init(w_F)))
    weights = np.asarray(w_F) / scale
    return {name: features(dataset, seen) @ weights for name, dataset in groups.items()}
