"""Masks in rounds: what is left is scored, and the best of it kept, until a density is reached."""

import warnings
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from supermask_jax.densities import exact, keep_count
from supermask_jax.selection import keep_highest, keep_highest_of_all
from supermask_jax.trees import Tree, by_path, ones_and_sizes


def iterative(score_fn: Callable[[Tree | None], Tree], density: float, rounds: int, minimum: int = 0) -> Tree:
    """Masks after `rounds` rounds of scoring what is left and keeping the best of it, all layers ranked as one.

    After round r the fraction density**(r / rounds) of all weights is left, after the last exactly `density`, each
    rounded up to whole weights; nothing pruned comes back. One round is one-shot pruning. This is a host loop and not
    for jit: let `score_fn` be compiled. (It is then compiled twice, for None and for masks.)

    Args:
      score_fn: score_fn(masks) -> scores of weights * masks, where masks are None in the first round. Such as
        jax.jit(lambda masks: saliency.synflow(apply_fn, weights, (28, 28, 1), masks=masks)).
      density: fraction of all weights kept in the end, in [0, 1].
      rounds: how often to score and prune.
      minimum: how many weights each layer keeps at least, its best; a smaller layer keeps all. What else is kept is
        the best of all that remain.

    Returns:
      Masks, exactly 0 or 1, with the structure and dtypes of the scores. A warning names the layers pruned whole.

    Raises:
      ValueError: density, rounds or minimum out of range; the density keeps fewer weights than `minimum` in each
        layer; scores not finite, or all 0.

    Source: Tanaka et al. 2020, algorithm 1, which is SynFlow with 100 rounds; with SNIP, de Jorge et al. 2020 and
    Verdenius et al. 2020. The densities between are taken to twelve decimals, lest a slip keep a weight too many.
    """
    final, rounds = exact(density), _whole("rounds", rounds, 1)
    minimum = _whole("minimum", minimum, 0)
    masks = None
    for number in range(1, rounds + 1):
        scores = score_fn(masks)
        check_ranking(scores, f"nothing to choose by in round {number}")
        if masks is None:
            masks = jax.tree.map(jnp.ones_like, scores)  # already here, so that the next rounds compile nothing
            sizes = {path: score.size for path, score in by_path(scores).items()}
            least = {path: min(minimum, size) for path, size in sizes.items()}
            last = keep_count(final, sum(sizes.values()))
            if sum(least.values()) > last:
                raise ValueError(f"density {density} keeps {last} weights: too few for {minimum} in every layer")
        count = last
        if number < rounds:  # and the decimals must not take it below the last
            count = max(last, keep_count(round(float(final) ** (number / rounds), 12), sum(sizes.values())))
        masks = _highest_with_least(scores, count, least, masks)
    empty = [path for path, (ones, size) in ones_and_sizes(masks).items() if size and not ones]
    if empty:
        warnings.warn(f"pruned whole: {', '.join(empty)}; minimum=1 keeps a weight in every layer", stacklevel=2)
    return masks


def check_ranking(scores: Tree, why: str) -> None:
    """Raises ValueError on scores that rank nothing: not all finite, or all 0 (for the reason `why`).

    Under jit values are not known, and nothing is raised.
    """
    if not known(scores):
        return
    leaves = {path: np.asarray(score) for path, score in by_path(scores).items()}
    for path, score in leaves.items():
        if not np.all(np.isfinite(score)):
            raise ValueError(f"the scores of {path!r} are not finite")
    if not any(np.any(score) for score in leaves.values()):
        raise ValueError(f"every score is 0: {why}")


def known(tree: Tree) -> bool:
    """Whether the values of all leaves are known, as they are not under jit."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _highest_with_least(scores: Tree, count: int, least: Mapping[str, int], within: Tree) -> Tree:
    """Masks of the `least[path]` highest scores of each leaf and, up to `count`, of the highest of all the others."""
    if not any(least.values()):
        return keep_highest_of_all(scores, count, within)
    reserved = keep_highest(scores, least, within)
    others = jax.tree.map(jnp.subtract, within, reserved)
    return jax.tree.map(jnp.add, reserved, keep_highest_of_all(scores, count - sum(least.values()), others))


def _whole(name: str, number: int, at_least: int) -> int:
    if not isinstance(number, int | np.integer) or number < at_least:
        raise ValueError(f"{name} must be a whole number >= {at_least}, got {number!r}")
    return int(number)
