"""What training costs on one device: time, compilation and memory of a step, time and bandwidth of a selection."""

import contextlib
import itertools
import re
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import supermask_jax as sm
from experiments.bench import operations
from experiments.bench.rows import compared, interleaved, row
from experiments.bench.torch_steps import torch_steps
from experiments.bench.train_step import DENSITY, OurStep, Sizes, Start, first_batch, noise
from experiments.config.sections import Model
from experiments.data.source import Dataset
from experiments.run.errors import UserError
from supermask_jax.trees import Tree

MNIST = Sizes()
SELECTION_DENSITIES = (0.3, 0.5)
TARGET_BATCH = 64  # the targets are for it: a selection costs the same whatever the batch
STEP_RATIOS = (
    ("edge-popup", "dense", "<=", 1.1),
    ("torch, sort", "edge-popup", ">=", 4.5),
    ("torch, kthvalue", "edge-popup", ">=", 1.5),
    ("edge-popup", "torch, dense", "<=", 1.1),
    ("dense", "torch, dense", None, None),
)
SELECTION_RATIOS = (("selection", "numpy.partition", "<=", 2.5), ("jnp.sort", "selection", None, None))
COMPILE_SECONDS = 3
CIFAR_BATCH = 128
METHODS = ("edge-popup", "dense")
COMPILATIONS = 3  # of a step of each, in turns
CIFAR_RATIOS = (("edge-popup", "dense", "<=", 1.05), ("torch, kthvalue", "edge-popup", None, None))


def _cifar(model: str, against_torch: float, published: float) -> tuple[Sizes, tuple]:
    """A network of CIFAR-10, and what its step should be beside PyTorch's, dense and as published."""
    ratios = ("dense", "torch, dense", "<=", against_torch), ("torch, sort", "edge-popup", ">=", published)
    return Sizes(Model(model=model), 100 * CIFAR_BATCH, (32, 32, 3), CIFAR_BATCH), ratios


CIFAR = {
    "conv2": _cifar("conv2", 1.0, 2.5),
    "conv4": _cifar("conv4", 1.0, 2.0),
    "resnet-20": _cifar("resnet-20", 1.1, 1.0),
    "resnet-18": _cifar("resnet-18", 1.1, 2.0),
}
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes

Status = Callable[[str], contextlib.AbstractContextManager]


def measure(rounds: int, batch_sizes: Sequence[int], torch: bool, status: Status) -> dict:
    """Measures everything on one device.

    Args:
      rounds: times that each candidate is measured.
      batch_sizes: images per step.
      torch: whether PyTorch's steps are measured too.
      status: shows what is being measured, as a context manager.

    Returns:
      {"rows": the table}.
    """
    with status("compiling"):
        start = noise(MNIST)
        ours = {batch: our_steps(start, batch, MNIST) for batch in batch_sizes}
        rows = compiling_and_memory(ours, start.dataset)
    for batch, steps in ours.items():
        with status(f"training steps, batch {batch}"):
            reference = torch_steps(start, steps["edge-popup"]) if torch else contextlib.nullcontext({})
            ratios = STEP_RATIOS if batch == TARGET_BATCH else [(*pair, None, None) for *pair, _, _ in STEP_RATIOS]
            with reference as theirs:
                rows += time_steps(f"training step, batch {batch}", steps, theirs, ratios, rounds)
    with status("selection"):
        rows += time_selection(start.weights, rounds)
        if jax.default_backend() != "cpu":
            rows += time_bandwidth(MNIST.streamed, rounds)
    return {"rows": rows}


def our_steps(start: Start, batch: int, sizes: Sizes) -> dict[str, OurStep]:
    """{method: its step}."""
    return {method: OurStep(method, start, batch, sizes) for method in METHODS}


def compiled_in_turns(
    start: Start, batch: int, sizes: Sizes, turns: int = COMPILATIONS
) -> tuple[dict[str, OurStep], dict[str, np.ndarray]]:
    """({method: its step}, {method: [turns] seconds of compiling it, with its tracing}); a turn before is not counted.

    Each begins without what jax has traced: the second method would find operations of the first.
    """
    seconds: dict[str, list[float]] = {}
    for _ in range(1 + turns):
        steps = {}
        for method in METHODS:
            jax.clear_caches()
            steps[method] = OurStep(method, start, batch, sizes)
            jax.block_until_ready(steps[method]())
            seconds.setdefault(method, []).append(steps[method].advance.compile_seconds)
    return steps, {method: np.array(values[1:]) for method, values in seconds.items()}


def measure_cifar(rounds: int, torch: bool, status: Status) -> dict:
    """Measures the networks of CIFAR-10: the step, its compilation, the selection; and convolutions by themselves.

    Args:
      rounds: times that each candidate is measured.
      torch: whether PyTorch's steps are measured too.
      status: shows what is being measured, as a context manager.

    Returns:
      {"rows": the table}.
    """
    rows = []
    for name, (sizes, faster) in CIFAR.items():
        group = f"{name}, batch {CIFAR_BATCH}"
        with status(group):
            start = noise(sizes)
            steps, seconds = compiled_in_turns(start, CIFAR_BATCH, sizes)
            rows += [row(group, f"compiling, {method}", "s", values) for method, values in seconds.items()]
            ratios = seconds["edge-popup"] / seconds["dense"]
            rows.append(row(group, "compiling, edge-popup / dense", "x", ratios, "<=", 1.3))
            reference = torch_steps(start, steps["edge-popup"]) if torch else contextlib.nullcontext({})
            with reference as theirs:
                rows += time_steps(group, steps, theirs, [*CIFAR_RATIOS, *faster], rounds)
            scores = sm.init_scores(jax.random.key(1), start.weights)
            select = _selection(DENSITY, scores)
            seconds = interleaved(_selections(select, scores, DENSITY), rounds)
            rows += compared(group, seconds, SELECTION_RATIOS[:1])
    with status("convolutions"):
        rows += operations.measure(CIFAR_BATCH, rounds, torch)
    return {"rows": rows}


def compiling_and_memory(ours: Mapping[int, Mapping[str, OurStep]], dataset: Dataset) -> list[dict]:
    """Rows of a step's compilation time and memory. They are measured first, because a process's peaks only grow.

    Args:
      ours: {batch: {method: step}}.
      dataset: the images that the steps train on.
    """
    steps = {f"{name}, batch {batch}": step for batch, of in ours.items() for name, step in of.items()}
    jax.block_until_ready([step() for step in steps.values()])
    rows = [row("compiling a step", n, "s", s.advance.compile_seconds, "<=", COMPILE_SECONDS) for n, s in steps.items()]
    for name, step in steps.items():
        compiled = _compiled(step.step, step.state, first_batch(dataset.train, step.optim.batch_size), donate=0)
        used = compiled.memory_analysis()
        total = used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes
        rows.append(row("peak memory", name, "MB", (total - used.alias_size_in_bytes) / 1e6))
    peaks = {
        "process, with compiling": peak_memory(),
        "device": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    return rows + [row("peak memory", name, "MB", peak / 1e6) for name, peak in peaks.items() if peak]


def peak_memory() -> int:
    """The most bytes that this process has had in memory. Linux's rusage has that of its parent, where it is higher."""
    try:
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0])
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def time_steps(
    group: str, ours: Mapping[str, OurStep], theirs: Mapping[str, Callable], ratios: Sequence[tuple], rounds: int
) -> list[dict]:
    """Rows of one training step of each method; arguments as in `compared`, `theirs` those of `torch_steps`.

    Raises:
      UserError: the training diverged.
    """
    steps = ours["dense"].steps
    seconds = interleaved({**ours, **theirs}, rounds)
    for name, step in ours.items():
        if int(step.totals["bad_step"]) >= 0:
            raise UserError(f"{name} training on noise gave numbers that are not finite; its times mean nothing.")
    return compared(group, {name: times / steps for name, times in seconds.items()}, ratios)


def time_selection(weights: Tree, rounds: int) -> list[dict]:
    """Rows of edge-popup's masks: of the convnet's largest layer, and of all its layers together.

    A group's name ends with the kind of scores and the density. numpy.partition does less work: it computes each
    layer's threshold, and neither makes masks nor breaks ties.
    """
    parts = {"layer": _largest, "net": lambda scores: scores}
    kinds, rows = _scores_of_each_kind(weights), []
    for (part, part_of), density in itertools.product(parts.items(), SELECTION_DENSITIES):
        select = _selection(density, part_of(kinds["normal"]))
        for kind, scores in kinds.items():
            # Once: a sort is slow and knows no density.
            sorts = part != "net" and density == SELECTION_DENSITIES[0]
            seconds = interleaved(_selections(select, part_of(scores), density, sorts), rounds)
            rows += compared(f"selection, {part}, {kind}, {density}", seconds, SELECTION_RATIOS)
    return rows


def _selection(density: float, scores: Tree) -> Callable[[Tree], Tree]:
    """Edge-popup's masks, compiled for these scores."""
    mask_fn = sm.edge_popup(density)
    return _compiled(lambda s: mask_fn(s, None), scores)


def _selections(select: Callable, scores: Tree, density: float, sorts: bool = False) -> dict[str, Callable]:
    """The selection and what it is compared with, for `interleaved`."""
    flat = [np.abs(np.asarray(s)).ravel() for s in jax.tree.leaves(scores)]
    cuts = [s.size - sm.keep_count(density, s.size) for s in flat]
    candidates = {
        "selection": partial(select, scores),
        "numpy.partition": lambda: list(map(np.partition, flat, cuts)),
    }
    if sorts:
        sort = jax.jit(lambda scores: jax.tree.map(lambda s: jnp.sort(jnp.abs(s).ravel()), scores))
        candidates["jnp.sort"] = partial(sort, scores)
    return candidates


def _scores_of_each_kind(weights: Tree) -> dict[str, Tree]:
    """Scores for these weights: as training starts with, normal, and normal with many ties."""
    rng = np.random.default_rng(0)
    normal = jax.tree.map(lambda w: jnp.asarray(rng.standard_normal(w.shape, np.float32)), weights)
    return {
        "uniform": sm.init_scores(jax.random.key(1), weights),
        "normal": normal,
        "tied": jax.tree.map(lambda s: jnp.round(s, 1), normal),
    }


def _largest(scores: Tree) -> Tree:
    return {"": max(jax.tree.leaves(scores), key=jnp.size)}


def time_bandwidth(shape: tuple[int, int], rounds: int) -> list[dict]:
    """Rows of the bytes per second of a selection and of a copy, counting one read of the scores and one write.

    Their ratio is how many copies a selection costs; it reads the scores once in every pass of its search.
    """
    scores = jax.random.uniform(jax.random.key(0), shape, minval=-1)
    functions = {"selection": lambda s: sm.edge_popup(DENSITY)(s, None), "copy": jnp.copy}
    compiled = {name: _compiled(function, scores) for name, function in functions.items()}
    seconds = interleaved({name: partial(function, scores) for name, function in compiled.items()}, rounds)
    group = f"bandwidth, {scores.nbytes / 1e6:,.0f} MB of scores"
    rates = [row(group, name, "GB/s", 2e-9 * scores.nbytes / times) for name, times in seconds.items()]
    return rates + compared(group, seconds, [("selection", "copy", None, None)])


def _compiled(function: Callable, *arguments: Any, donate: int | tuple[int, ...] = ()) -> jax.stages.Compiled:
    """The function compiled for these arguments, with the options that the backend needs."""
    return sm.jit(function, donate_argnums=donate).lower(*arguments).compile()
