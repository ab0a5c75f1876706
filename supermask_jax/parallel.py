"""The train step on many devices: over a mesh under jit, under pmap, and in several processes.

A mesh under jit is the usual way. Batches are split over the mesh, the state is replicated or sharded, and the step is
the same as on one device; the compiler adds the communication:

    mesh = parallel.mesh()
    state = parallel.place_state(mesh, state)
    step = sm.jit(
        sm.make_train_step(mask_fn, loss_fn, tx, learns="scores"),
        out_shardings=(parallel.state_shardings(mesh, state), None),
        donate_argnums=0,
    )
    for batch in batches:
        state, metrics = step(state, parallel.shard_batch(mesh, batch))

Losses, batch statistics, dropout and masks are those of the whole batch on one device, up to the order of sums.
`out_shardings` keep the state in its place from step to step, so that the step is compiled once. With
`shard_scores=True` in both places, wrap the loss in `with_whole_weights`.

In several processes, each process calls `initialize` first, makes the same state, and gives `shard_batch` its own share
of the batch. `pmap_step` is the step under `jax.pmap`.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from supermask_jax.supermask import MaskFn, ProductFn
from supermask_jax.train import Learner, LossFn, Optimizer, TrainState, make_train_step
from supermask_jax.trees import Tree, by_path

AXIS = "devices"  # of the mesh and of pmap: what BatchNorm and `weighted_mean` are given as axis_name under pmap


def initialize(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process to the others. Call it before anything that touches a device.

    With all three arguments None, the cluster's environment decides (Slurm, Open MPI, Kubernetes, TPU pods: see
    `jax.distributed.initialize`).

    Args:
      coordinator: "address:port" of process 0; the port must be free there.
      processes: the number of processes on all hosts together.
      process_id: which process this is, in [0, processes).

    Raises:
      ValueError: some arguments are given and some are not, or `process_id` is out of range.
    """
    given = (coordinator, processes, process_id)
    if None in given and given != (None, None, None):
        raise ValueError(f"give coordinator, processes and process_id, or none of them; got {given}")
    if process_id is not None and processes is not None and not 0 <= process_id < processes:
        raise ValueError(f"process_id must be in [0, processes): got {process_id} of {processes}")
    jax.distributed.initialize(coordinator, processes, process_id)


def mesh(devices: int | None = None) -> Mesh:
    """Returns a mesh with one axis, "devices".

    Args:
      devices: how many, the first ones; None means all devices of all processes.

    Raises:
      ValueError: more devices than there are, fewer than one, or, in several processes, fewer than all.
    """
    chosen = _devices(devices)
    # Not the default, Explicit axes: those refuse most operations on what is sharded.
    return jax.make_mesh((len(chosen),), (AXIS,), axis_types=(AxisType.Auto,), devices=chosen)


def shard_batch(mesh: Mesh, batch: Tree) -> Tree:
    """Returns the batch with the first axis of every leaf split over the mesh.

    Args:
      mesh: made by `mesh`.
      batch: arrays [n, ...], with the same n for all. In several processes it is this process's share; all shares have
        the same size.

    Raises:
      ValueError: the number of the mesh's devices (in this process) does not divide n, or a leaf has no axis.
    """
    _check_divisible(batch, len(mesh.local_devices))
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.make_array_from_process_local_data(sharding, batch)


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Returns a copy of the tree, whole on every device of the mesh.

    The copy shares no memory with `tree`, so that a step may be given it as a donation.

    Args:
      mesh: made by `mesh`.
      tree: arrays; in several processes, the same values in each.

    Raises:
      ValueError: in several processes, their values differ.
    """
    return _place(mesh, tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree))


def place_state(mesh: Mesh, state: TrainState, shard_scores: bool = False) -> TrainState:
    """Returns a copy of the state on the mesh, laid out by `state_shardings`.

    The copy shares no memory with `state`, which can be placed again after a step was given the copy as a donation.

    Args:
      mesh: made by `mesh`.
      state: made by `init_state`; in several processes, the same in each.
      shard_scores: whether scores, weights and optimizer state are split over the mesh, or whole on every device.

    Raises:
      ValueError: in several processes, their states differ (because they were made from other keys, say).
    """
    return _place(mesh, state, state_shardings(mesh, state, shard_scores))


def state_shardings(mesh: Mesh, state: TrainState, shard_scores: bool = False) -> TrainState:
    """Returns the sharding of every leaf of the state: for `out_shardings` of `jit`, and for restoring.

    Args:
      mesh: made by `mesh`.
      state: arrays, or their shapes (`jax.eval_shape`). The shardings have its structure.
      shard_scores: False: the whole state is on every device. True: scores, weights and optimizer state are split over
        the mesh, so that a device stores and updates a part. Each array is split along the largest axis whose size the
        number of devices divides; along the last axis only if it divides no other; if it divides none, the array stays
        whole. Selection then exchanges counts and small samples, never scores. For a layer's product the compiler
        chooses what to gather, in a convnet also activations; `with_whole_weights` makes it the weights.
    """

    def split(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size and size % mesh.size == 0]
        # A CPU counts scores row by row: of a layer that is split along its rows, a count for each would travel.
        axes = [axis for axis in axes if axis < leaf.ndim - 1] or axes
        largest = max(axes, key=lambda axis: leaf.shape[axis], default=None)
        return NamedSharding(mesh, PartitionSpec() if largest is None else PartitionSpec(*[None] * largest, AXIS))

    shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), state)
    if shard_scores:
        shardings = shardings._replace(
            subnet=jax.tree.map(split, state.subnet), opt_state=jax.tree.map(split, state.opt_state)
        )
    return shardings


def with_whole_weights(mesh: Mesh, loss_fn: LossFn) -> LossFn:
    """Returns a `loss_fn` whose params are whole on every device of the mesh, for sharded scores under jit.

    Without it, the compiler chooses for every product whether weights or activations are communicated. With it, batches
    stay split, and each weight is gathered once. That is less communication for a deep convnet, and more for wide dense
    layers with few images.

    Args:
      mesh: made by `mesh`.
      loss_fn: loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics)).
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def on_whole_weights(params: Tree, *rest: Any) -> Any:
        return loss_fn(jax.lax.with_sharding_constraint(params, whole), *rest)

    return on_whole_weights


def pmap_step(
    mask_fn: MaskFn,
    loss_fn: LossFn,
    tx: Optimizer,
    *,
    learns: Learner,
    devices: int | None = None,
    donate: bool = False,
    product: ProductFn | None = None,
) -> Callable[[TrainState, Tree], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the train step compiled by `jax.pmap`: step(state, batch) -> (state, metrics).

    States go in as `init_state` makes them, and come out whole on every device (of this process). The batch goes in as
    on one device (in several processes, this one's share) and is split into equal parts. Every device draws the same
    masks and its own dropout; gradients, metrics and floating model state are averaged over the devices. Therefore:
      - A loss that is a plain mean equals that of the whole batch. A weighted mean does not where the weights of the
        parts differ in sum, as those of a padded last batch do; use `weighted_mean(..., axis_name=parallel.AXIS)`.
      - Metrics that are sums, such as the number of correct answers, come out divided by the number of devices.
      - Batch statistics are of the whole batch if the model computes them so: `flax.linen.BatchNorm(axis_name=AXIS)`.
        Without it, each device normalises by its part, and running variances miss the variance between the parts.

    Args:
      mask_fn: mask_fn(scores, key) -> masks, exactly 0 or 1.
      loss_fn: loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics)); its key is for dropout.
      tx: optax transformation; the state must come from `init_state` with an equal one. With learns=("scores", where)
        it may be a pair: one for the scores, one for the weights beside them.
      learns: which tree of the `Subnet` the optimizer updates; or ("scores", where): the scores, and beside them the
        leaves of the weights that where(path, leaf) chooses.
      devices: how many, the first ones; None means all devices of all processes.
      donate: whether a state that goes in may be overwritten.
      product: product(subnet, key) -> the params that `loss_fn` is given, where that is not weights * masks. None means
        `subnetwork(mask_fn, subnet, key)`.

    Raises:
      ValueError: here, `learns` is unknown, learns="scores" with `identity`, or a wrong number of devices; at a call,
        the number of devices (of this process) does not divide the batch, the learning tree has no leaves, or the
        optimizer state does not fit it.
    """
    chosen = _devices(devices)
    own = [device for device in chosen if device.process_index == jax.process_index()]
    everywhere = NamedSharding(Mesh(own, (AXIS,)), PartitionSpec())
    step = jax.pmap(
        make_train_step(mask_fn, loss_fn, tx, learns=learns, axis_name=AXIS, product=product),
        AXIS,
        in_axes=(None, 0),
        out_axes=None,
        devices=chosen,
        donate_argnums=(0,) if donate else (),
    )

    def split(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(len(own), leaf.shape[0] // len(own), *leaf.shape[1:])

    def step_on_parts(state: TrainState, batch: Tree) -> tuple[TrainState, dict[str, jax.Array]]:
        _check_divisible(batch, len(own))
        # To where the result will be, or the second step would be compiled again; from then on this does nothing.
        return step(jax.device_put(state, everywhere), jax.tree.map(split, batch))

    return step_on_parts


def weighted_mean(values: jax.Array, weights: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Returns sum(values * weights) / sum(weights) over the batch, for a `loss_fn`; examples of weight 0 do not count.

    Args:
      values: [n], or any one shape.
      weights: of the same shape.
      axis_name: None under jit. Under pmap, its axis: the sum of weights is then the devices' mean, so that the mean of
        the results, and of their gradients, is that of the whole batch however the weights are distributed.

    Returns:
      A scalar.
    """
    total = jnp.sum(weights)
    if axis_name is not None:
        total = jax.lax.pmean(total, axis_name)
    return jnp.sum(values * weights) / total


def _devices(count: int | None) -> list[jax.Device]:
    there = jax.devices()
    if count is not None and not 1 <= count <= len(there):
        raise ValueError(f"asked for {count} devices; there are {len(there)}, and at least one is needed")
    if count not in (None, len(there)) and jax.process_count() > 1:
        raise ValueError(f"asked for {count} devices; several processes take part with all {len(there)} of theirs")
    return there[:count]


def _check_divisible(batch: Tree, devices: int) -> None:
    for path, leaf in by_path(batch).items():
        shape = jnp.shape(leaf)
        if not shape:
            raise ValueError(f"{path!r} of the batch has no first axis to split over the devices")
        if shape[0] % devices:
            raise ValueError(
                f"a batch of {shape[0]} examples ({path!r}) does not divide over {devices} devices: "
                "drop some, or pad it with examples of weight 0"
            )


def _place(mesh: Mesh, tree: Tree, shardings: Tree) -> Tree:
    if jax.process_count() == 1:
        tree = jax.device_put(tree, shardings)  # from wherever its leaves are; jit takes them from one place only
    else:
        _check_same_everywhere(mesh, tree)
    # device_put keeps the buffer of a leaf that is already on a device: donating the result would delete the leaf.
    leaves, structure = jax.tree.flatten(shardings)
    return _copier(structure, tuple(leaves))(tree)


@functools.lru_cache(maxsize=64)
def _copier(structure: Any, shardings: tuple[NamedSharding, ...]) -> Callable[[Tree], Tree]:
    return jax.jit(lambda tree: tree, out_shardings=jax.tree.unflatten(structure, shardings))


def _check_same_everywhere(mesh: Mesh, tree: Tree) -> None:
    """Raises where this process's own leaves are not bit for bit those of the others."""
    own = [leaf for leaf in jax.tree.leaves(tree) if getattr(leaf, "is_fully_addressable", True)]
    own = [jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf for leaf in own]
    sums = np.array([zlib.crc32(np.asarray(leaf).tobytes()) for leaf in own], np.uint32)
    try:
        jax.device_put(sums, NamedSharding(mesh, PartitionSpec()))  # compares what the processes pass
    except AssertionError as error:
        raise ValueError("the processes pass different values: make the state from the same keys in each") from error
