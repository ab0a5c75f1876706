"""A damaged run directory: the run resumes with the right bits, or one error names what is wrong and what works."""

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A run with two epochs behind it and two checkpoints; it has a summary too, which a test may take away."""
    path = tmp_path_factory.mktemp("template") / "run"
    workdir = Workdir(path, SETTINGS, "images")
    checkpoints = workdir.checkpoints()
    for epoch in range(3):
        workdir.append({"epoch": epoch, "step": 10 * epoch, "train_loss": float("nan"), "flips": {"a": 3}})
        if epoch:
            checkpoints.save(10 * epoch, {**TREE, "a": TREE["a"] + 10 * epoch})
    workdir.finish(SUMMARY, lambda: None)
    return path


def opened(path, restart=False):
    """What a command does before it trains: (summary, step, tree); step and tree are None of a run that begins."""
    workdir = Workdir(path, SETTINGS, "images", restart=restart)
    if (summary := workdir.summary()) is not None:
        return summary, None, None
    checkpoints = workdir.checkpoints()
    step, tree = checkpoints.restore(TREE) or (None, None)
    workdir.cut_records(-1 if step is None else step, epochs=0 if step is None else step // 10 + 1)
    return None, step, tree


def contents(path):
    """The bytes of every file below a directory, but for those that say nothing."""
    files = (file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    return {file.read_bytes() for file in files if file.name != LOCK and file.stat().st_size}


ACTIONS = ("flip", "cut", "text", "more", "remove", "rename", "copy", "folder", "link", "loop", "pipe", "swap", "empty")


def harm(path, action, pick, other, place):
    """Does one thing to a file or folder of the directory."""
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
                remove(target)
    elif action == "swap" and target.is_file() and second.is_file() and target != second:
        first = target.read_bytes()
        target.write_bytes(second.read_bytes())
        second.write_bytes(first)
    else:
        remove(target)
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


def remove(target):
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


harms = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.integers(0, 99), st.integers(0, 99), st.integers(0, 5000)), max_size=3
)


def check(template, finished, done):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checkpoints that are damaged
        path = Path(folder) / "run"
        shutil.copytree(template, path)
        if not finished:
            (path / "summary.json").unlink()
        with contextlib.suppress(OSError):
            for each in done:
                harm(path, *each)
        before = contents(path)
        try:
            summary, step, tree = opened(path)
        except UserError as error:
            assert "Traceback" not in str(error) and len(str(error)) < 2000
            assert before <= contents(path), "an error must leave every file"
            # The way out that every error names works, and moves what was there.
            assert opened(path, restart=True) == (None, None, None)
            assert before <= contents(path) and (path / f"{REPLACED}-1").is_dir()
            return
        if summary is not None:
            assert isinstance(summary["test_accuracy"], float) and summary["layers"]
        elif step is None:
            # Only a directory that looks like a new one may begin anew.
            assert not any(os.path.lexists(path / name) for name in ("replaced-1", "summary.json"))
            assert not before & contents(template / "checkpoints"), "a silent restart"
        else:
            np.testing.assert_array_equal(tree["a"], TREE["a"] + step)


@pytest.mark.parametrize("finished", (False, True))
def test_a_directory_that_nothing_happened_to_is_whole(template, finished):
    check(template, finished, [])


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(finished=st.booleans(), done=harms)
def test_anything_done_to_a_directory_ends_in_the_right_bits_or_in_one_error_whose_way_out_works(
    template, finished, done
):
    check(template, finished, done)
