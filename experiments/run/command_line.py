"""From a frozen dataclass to a command: flags, presets, `--help`, one-paragraph errors. Imports nothing heavy."""

import argparse
import ctypes
import dataclasses
import difflib
import os
import shlex
import sys
import textwrap
import traceback
import typing
import warnings
from collections.abc import Callable

import tyro

from experiments.run.errors import UserError
from experiments.run.interrupt import Interrupted


def run(main: Callable, config_type: type, defaults: Callable[..., dict], prog: str, args: list[str] | None = None):
    """Parses flags into `config_type`, calls main(config) and exits on errors.

    `defaults(preset=..., method=...)` gives the fields that a preset sets; flags override them. The exit status is 0,
    1 (the run failed, or another process that took part), 2 (bad flags or settings), 3 (asked to stop, and saved: what
    is printed goes on with it) or 130 (interrupted where there was nothing to save).
    """
    args = sys.argv[1:] if args is None else args
    try:
        config = parse(config_type, defaults, prog, args)
    except UserError as error:
        _complain(error, status=2)
    _keep_freed_memory()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # a user's eye needs no line of code
    try:
        main(config)
    except Interrupted as error:
        print(f"{error} Go on with:\n{prog} {shlex.join(args)}".rstrip(), file=sys.stderr)
        sys.exit(3)
    except UserError as error:
        _complain(error, status=1)
    except OSError as error:
        _complain(
            f"{error}. What was saved is whole: make room or mend the path, and give the same command again.",
            status=1,
        )
    except KeyboardInterrupt:
        text = "error: interrupted. Give the same command again: a run goes on from its last checkpoint."
        print(text, file=sys.stderr, flush=True)
        _end_at_once(130)  # a compilation may be under way in another thread, and ending in order would crash
    except Exception as error:
        if not _is_one_of_several():
            raise
        from experiments.run.processes import has_lost_others

        if not has_lost_others(error):
            traceback.print_exc()
            _end_at_once(1)
        _complain(
            f"another process has ended ({str(error)[:200]}); its message says why. Give all of them the same commands "
            "again: they go on from the last checkpoint.",
            status=1,
        )


def parse(config_type: type, defaults: Callable[..., dict], prog: str, args: list[str]):
    """The settings: the preset's, overridden by the flags, then checked by the dataclass's own `check`."""
    chosen = _choices(config_type, args)
    base = config_type(**defaults(**{k: v for k, v in chosen.items() if k in ("preset", "method")}))
    config = tyro.cli(config_type, args=args, default=base, prog=prog)
    config.check()
    return config


def _choices(config_type: type, args: list[str]) -> dict[str, str]:
    """The flags of fields with a fixed set of values, read ahead of the rest: presets depend on them, and a wrong
    one gets an answer that names the nearest right one."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    valid = {}
    for field in dataclasses.fields(config_type):
        if typing.get_origin(field.type) is typing.Literal:
            valid[field.name] = typing.get_args(field.type)
            scan.add_argument("--" + field.name.replace("_", "-"), dest=field.name, nargs="?")
    chosen = {k: v for k, v in vars(scan.parse_known_args(args)[0]).items() if v is not None}
    for name, value in chosen.items():
        if value not in valid[name]:
            near = difflib.get_close_matches(value, valid[name], n=1, cutoff=0.3)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"no {name.replace('_', ' ')} {value!r}: {hint}There are: {', '.join(valid[name])}.")
    return chosen


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
    """Asks glibc to keep large freed blocks. XLA allocates its buffers anew at every step; on a virtual machine the
    page faults of giving them back and forth cost up to a third of a step. Only the commands do this: importing a
    library should not change a process."""
    if sys.platform != "linux" or os.environ.get("MALLOC_TRIM_THRESHOLD_"):
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # from malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 2**28)
    except (OSError, AttributeError):  # another C library: slower, not wrong
        return
