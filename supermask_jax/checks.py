"""What is refused before anything is selected, and what is warned of after."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supermask_jax.leaves import Layout
from supermask_jax.trees import Tree, by_path, layer_counts


def check_arrays(scores: Tree) -> None:
    """Raises TypeError on leaves that are numbers: a list of them is a tree, and not an array."""
    for path, score in by_path(scores).items():
        if not hasattr(score, "dtype"):
            kind = type(score).__name__
            raise TypeError(f"scores are arrays; {path!r} is a {kind}: is a list of numbers meant as one?")


def check_scores(path: str, score: jax.Array, allowed: jax.Array | None) -> None:
    """Raises on what is wrong with a leaf; values are looked at only where they are concrete (not under jit)."""
    dtype = np.dtype(score.dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 4:
        raise TypeError(f"scores must be floats of at most 32 bits; {path!r} has {dtype}: cast it to float32")
    if not isinstance(score, jax.core.Tracer) and np.isnan(np.asarray(score, np.float32)).any():
        raise ValueError(f"the scores of {path!r} hold NaN")
    if allowed is not None and jnp.shape(allowed) != jnp.shape(score):
        raise ValueError(f"the mask of {path!r} has shape {jnp.shape(allowed)}, its scores {jnp.shape(score)}")


def check_counts(counts: Mapping[str, Any], score: jax.Array, allowed: jax.Array | None) -> list[str]:
    """Raises where a layer has not so many weights; values are looked at only where they are concrete.

    Returns:
      The layers of which nothing is kept, although there is something, as far as that is known.
    """
    rooms = np.full(len(counts), score.size // max(len(counts), 1))
    if allowed is not None and is_concrete(allowed):
        rooms = np.count_nonzero(np.asarray(allowed).reshape(len(counts), rooms[0] if len(counts) else 0), axis=1)
    for (layer, count), room in zip(counts.items(), rooms.tolist(), strict=True):
        if is_concrete(count) and not is_count(count, room):
            raise ValueError(f"cannot keep {count} of the {room} weights to choose from in {layer!r}")
    if not is_concrete(allowed):
        return []
    there = zip(counts.items(), rooms, strict=True)
    return [layer for (layer, count), room in there if room and is_concrete(count) and not count]


def is_count(count: Any, room: int) -> bool:
    """Whether it is a whole number in [0, room]; NaN and infinity are none."""
    return bool(0 <= count <= room) and bool(count == int(count))


def warn_of_emptied(
    masks: Tree,
    before: Tree | None = None,
    layout: Layout | None = None,
    advice: str = "minimum=1 keeps a weight in every layer",
) -> None:
    """Warns of layers of which the masks keep nothing, although there was something; under jit nothing is known.

    Args:
      masks: tree of 0 or 1, None at leaves that are not prunable.
      before: the masks before; None means that every weight was kept.
      layout: what tells which leaves stack layers. None means the names.
      advice: what keeps a weight there.
    """
    if not is_concrete((masks, before)) or not by_path(masks):
        return
    there = {} if before is None else layer_counts(before, layout)
    emptied = [
        name
        for name, (ones, size) in layer_counts(masks, layout).items()
        if size and not ones and there.get(name, (size, size))[0]
    ]
    warn_of(emptied, advice, stacklevel=4)


def warn_of(emptied: Sequence[str], advice: str, stacklevel: int = 3) -> None:
    """Warns of these layers, if there are any; the warning points at the caller of the function that calls this."""
    if emptied:
        warnings.warn(f"no weight is kept in {', '.join(emptied)}; {advice}", stacklevel=stacklevel)


def is_concrete(tree: Any) -> bool:
    """Returns whether the values of all leaves are known, as they are not under jit."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
