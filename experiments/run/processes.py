"""Several processes, on one host or on many, that train one network together. A single process pays nothing."""

import contextlib
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.run import files
from experiments.run.errors import UserError
from supermask_jax import parallel

OWN_SETTINGS = ("process_id", "workdir", "data_dir", "compilation_cache")
THREADS = 32  # of eight simulated devices: with one for each core, they can wait for each other forever


def keep_compiled(folder: Path) -> None:
    """Keeps every program that this process compiles, and takes those that are there; UserError if it may not write."""
    try:
        files.require_writable(folder)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"--compilation-cache: cannot write in {folder} ({why}); name another directory.") from error
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def join(devices: int, coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins this process to the others, before anything touches a device. Does nothing for a process alone.

    Where the devices are CPUs, as many as asked for are simulated.

    Args:
      devices: how many train together, over all processes; 0 for the usual number.
      coordinator: None for a single process; "auto"; or ADDRESS:PORT of the first process.
      num_processes, process_id: how many processes there are and which one this is, with ADDRESS:PORT.

    Raises:
      UserError: no cluster's environment is there. Where some processes do not come within five minutes, the runtime
        itself ends this one.
    """
    if devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(THREADS, 4 * devices)))
        simulated = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
        if not simulated and coordinator != "auto":  # there, each process has the devices that it has
            with contextlib.suppress(RuntimeError):  # devices are in use already, as when called from a program
                jax.config.update("jax_num_cpu_devices", devices // (num_processes or 1))
    if coordinator is None:
        return
    where = (None, None, None) if coordinator == "auto" else (coordinator, num_processes, process_id)
    if num_processes:
        print(f"process {process_id} of {num_processes}: joins at {coordinator}", file=sys.stderr)
    try:
        # In a thread: in the main one, Ctrl-C would wait for the others as well.
        ThreadPoolExecutor(1).submit(parallel.initialize, *where).result()
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the other processes ({error}). Name them with --coordinator ADDRESS:PORT --num-processes N "
            "--process-id I, or run under Slurm, Open MPI, Kubernetes or on a TPU pod with --coordinator auto."
        ) from error


def require_same_settings(settings: Mapping[str, Any]) -> None:
    """Raises UserError unless all processes have the same settings, except their own. All processes must call."""
    shared = {name: value for name, value in settings.items() if name not in OWN_SETTINGS}
    own = ", ".join(f"--{name.replace('_', '-')}" for name in OWN_SETTINGS)
    require_alike(digest(shared), f"flags, but for {own}, must be the same")


def digest(*values) -> int:
    """An int32 that stands for arrays and for what has a repr."""
    crc = 0
    for value in values:
        crc = zlib.crc32(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else repr(value).encode(), crc)
    return crc % 2**31


def is_first() -> bool:
    """Whether this is the process that writes and shows the results."""
    return jax.process_index() == 0


def any_of(condition: bool) -> bool:
    """Whether the condition holds in any process. All processes must call."""
    return bool(np.any(_gathered(condition)))


def of_first(value):
    """The first process's value: a number, or an array that has the same shape in all. All processes must call."""
    return _gathered(value)[0]


def tree_of_first(tree: Any) -> Any:
    """The first process's tree, where all have one of the same shapes. All processes must call."""
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
    """All processes must call.

    Raises:
      UserError: `value`, an int32, differs from that of the first process; `what` begins the message.
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


def is_shared_failure(error: Exception) -> bool:
    """Whether the runtime failed while several processes work together: most often, another one has ended."""
    # Where it fails to begin a step, jax raises a ValueError with the runtime's status: "UNKNOWN: Gloo ...".
    status = isinstance(error, ValueError) and str(error).partition(":")[0].isupper()
    return (isinstance(error, jax.errors.JaxRuntimeError) or status) and jax.process_count() > 1


def _gathered(value) -> np.ndarray:
    """[processes, ...]"""
    value = np.asarray(value)
    if jax.process_count() == 1:
        return value[None]
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(value)
