"""Train steps over the images of a data set: compiled for the backend, in a fixed order, without waiting for the host.

How the step is driven differs by backend: on a CPU one compiled call per step, because XLA's CPU backend runs the
gradients of convolutions inside a loop many times slower (jax issue 12868); elsewhere, and for networks without
convolutions, many steps per call, with the images on the device.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import supermask_jax as sm
from experiments import data
from supermask_jax.trees import Tree

STEPS_PER_CALL = {"cpu": 1}
STEPS_PER_CALL_ELSEWHERE = 100
CPU_OPTIONS = {  # the defaults of jaxlib 0.10 make ...
    "xla_cpu_experimental_ynn_fusion_type": "",  # ... convolutions 2 to 3 times slower
    "xla_cpu_use_fusion_emitters": False,  # ... the whole step 10 % slower
    "xla_backend_optimization_level": 1,  # ... compilation twice as long, and the step no faster
}


class Driver:
    """Runs train steps over the images, which stay on the device.

    Called with (state, totals, order, start, stop) it does the steps of `order` from start to stop and returns the
    new state and totals, and the seconds that it took without compiling. The state that goes in is donated.
    `steps_per_call` is the backend's, if None.
    """

    def __init__(self, step: Callable, learns: str, dataset: data.Dataset, steps_per_call: int | None = None):
        self.steps_per_call = steps_per_call or STEPS_PER_CALL.get(jax.default_backend(), STEPS_PER_CALL_ELSEWHERE)
        self.compile_seconds = 0.0
        self._images, self._labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
        self._compiled = {}

        def one(carry, chosen, images, labels):
            state, totals = carry
            batch = _batch(images, labels, *chosen)
            at = state.step
            state, metrics = step(state, batch)
            leaf = first_not_finite(getattr(state.subnet, learns))
            is_first = (totals["bad_step"] < 0) & ((leaf >= 0) | ~jnp.isfinite(metrics["loss"]))
            return state, {
                "loss": totals["loss"] + metrics["loss"] * metrics["count"],
                "correct": totals["correct"] + metrics["correct"],
                "count": totals["count"] + metrics["count"],
                "bad_step": jnp.where(is_first, at, totals["bad_step"]),
                "bad_leaf": jnp.where(is_first, leaf, totals["bad_leaf"]),
            }

        def many(state, totals, images, labels, indices, weights):
            if len(indices) == 1:
                return one((state, totals), (indices[0], weights[0]), images, labels)
            carry, _ = jax.lax.scan(
                lambda carry, chosen: (one(carry, chosen, images, labels), None), (state, totals), (indices, weights)
            )
            return carry

        self._many = many

    def __call__(self, state, totals, order, start: int, stop: int) -> tuple[sm.TrainState, dict, float]:
        seconds = 0.0
        while start < stop:
            # Two lengths of call and no others: each one is compiled.
            steps = self.steps_per_call if stop - start >= self.steps_per_call else 1
            chosen = [part[start : start + steps] for part in order]
            run = self._compile(steps, (state, totals, self._images, self._labels, *chosen))
            began = time.perf_counter()
            state, totals = run(state, totals, self._images, self._labels, *chosen)
            seconds += time.perf_counter() - began
            start += steps
        began = time.perf_counter()
        jax.block_until_ready(totals)
        return state, totals, seconds + time.perf_counter() - began

    def batch(self, order, index: int) -> dict[str, jax.Array]:
        """The batch that the step of that index in `order` sees."""
        return _batch(self._images, self._labels, *(jnp.asarray(part[index]) for part in order))

    def _compile(self, steps: int, arguments: tuple) -> Callable:
        if steps not in self._compiled:
            began = time.perf_counter()
            self._compiled[steps] = compile_for_backend(self._many, arguments, donate=(0, 1))
            self.compile_seconds += time.perf_counter() - began
        return self._compiled[steps]


def _batch(images, labels, indices, weight) -> dict[str, jax.Array]:
    return {"image": images[indices], "label": labels[indices], "weight": weight}


def compile_for_backend(function: Callable, arguments: tuple, donate: tuple[int, ...] = ()) -> Callable:
    """`function` compiled for these arguments, on a CPU with the options that make its convolutions fast."""
    options = CPU_OPTIONS if jax.default_backend() == "cpu" else None
    try:
        return jax.jit(function, donate_argnums=donate, compiler_options=options).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()  # a compiler without the option


def compiling(function: Callable) -> Callable:
    """`function`, compiled for the backend when it is first called with arguments of some shapes."""
    compiled = {}

    def call(*arguments):
        shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments)]
        kind = (jax.tree.structure(arguments), *shapes)
        if kind not in compiled:
            compiled[kind] = compile_for_backend(function, arguments)
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
