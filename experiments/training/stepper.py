"""Train steps over the examples of a source, in a fixed order, compiled for the backend, without waiting for the host.

A stepper does steps of one epoch. Images in memory are put on the devices once, and indices travel (`OnDevice`); under
pmap, and from a source that is read as it is needed, batches travel (`Pmapped`, `Streamed`).
How many steps one compiled call does differs by backend: on a CPU one, because XLA's CPU backend runs the gradients of
convolutions inside a loop many times slower (jax issue 12868); elsewhere, and for networks without convolutions, many.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import supermask_jax as sm
from experiments.data.batches import alternate_flips, epoch_order
from experiments.data.source import Arrays, Source
from experiments.data.stream import batches_ahead
from experiments.run.placement import Placement
from experiments.run.surroundings import require_memory
from experiments.training.loop import Advance, Batch, Progress
from supermask_jax import parallel
from supermask_jax.trees import Tree, leaf_key, prunable

STEPS_PER_CALL = {"cpu": 1}
STEPS_PER_CALL_ELSEWHERE = 100
STEPS_PER_CALL_DENSE = 50  # of networks without convolutions, on every backend


class Order(NamedTuple):
    """Of each step's examples, [steps, batch]."""

    index: np.ndarray  # int32
    weight: np.ndarray  # float32
    flipped: np.ndarray | None = None  # bool, if flips alternate
    draw: np.ndarray | None = None  # uint32, if the source crops at random: what it draws from


class Epochs(NamedTuple):
    """How the examples of a source make up epochs."""

    examples: int
    batch_size: int
    drop_remainder: bool = False  # where padding would enter batch statistics
    alternate: bool = False  # whether an order says which images are mirrored
    drawn: bool = False  # whether an order says what a source draws from

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.seen // self.batch_size if self.drop_remainder else -(-self.examples // self.batch_size)

    @property
    def seen(self) -> int:
        """Examples that an epoch trains on."""
        return self.examples - self.examples % self.batch_size if self.drop_remainder else self.examples

    def order(self, key: jax.Array, epoch: int) -> Order:
        """Which examples each step of an epoch sees: a function of (key, epoch) only."""
        order = Order(*epoch_order(key, epoch, self.examples, self.batch_size, self.drop_remainder))
        if self.alternate:
            flips = alternate_flips(leaf_key(key, "flipped"), epoch, self.examples)
            order = order._replace(flipped=flips[order.index])
        if self.drawn:
            of_epoch = jax.random.fold_in(leaf_key(key, "draws"), epoch)
            draws = np.asarray(jax.random.bits(of_epoch, (self.examples,), np.uint32))
            order = order._replace(draw=draws[order.index])
        return order


def epochs_of(source: Source, batch_size: int, drop_remainder: bool = False, alternate: bool = False) -> Epochs:
    """The epochs of a source, with draws if it crops at random; arguments as in `Epochs`."""
    return Epochs(len(source), batch_size, drop_remainder, alternate, source.draws)


class Stepper(Protocol):
    """Does the steps of `order` from `start` to `stop`; the state and totals that go in are given away.

    Returns the new state and totals, the seconds that it took without compiling, and the last step's batch.
    """

    steps_per_call: int
    compile_seconds: float
    memory: int  # bytes that a step takes beside its state and the images; 0 while or where it is not known

    def __call__(
        self, state: sm.TrainState, totals: dict, order: Order, start: int, stop: int
    ) -> tuple[sm.TrainState, dict, float, Batch]: ...


def over(stepper: Stepper, epochs: Epochs, key: jax.Array) -> Advance:
    """The `Advance` of the training loop that does a stepper's steps, epoch after epoch, in the order of a key."""
    last = {}  # the order of one epoch: the next call most often wants it again

    def advance(progress: Progress, step: int, stop: int) -> tuple[Progress, Batch]:
        batch: Batch = {}
        while step < stop:
            epoch, start = divmod(step, epochs.steps)
            if epoch not in last:
                last.clear()
                last[epoch] = epochs.order(key, epoch)
            end = min(start + stop - step, epochs.steps)
            state, totals, seconds, batch = stepper(progress.state, progress.totals, last[epoch], start, end)
            progress = progress._replace(state=state, totals=totals, seconds=progress.seconds + seconds)
            step += end - start
        return progress, batch

    return advance


def make_stepper(
    step: Callable,
    learns: str,
    source: Source,
    placement: Placement,
    steps_per_call: int | None = None,
    workers: int = 0,
) -> "OnDevice | Streamed":
    """The stepper for a source: in memory, or read as it is needed; arguments as in `OnDevice` and `Streamed`."""
    if isinstance(source, Arrays):
        return OnDevice(step, learns, source, placement, steps_per_call)
    return Streamed(step, learns, source, placement, workers)


def steps_per_call(weights: Tree) -> int | None:
    """How many steps to compile into one call for these weights; None for the backend's own number."""
    return None if any(len(shape) > 2 for shape in prunable(weights).values()) else STEPS_PER_CALL_DENSE


class OnDevice:
    """`Stepper` over images that stay on the devices.

    Args:
      step: of `make_train_step`; its metrics are sums, except for the loss.
      learns: the tree that is watched for what is not finite.
      source: the images.
      placement: where the state is; the batches are split over its devices. One device, if None.
      steps_per_call: how many steps are compiled into one call; the backend's number, if None.
    """

    def __init__(
        self,
        step: Callable,
        learns: str,
        source: Arrays,
        placement: Placement | None = None,
        steps_per_call: int | None = None,
    ):
        self.steps_per_call = steps_per_call or STEPS_PER_CALL.get(jax.default_backend(), STEPS_PER_CALL_ELSEWHERE)
        self.compile_seconds, self.memory = 0.0, 0
        self._placement, self._source = placement or Placement(), source
        self._images = self._placement.replicate((source.images, source.labels))
        self._compiled, self._order, self._placed = {}, None, None

        def one(carry, images, chosen):
            state, totals = carry
            at = state.step
            state, metrics = step(state, _batch(images, chosen))
            return state, add_to_totals(totals, metrics, getattr(state.subnet, learns), at)

        def many(steps, state, totals, images, order, start):
            chosen = jax.tree.map(lambda part: jax.lax.dynamic_slice_in_dim(part, start, steps), order)
            if steps == 1:
                return one((state, totals), images, jax.tree.map(lambda part: part[0], chosen))
            carry, _ = jax.lax.scan(lambda carry, at: (one(carry, images, at), None), (state, totals), chosen)
            return carry

        self._many = many

    def lower(self, state: sm.TrainState, totals: dict, order: Order) -> jax.stages.Lowered:
        """The program of one step, not compiled yet."""
        return self._lower(1, (state, totals, self._images, self._place(order), np.int32(0)))

    def __call__(self, state, totals, order, start: int, stop: int):
        if order is not self._order:  # of a new epoch
            self._order, self._placed = order, self._place(order)
        seconds, at = 0.0, start
        while at < stop:
            # Two lengths of call and no others: each one is compiled.
            steps = self.steps_per_call if stop - at >= self.steps_per_call else 1
            arguments = (state, totals, self._images, self._placed, np.int32(at))
            run = self._compile(steps, arguments)
            began = time.perf_counter()
            state, totals = run(*arguments)
            seconds += time.perf_counter() - began
            at += steps
        began = time.perf_counter()
        jax.block_until_ready(totals)
        seconds += time.perf_counter() - began
        return state, totals, seconds, _read(self._source, order, stop - 1)

    def _compile(self, steps: int, arguments: tuple) -> Callable:
        kind = steps, arguments[3].index.shape
        if kind not in self._compiled:
            began = time.perf_counter()
            self._compiled[kind] = self._lower(steps, arguments).compile()
            self.compile_seconds += time.perf_counter() - began
            if not self.memory:  # later, what is held for the next step does not count as free
                self.memory = memory_of(self._compiled[kind])
                require_memory(self.memory, self._placement.mesh.local_devices[0])
        return self._compiled[kind]

    def _place(self, order: Order) -> Order:
        return jax.tree.map(partial(self._placement.split, axis=1), Order(*order)._replace(draw=None))

    def _lower(self, steps: int, arguments: tuple) -> jax.stages.Lowered:
        out = self._placement.shardings(arguments[0]), self._placement.everywhere
        return sm.jit(partial(self._many, steps), donate_argnums=(0, 1), out_shardings=out).lower(*arguments)


class Streamed:
    """`Stepper` over a source that is read as it is needed: while a step runs, the next batches are read.

    In several processes, each reads its share of every batch. Any batch can be read by itself, so that a run resumes at
    any step with the batches that it would have had.

    Args:
      step, learns, source, placement: as in `OnDevice`.
      workers: processes that read; 0: threads of this one.
    """

    steps_per_call = 1

    def __init__(self, step: Callable, learns: str, source: Source, placement: Placement, workers: int = 0):
        self.compile_seconds, self.memory = 0.0, 0
        self._shares, self._placement, self._compiled = Shares(source, workers), placement, None

        def one(state, totals, batch):
            at = state.step
            state, metrics = step(state, batch)
            return state, add_to_totals(totals, metrics, getattr(state.subnet, learns), at)

        self._one = one

    def lower(self, state: sm.TrainState, totals: dict, order: Order) -> jax.stages.Lowered:
        """The program of one step, not compiled yet."""
        batch = parallel.shard_batch(self._placement.mesh, self._shares.read_one(order, 0))
        return self._lower((state, totals, batch))

    def __call__(self, state, totals, order, start: int, stop: int):
        seconds, batch = 0.0, {}
        for at in range(start, stop):
            began = time.perf_counter()  # a run that waits for its images is as slow as they come
            batch = self._shares.read(order, at)
            arguments = state, totals, parallel.shard_batch(self._placement.mesh, batch)
            seconds += time.perf_counter() - began
            run = self._compile(arguments)
            began = time.perf_counter()
            state, totals = run(*arguments)
            jax.block_until_ready(totals)
            seconds += time.perf_counter() - began
        return state, totals, seconds, batch

    def _compile(self, arguments: tuple) -> Callable:
        if self._compiled is None:
            began = time.perf_counter()
            self._compiled = self._lower(arguments).compile()
            self.compile_seconds += time.perf_counter() - began
            self.memory = memory_of(self._compiled)
            require_memory(self.memory, self._placement.mesh.local_devices[0])
        return self._compiled

    def _lower(self, arguments: tuple) -> jax.stages.Lowered:
        out = self._placement.shardings(arguments[0]), self._placement.everywhere
        return sm.jit(self._one, donate_argnums=(0, 1), out_shardings=out).lower(*arguments)


class Shares:
    """This process's shares of the batches of a source.

    Args:
      source, workers: as in `Streamed`.
      ahead: whether they are read before they are needed, which images in memory need not be.
    """

    AHEAD = 4  # batches that are read before they are needed, by each worker

    def __init__(self, source: Source, workers: int = 0, ahead: bool = True):
        self._source, self._workers, self._ahead = source, workers, ahead
        self._order, self._share, self._next, self._batches = None, None, -1, None

    def read(self, order: Order, at: int) -> Batch:
        """The share of the batch of the step of that index. The next one is expected to be asked for next."""
        if order is not self._order:
            self._order, self._share, self._next = order, _of_process(order), -1
        if not self._ahead:
            return _read(self._source, self._share, at)
        if at != self._next:
            if self._batches is not None:
                self._batches.close()  # its workers end before new ones begin
            read = partial(_read, self._source, self._share)
            self._batches = batches_ahead(read, at, len(order[0]), self._workers, self.AHEAD)
        self._next, batch = at + 1, next(self._batches)
        if self._next == len(order[0]):
            self._batches.close()  # its workers end with the epoch, and not when memory is collected
        return batch

    def read_one(self, order: Order, at: int) -> Batch:
        """The same, and none is read ahead."""
        return _read(self._source, _of_process(order), at)


class Pmapped:
    """`Stepper` for a step of `parallel.pmap_step`: one call for each step, with this process's share of a batch.

    Args:
      step: of `pmap_step`, on all devices of the placement, with metrics that are sums, except for the loss.
      learns, source, placement: as in `OnDevice`.
      workers: as in `Streamed`.
    """

    steps_per_call = 1

    def __init__(self, step: Callable, learns: str, source: Source, placement: Placement, workers: int = 0):
        self.compile_seconds, self.memory = 0.0, 0
        self._step, self._learns, self._placement, self._source = step, learns, placement, source
        self._in_memory = isinstance(source, Arrays)
        self._shares = Shares(source, workers, ahead=not self._in_memory)

        def add(totals, metrics, learner, at):
            # pmap gives the devices' means.
            sums = {name: value * placement.size for name, value in metrics.items() if name != "loss"}
            return add_to_totals(totals, {**metrics, **sums}, learner, at)

        self._add = jax.jit(add, donate_argnums=0)

    def __call__(self, state, totals, order, start: int, stop: int):
        state, totals = self._placement.local((state, totals))
        began, compiling, batch = time.perf_counter(), not self.compile_seconds, {}
        for at in range(start, stop):
            batch = self._shares.read(order, at)
            state, metrics = self._step(state, batch)
            totals = self._add(totals, metrics, getattr(state.subnet, self._learns), state.step - 1)
            if compiling:
                jax.block_until_ready(totals)
                self.compile_seconds, compiling = time.perf_counter() - began, False
                began = time.perf_counter()
        jax.block_until_ready(totals)
        state, totals = self._placement.as_global((state, totals))
        seconds = time.perf_counter() - began
        if self._in_memory:  # from disk it would take too long to read all of the batch once more
            batch = _read(self._source, order, stop - 1)
        return state, totals, seconds, batch


def memory_of(compiled) -> int:
    """Bytes that a compiled program takes on a device beside its arguments; 0 where the backend does not tell."""
    told = compiled.memory_analysis()
    return told.temp_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes if told else 0


def _of_process(order: Order) -> Order:
    """[steps, batch / processes]: this process's share of every batch of an order."""

    def share(part: np.ndarray) -> np.ndarray:
        steps, batch = part.shape
        return part.reshape(steps, jax.process_count(), batch // jax.process_count())[:, jax.process_index()]

    return jax.tree.map(share, Order(*order))


def _read(source: Source, order: Order, at: int) -> Batch:
    """The batch of the step of that index in `order`."""
    order = Order(*order)
    draw = None if order.draw is None else order.draw[at]
    return {**source.read(order.index[at], draw), **_beside(Order(*(None if p is None else p[at] for p in order)))}


def _batch(images, chosen: Order) -> Batch:
    images, labels = images
    return {"image": images[chosen.index], "label": labels[chosen.index], **_beside(chosen)}


def _beside(chosen: Order) -> Batch:
    """What a batch has from its order, beside what is at the indices."""
    return {name: part for name in ("weight", "flipped") if (part := getattr(chosen, name)) is not None}


def zero_totals() -> dict[str, jax.Array]:
    """The sums over the steps before the first: "loss", "correct" and "count".

    "bad_step" is the first step that was not finite, or -1. "bad_leaf" is the place of the first leaf of what learns
    that was not finite after it, or -1 if only the loss was not.
    """
    sums = {name: jnp.float32(0) for name in ("loss", "correct", "count")}
    return sums | {"bad_step": jnp.int32(-1), "bad_leaf": jnp.int32(-1)}


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


def first_not_finite(tree: Tree) -> jax.Array:
    """The place of the first leaf that holds NaN or infinity, or -1: then its sum of magnitudes is not finite."""
    finite = jnp.isfinite(jnp.stack([jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]))
    return jnp.where(jnp.all(finite), -1, jnp.argmin(finite)).astype(jnp.int32)
