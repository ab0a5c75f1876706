"""How the time and the memory of a selection grow with the number of scores: trees from 25 million to 1.3 billion.

Every tree is measured in a process of its own, whose peak of memory is the selection's: on one device, and split over
eight fake ones. Of real pods there is the cost model's time only.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import supermask_jax as sm
from experiments.bench.cost_model import CHIPS, Network, cost_model
from experiments.bench.networks import describe, shardings_of, split_layers
from experiments.bench.one_device import peak_memory
from experiments.bench.rows import interleaved, row
from experiments.bench.scaling import in_child
from experiments.bench.tables import CHIP, CHIPS_IN_ALL
from experiments.run.surroundings import free_on
from supermask_jax import parallel

DENSITY = 0.5
PASSES = 18  # that the cost model counts: as many as ResNet-50 needed on uniform scores (results/scaling.json)
# {devices: bytes of a score that a process may need}: the score, its mask, its key, and what counting the largest array
# takes. Of 355 million scores, 12 were measured on one device, and 15 to 18 on eight. A tree that may need more than is
# free is left out, and named.
NEEDED = {1: 12.5, 8: 18}


def transformer(layers: int, width: int, vocabulary: int, positions: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a GPT: of each layer queries, keys and values; what follows attention; and the two of the MLP."""
    block = {
        "attention": (width, 3 * width),
        "projection": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    shapes = {f"{at}/{name}": shape for at in range(layers) for name, shape in block.items()}
    return {"tokens": (vocabulary, width), "positions": (positions, width), **shapes}


TREES: Mapping[str, Callable[[], Mapping[str, tuple[int, ...]]]] = {
    "ResNet-50": lambda: describe("resnet-50").scores,
    "Wide ResNet-50": lambda: describe("wide-resnet-50").scores,
    "GPT-2 medium": lambda: transformer(24, 1024, 50257, 1024),
    "transformer of 1.3 billion": lambda: transformer(24, 2048, 50257, 2048),
}
"""{name: function that makes {path: shape}}."""


def measure(rounds: int, status: Callable) -> dict[str, Any]:
    """Measures every tree that fits into memory.

    Args:
      rounds: times that each selection is measured.
      status: shows what is being measured, as a context manager.

    Returns:
      "rows": the table. "trees": of each tree and number of devices "tree", "devices", "scores", "arrays" and either
      "seconds", "compile_seconds" and "peak_bytes", or "left_out", the reason. "pod": {tree: {chips: the cost model's
      seconds}}.
    """
    free, trees = free_on(jax.devices("cpu")[0]), []
    for name, shapes in TREES.items():
        tree = shapes()
        sizes = [math.prod(shape) for shape in tree.values()]
        for devices in NEEDED:
            of = {"tree": name, "devices": devices, "scores": sum(sizes), "arrays": len(sizes)}
            if free is None or sum(sizes) * NEEDED[devices] > free:
                of["left_out"] = "it may need more memory than is free, or nothing tells how much is free"
            else:
                with status(f"selection of {name}, {devices} device{'s' * (devices > 1)}"):
                    try:
                        of |= in_child(devices, time_tree, [(tree, rounds)])[0]
                    except RuntimeError as error:  # the others are not lost with it
                        of["left_out"] = str(error)
            trees.append(of)
    pod = {name: {str(chips): on_pod(name, chips) for chips in CHIPS_IN_ALL} for name in TREES}
    return {"rows": rows(trees), "trees": trees, "pod": pod}


def rows(trees: list[dict[str, Any]]) -> list[dict]:
    """The rows of the benchmark's table; of a tree that did not fit there are none."""
    lines = []
    for of in trees:
        if "seconds" in of:
            devices = f"{of['devices']} fake device{'s' * (of['devices'] > 1)}"
            group = f"{of['tree']}, {of['scores'] / 1e6:,.0f} million scores, {devices}"
            lines += [
                row(group, "selection", "ms", 1e3 * np.array(of["seconds"])),
                row(group, "compiling", "s", of["compile_seconds"]),
                row(group, "peak memory of the process", "MB", of["peak_bytes"] / 1e6),
            ]
    return lines


def time_tree(shapes: Mapping[str, Sequence[int]], rounds: int) -> dict[str, Any]:
    """What `measure` has of a tree, measured on all devices of this process.

    Args:
      shapes: {path: shape} of its scores.
      rounds: times that it is measured.
    """
    shardings = shardings_of(parallel.mesh(), shapes)
    scores = {path: _uniform(tuple(shapes[path]), shardings[path], at) for at, path in enumerate(shapes)}
    select = sm.jit(lambda scores: sm.edge_popup(DENSITY)(scores, None), out_shardings=shardings)
    began = time.perf_counter()
    compiled = select.lower(scores).compile()
    compile_seconds = time.perf_counter() - began
    # Between two selections, because the masks of the last one are only freed when Python collects its garbage.
    turns = {"selection": lambda: compiled(scores), "garbage": gc.collect}
    seconds = interleaved(turns, rounds)["selection"].tolist()
    return {"seconds": seconds, "compile_seconds": compile_seconds, "peak_bytes": peak_memory()}


def _uniform(shape: tuple[int, ...], sharding: jax.sharding.Sharding, seed: int) -> jax.Array:
    """Uniform scores, drawn by NumPy in parts: the memory of a selection is to be the peak."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        own = tuple(len(range(*at.indices(size))) for at, size in zip(index, shape, strict=True))
        begin = [at.indices(size)[0] for at, size in zip(index, shape, strict=True)]
        return np.random.default_rng([seed, *begin]).random(own, np.float32) - np.float32(0.5)

    return jax.make_array_from_callback(shape, sharding, part)


def on_pod(name: str, chips: int) -> float:
    """The cost model's seconds of a selection with the scores split over so many chips."""
    scores = TREES[name]()
    network = Network(scores, channels=0, norms=0, flops=0, activations=0)
    split = split_layers(scores, chips)
    cost = cost_model(network, chips, 0, CHIPS[CHIP], "gathered", split, PASSES)
    without = cost_model(network, chips, 0, CHIPS[CHIP], "gathered", split)
    return cost.selection + cost.latency - without.latency
