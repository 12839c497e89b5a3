"""Baselines that a reward model has to beat: a response's length, and the words in it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from instructjax import losses
from instructjax.data import Dataset


def lengths(dataset: Dataset, train_set: Dataset) -> np.ndarray:
    """Number of tokens of each response: length_BK1."""
    return dataset.response.lengths[..., None].astype(np.float32)


def bags(dataset: Dataset, train_set: Dataset, most: int = 1000) -> np.ndarray:
    """Counts of the commonest tokens in each response: count_BKF.

    Args:
      dataset: comparisons.
      train_set: comparisons whose responses decide which tokens are the commonest.
      most: the largest number of tokens, F.
    """

    def responses(comparisons: Dataset):
        slots = np.argwhere(comparisons.ranks > 0)
        return ((i, k, comparisons.response[i, k]) for i, k in slots)

    frequency = np.bincount(np.concatenate([ids for *_, ids in responses(train_set)]))
    common = np.argsort(-frequency, kind="stable")[: min(most, np.count_nonzero(frequency))]
    column = np.full(
        1 + max(len(frequency), *(int(ids.max()) + 1 for *_, ids in responses(dataset))), -1
    )
    column[common] = np.arange(len(common))
    count_BKF = np.zeros((*dataset.ranks.shape, len(common)), np.float32)
    for i, k, ids in responses(dataset):
        at = column[ids]
        np.add.at(count_BKF[i, k], at[at >= 0], 1)
    return count_BKF


def linear(
    features: Callable[[Dataset, Dataset], np.ndarray], seen: Dataset, groups: dict[str, Dataset]
) -> dict[str, np.ndarray]:
    """Scores that are linear in features of a response: logistic regression on pairs' differences.

    It is fitted to the first 3,000 comparisons. It has few weights, and more data change nothing.

    Args:
      features: (comparisons, training comparisons) -> [n, K, F], such as `lengths` or `bags`.
      seen: training comparisons.
      groups: comparisons to score, by name.

    Returns:
      scores [n, K] of each group's responses, by name.
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
