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


def edge_popup_mlp(weights, scores, x, labels, density_counts, lr, momentum, decay, steps):
    """Edge-popup on a bias-free ReLU network by hand: (losses, final scores), all in double precision.

    weights, scores: lists of [in, out]; density_counts: how many weights each layer keeps. The gradient of a score
    is w * dL/d(w m) * sign(s). SGD: d = g + decay s; v = momentum v + d; s = s - lr v.
    """
    weights, scores = ([np.asarray(a, np.float64) for a in arrays] for arrays in (weights, scores))
    velocity, losses = [np.zeros_like(s) for s in scores], []
    for _ in range(steps):
        masked = [w * highest(np.abs(s), c) for w, s, c in zip(weights, scores, density_counts, strict=True)]
        inputs = [np.asarray(x, np.float64)]  # of each layer
        for layer in masked[:-1]:
            inputs.append(np.maximum(inputs[-1] @ layer, 0))
        logits = inputs[-1] @ masked[-1]
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        rows = np.arange(len(labels))
        losses.append(-np.log(p[rows, labels]).mean())
        back = p.copy()
        back[rows, labels] -= 1
        back /= len(labels)
        for i in reversed(range(len(masked))):
            gradient = inputs[i].T @ back * weights[i] * np.sign(scores[i])
            back = back @ masked[i].T * (inputs[i] > 0)
            velocity[i] = momentum * velocity[i] + gradient + decay * scores[i]
            scores[i] = scores[i] - lr * velocity[i]
    return losses, scores
