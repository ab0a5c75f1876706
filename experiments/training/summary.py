"""What is recorded of a network: sizes, flips, and the summary of a run."""

import datetime
import importlib.metadata
import platform

import jax
import jax.numpy as jnp

import supermask_jax as sm
from experiments.training.network import Network
from supermask_jax import metrics
from supermask_jax.trees import Tree, by_path, ones_and_sizes


def count_flips(before: Tree, after: Tree) -> dict[str, int]:
    """{path: number of mask bits that differ}."""
    old = by_path(before)
    return {path: int(jnp.count_nonzero(m != old[path])) for path, m in by_path(after).items()}


def sizes(network: Network, weights: Tree, state: Tree, masks: Tree) -> dict:
    """What the masks keep: "layers", by path; the paths of those that keep nothing; "density"; "parameters"; "flops".

    The density is that of all layers together. FLOPs are those of one image.
    """
    layers = {
        path: {"size": size, "kept": kept, "density": kept / size}
        for path, (kept, size) in kernel_counts(weights, masks).items()
    }

    def apply_fn(params, images):
        return network.logits(params, state, images)

    return {
        "density": sum(v["kept"] for v in layers.values()) / sum(v["size"] for v in layers.values()),
        "layers": layers,
        "emptied": [path for path, layer in layers.items() if not layer["kept"]],
        "parameters": metrics.parameter_count(weights, masks),
        "flops": metrics.flops(apply_fn, weights, masks, network.image_shape),
    }


def kernel_counts(weights: Tree, masks: Tree) -> dict[str, tuple[int, int]]:
    """{path: (kept, size)} of every prunable leaf; where there are no masks, all of every kernel is kept."""
    if jax.tree.leaves(masks):
        return ones_and_sizes(masks)
    kernels = {path: leaf.size for path, leaf in by_path(weights).items() if sm.is_kernel(path, leaf)}
    return {path: (size, size) for path, size in kernels.items()}


def machine() -> str:
    """The device that this process computes on."""
    return f"{jax.devices()[0].device_kind} ({jax.default_backend()}), {platform.machine()}"


def today() -> str:
    """The date, as 2026-01-31."""
    return datetime.date.today().isoformat()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    packages = ("supermask-jax", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str:
    """The version of a package, or "not installed" of one that is found on the path, as this one in a checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
