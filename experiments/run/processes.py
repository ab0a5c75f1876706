"""Several processes, on one host or on many, that train one network together; everything here is free for one alone."""

import contextlib
import os
import re
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from experiments.run.errors import UserError
from supermask_jax import parallel

OWN_SETTINGS = ("process_id", "workdir", "data_dir")
LOST = re.compile("gloo|nccl|closed by peer|reset by peer|heartbeat|barrier|coordination", re.IGNORECASE)
THREADS = 32  # of eight simulated devices: with one for each core, they can wait for each other forever


def join(config) -> None:
    """Joins this process to the others that the settings name, before anything touches a device.

    Where the devices are CPUs, as many as asked for are simulated.

    Args:
      config: settings with the fields devices, coordinator, num_processes and process_id of `experiments.mnist.Config`.

    Raises:
      UserError: no cluster's environment is found, or the others have other settings. Where some do not come within
        five minutes, the runtime itself ends the process.
    """
    if config.devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(THREADS, 4 * config.devices)))
        simulated = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
        if not simulated and config.coordinator != "auto":  # there, each process has the devices that it has
            with contextlib.suppress(RuntimeError):  # devices are in use already, as when called from a program
                jax.config.update("jax_num_cpu_devices", config.devices // (config.num_processes or 1))
    if config.coordinator is None:
        return
    where = (config.coordinator, config.num_processes, config.process_id)
    where = (None, None, None) if config.coordinator == "auto" else where
    if config.num_processes:
        print(f"process {config.process_id} of {config.num_processes}: joins at {config.coordinator}", file=sys.stderr)
    try:
        # In a thread: in the main one, Ctrl-C would wait for the others as well.
        ThreadPoolExecutor(1).submit(parallel.initialize, *where).result()
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the other processes ({error}). Name them with --coordinator ADDRESS:PORT --num-processes N "
            "--process-id I, or run under Slurm, Open MPI, Kubernetes or on a TPU pod with --coordinator auto."
        ) from error
    settings = {name: value for name, value in vars(config).items() if name not in OWN_SETTINGS}
    own = ", ".join(f"--{name.replace('_', '-')}" for name in OWN_SETTINGS)
    require_alike(digest(settings), f"flags, but for {own}, must be the same")


def digest(*values) -> int:
    """An int32 that stands for arrays and for what has a repr."""
    crc = 0
    for value in values:
        crc = zlib.crc32(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode(), crc)
    return crc % 2**31


def is_first() -> bool:
    """Whether this is the process that writes and shows what all found."""
    return jax.process_index() == 0


def any_of(condition: bool) -> bool:
    """Whether the condition holds in any process. All must ask."""
    return bool(np.any(_gathered(condition)))


def of_first(value):
    """The first process's value: a number, or an array that has the same shape in all. All must ask."""
    return _gathered(value)[0]


def tree_of_first(tree: Any) -> Any:
    """The first process's tree, of which all have one of the same shapes. All must ask."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    plain = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)
    shared = multihost_utils.broadcast_one_to_all(plain)
    return jax.tree.map(lambda leaf, new: jax.random.wrap_key_data(new) if is_key(leaf) else new, tree, shared)


def is_key(leaf) -> bool:
    """Whether it is an array of `jax.random.key`s, which not all functions take."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def require_alike(value: int, what: str) -> None:
    """All must ask.

    Raises:
      UserError: `value`, an int32, is not that of the first process in each; `what` begins the message.
    """
    if any_of(value != of_first(value)):
        raise UserError(f"{what} in all processes.")


def in_turn(function: Callable[[], Any]) -> Any:
    """function() of this process: the first process calls it before the others do.

    Raises:
      UserError: what it raised here; or, so that none waits for it forever, that it failed in another process.
    """
    result, failed = None, None
    for turn in (is_first(), not is_first()):
        if turn:
            try:
                result = function()
            except (UserError, OSError) as error:
                failed = error
        if any_of(failed is not None):
            raise failed or UserError("another process could not begin; its message says why.")
    return result


def meet() -> None:
    """Waits for all the others."""
    any_of(False)


def has_lost_others(error: Exception) -> bool:
    """Whether this is what a process is told when another one that it works with has ended."""
    return LOST.search(str(error)) is not None


def _gathered(value) -> np.ndarray:
    """[processes, ...]"""
    value = np.asarray(value)
    if jax.process_count() == 1:
        return value[None]
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(value)
