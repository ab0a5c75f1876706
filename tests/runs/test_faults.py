"""A training run survives what is done to it: real runs in processes of their own, and damage to their files.

test_interrupt.py tests SIGTERM, Ctrl-C and a second process in the directory.
"""

import errno
import json
import os
import random
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config.settings import flat, neutral
from experiments.faults import child_run, disks, inputs, soak, stops
from experiments.mnist import Config
from experiments.run.checkpoints import CHECKSUMS, SAVED, Checkpoints
from experiments.run.errors import UserError
from experiments.run.names import Settings
from experiments.run.workdir import Workdir

pytestmark = pytest.mark.usefixtures("quick_processes")
SETTINGS = Settings(flat(Config()), neutral(Config))
TREE = {"a": jnp.arange(5000.0), "key": jax.random.key(3)}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """One directory for all tests: the undisturbed run is made once, and programs once for these and other tests."""
    folder, shared = tmp_path_factory.mktemp("faults"), Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    shared.mkdir(exist_ok=True)
    (folder / "compiled").symlink_to(shared)
    return folder


def assert_survived(fault):
    __tracebackhide__ = True
    assert fault.survived == fault.tries == len(fault.details) > 0, json.dumps(fault.details, indent=2, default=str)


@pytest.mark.slow
def test_a_run_killed_again_and_again_resumes_each_time_and_ends_bit_identical(scratch):
    seed = random.randrange(2**32)
    print("moments drawn from seed", seed)
    fault = stops.kills(scratch, tries=8, seed=seed)
    assert_survived(fault)
    assert fault.tries >= 8
    during_save = [seen["during_save"] for seen in fault.details]
    assert any(during_save) and not all(during_save)
    steps = [seen["next"] for seen in fault.details]
    assert all(step > 0 for step in steps) and steps == sorted(steps)
    left = {file.name for file in (scratch / "killed-mnist").iterdir()} - {".lock"}
    pictures = {name for name in left if name.endswith(".png")}
    files = {"config.json", "metrics.jsonl", "summary.json", "subnetwork.safetensors", "checkpoints"}
    files.add(".saved-checkpoints")
    assert left == files | pictures and pictures
    kept = {file.name for file in (scratch / "killed-mnist" / "checkpoints").iterdir()}
    assert len(kept) == 3 and "saved" in kept  # two checkpoints, and nothing of saves that were killed


@pytest.mark.slow
def test_the_same_command_gives_the_same_bits_in_every_file(scratch, monkeypatch):
    first = child_run.undisturbed(scratch)
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")  # compiled again, too
    run = child_run.finished(scratch, scratch / "again", "--epochs", str(child_run.MNIST.epochs))
    assert run.ended() == 0
    second = child_run.results(run.workdir)
    assert child_run.differences(second, first) == []
    assert len(first["arrays"]) > 5 and len(first["records"]) == child_run.MNIST.epochs + 1
    assert {"layers.png", "kernels.png", "flips.png", "curves.png"} <= set(first["pictures"])
    for name in first["pictures"]:
        assert first["pictures"][name][:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_what_differs_is_named(scratch):
    one = child_run.undisturbed(scratch)
    other = {**one, "step": 1, "arrays": {**one["arrays"]}, "pictures": {**one["pictures"], "flips.png": b""}}
    name = max(one["arrays"], key=lambda name: one["arrays"][name].size)
    other["arrays"][name] = one["arrays"][name].copy()
    other["arrays"][name].flat[0] = np.nextafter(one["arrays"][name].flat[0], np.float32(9))
    assert child_run.differences(one, one) == []
    assert child_run.differences(other, one) == ["step", name, "flips.png"]


@pytest.mark.slow
def test_a_full_disk_stops_a_run_with_one_paragraph_and_it_resumes_when_there_is_room(scratch):
    fault = disks.full_disk(scratch)
    assert_survived(fault)
    assert {"checkpoint", "pictures"} <= {seen["place"] for seen in fault.details}
    for seen in fault.details:
        assert seen["output"].count("error: ") == 1 and "give the same command again" in seen["output"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [disks.cut_checkpoint, disks.noisy_checkpoint])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used_and_no_whole_one_is_an_error(scratch, fault):
    fault = fault(scratch, tries=1, seed=random.randrange(2**32))
    assert_survived(fault)
    assert fault.details[0]["warned"] and fault.details[-1]["all"]


@pytest.mark.slow
def test_a_run_resumes_on_other_devices(scratch):
    fault = stops.other_devices(scratch)
    assert_survived(fault)
    assert fault.tries == 3


@pytest.mark.slow
def test_training_that_diverges_names_step_and_layer_and_leaves_finite_checkpoints(scratch):
    fault = stops.not_finite(scratch)
    assert_survived(fault)
    assert fault.details[0]["what"] == "Dense_0/kernel"


@pytest.mark.slow
def test_saving_once_a_second_for_a_while_leaves_no_more_files_memory_or_open_files(scratch):
    fault = soak.soak(scratch, seconds=10)
    assert_survived(fault)
    seen = fault.details[0]
    assert seen["written"] >= 3 and len(seen["rss"]) == len(seen["files"]) >= 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    (
        partial(stops.interrupted_phases, phases=("compiling", "drawing")),
        inputs.swollen_archives,
    ),
)
def test_other_harm(scratch, fault):
    assert_survived(fault(scratch))


def saved_twice(path):
    checkpoints = Checkpoints(path)
    assert checkpoints.restore(TREE) is None
    for step in (10, 20):
        checkpoints.save(step, {**TREE, "a": TREE["a"] + step})


def restored(path):
    step, tree = Checkpoints(path).restore(TREE)
    np.testing.assert_array_equal(tree["a"], TREE["a"] + step)
    return step


@pytest.mark.parametrize("how", ["gone", "cut", "one bit", "noise"])
def test_damage_to_any_file_of_a_checkpoint_is_detected(tmp_path, how):
    rng = random.Random(0)
    saved_twice(tmp_path / "whole")
    files = [file for file in (tmp_path / "whole" / "20").rglob("*") if file.is_file() and file.stat().st_size]
    assert any(file.stat().st_size > 4 * 5000 / 2 for file in files)  # the array is among them
    for number, file in enumerate(files):
        path = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        damaged = path / file.relative_to(tmp_path / "whole")
        content, place = damaged.read_bytes(), rng.randrange(file.stat().st_size)
        damaged.unlink()
        if how != "gone":
            noise = bytes([content[place] ^ 1]) if how == "one bit" else rng.randbytes(16)
            damaged.write_bytes(content[:place] + (b"" if how == "cut" else noise + content[place + len(noise) :]))
        with pytest.warns(UserWarning, match=r"cannot read the checkpoint at step 20 .* from step 10"):
            assert restored(path) == 10
        assert sorted(file.name for file in path.iterdir()) == ["10", "20.damaged", "saved"]


def test_after_a_damaged_checkpoint_it_saves_at_that_step_again(tmp_path):
    saved_twice(tmp_path)
    (tmp_path / "20" / CHECKSUMS).unlink()
    checkpoints = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match="cannot read the checkpoint at step 20"):
        assert checkpoints.restore(TREE)[0] == 10
    for step in (15, 20):
        checkpoints.save(step, {**TREE, "a": TREE["a"] + step})
    assert restored(tmp_path) == 20
    assert sorted(file.name for file in tmp_path.iterdir()) == ["15", "20", "20.damaged", "saved"]


def test_a_whole_checkpoint_that_cannot_be_read_now_is_an_error_and_stays(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    saved_twice(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.v1.load", fail)
        with pytest.raises(UserError, match=r"step 20 in .* not be read .*Input/output error.* as they were written"):
            Checkpoints(tmp_path).restore(TREE)
    assert restored(tmp_path) == 20


def test_checkpoints_from_before_there_were_checksums_are_read_unless_newer_ones_lie_beside_them(tmp_path):
    saved_twice(tmp_path)
    for step in ("10", "20"):
        (tmp_path / step / CHECKSUMS).unlink()
    for mark in (tmp_path / SAVED, tmp_path.with_name(f".saved-{tmp_path.name}")):
        mark.unlink()
    assert restored(tmp_path) == 20
    Checkpoints(tmp_path).save(30, {**TREE, "a": TREE["a"] + 30})
    assert restored(tmp_path) == 30
    shutil.rmtree(tmp_path / "30")
    with pytest.raises(UserError, match="no checkpoint in"), pytest.warns(UserWarning, match="missing"):
        restored(tmp_path)


def test_checkpoints_that_were_there_and_are_gone_are_an_error(tmp_path):
    saved_twice(tmp_path / "c")
    for step in ("10", "20"):
        shutil.rmtree(tmp_path / "c" / step)
    with pytest.raises(UserError, match="there are none now"):
        Checkpoints(tmp_path / "c").restore(TREE)
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(UserError, match="there are none now"):  # an emptied directory is one that was never filled
        Checkpoints(tmp_path / "c").restore(TREE)
    workdir = Workdir(tmp_path / "run", SETTINGS, "digest")
    workdir.checkpoints()
    workdir.append({"epoch": 0, "step": 0})
    workdir.checkpoints()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="there are none now"):
        workdir.checkpoints()


def test_a_directory_that_may_be_entered_but_not_listed_holds_a_run(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    opens = os.open

    def refuse(path, *rest, **more):
        if str(path) == str(tmp_path):  # as for a user who is not root
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opens(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    Workdir(tmp_path / "inner", SETTINGS, "digest").append({"epoch": 0, "step": 0})
    assert len(Workdir(tmp_path / "inner", SETTINGS, "digest").records()) == 1


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path):
    workdir = tmp_path / "run"
    saved_twice(workdir / "checkpoints")
    for name in (".metrics.jsonl.123", ".config.json.123", ".summary.json.9"):
        (workdir / name).write_text("half")
    for name in ("30.tmp", "30.tmp.orbax-checkpoint-tmp", "5.tmp"):
        shutil.copytree(workdir / "checkpoints" / "20", workdir / "checkpoints" / name)
    (workdir / "config.json").write_text("{}")
    (workdir / ".hidden").write_text("the user's")
    (workdir / "checkpoints" / "notes.tmp").write_text("the user's")
    with pytest.raises(UserError, match="other settings"):
        Workdir(workdir, SETTINGS, "digest")
    assert restored(workdir / "checkpoints") == 20
    assert sorted(file.name for file in (workdir / "checkpoints").iterdir()) == ["10", "20", "notes.tmp", "saved"]
    left = [".hidden", ".lock", ".saved-checkpoints", "checkpoints", "config.json"]
    assert sorted(file.name for file in workdir.iterdir()) == left


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes to file 5: ... [os_error_code='28']"),
    ],
)
def test_a_save_that_fails_is_one_error_whatever_the_writer_raises_and_the_last_one_is_whole(
    tmp_path, monkeypatch, error
):
    def fail(*_):
        raise error

    saved_twice(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.v1.save", fail)
        with pytest.raises(UserError, match=r"at step 30 in .* \(No space left on device\)"):
            Checkpoints(tmp_path).save(30, TREE)
    assert restored(tmp_path) == 20


def test_a_full_disk_is_reported_with_the_file_and_a_run_without_pictures_is_not_finished(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_):
        raise full

    workdir = Workdir(tmp_path / "run", SETTINGS, "digest")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=r"metrics.jsonl"):
        workdir.append({"epoch": 0, "step": 0})
    monkeypatch.undo()
    full.filename = None
    with pytest.raises(OSError, match=r"No space left on device: .*run"):
        workdir.finish({"seed": 0}, fail)
    assert not (tmp_path / "run" / "summary.json").exists()
