"""The main job from the command line: end to end on the 5,000 digits that need no network, and every bad input."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from experiments import mnist
from experiments.config.flags import RENAMED, parser
from experiments.config.settings import fields
from experiments.run import command_line

ROOT = Path(__file__).parents[2]
PICTURES = {"curves.png", "layers.png", "kernels.png", "flips.png"}
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}


def process(tmp_path, *flags, data_dir=None, columns=200):
    env = {k: v for k, v in os.environ.items() if k not in ("SUPERMASK_DATA_DIR", "TFDS_DATA_DIR")}
    env |= {**NO_NETWORK, "HOME": str(tmp_path / "home"), "COLUMNS": str(columns)}
    if data_dir is not None:
        env["SUPERMASK_DATA_DIR"] = str(data_dir)
    args = [sys.executable, "-m", "experiments.mnist", *map(str, flags)]
    return subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def run(capsys, monkeypatch, *flags):
    """(exit status, standard output, standard error) of the command with these flags, in this process."""
    monkeypatch.setattr(command_line, "_keep_freed_memory", lambda: None)  # it is for the life of a process
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # the command changes it
    monkeypatch.delenv("SUPERMASK_DATA_DIR", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    try:
        command_line.run(mnist.main, parser(mnist.Config, mnist.defaults), mnist.PROG, list(map(str, flags)))
        status = 0
    except SystemExit as ended:
        status = ended.code
    return status, *capsys.readouterr()


def small(tmp_path):
    return ["--model", "lenet-300-100", "--epochs", "2", "--workdir", tmp_path / "run"]


def test_it_finds_a_supermask_and_leaves_its_files(tmp_path, capsys, monkeypatch):
    flags = ["--dataset", "mnist-5k", "--train-images", "2000", "--model", "mlp", "--width", "32", "--epochs", "2"]
    status, out, err = run(capsys, monkeypatch, *flags, "--density", "0.3", "--workdir", tmp_path / "run")
    told = r"\n(about [\d.]+ minutes|less than a minute): [\d,]+ steps of [\d.]+ ms, and evaluations"
    assert re.search(told + r"; a step takes [\d,]+ MB of memory\n", out)
    assert status == 0, err
    assert "mnist-5k" in out and "epoch   2/2" in out
    files = {p.name for p in (tmp_path / "run").iterdir()}
    own = {".lock", ".saved-checkpoints", "config.json", "metrics.jsonl", "summary.json", "checkpoints"}
    own.add("subnetwork.safetensors")
    assert files == own | PICTURES
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["method"], summary["dataset"], summary["steps"]) == ("edge-popup", "mnist-5k", 2 * 32)
    assert summary["layers"]["Dense_0/kernel"] == {"size": 25088, "kept": 7527, "density": 7527 / 25088}
    assert 0.5 < summary["test_accuracy"] <= summary["best_test_accuracy"] <= 1


@pytest.mark.slow
def test_without_network_and_data_it_says_so_and_finds_a_supermask_on_mnist_5k(tmp_path):
    done = process(tmp_path, "--density", "0.3", *small(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "WARNING" in done.stderr and "mnist-5k" in done.stderr
    assert "mnist-5k" in done.stdout and "epoch   2/2" in done.stdout
    files = {p.name for p in (tmp_path / "run").iterdir()}
    own = {".lock", ".saved-checkpoints", "config.json", "metrics.jsonl", "summary.json", "checkpoints"}
    own.add("subnetwork.safetensors")
    assert files == own | PICTURES

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    keys = "method dataset density test_accuracy best_test_accuracy test_loss epochs steps train_seconds"
    assert set(f"{keys} images_per_second layers device versions seed config".split()) <= set(summary)
    assert (summary["method"], summary["dataset"], summary["steps"]) == ("edge-popup", "mnist-5k", 2 * 63)
    assert 0.7 < summary["test_accuracy"] <= summary["best_test_accuracy"] <= 1
    assert summary["layers"]["Dense_0/kernel"] == {"size": 235200, "kept": 70560, "density": 0.3}
    assert summary["config"]["dataset"] == "mnist-5k" and summary["config"]["density"] == 0.3

    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, 63, 126]
    assert records[0]["test_accuracy"] < 0.3 and records[-1]["test_accuracy"] == summary["test_accuracy"]
    assert all(0 < r["flips"]["Dense_0/kernel"] < 235200 for r in records[1:])


@pytest.mark.slow
def test_with_images_held_out_the_test_set_is_measured_once_at_the_end(tmp_path):
    done = process(tmp_path, "--method", "dense", "--dataset", "mnist-5k", "--validation", "400", *small(tmp_path))
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("validation_accuracy" in r and "test_accuracy" not in r for r in records)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["density"] == 1.0 and summary["steps"] == 2 * 57
    assert summary["test_accuracy"] == summary["best_test_accuracy"] > 0.7


@pytest.mark.slow
def test_bernoulli_reports_the_deterministic_and_the_sampled_masks(tmp_path):
    flags = ["--method", "bernoulli", "--init", "signed-deviation", "--dataset", "mnist-5k", "--validation", "400"]
    done = process(tmp_path, *flags, *small(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "sampled loss" in done.stdout and "of sampled masks" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held = {"validation_loss", "validation_accuracy", "validation_sampled_loss", "validation_sampled_accuracy"}
    assert all(held <= set(record) for record in records)
    assert records[0]["validation_accuracy"] < 0.2  # nothing is kept
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0.7 < summary["test_sampled_accuracy"] <= 1 and 0.3 < summary["test_accuracy"] <= 1
    assert 0.3 < summary["density"] < 0.7 and summary["config"]["density"] == 1.0 and summary["config"]["rescale"]
    assert {p.name for p in (tmp_path / "run").iterdir()} >= PICTURES


@pytest.mark.slow
def test_the_default_command_recognises_real_mnist(tmp_path, data_dir):
    """A tenth of an epoch would prove little: one epoch of LeNet on all 60,000 images."""
    done = process(
        tmp_path, "--model", "lenet-300-100", "--epochs", "1", "--workdir", tmp_path / "run", data_dir=data_dir
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["dataset"], summary["steps"]) == ("mnist", 938)
    assert summary["test_accuracy"] > 0.93


@pytest.mark.parametrize(
    ("flags", "says", "status"),
    [
        (["--density", "0"], "--density must be the fraction kept, in (0, 1]; got 0.0", 2),
        (["--density", "1.5"], "got 1.5", 2),
        (["--seed", "-1"], "--seed must be a whole number in [0, 2**32)", 2),
        (["--seed", "4294967296"], "[0, 2**32)", 2),
        (
            ["--method", "edgepopup"],
            "no method 'edgepopup': did you mean 'edge-popup'? There are: edge-popup, bernoulli, dense, random,",
            2,
        ),
        (["--preset", "tutoral"], "did you mean 'tutorial'?", 2),
        (["--dataset", "mnist5k"], "did you mean 'mnist-5k'?", 2),
        (["--densty", "0.5"], "--density", 2),
        (["--epochs", "0"], "--epochs must be in [1, 1,000,000]; got 0", 2),
        (["--dropout", "--model", "mlp"], "nothing reads --dropout here: it goes with --model convnet, --model", 2),
        (["--method", "dense", "--scale-weights"], "dense training keeps every weight", 2),
        (["--method", "bernoulli", "--scale-weights"], "bernoulli learns how many weights it keeps", 2),
        (["--scale-layers", "--scale-weights"], "exclude each other", 2),
        (["--method", "dense", "--scale-layers"], "nothing reads --scale-layers here", 2),
        (["--method", "snip", "--scale-layers"], "known before the weights: --distribution uniform, uniform+", 2),
        (["--rescale"], "nothing reads --rescale here: it goes with --method bernoulli", 2),
        (["--method", "bernoulli", "--preset", "tutorial"], "it is for --method edge-popup, dense", 2),
        (["--preset", "zhou"], "no --preset zhou for --method edge-popup", 2),
        (
            ["--method", "gradual", "--minimum", "5", "--distribution", "erk"],
            "nothing reads --minimum here: it goes with --distribution",
            2,
        ),
        (["--method", "random", "--rounds", "3"], "nothing reads --rounds here: it goes with --distribution", 2),
        (["--method", "rigl", "--unit", "neuron"], "--unit neuron is for --method edge-popup", 2),
        (["--method", "set", "--distribution", "global"], "set needs a --distribution", 2),
        (["--ood", "kmnist"], "add --assess", 2),
        (["--assess", "--ood", "mnist-5k", "--dataset", "mnist-5k"], "the images that the network is trained on", 1),
        (["--dataset", "mnist-5k", "--train-images", "4001"], "there are 4000 to train on", 1),
        (["--dataset", "mnist-5k", "--validation", "4000"], "4000", 1),
    ],
)
def test_bad_input_is_one_clear_paragraph(tmp_path, capsys, monkeypatch, flags, says, status):
    got, _, err = run(capsys, monkeypatch, *flags, "--workdir", tmp_path / "run")
    text = " ".join(err.split())
    assert got == status, text
    assert says in text and "Traceback" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bad_input_is_one_clear_paragraph_of_a_real_process(tmp_path):
    done = process(tmp_path, "--dataset", "fashion_mnist", "--data-dir", "nowhere", "--workdir", tmp_path / "run")
    assert done.returncode == 1 and "nowhere" in done.stderr and "Traceback" not in done.stderr
    done = process(tmp_path, "--density", "0", "--workdir", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.startswith("error: --density must be") and done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_written_is_an_error_before_training(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    workdir = tmp_path / "file" / "run"
    status, _, err = run(capsys, monkeypatch, "--dataset", "mnist-5k", "--workdir", workdir)
    assert status == 1
    assert "cannot write to the work directory" in err and "Traceback" not in err


@pytest.mark.slow
def test_masks_that_cannot_be_had_are_an_error_that_says_what_can_and_leave_the_directory_free(tmp_path):
    flags = [*small(tmp_path), "--dataset", "mnist-5k", "--epochs", "1"]
    done = process(tmp_path, *flags, "--method", "random", "--distribution", "erk+", "--density", "0.001")
    assert done.returncode == 1
    assert "the density must be at least" in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    done = process(tmp_path, *flags, "--method", "snip", "--minimum", "100000", "--density", "0.3")
    assert done.returncode == 1
    assert "too few for 100000 in every layer" in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    done = process(tmp_path, *flags, "--method", "snip")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_truncated_file_is_an_error_and_not_a_fallback(tmp_path):
    (tmp_path / "mnist").mkdir()
    for name in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ):
        (tmp_path / "mnist" / name).write_bytes(b"\0\0\x08\x03\0\0\0\x05")
    done = process(tmp_path, *small(tmp_path), data_dir=tmp_path)
    assert done.returncode == 1
    assert "train-images-idx3-ubyte" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_at_its_step_and_keeps_the_last_good_checkpoint(tmp_path):
    flags = ["--dataset", "mnist-5k", *small(tmp_path), "--checkpoint-every", "1"]
    done = process(tmp_path, *flags, "--method", "dense", "--optimizer", "sgd", "--learning-rate", "1e8")
    assert done.returncode == 1
    text = " ".join(done.stderr.split())
    assert "is not finite (NaN or infinity) at step" in text and "Traceback" not in text
    assert "error: Dense_0/kernel is not finite" in text
    step = int(text.split("at step ")[1].split(".")[0])
    saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved, default=0) == step
    assert not (tmp_path / "run" / "summary.json").exists()


def test_help_reads_well_and_comes_at_once(tmp_path):
    began = time.perf_counter()
    done = process(tmp_path, "--help", columns=80)
    assert done.returncode == 0
    for field in fields(mnist.Config):
        assert f"--{field.name.replace('_', '-')}" in done.stdout
    assert not any(f"{old} " in done.stdout for old in RENAMED)
    assert "Fraction of the weights that is kept" in done.stdout
    lines = [line[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    told = " " * 7
    for line, after in itertools.pairwise(lines):  # a line ends where the next word does not fit
        if line.startswith(told) and after.startswith(told):
            assert len(line.rstrip()) + 1 + len(after.split()[0]) > len(line) - 1, (line, after)
    assert time.perf_counter() - began < 20  # loose: a slow machine; importing JAX and reading data take longer
