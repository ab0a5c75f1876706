"""Slow versions in NumPy, right at a glance, of what the package computes fast."""

import numpy as np


def highest(scores, count, within=None) -> np.ndarray:
    """Mask of one array's `count` highest scores; of equal ones, the lowest flat index loses.

    A stable ascending sort leaves equal scores in the order of their flat index; the last `count` are kept.
    """
    scores = np.asarray(scores).astype(np.float32)
    candidates = np.arange(scores.size) if within is None else np.flatnonzero(np.asarray(within))
    order = np.argsort(scores.reshape(-1)[candidates], kind="stable")
    mask = np.zeros(scores.size, np.float32)
    mask[candidates[order[order.size - count :]]] = 1
    return mask.reshape(scores.shape)


def highest_in_each(scores: dict, counts: dict, within: dict | None = None) -> dict:
    """{name: mask} of flat dictionaries, one layer at a time."""
    return {name: highest(s, counts[name], None if within is None else within[name]) for name, s in scores.items()}


def highest_of_all(scores: dict, count: int) -> dict:
    """{name: mask} of the `count` highest of all the arrays, joined in the dictionary's order."""
    joined = highest(np.concatenate([np.ravel(s).astype(np.float32) for s in scores.values()]), count)
    parts = np.split(joined, np.cumsum([np.size(s) for s in scores.values()])[:-1])
    return {name: part.reshape(np.shape(s)) for part, (name, s) in zip(parts, scores.items(), strict=True)}
