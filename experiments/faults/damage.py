"""Run directories that are damaged: the run resumes with the right bits, or one error names what works.

A directory is made without any training, damaged at random places, and opened as a command opens it.
"""

import contextlib
import json
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.faults.child_run import Fault, make_fault
from experiments.run.errors import UserError
from experiments.run.names import Settings
from experiments.run.workdir import LOCK, REPLACED, Workdir

SETTINGS = Settings({"dataset": "mnist", "density": 0.5, "seed": 3})
TREE = {"a": jnp.arange(40.0).reshape(8, 5), "b": jnp.int32(7)}
LAYER = {"kept": 1, "size": 2, "density": 0.5}
SUMMARY = {
    "method": "edge-popup", "dataset": "mnist", "model": "mlp", "test_accuracy": 0.9, "test_loss": 0.3, "density": 0.5,
    "layers": {"a": LAYER}, "parameters": 1, "flops": 2, "epochs": 2, "steps": 20, "train_seconds": 1.5,
    "images_per_second": 9.5, "seed": 3, "config": {"density": 0.5},
}  # fmt: skip
TEXTS = ("", "[1,2]", "5", "null", '"x"', "{}", '{"a":1}', '{"epoch":1}', '{"epoch":"1","step":2}', "NaN", "[" * 50_000)
TEXTS += (json.dumps(SUMMARY | {"test_accuracy": "high"}), json.dumps(SUMMARY | {"layers": {"a": 3}}), "\udcff\n")
ACTIONS = ("flip", "cut", "text", "more", "remove", "rename", "copy", "folder", "link", "loop", "pipe", "swap", "empty")
MOST_HARMS, MOST_PICKED, LAST_PLACE = 3, 99, 5000  # what `harm` is given at most

Harm = tuple[str, int, int, int]  # the arguments of `harm`


def make_run(path: Path) -> Path:
    """A run with two epochs behind it and two checkpoints; it has a summary too, which may be taken away."""
    workdir = Workdir(path, SETTINGS, "images")
    checkpoints = workdir.checkpoints()
    for epoch in range(3):
        workdir.append({"epoch": epoch, "step": 10 * epoch, "train_loss": float("nan"), "flips": {"a": 3}})
        if epoch:
            checkpoints.save(10 * epoch, {**TREE, "a": TREE["a"] + 10 * epoch})
    workdir.finish(SUMMARY, lambda: None)
    return path


def harm(path: Path, action: str, pick: int, other: int, place: int) -> None:
    """Does one thing to a file or folder of a directory.

    Args:
      path: the directory.
      action: one of `ACTIONS`.
      pick: which file or folder.
      other: which one more, for actions on two.
      place: where in the file; or which new name or text.
    """
    entries = sorted(file for file in path.rglob("*") if file.name != LOCK)
    if not entries:
        return
    target, second = entries[pick % len(entries)], entries[other % len(entries)]
    if action in ("flip", "cut", "more") and target.is_file():
        content = target.read_bytes()
        at = place % max(len(content), 1)
        changed = bytes([content[at] ^ (1 << place % 8)]) if content else b"x"
        flipped, longer = content[:at] + changed + content[at + 1 :], content + b'{"epoch":9}\n'
        target.write_bytes({"flip": flipped, "cut": content[:at], "more": longer}[action])
    elif action == "empty" and target.is_dir():
        shutil.rmtree(target)
        target.mkdir()
    elif action in ("copy", "rename"):
        name = target.with_name(("30", "20", "metrics.jsonl", "config.json", "x.tmp", "summary.json")[place % 6])
        if not os.path.lexists(name):
            (shutil.copytree if target.is_dir() else shutil.copy)(target, name)
            if action == "rename":
                _remove(target)
    elif action == "swap" and target.is_file() and second.is_file() and target != second:
        first = target.read_bytes()
        target.write_bytes(second.read_bytes())
        second.write_bytes(first)
    else:
        _put_in_its_place(target, second, action, place)


def _put_in_its_place(target: Path, second: Path, action: str, place: int) -> None:
    _remove(target)
    if action in ("flip", "text"):
        target.write_bytes(TEXTS[place % len(TEXTS)].encode(errors="surrogateescape"))
    elif action == "folder":
        target.mkdir()
    elif action == "link":
        target.symlink_to(second)
    elif action == "loop":
        target.symlink_to(target.name)
    elif action == "pipe":
        os.mkfifo(target)


def _remove(target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def outcome(template: Path, finished: bool, done: Iterable[Harm]) -> str | None:
    """What is wrong with what happens to a damaged directory; None if all is as it should be.

    Args:
      template: of `make_run`.
      finished: whether the run has its summary.
      done: what is done to it.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checkpoints that are damaged
        path = Path(folder) / "run"
        shutil.copytree(template, path)
        if not finished:
            (path / "summary.json").unlink()
        with contextlib.suppress(OSError):
            for each in done:
                harm(path, *each)
        before = _contents(path)
        try:
            summary, step, tree = _opened(path)
        except UserError as error:
            return _wrong_with_the_error(path, str(error), before)
        if summary is not None:
            return None if isinstance(summary["test_accuracy"], float) and summary["layers"] else "a wrong summary"
        if step is not None:
            return None if np.array_equal(tree["a"], TREE["a"] + step) else f"wrong arrays at step {step}"
        # Only a directory that looks like a new one may begin anew.
        begun = any(os.path.lexists(path / name) for name in (f"{REPLACED}-1", "summary.json"))
        return "a silent restart" if begun or before & _contents(template / "checkpoints") else None


def _wrong_with_the_error(path: Path, says: str, before: set[bytes]) -> str | None:
    if "Traceback" in says or len(says) > 2000:
        return f"an error that is no paragraph: {says}"
    if not before <= _contents(path):
        return "an error that removed a file"
    # The way out that every error names works, and moves what was there.
    if _opened(path, restart=True) != (None, None, None):
        return "--restart does not begin anew"
    kept = before <= _contents(path) and (path / f"{REPLACED}-1").is_dir()
    return None if kept else "--restart lost a file"


def _opened(path: Path, restart: bool = False) -> tuple[Any, Any, Any]:
    """What a command does before it trains: (summary, step, tree); step and tree are None of a run that begins."""
    workdir = Workdir(path, SETTINGS, "images", restart=restart)
    if (summary := workdir.summary()) is not None:
        return summary, None, None
    checkpoints = workdir.checkpoints()
    step, tree = checkpoints.restore(TREE) or (None, None)
    workdir.cut_records(-1 if step is None else step, epochs=0 if step is None else step // 10 + 1)
    return None, step, tree


def _contents(path: Path) -> set[bytes]:
    """The bytes of every file below a directory, but for those that say nothing."""
    files = (file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    return {file.read_bytes() for file in files if file.name != LOCK and file.stat().st_size}


def damaged_directories(scratch: Path, tries: int = 200, seed: int = 0) -> Fault:
    """Up to three things are done at random to the files of a run's directory.

    Args:
      scratch: a directory for the run.
      tries: how many damaged directories.
      seed: of what is done to them.

    Returns:
      A fault whose details have what was "done", and what is "wrong", if anything is.
    """
    template, rng, details = make_run(scratch / "template"), random.Random(seed), []
    for _ in range(tries):
        finished = rng.random() < 0.5
        done = [_drawn(rng) for _ in range(rng.randrange(MOST_HARMS + 1))]
        try:
            wrong = outcome(template, finished, done)
        except Exception as error:  # a traceback for the user
            wrong = f"{type(error).__name__}: {error}"
        details.append({"finished": finished, "done": done, "wrong": wrong, "survived": wrong is None})
    return make_fault("files of a run damaged, missing, swapped or replaced", details)


def _drawn(rng: random.Random) -> Harm:
    return (rng.choice(ACTIONS), rng.randint(0, MOST_PICKED), rng.randint(0, MOST_PICKED), rng.randint(0, LAST_PLACE))
