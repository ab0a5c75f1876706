"""PyTorch's train steps in a process of their own, for the benchmark to time beside ours.

torch is optional, so it is imported only where it is measured.
"""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np

from experiments.bench.child import candidates
from experiments.bench.rows import cores
from experiments.bench.train_step import DENSITY, OurStep, Start, first_batch, make_method
from experiments.data.augment import normalise
from supermask_jax.commands import graphs, networks
from supermask_jax.trees import by_path


def why_no_torch() -> str | None:
    """Why torch cannot be measured, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch not installed"
    if jax.default_backend() == "cpu":
        return None  # importing it here would count in the peak memory of this process
    import torch

    return None if torch.cuda.is_available() else "torch does not support this device"


def torch_arguments(start: Start, ours: OurStep) -> dict[str, Any]:
    """The arguments of `torch_reference.make_steps`: weights, scores, batch, settings that our edge-popup starts with.

    Args:
      start: of `train_step.noise`.
      ours: edge-popup's step; only its settings are read.
    """
    dataset, module = start.dataset, start.network.module
    batch = first_batch(dataset.train, ours.optim.batch_size)
    of_torch = networks.Network(module, dataset.image_shape, dataset.classes, dataset.mean, dataset.std)
    graph = graphs.steps(of_torch)
    weights, state = jax.device_get((by_path(start.weights), by_path(start.model_state)))
    scores = jax.device_get(by_path(make_method("edge-popup", start.weights).subnet.scores))
    arguments = {
        # Plain tuples, so that the other process imports no JAX.
        "graph": [tuple(step._replace(layer=graphs.torch_name(step.layer))) for step in graph],
        "weights": graphs.arrays(graph, weights, state),
        "scores": graphs.arrays(graph, scores, {}),
        "images": np.asarray(normalise(batch["image"], dataset.mean, dataset.std)),
        "labels": batch["label"],
        "density": DENSITY,
        "learning_rate": ours.optim.learning_rate,
        "momentum": ours.optim.momentum,
        "threads": cores(),
        "device": "cpu" if jax.default_backend() == "cpu" else "cuda",
    }
    return jax.device_get(arguments)


def torch_steps(start: Start, ours: OurStep) -> AbstractContextManager[dict[str, Callable[[], float]]]:
    """{name: call}, where a call does as many steps as one of ours, from the same start, and returns the last loss.

    The process ends with the context. Arguments as in `torch_arguments`.
    """
    from experiments.bench import torch_reference

    return candidates(torch_reference.make_steps, ours.steps, **torch_arguments(start, ours))
