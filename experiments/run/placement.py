"""Where the arrays of a run are: on one device, or on a mesh of devices, in one process or in several."""

import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import supermask_jax as sm
from experiments.run import processes
from experiments.run.errors import UserError
from experiments.run.processes import is_key
from supermask_jax import parallel
from supermask_jax.trees import Tree


class Placement:
    """The devices of a run, and which part of an array each of them holds.

    Args:
      devices: how many; 0: one, or, in several processes, all that they have.
      shard_scores: whether scores, weights and optimizer state are split over them; see `parallel.state_shardings`.

    Raises:
      UserError: there are fewer devices, or, in several processes, more.
    """

    def __init__(self, devices: int = 0, shard_scores: bool = False):
        if not devices:
            devices = 1 if jax.process_count() == 1 else jax.device_count()
        try:
            self.mesh = parallel.mesh(devices)
        except ValueError as error:
            flag = re.search(r"--xla_force_host_platform_device_count=\d+", os.environ.get("XLA_FLAGS", ""))
            why = f" XLA_FLAGS has {flag[0]}: without it, as many as are asked for are simulated." if flag else ""
            raise UserError(f"--devices {devices}: {error}.{why}") from error
        self.size = self.mesh.size
        self.everywhere = NamedSharding(self.mesh, PartitionSpec())
        self._shard_scores = shard_scores
        self._gather = jax.jit(lambda tree: tree, out_shardings=self.everywhere)

    def place(self, state: sm.TrainState) -> sm.TrainState:
        """A copy of the first process's state where a step wants it. The others' own may differ in the last bits."""
        return parallel.place_state(self.mesh, processes.tree_of_first(state), self._shard_scores)

    def shardings(self, state: sm.TrainState) -> sm.TrainState:
        """Where the leaves of a placed state are."""
        return parallel.state_shardings(self.mesh, state, self._shard_scores)

    def loss(self, loss_fn: Callable) -> Callable:
        """A loss_fn for the step on these devices: where scores are split, weights are made whole for it."""
        return parallel.with_whole_weights(self.mesh, loss_fn) if self._shard_scores else loss_fn

    def replicate(self, tree: Tree) -> Tree:
        """Arrays that every process has alike, whole on every device."""
        return jax.tree.map(lambda leaf: self._put(leaf, PartitionSpec()), tree)

    def split(self, array: np.ndarray, axis: int = 0) -> jax.Array:
        """An array split over the devices along an axis, which their number divides. Each process reads its share."""
        return self._put(array, PartitionSpec(*[None] * axis, parallel.AXIS))

    def whole(self, tree: Tree) -> Tree:
        """The tree as NumPy arrays in this process; on a single device, as it is. All processes must ask for it."""
        if self.size == 1:
            return tree
        return jax.tree.map(_fetched, self._gather(tree))

    def local(self, tree: Tree) -> Tree:
        """Replicated arrays as those of this process's devices alone: what `pmap` takes. Nothing is copied."""
        return self._on(tree, self.mesh.local_mesh)

    def as_global(self, tree: Tree) -> Tree:
        """The inverse of `local`: replicated arrays as those of all processes' devices."""
        return self._on(tree, self.mesh)

    def _on(self, tree: Tree, mesh: Mesh) -> Tree:
        if jax.process_count() == 1:
            return tree
        return jax.tree.map(lambda leaf: _shared(leaf, NamedSharding(mesh, PartitionSpec())), tree)

    def _put(self, value: Any, spec: PartitionSpec) -> jax.Array:
        if is_key(value):
            return jax.random.wrap_key_data(self._put(jax.random.key_data(value), spec))
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, NamedSharding(self.mesh, spec), lambda index: value[index])


def _shared(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The same buffers under another sharding, which holds all on every device as well."""
    if is_key(leaf):
        return jax.random.wrap_key_data(_shared(jax.random.key_data(leaf), sharding))
    buffers = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, buffers)


def _fetched(leaf: jax.Array):
    return jax.random.wrap_key_data(_fetched(jax.random.key_data(leaf))) if is_key(leaf) else np.asarray(leaf)
