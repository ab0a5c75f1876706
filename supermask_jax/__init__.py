"""Find the networks that are hidden inside networks: masks and scores as pytrees beside frozen weights."""

from supermask_jax import construction, densities, dynamic, initializers, lottery, metrics, models, parallel, saliency
from supermask_jax.densities import keep_count
from supermask_jax.initializers import equinox_fan_in, equinox_fan_out, flax_fan_in, flax_fan_out
from supermask_jax.selection import (
    global_masks,
    keep_highest,
    layerwise_masks,
    n_m_masks,
    random_masks,
    top_k_mask,
)
from supermask_jax.supermask import (
    MaskFn,
    Subnet,
    bernoulli,
    edge_popup,
    identity,
    init_scores,
    rescaled,
    subnetwork,
    zero_scores,
)
from supermask_jax.train import TrainState, init_state, make_train_step
from supermask_jax.trees import density, is_kernel, layer_densities

__all__ = [
    "MaskFn",
    "Subnet",
    "TrainState",
    "bernoulli",
    "construction",
    "densities",
    "density",
    "dynamic",
    "edge_popup",
    "equinox_fan_in",
    "equinox_fan_out",
    "flax_fan_in",
    "flax_fan_out",
    "global_masks",
    "identity",
    "init_scores",
    "init_state",
    "initializers",
    "is_kernel",
    "keep_count",
    "keep_highest",
    "layer_densities",
    "layerwise_masks",
    "lottery",
    "make_train_step",
    "metrics",
    "models",
    "n_m_masks",
    "parallel",
    "random_masks",
    "rescaled",
    "saliency",
    "subnetwork",
    "top_k_mask",
    "zero_scores",
]
