"""The methods by their command-line names: each says what the masks come from and what learns."""

from typing import NamedTuple

import jax

import supermask_jax as sm


class Task(NamedTuple):
    """What `runner.fit` trains."""

    mask_fn: sm.MaskFn
    subnet: sm.Subnet
    learns: str


def edge_popup(config, weights, key) -> Task:
    return Task(sm.edge_popup(config.density), sm.Subnet(weights, sm.init_scores(key, weights)), "scores")


def dense(config, weights, key) -> Task:
    return Task(sm.identity, sm.Subnet(weights, jax.tree.map(lambda _: None, weights)), "weights")


METHODS = {"edge-popup": edge_popup, "dense": dense}
