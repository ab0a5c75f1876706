"""Time and memory of the training step and of the selection: `python -m experiments.benchmark`.

With --scaling, what several devices cost instead (`scaling`).

Absolute times move between machines and from day to day, so everything is a ratio within one run: the candidates take
turns, and a ratio is the median over the rounds of each round's own ratio. Functions import what is heavy themselves,
so that --help answers at once.
"""

import contextlib
import importlib.metadata
import itertools
import multiprocessing
import operator
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.run import command_line
from experiments.run.errors import UserError

WARM_UP = 2  # rounds that are not counted
STEP_DENSITY = 0.5
LEARNING_RATE = 0.01  # low: nothing can be learned from noise, and large steps diverge on it
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
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes
HOLDS = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Config:
    """Measure the MNIST convnet's training step and the selection of the highest scores."""

    rounds: int = 30
    """Times that each candidate is measured; the candidates take turns."""
    batch_sizes: tuple[int, ...] = (64, 512)
    """Images per step."""
    skip_torch: bool = False
    """Leave PyTorch out; it is also left out where it is not installed."""
    scaling: bool = False
    """Measure what several devices cost instead: steps per second of 1 to 8 fake devices, the bytes that a step moves
    between them, and what a run survives. The batch sizes are not used."""
    soak_seconds: int = 15
    """With --scaling, how long a run is watched that saves once a second."""
    output: str | None = None
    """Where the figures go as JSON; by default runs/benchmark/benchmark.json, or scaling.json there."""

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        if self.rounds < 1:
            raise UserError(f"--rounds must be 1 or more; got {self.rounds}.")
        if self.soak_seconds < 1:
            raise UserError(f"--soak-seconds must be 1 or more; got {self.soak_seconds}.")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UserError(f"--batch-sizes must be 1 or more each; got {self.batch_sizes}.")


class Sizes(NamedTuple):
    """How large the measured things are; smaller only in tests. By default, MNIST's."""

    images: int = 60_000
    image_shape: tuple[int, int, int] = (28, 28, 1)
    examples_per_turn: int = 1024  # that a candidate trains on before the next one's turn
    streamed: tuple[int, int] = (2**16, 2**10)  # scores for bandwidth: more than any cache holds


def main(config: Config, sizes: Sizes = Sizes()) -> dict:  # noqa: B008 - immutable
    """Measures, prints the table, writes the JSON file and returns what is in it."""
    from rich.console import Console

    from experiments.run import files

    console = Console(file=sys.stdout)
    file = Path(config.output or f"runs/benchmark/{'scaling' if config.scaling else 'benchmark'}.json")
    if file.is_dir():
        raise UserError(f"{file} is a directory; name a file with --output.")
    file.parent.mkdir(parents=True, exist_ok=True)
    no_torch = "skipped" if config.skip_torch or config.scaling else why_no_torch()
    measure = measure_scaling if config.scaling else measure_one_device
    result = {"about": about(config, no_torch), **measure(config, sizes, no_torch, console)}
    show(console, result)
    files.write_json(file, result)
    return result


def measure_scaling(config: Config, sizes: Sizes, no_torch: str | None, console) -> dict:
    """{"rows": the table, and what it was made from}."""
    from experiments.bench import faults, scaling

    with console.status("several devices: minutes"):
        measured = scaling.measure(config.rounds)
    with console.status("faults: minutes"), tempfile.TemporaryDirectory() as scratch:
        survived = [
            {"fault": fault.fault, "tries": fault.tries, "survived": fault.survived}
            for fault in faults.table(Path(scratch), config.soak_seconds)
        ]
    return {"rows": scaling.rows(measured), **measured, "faults": survived}


def measure_one_device(config: Config, sizes: Sizes, no_torch: str | None, console) -> dict:
    """{"rows": the table}."""
    import jax

    with console.status("compiling"):
        dataset, weights = noise(sizes)
        ours = {
            batch: {method: OurStep(method, dataset, weights, batch, sizes) for method in ("edge-popup", "dense")}
            for batch in config.batch_sizes
        }
        rows = compiling_and_memory(ours, dataset)
    for batch, steps in ours.items():
        with console.status(f"training steps, batch {batch}"):
            reference = (
                torch_steps(dataset, weights, steps["edge-popup"]) if not no_torch else contextlib.nullcontext({})
            )
            ratios = STEP_RATIOS if batch == TARGET_BATCH else [(*pair, None, None) for *pair, _, _ in STEP_RATIOS]
            with reference as theirs:
                rows += time_steps(f"training step, batch {batch}", steps, theirs, ratios, config.rounds)
    with console.status("selection"):
        rows += time_selection(weights, config.rounds)
        if jax.default_backend() != "cpu":
            rows += time_bandwidth(sizes.streamed, config.rounds)
    return {"rows": rows}


def row(group: str, name: str, unit: str, values, target: str | None = None, bound: float | None = None) -> dict:
    """One line of the table and of the JSON file. A target is "<=" or ">=" a bound, in `unit`."""
    median = float(np.median(values))
    line = {"group": group, "name": name, "unit": unit, "median": median}
    line |= {"min": float(np.min(values)), "max": float(np.max(values))}
    if target:
        line |= {"target": f"{target} {bound:g}", "met": HOLDS[target](median, bound)}
    return line


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """{name: [rounds] seconds of each call}. The candidates take turns, and nothing is under way when one begins."""
    import jax

    seconds = {name: [] for name in candidates}
    for _ in range(WARM_UP + rounds):
        for name, call in candidates.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(times[WARM_UP:]) for name, times in seconds.items()}


def compared(group: str, seconds: dict[str, np.ndarray], ratios) -> list[dict]:
    """Rows of the times, and of the ratios between candidates that are there."""
    return [row(group, name, "ms", times * 1e3) for name, times in seconds.items()] + [
        row(group, f"{above} / {below}", "x", seconds[above] / seconds[below], target, bound)
        for above, below, target, bound in ratios
        if above in seconds and below in seconds
    ]


def noise(sizes: Sizes):
    """Random images in the shape of MNIST, whose content costs a step nothing, and the convnet's weights for them."""
    import jax

    from experiments import mnist
    from experiments.data import load as data
    from experiments.training import recipe

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (sizes.images, *sizes.image_shape), np.uint8)
    labels = rng.integers(0, 10, sizes.images, np.int32)
    mean, std = 0.5, 12**-0.5  # of uniform noise
    dataset = data.Dataset("noise", images, labels, images[:1], labels[:1], mean, std, source="random")
    config = mnist.Config()
    model = recipe.build_model(config, dataset.classes)
    return dataset, jax.device_get(recipe.draw_weights(config, model, sizes.image_shape, jax.random.key(0)))


class OurStep:
    """A method's train step as `experiments.mnist` runs it. Each call trains for `steps` steps."""

    def __init__(self, method: str, dataset, weights, batch: int, sizes: Sizes):
        import jax
        import jax.numpy as jnp

        import supermask_jax as sm
        from experiments import mnist
        from experiments.training import methods, recipe
        from experiments.training import stepper as driver

        self.config = mnist.Config(method=method, batch_size=batch, density=STEP_DENSITY, learning_rate=LEARNING_RATE)
        examples, key = len(dataset.train_labels), jax.random.key(0)
        weights = jax.tree.map(jnp.array, weights)  # a copy: the step donates its state
        model = recipe.build_model(self.config, dataset.classes)
        loss_fn = recipe.make_loss(model, dataset.mean, dataset.std)
        tx = recipe.make_optimizer(self.config, recipe.make_schedule(self.config, max(examples // batch, 1)))
        # With a key of its own and without weights: the first step overwrites the state that holds those.
        self.start = methods.Start(self.config, None, jax.random.key(0), tx, model)
        task = methods.METHODS[method](self.start._replace(weights=weights))
        self.step = sm.make_train_step(task.mask_fn, loss_fn, tx, learns=task.learns)
        self.state = sm.init_state(task.subnet, tx, key, learns=task.learns)
        self.totals = driver.zero_totals()
        self.advance = driver.Driver(self.step, task.learns, dataset)
        self._order = driver.epoch_order(key, 0, examples, batch)
        self.steps = max(self.advance.steps_per_call, sizes.examples_per_turn // batch)
        self.steps = min(self.steps, len(self._order[0]))

    def __call__(self):
        self.state, self.totals, _ = self.advance(self.state, self.totals, self._order, 0, self.steps)
        return self.state, self.totals


def first_batch(dataset, batch: int) -> dict[str, np.ndarray]:
    """A batch as a train step takes it."""
    images, labels = dataset.train_images[:batch], dataset.train_labels[:batch]
    return {"image": images, "label": labels, "weight": np.ones(len(labels), np.float32)}


def compiling_and_memory(ours: dict[int, dict[str, OurStep]], dataset) -> list[dict]:
    """Rows of what one step needs beside its time. To be measured first: a process's peaks only grow."""
    import jax

    from experiments.training import stepper as driver

    steps = {f"{name}, batch {batch}": step for batch, of in ours.items() for name, step in of.items()}
    jax.block_until_ready([step() for step in steps.values()])
    rows = [row("compiling a step", n, "s", s.advance.compile_seconds, "<=", COMPILE_SECONDS) for n, s in steps.items()]
    for name, step in steps.items():
        arguments = step.state, first_batch(dataset, step.config.batch_size)
        used = driver.compile_for_backend(step.step, arguments, donate=(0,)).memory_analysis()
        total = used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes
        rows.append(row("peak memory", name, "MB", (total - used.alias_size_in_bytes) / 1e6))
    peaks = {
        "process, with compiling": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT,
        "device": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    return rows + [row("peak memory", name, "MB", peak / 1e6) for name, peak in peaks.items() if peak]


def why_no_torch() -> str | None:
    """Why torch cannot be compared with, or None."""
    import jax

    try:
        import torch
    except ImportError:
        return "torch not installed"
    supported = jax.default_backend() == "cpu" or torch.cuda.is_available()
    return None if supported else "torch does not support this device"


def torch_arguments(dataset, weights, ours: OurStep) -> dict[str, Any]:
    """What `torch_reference.serve` is given: weights, scores, batch and settings that our edge-popup starts from."""
    import jax

    from experiments.training import methods, recipe
    from supermask_jax.trees import by_path

    batch = first_batch(dataset, ours.config.batch_size)
    task = methods.METHODS["edge-popup"](ours.start._replace(weights=weights))
    arguments = {
        "weights": by_path(weights),
        "scores": by_path(task.subnet.scores),
        "images": np.asarray(recipe.normalise(batch["image"], dataset.mean, dataset.std)),
        "labels": batch["label"],
        "density": STEP_DENSITY,
        "learning_rate": ours.config.learning_rate,
        "momentum": ours.config.momentum,
        "threads": cores(),
        "device": "cpu" if jax.default_backend() == "cpu" else "cuda",
    }
    return jax.device_get(arguments)


@contextlib.contextmanager
def torch_steps(dataset, weights, ours: OurStep) -> Iterator[dict[str, Callable[[], float]]]:
    """{name: call}: torch's steps from the same start as ours, as many in a call.

    They run in a process of their own: the threads of torch and of XLA, waiting busily in one process, would slow both.
    """
    from experiments.bench import torch_reference

    arguments = torch_arguments(dataset, weights, ours)
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=torch_reference.serve, args=(theirs, arguments), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process ends a recv

    def call(name: str) -> float:
        pipe.send((name, ours.steps))
        return pipe.recv()

    try:
        yield {name: partial(call, name) for name in pipe.recv()}
    finally:
        process.terminate()
        process.join()


def time_steps(group: str, ours: dict[str, OurStep], theirs: dict[str, Callable], ratios, rounds: int) -> list[dict]:
    """Rows of one training step of each method."""
    steps = ours["dense"].steps
    seconds = interleaved({**ours, **theirs}, rounds)
    for name, step in ours.items():
        if int(step.totals["bad_step"]) >= 0:
            raise UserError(f"{name} training on noise gave numbers that are not finite; its times mean nothing.")
    return compared(group, {name: times / steps for name, times in seconds.items()}, ratios)


def time_selection(weights, rounds: int) -> list[dict]:
    """Rows of edge-popup's mask alone: of the convnet's largest layer, and of all its layers in lockstep.

    A group's name ends with the kind of scores and the density. numpy.partition has less to do: it finds each layer's
    threshold, but makes no mask and breaks no ties.
    """
    import jax
    import jax.numpy as jnp

    import supermask_jax as sm
    from experiments.training import stepper as driver

    rng = np.random.default_rng(0)
    normal = jax.tree.map(lambda w: jnp.asarray(rng.standard_normal(w.shape, np.float32)), weights)
    kinds = {
        "uniform": sm.init_scores(jax.random.key(1), weights),
        "normal": normal,
        "tied": jax.tree.map(lambda s: jnp.round(s, 1), normal),
    }
    parts = {"layer": lambda scores: {"": max(jax.tree.leaves(scores), key=jnp.size)}, "net": lambda s: s}
    sort = jax.jit(lambda scores: jax.tree.map(lambda s: jnp.sort(jnp.abs(s).ravel()), scores))
    rows = []
    for (part, part_of), density in itertools.product(parts.items(), SELECTION_DENSITIES):
        mask_fn = sm.edge_popup(density)
        select = driver.compile_for_backend(lambda s, f=mask_fn: f(s, None), (part_of(normal),))
        for kind, scores in kinds.items():
            scores = part_of(scores)
            flat = [np.abs(np.asarray(s)).ravel() for s in jax.tree.leaves(scores)]
            cuts = [s.size - sm.keep_count(density, s.size) for s in flat]
            candidates = {
                "selection": partial(select, scores),
                "numpy.partition": lambda flat=flat, cuts=cuts: list(map(np.partition, flat, cuts)),
            }
            if part != "net" and density == SELECTION_DENSITIES[0]:  # once: a sort is slow and knows no density
                candidates["jnp.sort"] = partial(sort, scores)
            seconds = interleaved(candidates, rounds)
            rows += compared(f"selection, {part}, {kind}, {density}", seconds, SELECTION_RATIOS)
    return rows


def time_bandwidth(shape: tuple[int, int], rounds: int) -> list[dict]:
    """Rows of the bytes per second of a selection, counting one read of the scores and one write of the mask, and of a
    copy. Their ratio is how many copies a selection costs; it reads the scores once in every pass of its search."""
    import jax
    import jax.numpy as jnp

    import supermask_jax as sm
    from experiments.training import stepper as driver

    scores = jax.random.uniform(jax.random.key(0), shape, minval=-1)
    functions = {"selection": lambda s: sm.edge_popup(STEP_DENSITY)(s, None), "copy": jnp.copy}
    compiled = {name: driver.compile_for_backend(function, (scores,)) for name, function in functions.items()}
    seconds = interleaved({name: partial(function, scores) for name, function in compiled.items()}, rounds)
    group = f"bandwidth, {scores.nbytes / 1e6:,.0f} MB of scores"
    rates = [row(group, name, "GB/s", 2e-9 * scores.nbytes / times) for name, times in seconds.items()]
    return rates + compared(group, seconds, [("selection", "copy", None, None)])


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def about(config: Config, no_torch: str | None) -> dict:
    """What the figures were measured on and with."""
    import jax

    from experiments.training import fit as runner

    versions = runner.versions()
    if not no_torch:
        versions["torch"] = importlib.metadata.version("torch")
    return {
        "config": asdict(config),
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()}), {platform.machine()}",
        "cores": cores(),
        "torch": no_torch or versions["torch"],
        "versions": versions,
    }


def show(console, result: dict) -> None:
    """The rows as a table of 80 columns, a section for each group."""
    from rich.table import Table

    about = result["about"]
    table = Table(title=f"{about['device']}, {about['cores']} cores, {about['config']['rounds']} rounds")
    for column, justify in (("", "left"), ("median", "right"), ("min - max", "right"), ("target", "left")):
        table.add_column(column, justify=justify)
    for group, lines in itertools.groupby(result["rows"], key=operator.itemgetter("group")):
        table.add_section()
        table.add_row(f"[bold]{group}")
        for line in lines:
            median, low, high = (short(line[part]) for part in ("median", "min", "max"))
            verdict = f"{line['target']} {'met' if line['met'] else 'MISSED'}" if "target" in line else ""
            spread = "" if line["min"] == line["max"] else f"{low} - {high}"
            table.add_row(line["name"], f"{median} {line['unit']}", spread, verdict)
    console.print(table)
    if "faults" in result:
        table = Table("fault", "tries", "survived", title="what a run survives")
        for fault in result["faults"]:
            table.add_row(fault["fault"], str(fault["tries"]), str(fault["survived"]))
        console.print(table)
    console.print("A ratio is the median of the rounds' own ratios. torch:", about["torch"], highlight=False)


def short(figure: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:#.3g}"


if __name__ == "__main__":
    command_line.run(main, Config, lambda: {}, prog="python -m experiments.benchmark")
