"""The methods by their command-line names: each says what the masks come from and what learns."""

from typing import NamedTuple

import jax

import supermask_jax as sm


class Task(NamedTuple):
    """What `runner.fit` trains."""

    mask_fn: sm.MaskFn  # exactly 0 or 1: what is counted, compared and drawn
    forward: sm.MaskFn  # what the weights are multiplied by, in training and evaluation
    subnet: sm.Subnet
    learns: str
    sampled: bool = False  # whether masks are drawn: then a network is many, and evaluated as such


def edge_popup(config, weights, key) -> Task:
    mask_fn = sm.edge_popup(config.density)
    return Task(mask_fn, mask_fn, sm.Subnet(weights, sm.init_scores(key, weights)), "scores")


def bernoulli(config, weights, key) -> Task:
    mask_fn = sm.bernoulli()
    forward = sm.rescaled(mask_fn) if config.rescale else mask_fn
    return Task(mask_fn, forward, sm.Subnet(weights, sm.zero_scores(weights)), "scores", sampled=True)


def dense(config, weights, key) -> Task:
    return Task(sm.identity, sm.identity, sm.Subnet(weights, jax.tree.map(lambda _: None, weights)), "weights")


METHODS = {"edge-popup": edge_popup, "bernoulli": bernoulli, "dense": dense}
