"""What surrounds a run, its environment variables and its limits: what it cannot work with is one paragraph."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.run.errors import UserError

try:
    import resource
except ImportError:  # not a Unix
    resource = None

FILES, FEWEST_FILES = 1024, 64  # open at once: what is asked for, and what the writer of checkpoints needs
MEMORY = Path("/proc/meminfo")
GROUP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # of processes, with limits of their own


class GroupVersion(NamedTuple):
    """How a version of Linux's control groups names what it tells of memory; files that are cached can be dropped."""

    kind: str
    folder: str
    limit: str
    used: str
    cached: str  # what `active_file` and `inactive_file` begin with


GROUP_VERSIONS = (
    GroupVersion("", "", "memory.max", "memory.current", ""),
    GroupVersion("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
TO_THE_BACKEND = re.compile(r"Unable to initialize backend|No visible \w+ devices|Unknown backend")
NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|Unable to allocate")


def require_usable() -> None:
    """Raises the limit of open files, and raises UserError for what no run can work with. Imports no JAX."""
    if os.environ.get("JAX_DISABLE_JIT", "").lower() in ("1", "true", "yes", "on", "y", "t"):
        raise UserError(
            "JAX_DISABLE_JIT is set, and the commands compile their steps: unset it. A step of your own runs without "
            "compilation as sm.make_train_step returns it."
        )
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FEWEST_FILES:
        raise UserError(
            f"only {hard} files may be open at once here, and a run needs {FEWEST_FILES}: raise the limit (ulimit -n)."
        )
    allow_files(FILES - soft)


def allow_files(more: int) -> None:
    """Lets this process open so many files beyond what it could, or as many as the system allows."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if more > 0 and soft != resource.RLIM_INFINITY:
        wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
        with contextlib.suppress(ValueError, OSError):  # a system that allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def explain(error: BaseException) -> str | None:
    """A paragraph for an error that comes from the surroundings; None for any other."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or NO_MEMORY.search(text):
        return (
            f"the memory does not suffice ({_first_line(error)}). A smaller --batch-size or a smaller network takes "
            "less. What was saved is whole: the same command resumes."
        )
    if TO_THE_BACKEND.search(text) or (isinstance(error, AssertionError) and _raised_in(error, "xla_bridge.py")):
        asked = os.environ.get("JAX_PLATFORMS")
        why = f"JAX_PLATFORMS={asked} asks for devices" if asked else "JAX asked for devices"
        return (
            f"{why} that JAX does not find here ({_first_line(error) or 'no such backend'}). Unset JAX_PLATFORMS to "
            'take what is there, or install JAX for them, as `pip install "jax[cuda13]"` does for NVIDIA GPUs.'
        )
    return None


def require_memory(needed: int, device) -> None:
    """Raises UserError if a compiled program needs more memory than is free.

    Args:
      needed: bytes, beside what is held already.
      device: the `jax.Device` that it runs on.
    """
    free = free_on(device)
    if free is not None and needed > free:
        raise UserError(
            f"a training step needs {needed / 1e9:.1f} GB of memory beside what is held already, and {free / 1e9:.1f} "
            f"GB are free ({device.platform}): a smaller --batch-size or a smaller network takes less."
        )


def free_on(device) -> int | None:
    """Bytes that are free on a device, or for a CPU in this machine; None where nothing tells."""
    if device.platform != "cpu":
        told = device.memory_stats() or {}
        limit = told.get("bytes_limit")
        return None if limit is None else limit - told.get("bytes_in_use", 0)
    return free_memory(swap=True)


def free_memory(swap: bool) -> int | None:
    """Bytes that this process can still take, with what the machine can swap or without; None if not on Linux."""
    try:
        told = dict(re.findall(r"(\w+):\s+(\d+) kB", MEMORY.read_text()))
    except OSError:
        return None
    if "MemAvailable" not in told:
        return None
    free = 1024 * (int(told["MemAvailable"]) + (int(told.get("SwapFree", 0)) if swap else 0))
    return min([free, *_left_to_groups()])


def _left_to_groups() -> Iterator[int]:
    """Bytes that the groups of processes that this one is in, such as a container or a job, have left of their own."""
    with contextlib.suppress(OSError):
        for line in GROUP.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            for version in GROUP_VERSIONS:
                if version.kind in kinds.split(","):
                    yield from _left_to_group(GROUPS / version.folder, path, version)


def _left_to_group(root: Path, path: str, version: GroupVersion) -> Iterator[int]:
    """The same of a group and of those that it is part of, as far as they have a limit."""
    folder = root / path.lstrip("/")
    for group in (folder, *folder.parents):
        if root not in (group, *group.parents):
            return
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max", which is no limit
            limit, used = (int((group / name).read_text()) for name in (version.limit, version.used))
            cached = re.findall(
                rf"^{version.cached}(?:in)?active_file (\d+)$", (group / "memory.stat").read_text(), re.M
            )
            yield max(limit - used + sum(map(int, cached)), 0)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def _raised_in(error: BaseException, file: str) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.endswith(file)
