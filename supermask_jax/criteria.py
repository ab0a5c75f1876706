"""The mask criteria of Zhou et al. 2019: scores that compare a layer's `initial` weights with its `final` ones."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from supermask_jax.draws import unit_uniform
from supermask_jax.trees import Tree, Where, at_most_32_bits, by_path, is_kernel, leaf_key, map_with_name, prunable

Score = Callable[[jax.Array, jax.Array], jax.Array]
"""(initial, final) -> scores, arrays of one shape."""


def _large_final(initial: jax.Array, final: jax.Array) -> jax.Array:
    return jnp.abs(final)


def _large_init(initial: jax.Array, final: jax.Array) -> jax.Array:
    return jnp.abs(initial)


def _magnitude_increase(initial: jax.Array, final: jax.Array) -> jax.Array:
    return jnp.abs(final) - jnp.abs(initial)


def _movement(initial: jax.Array, final: jax.Array) -> jax.Array:
    return jnp.abs(final - initial)


def _negated(score: Score) -> Score:
    return lambda initial, final: -score(initial, final)


def _if_same_sign(score: Score) -> Score:
    return lambda initial, final: jnp.where(jnp.sign(initial) == jnp.sign(final), score(initial, final), 0)


def _if_diff_sign(score: Score) -> Score:
    return lambda initial, final: jnp.where(jnp.sign(initial) != jnp.sign(final), score(initial, final), 0)


CRITERIA: Mapping[str, Score] = {
    "large_final": _large_final,
    "small_final": _negated(_large_final),
    "large_init": _large_init,
    "small_init": _negated(_large_init),
    "magnitude_increase": _magnitude_increase,
    "movement": _movement,
    "large_final_same_sign": _if_same_sign(_large_final),
    "large_final_diff_sign": _if_diff_sign(_large_final),
    "magnitude_increase_same_sign": _if_same_sign(_magnitude_increase),
    "magnitude_increase_diff_sign": _if_diff_sign(_magnitude_increase),
}
"""{name: (initial, final) -> scores} of one layer's arrays, for the criteria that look at one weight at a time."""

RANKED: Mapping[str, tuple[str, str]] = {
    "large_init_large_final": ("large_init", "large_final"),
    "small_init_small_final": ("small_init", "small_final"),
}
"""{name: two criteria} whose score is the smaller of a weight's percentile ranks by the two."""


def criterion(
    name: str,
    initial: Tree,
    final: Tree,
    *,
    masks: Tree | None = None,
    key: jax.Array | None = None,
    where: Where = is_kernel,
) -> Tree:
    """Returns scores by one of the mask criteria of Zhou et al.; higher = kept.

    The criteria that ask for a sign score a weight of the other sign 0, as the released code does. For
    magnitude_increase, 0 is above every weight that has the right sign and shrank. The sign of a weight of 0 is the
    same as that of another 0, and of no other number.

    Args:
      name: one of `CRITERIA` or `RANKED`, or "random".
      initial: the weights that training started from.
      final: the weights that training ended with; a tree like `initial`.
      masks: 0 or 1: the weights among which the criteria of `RANKED` rank, in each layer; None means all. The scores
        of other weights mean nothing, so give the selection the same masks as `within`.
      key: a `jax.random.key`, which "random" needs. A leaf's draw depends only on the key and the leaf's path.
      where: (path, leaf) -> whether the leaf is prunable; or the `Layout` of the network.

    Returns:
      A tree like `initial`, None at leaves that are not prunable. "random" scores are float32 in [0, 1), those of
      `RANKED` are float32 percentile ranks in [0, 1), all others have the dtype of the weights, float32 for float64.

    Raises:
      ValueError: the name is unknown, "random" has no key, or `where` chooses no leaf.

    Source: Zhou et al. 2019, sections 2 and 5, and its released code (get_weight_init.py). The code breaks ties at
    random, the selection here by flat index. Where the code searches for one percentile that both magnitudes exceed,
    `RANKED` computes the same order exactly.
    """
    names = [*CRITERIA, *RANKED, "random"]
    if name not in names:
        raise ValueError(f"there is no mask criterion {name!r}; there are: {', '.join(names)}")
    if name == "random" and key is None:
        raise ValueError("the criterion 'random' needs a key")
    shapes = prunable(initial, where)
    kept = {} if masks is None else by_path(masks)

    def score(path: str, before: jax.Array, after: jax.Array) -> jax.Array | None:
        if path not in shapes:
            return None
        if name == "random" and key is not None:  # float32: in bfloat16 most would tie, and ties are not random
            return unit_uniform(leaf_key(key, path), before.shape)
        if name in CRITERIA:
            return at_most_32_bits(CRITERIA[name](before, after))
        ranks = [_percentile_ranks(CRITERIA[part](before, after), kept.get(path)) for part in RANKED[name]]
        first, second = ranks
        return jnp.minimum(first, second)

    return map_with_name(score, initial, final)


def _percentile_ranks(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[scores.shape] float32 in [0, 1): the share of the kept scores that are lower. Equal scores share a rank."""
    candidates = scores if mask is None else jnp.where(mask != 0, scores, jnp.inf)  # what is not kept sorts last
    number = scores.size if mask is None else jnp.count_nonzero(mask)
    lower = jnp.searchsorted(jnp.sort(candidates.ravel()), scores.ravel()).reshape(scores.shape)
    return lower.astype(jnp.float32) / jnp.maximum(jnp.asarray(number, jnp.float32), 1)
