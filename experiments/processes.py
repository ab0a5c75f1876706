"""Several processes, on one host or on many, that train one network together; everything here is free for one alone."""

import contextlib
import os
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.errors import UserError
from supermask_jax import parallel

OWN_SETTINGS = ("process_id", "workdir", "data_dir")
THREADS = 32  # of eight simulated devices: with one for each core, they can wait for each other forever


def join(config) -> None:
    """Joins this process to the others that the settings name, before anything touches a device.

    Where the devices are CPUs, as many as asked for are simulated.

    Args:
      config: settings with the fields devices, coordinator, num_processes and process_id of `experiments.mnist.Config`.

    Raises:
      UserError: no cluster's environment is found, the others do not come, or they have other settings.
    """
    if config.devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(THREADS, 4 * config.devices)))
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            with contextlib.suppress(RuntimeError):  # devices are in use already, as when called from a program
                jax.config.update("jax_num_cpu_devices", config.devices // (config.num_processes or 1))
    if config.coordinator is None:
        return
    where = (config.coordinator, config.num_processes, config.process_id)
    where = (None, None, None) if config.coordinator == "auto" else where
    try:
        parallel.initialize(*where)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the other processes ({error}). Name them with --coordinator ADDRESS:PORT --num-processes N "
            "--process-id I, or run under Slurm, Open MPI, Kubernetes or on a TPU pod with --coordinator auto."
        ) from error
    settings = {name: value for name, value in vars(config).items() if name not in OWN_SETTINGS}
    digest = zlib.crc32(repr(sorted(settings.items())).encode()) % 2**24  # a whole number that float32 holds
    if any_of(digest != of_first(digest)):
        own = ", ".join(f"--{name.replace('_', '-')}" for name in OWN_SETTINGS)
        raise UserError(f"the processes were given different flags; only {own} may differ.")


def is_first() -> bool:
    """Whether this is the process that writes and shows what all found."""
    return jax.process_index() == 0


def any_of(condition: bool) -> bool:
    """Whether the condition holds in any process. All must ask."""
    if jax.process_count() == 1:
        return condition
    return bool(np.any(_gathered(condition)))


def of_first(value: float) -> float:
    """The first process's value. All must ask."""
    return value if jax.process_count() == 1 else float(_gathered(value)[0])


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


def first_only(function: Callable[[], None]) -> None:
    """Calls function() in the first process; all others wait for it, and fail where it fails.

    Raises:
      UserError: what it raised.
    """
    in_turn(lambda: function() if is_first() else None)


def meet() -> None:
    """Waits for all the others."""
    any_of(False)


def _gathered(value) -> np.ndarray:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.asarray(value, np.float32))
