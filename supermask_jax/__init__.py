"""Find the networks that are hidden inside networks: masks and scores as pytrees beside frozen weights."""

from supermask_jax import initializers, models
from supermask_jax.densities import keep_count
from supermask_jax.initializers import equinox_fan_in, flax_fan_in
from supermask_jax.selection import global_masks, keep_highest, layerwise_masks, top_k_mask
from supermask_jax.supermask import MaskFn, Subnet, edge_popup, identity, init_scores, subnetwork
from supermask_jax.train import TrainState, init_state, make_train_step
from supermask_jax.trees import density, is_kernel, layer_densities

__all__ = [
    "MaskFn",
    "Subnet",
    "TrainState",
    "density",
    "edge_popup",
    "equinox_fan_in",
    "flax_fan_in",
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
    "make_train_step",
    "models",
    "subnetwork",
    "top_k_mask",
]
