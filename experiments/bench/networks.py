"""The networks whose steps are counted and timed on several devices, and what the formulae need to know of them."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import supermask_jax as sm
from experiments.bench.cost_model import Network
from supermask_jax import models, parallel
from supermask_jax.trees import by_path
from supermask_jax.usage import multiplications

NETWORKS: Mapping[str, tuple[nn.Module, tuple[int, int, int]]] = {  # {name: (model, shape of an image)}
    "mnist-convnet": (models.MnistConvNet(), (28, 28, 1)),  # 1.2 million scores
    "mlp": (models.MLP(use_bias=False, hidden=(4096, 2048)), (64, 64, 1)),  # 25 million, quick to compile
    "resnet-50": (models.ResNet50(), (224, 224, 3)),
    "wide-resnet-50": (models.WideResNet50(), (224, 224, 3)),
    "tiny-resnet": (models.ResNet(10, (1, 1), bottleneck=True, width=16), (64, 64, 3)),
}


@functools.cache
def describe(name: str) -> Network:
    """What the formulae need to know of a network of `NETWORKS`."""
    return describe_module(*NETWORKS[name])


def describe_module(model: nn.Module, image: tuple[int, int, int]) -> Network:
    """What the formulae need to know of a model for images of this shape. It is read from shapes: nothing is run."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image)))
    statistics = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes.get("batch_stats", {}))

    def put_out(module, method):
        return method == "__call__" and isinstance(module, nn.Conv | nn.Dense | nn.BatchNorm)

    def apply(weights, images, **options):
        return model.apply({"params": weights, "batch_stats": statistics}, images, **options)

    images = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    outputs = functools.partial(apply, capture_intermediates=put_out)
    _, seen = jax.eval_shape(outputs, shapes["params"], images)
    norms = [leaf.size for path, leaf in by_path(statistics).items() if path.endswith("/mean")]
    return Network(
        scores={path: leaf.shape for path, leaf in by_path(shapes["params"]).items()},
        channels=sum(norms),
        norms=len(norms),
        flops=2 * sum(multiplications(apply, shapes["params"], images).values()),
        activations=sum(leaf.size for leaf in jax.tree.leaves(seen)),
    )


def shardings_of(mesh: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, jax.sharding.Sharding]:
    """{path: how `parallel.state_shardings` splits scores of this shape}."""
    weights = {path: jax.ShapeDtypeStruct(tuple(shape), jnp.float32) for path, shape in shapes.items()}
    state = sm.TrainState(None, sm.Subnet(weights, weights), None, None, None)
    return parallel.state_shardings(mesh, state, shard_scores=True).subnet.scores


def split_layers(shapes: Mapping[str, tuple[int, ...]], devices: int) -> set[str]:
    """Paths of the layers that `parallel.state_shardings` splits over so many devices. The devices need not exist."""
    mesh = jax.sharding.AbstractMesh((devices,), (parallel.AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    return {path for path, sharding in shardings_of(mesh, shapes).items() if not sharding.is_fully_replicated}
