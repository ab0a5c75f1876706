"""From a main function to a process: exit statuses, one-paragraph errors, memory. Imports nothing heavy."""

import ctypes
import os
import shlex
import sys
import textwrap
import traceback
import typing
import warnings
from collections.abc import Callable

from experiments.run.errors import UserError
from experiments.run.interrupt import Interrupted
from experiments.run.streams import undisturbed
from experiments.run.surroundings import explain, require_usable


def run(main: Callable, parse: Callable, prog: str, args: list[str] | None = None):
    """Calls main(parse(prog, args)) and exits on errors.

    The exit status is 0, 1 (the run failed, or another process that took part), 2 (bad flags or settings), 3 (stopped
    by a signal, after saving: the message has the command that resumes) or 130 (interrupted with nothing to save).

    Args:
      main: takes the configuration.
      parse: (prog, args) -> configuration; see `experiments.config.flags`.
      prog: the command as the user types it, without flags.
      args: the flags; those of this process, if None.
    """
    with undisturbed():
        _run(main, parse, prog, sys.argv[1:] if args is None else args)


def _run(main: Callable, parse: Callable, prog: str, args: list[str]) -> None:
    try:
        config = parse(prog, args)
    except UserError as error:
        _complain(error, status=2)
    try:
        require_usable()
    except UserError as error:
        _complain(error, status=1)
    _keep_freed_memory()
    again = " without --restart" if "--restart" in args else ""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # a user's eye needs no line of code
    try:
        main(config)
    except Interrupted as error:
        flags = shlex.join(arg for arg in args if arg != "--restart")
        print(f"{error} Resume with:\n{_as_started(prog)} {flags}".rstrip(), file=sys.stderr)
        sys.exit(3)
    except UserError as error:
        _complain(error, status=1)
    except OSError as error:
        _complain(
            f"{error}. What was saved is whole: make room or mend the path, and give the same command{again} again.",
            status=1,
        )
    except KeyboardInterrupt:
        text = f"error: interrupted. Give the same command{again} again: a run resumes from its last checkpoint."
        print(text, file=sys.stderr, flush=True)
        _end_at_once(130)  # a compilation may be under way in another thread, and ending in order would crash
    except Exception as error:
        if says := explain(error):
            _complain(says, status=1)
        if not _is_one_of_several():
            raise
        from experiments.run.processes import is_shared_failure

        if not is_shared_failure(error):
            traceback.print_exc()
            _end_at_once(1)
        _complain(
            f"the runtime failed where several processes work together ({str(error)[:200]}). If another process has "
            f"ended, its message says why. Give all of them the same commands{again} again: they resume from the last "
            "checkpoint.",
            status=1,
        )


def _as_started(prog: str) -> str:
    """The command with the Python that runs it, which may not be the one on the path."""
    _, *rest = prog.split(" ")
    here = os.path.relpath(sys.executable)
    return " ".join([shlex.quote(sys.executable if here.startswith("..") else here), *rest])


def _complain(error, status: int) -> typing.NoReturn:
    print(textwrap.fill(f"error: {error}", width=100, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
    if _is_one_of_several():
        _end_at_once(status)  # ending in order waits for the others, and they for this one
    sys.exit(status)


def _end_at_once(status: int) -> typing.NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_one_of_several() -> bool:
    """Whether this process has joined others."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _keep_freed_memory() -> None:
    """Asks glibc to keep freed blocks of any size. XLA allocates its buffers anew at every step, and on a virtual
    machine the page faults of giving them back and forth cost up to a third of a step. It does so in threads, whose own
    heaps hold no large block: all threads share one heap. Only the commands do this: importing a library should not
    change a process."""
    if sys.platform != "linux" or os.environ.get("MALLOC_TRIM_THRESHOLD_"):
        return
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8  # from malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_arena_max, 1)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)  # never trim
        libc.mallopt(m_top_pad, 2**28)
    except (OSError, AttributeError):  # another C library: slower, not wrong
        return
