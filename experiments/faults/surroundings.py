"""Runs in surroundings that are not as usual: closed streams, variables, limits, other users, terminals.

A run survives if it ends as it would elsewhere, or with one of our errors before it trains.
"""

import contextlib
import fcntl
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path
from typing import Any

import jax

from experiments.faults.child_run import (
    CIFAR,
    MNIST,
    ON_CPU,
    ROOT,
    ChildRun,
    Fault,
    differences,
    finished,
    is_an_error,
    make_fault,
    results,
    undisturbed,
)

NOBODY = 65534
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
COLOURED = {"TERM": "xterm-256color"}
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d)(?:;\d+)*m")


def closed_streams(scratch: Path) -> Fault:
    """A standard output whose reader goes, that is full, or that is closed ends no run."""
    expected, details = undisturbed(scratch), []
    for number, where in enumerate(("| head -2", "> /dev/full", ">&-", "2>&- | head -1")):
        workdir = scratch / f"stream-{number}"
        command = [sys.executable, "-m", MNIST.command, *MNIST.flags, "--epochs", str(MNIST.epochs)]
        shell = f"{shlex.join([*command, '--workdir', str(workdir)])} {where}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", shell], cwd=ROOT, env=os.environ | ON_CPU, capture_output=True, text=True)
        differs = differences(results(workdir), expected) if done.returncode == 0 else ["unfinished"]
        seen = {"where": where, "status": done.returncode, "said": done.stderr[-500:], "differs": differs}
        details.append({**seen, "survived": not differs and "Traceback" not in done.stderr})
    return make_fault("a standard output that is closed or full", details)


def unusable(scratch: Path) -> Fault:
    """Variables, limits and sizes that no run can work with: one paragraph that names them, before it trains."""
    there = 3 if jax.device_count() != 3 else 4
    # A step on 4,000 images by a network this wide takes about twice the machine's memory.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    width = str(max(memory // 10**7 // 2, 99))
    wide = ("--dataset", "colour-digits-5k", "--model", "cnn", "--depth", "1", "--width", width)
    large = CIFAR._replace(flags=(*wide, "--batch-size", "4000"))
    few = ("bash", "-c", 'ulimit -n 24; exec "$@"', "bash")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("JAX_PLATFORMS=nonsense", {"variables": {"JAX_PLATFORMS": "nonsense"}}),
        ("JAX_DISABLE_JIT", {"variables": {"JAX_DISABLE_JIT": "1"}}),
        ("XLA_FLAGS", {"variables": {"XLA_FLAGS": f"--xla_force_host_platform_device_count={there}"}, "devices": "8"}),
        ("files may be open", {"prefix": few}),
        ("of memory", {"job": large}),
    ]
    if not any(device.platform == "gpu" for device in jax.devices()):
        cases.append(("JAX_PLATFORMS=cuda", {"variables": {"JAX_PLATFORMS": "cuda"}}))
    details = []
    for number, (named, more) in enumerate(cases):
        workdir, devices = scratch / f"unusable-{number}", more.pop("devices", None)
        run = finished(scratch, workdir, *(("--devices", devices) if devices else ()), **more)
        seen = {"named": named, "status": run.ended(), "said": run.output()[-700:]}
        seen["survived"] = run.ended() == 1 and is_an_error(run.output()) and named in run.output().split("error: ")[1]
        details.append({**seen, "survived": seen["survived"] and not (workdir / "summary.json").exists()})
    return make_fault("variables, limits and memory that no run can work with", details)


def other_users(scratch: Path) -> Fault | None:
    """A user who may not write, or not read, and one who comes to another's directory. None if this one is not root.

    The user has no home. The interpreter must be one that others may run; where it is not, None too.
    """
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return None
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        room.chmod(0o777)
        who = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        reads = [sys.executable, "-c", "import jax, experiments.run.workdir"]
        with contextlib.suppress(PermissionError):
            tried = subprocess.run(reads, cwd=ROOT, capture_output=True, env=_without_home(room), **who)
            if tried.returncode == 0:
                return make_fault(
                    "another user: what may not be written or read, no home", _as_nobody(scratch, room, who)
                )
    return None


def _without_home(room: Path) -> dict[str, str]:
    return {**os.environ, "HOME": str(room / "missing"), "PYTHONDONTWRITEBYTECODE": "1"}


def _as_nobody(scratch: Path, room: Path, who: dict) -> list[dict]:
    ours, closed, images = room / "ours", room / "closed", room / "images"
    shutil.copytree(undisturbed_path(scratch), ours)
    for path in (closed, images):
        path.mkdir()
    (images / "train-images-idx3-ubyte").write_bytes(b"secret")
    images.chmod(0o700)
    variables = {"HOME": str(room / "missing"), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    epochs = ("--epochs", str(MNIST.epochs))
    cases = [
        ("their own directory, and no home", room / "theirs", (), 0),
        ("a directory that is not theirs", closed / "run", (), 1),
        ("another's run", ours, (), 1),
        ("images that they may not read", room / "unread", ("--dataset", "idx", "--data-dir", str(images)), 1),
    ]
    expected, details = undisturbed(scratch), []
    for name, workdir, flags, status in cases:
        with ChildRun(room, workdir, *epochs, *flags, variables=variables, **who) as run:
            run.ended()
        seen = {"case": name, "status": run.ended(), "said": run.output()[-700:]}
        if status:
            seen["survived"] = run.ended() == status and is_an_error(run.output())
        else:
            seen["survived"] = run.ended() == 0 and not differences(results(workdir), expected)
        details.append(seen)
    return details


def undisturbed_path(scratch: Path) -> Path:
    """The work directory of `undisturbed`'s run on MNIST."""
    undisturbed(scratch)
    return scratch / f"undisturbed-{MNIST.name}-{MNIST.epochs}"


def terminals(scratch: Path) -> Fault:
    """Terminals of 40, 80 and 200 columns, with and without colour, one of them resized on the way, and --help.

    A run survives if no line is wider than its terminal, and where colour is not wanted there is none.
    """
    details = []
    for columns in (40, 80, 200):
        for variables in (COLOURED, COLOURED | {"NO_COLOR": "1"}):
            details.append(_on_terminal(scratch, columns, variables))
            details.append(_on_terminal(scratch, columns, variables, helps=True))
    details.append(_on_terminal(scratch, 80, {"TERM": "dumb"}))  # of which rich assumes so many columns
    details.append(_on_terminal(scratch, 80, COLOURED, then=50))
    return make_fault("terminals of 40, 80 and 200 columns, without colour, resized", details)


def _on_terminal(
    scratch: Path, columns: int, variables: dict[str, str], then: int | None = None, helps: bool = False
) -> dict:
    """What a run, or --help, shows on a terminal of so many columns, and `then` of so many others."""
    name = f"terminal-{columns}-{then}-{'-'.join(variables)}-{variables['TERM']}{'-help' * helps}"
    flags = ["--help"] if helps else ["--epochs", "2", "--workdir", str(scratch / name)]
    ours, theirs = pty.openpty()
    _resize(ours, columns)
    command = [sys.executable, "-m", MNIST.command, *MNIST.flags, *flags]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    environment |= ON_CPU
    shown = []
    with subprocess.Popen(command, cwd=ROOT, env=environment | variables, stdin=theirs, stdout=theirs, stderr=theirs):
        os.close(theirs)
        if then:
            threading.Timer(3, _resize, (ours, then)).start()
        with contextlib.suppress(OSError):  # the end of a terminal
            while got := os.read(ours, 65536):
                shown.append(got)
    os.close(ours)
    text = b"".join(shown).decode(errors="replace")  # all at once: a character may come in two parts
    # A line is drawn over after a carriage return.
    lines = [part for line in ESCAPE.sub("", text).split("\n") for part in line.split("\r")]
    widths = [len(line.rstrip()) for line in lines]
    # A command is shown as it is typed, however long it is.
    wide = [line for line in lines if len(line.rstrip()) > max(columns, then or 0) and "python -m" not in line]
    plain = "NO_COLOR" in variables or variables["TERM"] == "dumb"
    seen = {"columns": columns, **variables, "widest": max(widths, default=0), "wide": wide[:3]}
    seen["coloured"] = bool(COLOUR.search(text))
    finished = helps or (scratch / name / "summary.json").exists()
    seen["survived"] = finished and not wide and not (plain and seen["coloured"]) and "Traceback" not in text
    return seen


def _resize(terminal: int, columns: int) -> None:
    with contextlib.suppress(OSError):  # it may be gone
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
