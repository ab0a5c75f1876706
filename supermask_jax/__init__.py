"""Find the networks that are hidden inside networks: masks and scores as pytrees beside frozen weights."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from supermask_jax import (
    artifact,
    construction,
    densities,
    dynamic,
    initializers,
    layouts,
    lottery,
    methods,
    metrics,
    parallel,
    saliency,
)
from supermask_jax.artifact import load_run, load_subnetwork, save_subnetwork
from supermask_jax.backend import jit
from supermask_jax.compaction import compact
from supermask_jax.densities import keep_count
from supermask_jax.layouts import describe, inspect
from supermask_jax.leaves import Layout, Leaf, equinox_fan_in, equinox_fan_out, flax_fan_in, flax_fan_out
from supermask_jax.methods import Method
from supermask_jax.pretrained import load_hidden_network, load_pretrained
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
    ProductFn,
    Subnet,
    bernoulli,
    edge_popup,
    identity,
    init_scores,
    rescaled,
    subnetwork,
    threshold,
    zero_scores,
)
from supermask_jax.train import TrainState, init_state, make_train_step
from supermask_jax.trees import density, is_kernel, layer_densities

if TYPE_CHECKING:
    from supermask_jax import models

__all__ = [
    "Layout",
    "Leaf",
    "MaskFn",
    "Method",
    "ProductFn",
    "Subnet",
    "TrainState",
    "artifact",
    "bernoulli",
    "compact",
    "construction",
    "densities",
    "density",
    "describe",
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
    "inspect",
    "is_kernel",
    "jit",
    "keep_count",
    "keep_highest",
    "layer_densities",
    "layerwise_masks",
    "layouts",
    "load_hidden_network",
    "load_pretrained",
    "load_run",
    "load_subnetwork",
    "lottery",
    "make_train_step",
    "methods",
    "metrics",
    "models",
    "n_m_masks",
    "parallel",
    "random_masks",
    "rescaled",
    "saliency",
    "save_subnetwork",
    "subnetwork",
    "threshold",
    "top_k_mask",
    "zero_scores",
]


def __getattr__(name: str) -> ModuleType:
    if name == "models":  # imported at its first use, because only the models need flax
        return importlib.import_module("supermask_jax.models")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
