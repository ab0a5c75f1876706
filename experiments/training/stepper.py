"""Train steps over the images of a data set: compiled for the backend, in a fixed order, without waiting for the host.

How the step is driven differs by backend: on a CPU one compiled call per step, because XLA's CPU backend runs the
gradients of convolutions inside a loop many times slower (jax issue 12868); elsewhere, and for networks without
convolutions, many steps per call, with the images on the device.
"""

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import supermask_jax as sm
from experiments.data import load as data
from experiments.run.placement import Layout
from supermask_jax.trees import Tree

STEPS_PER_CALL = {"cpu": 1}
STEPS_PER_CALL_ELSEWHERE = 100
CPU_OPTIONS = {  # the defaults of jaxlib 0.10 make ...
    "xla_cpu_experimental_ynn_fusion_type": "",  # ... convolutions 2 to 3 times slower
    "xla_cpu_use_fusion_emitters": False,  # ... the whole step 10 % slower
    "xla_backend_optimization_level": 1,  # ... compilation twice as long, and the step no faster
}


class Driver:
    """Runs train steps over the images, which stay on the devices.

    Called with (state, totals, order, start, stop) it does the steps of `order` from start to stop and returns the
    new state and totals, and the seconds that it took without compiling. The state that goes in is donated.

    Args:
      step: of `make_train_step`; its metrics are sums, but for the loss.
      learns: the tree that is watched for what is not finite.
      dataset: the images; `order` counts the training images.
      steps_per_call: how many steps are compiled into one; the backend's number, if None.
      layout: where the state lies; the order's batches are split over its devices. One device, if None.
    """

    def __init__(
        self,
        step: Callable,
        learns: str,
        dataset: data.Dataset,
        steps_per_call: int | None = None,
        layout: Layout | None = None,
    ):
        self.steps_per_call = steps_per_call or STEPS_PER_CALL.get(jax.default_backend(), STEPS_PER_CALL_ELSEWHERE)
        self.compile_seconds = 0.0
        self._layout, self._learns = layout or Layout(), learns
        self._images = self._layout.replicate((dataset.train_images, dataset.train_labels))
        self._compiled, self._order, self._placed = {}, None, None

        def one(carry, images, chosen):
            state, totals = carry
            at = state.step
            state, metrics = step(state, _batch(images, *chosen))
            return state, add_to_totals(totals, metrics, getattr(state.subnet, learns), at)

        def many(steps, state, totals, images, order, start):
            chosen = [jax.lax.dynamic_slice_in_dim(part, start, steps) for part in order]
            if steps == 1:
                return one((state, totals), images, [part[0] for part in chosen])
            carry, _ = jax.lax.scan(lambda carry, at: (one(carry, images, at), None), (state, totals), tuple(chosen))
            return carry

        self._many = many

    def __call__(self, state, totals, order, start: int, stop: int) -> tuple[sm.TrainState, dict, float]:
        if order is not self._order:  # of a new epoch
            self._order, self._placed = order, tuple(self._layout.split(part, axis=1) for part in order)
        seconds = 0.0
        while start < stop:
            # Two lengths of call and no others: each one is compiled.
            steps = self.steps_per_call if stop - start >= self.steps_per_call else 1
            arguments = (state, totals, self._images, self._placed, np.int32(start))
            run = self._compile(steps, arguments)
            began = time.perf_counter()
            state, totals = run(*arguments)
            seconds += time.perf_counter() - began
            start += steps
        began = time.perf_counter()
        jax.block_until_ready(totals)
        return state, totals, seconds + time.perf_counter() - began

    def _compile(self, steps: int, arguments: tuple) -> Callable:
        kind = steps, arguments[3][0].shape
        if kind not in self._compiled:
            began = time.perf_counter()
            out = self._layout.shardings(arguments[0]), self._layout.everywhere
            self._compiled[kind] = compile_for_backend(partial(self._many, steps), arguments, (0, 1), out)
            self.compile_seconds += time.perf_counter() - began
        return self._compiled[kind]


class PmapDriver:
    """`Driver` for a step of `parallel.pmap_step`: one call of it for each step, with this process's share of a batch.

    Args:
      step: of `pmap_step`, on all devices of the layout, with metrics that are sums, but for the loss.
      learns, dataset, layout: as for `Driver`.
    """

    steps_per_call = 1

    def __init__(self, step: Callable, learns: str, dataset: data.Dataset, layout: Layout):
        self.compile_seconds = 0.0
        self._step, self._learns, self._layout = step, learns, layout
        self._images = dataset.train_images, dataset.train_labels

        def add(totals, metrics, learner, at):
            sums = {name: value * layout.size for name, value in metrics.items() if name != "loss"}  # means of devices
            return add_to_totals(totals, {**metrics, **sums}, learner, at)

        self._add = jax.jit(add, donate_argnums=0)

    def __call__(self, state, totals, order, start: int, stop: int) -> tuple[sm.TrainState, dict, float]:
        state, totals = self._layout.local((state, totals))
        began, compiling = time.perf_counter(), not self.compile_seconds
        for index in range(start, stop):
            state, metrics = self._step(state, _batch(self._images, *(self._share(part[index]) for part in order)))
            totals = self._add(totals, metrics, getattr(state.subnet, self._learns), state.step - 1)
            if compiling:
                jax.block_until_ready(totals)
                self.compile_seconds, compiling = time.perf_counter() - began, False
                began = time.perf_counter()
        jax.block_until_ready(totals)
        state, totals = self._layout.everyones((state, totals))
        return state, totals, time.perf_counter() - began

    def _share(self, part: np.ndarray) -> np.ndarray:
        return part.reshape(jax.process_count(), -1)[jax.process_index()]


def batch_at(dataset: data.Dataset, order, index: int) -> dict[str, np.ndarray]:
    """The batch that the step of that index in `order` sees."""
    return _batch((dataset.train_images, dataset.train_labels), *(part[index] for part in order))


def _batch(images, indices, weight) -> dict:
    images, labels = images
    return {"image": images[indices], "label": labels[indices], "weight": weight}


def add_to_totals(totals: dict, metrics: dict, learner: Tree, at) -> dict[str, jax.Array]:
    """The totals (see `zero_totals`) with those of the step `at`, after which the learning tree is `learner`."""
    leaf = first_not_finite(learner)
    is_first = (totals["bad_step"] < 0) & ((leaf >= 0) | ~jnp.isfinite(metrics["loss"]))
    return {
        "loss": totals["loss"] + metrics["loss"] * metrics["count"],
        "correct": totals["correct"] + metrics["correct"],
        "count": totals["count"] + metrics["count"],
        "bad_step": jnp.where(is_first, at, totals["bad_step"]),
        "bad_leaf": jnp.where(is_first, leaf, totals["bad_leaf"]),
    }


def compile_for_backend(
    function: Callable, arguments: tuple, donate: tuple[int, ...] = (), out_shardings: Tree = None
) -> Callable:
    """`function` compiled for these arguments, on a CPU with the options that make its convolutions fast."""
    options = CPU_OPTIONS if jax.default_backend() == "cpu" else None
    compiled = partial(jax.jit, function, donate_argnums=donate, out_shardings=out_shardings)
    try:
        return compiled(compiler_options=options).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return compiled().lower(*arguments).compile()  # a compiler without the option


def compiling(function: Callable, out_shardings: Tree = None) -> Callable:
    """`function`, compiled for the backend when it is first called with arguments of some shapes and places."""
    compiled = {}

    def call(*arguments):
        leaves = [(leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in jax.tree.leaves(arguments)]
        kind = (jax.tree.structure(arguments), *leaves)
        if kind not in compiled:
            compiled[kind] = compile_for_backend(function, arguments, out_shardings=out_shardings)
        return compiled[kind](*arguments)

    return call


def epoch_order(key: jax.Array, epoch: int, examples: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which images each step of an epoch sees: int32 [steps, batch] indices and float32 [steps, batch] weights.

    A new permutation for each epoch, a function of (key, epoch) alone. The last batch is padded with weight 0.
    """
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), examples), np.int32)
    padding = -examples % batch_size
    weights = np.concatenate([np.ones(examples, np.float32), np.zeros(padding, np.float32)])
    order = np.concatenate([order, np.zeros(padding, np.int32)])
    return order.reshape(-1, batch_size), weights.reshape(-1, batch_size)


def zero_totals() -> dict[str, jax.Array]:
    """The sums over an epoch's steps before its first; `bad_step` is the first that was not finite, or -1, and
    `bad_leaf` the place of the first such leaf of what learns then, or -1 for the loss alone."""
    sums = {name: jnp.float32(0) for name in ("loss", "correct", "count")}
    return sums | {"bad_step": jnp.int32(-1), "bad_leaf": jnp.int32(-1)}


def train_figures(totals: dict[str, jax.Array]) -> dict[str, float]:
    """Means over the epoch so far."""
    count = float(totals["count"])
    return {"loss": float(totals["loss"]) / count, "accuracy": float(totals["correct"]) / count, "examples": count}


def first_not_finite(tree: Tree) -> jax.Array:
    """The place of the first leaf that holds NaN or infinity, or -1: then its sum of magnitudes is not finite."""
    finite = jnp.isfinite(jnp.stack([jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]))
    return jnp.where(jnp.all(finite), -1, jnp.argmin(finite)).astype(jnp.int32)
