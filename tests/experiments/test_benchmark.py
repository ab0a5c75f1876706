"""The benchmark measures what it says, and runs from end to end with and without torch. No test looks at a time."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import benchmark
from experiments.run.errors import UserError
from supermask_jax.trees import by_path

TINY = benchmark.Sizes(images=800, image_shape=(8, 8, 1), examples_per_turn=8, streamed=(64, 16))
BATCH = 8


def check_rows(rows):
    for line in rows:
        assert {"group", "name", "unit", "median", "min", "max"} <= line.keys()
        assert line["unit"] in ("ms", "s", "x", "MB", "GB/s")
        assert 0 < line["min"] <= line["median"] <= line["max"] < math.inf


def test_end_to_end_without_torch(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    monkeypatch.setattr(benchmark, "TARGET_BATCH", BATCH)
    file = tmp_path / "new" / "benchmark.json"
    result = benchmark.main(benchmark.Config(rounds=2, batch_sizes=(BATCH,), output=str(file)), TINY)

    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    assert result["about"].keys() == {"config", "device", "cores", "torch", "versions"}
    check_rows(result["rows"])
    with_target = {(line["group"], line["name"]): line["target"] for line in result["rows"] if "target" in line}
    assert with_target["training step, batch 8", "edge-popup / dense"] == "<= 1.1"
    assert with_target["compiling a step", "dense, batch 8"] == "<= 3"
    for part in ("layer", "net"):
        for kind in ("uniform", "normal", "tied"):
            for density in (0.3, 0.5):
                assert with_target[f"selection, {part}, {kind}, {density}", "selection / numpy.partition"] == "<= 2.5"
    assert {"edge-popup, batch 8", "dense, batch 8", "process, with compiling"} <= {
        line["name"] for line in result["rows"] if line["group"] == "peak memory"
    }
    assert not any(line["name"].startswith("torch") for line in result["rows"])
    assert "torch not installed" in capsys.readouterr().out


def test_the_bandwidth_of_accelerators_runs_here_too():
    rows = benchmark.time_bandwidth(TINY.streamed, rounds=2)
    check_rows(rows)
    assert [line["name"] for line in rows if line["unit"] == "GB/s"] == ["selection", "copy"]


def test_candidates_take_turns_after_the_warm_up():
    calls = []
    seconds = benchmark.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * (benchmark.WARM_UP + 3)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_the_median_of_each_rounds_own_ratio_and_is_held_against_its_target():
    seconds = {"a": np.array([1.0, 10.0, 3.0]), "b": np.array([1.0, 5.0, 1.0])}
    ratio = benchmark.compared("g", seconds, [("a", "b", "<=", 2.5), ("a", "absent", "<=", 1)])[-1]
    assert ratio == {
        "group": "g",
        "name": "a / b",
        "unit": "x",
        "median": 2.0,
        "min": 1.0,
        "max": 3.0,
        "target": "<= 2.5",
        "met": True,
    }
    assert not benchmark.compared("g", seconds, [("a", "b", ">=", 2.5)])[-1]["met"]


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"batch_sizes": ()}, {"batch_sizes": (64, 0)}])
def test_settings_out_of_range_are_user_errors(wrong):
    with pytest.raises(UserError, match=next(iter(wrong)).replace("_", "-")):
        benchmark.Config(**wrong).check()


def test_flags_are_parsed_before_anything_heavy_is_imported():
    code = "import sys, experiments.benchmark; sys.exit(any(m in sys.modules for m in ('jax', 'torch', 'flax')))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_is_given_what_our_edge_popup_starts_from():
    dataset, weights = benchmark.noise(TINY)
    ours = benchmark.OurStep("edge-popup", dataset, weights, BATCH, TINY)
    start = jax.tree.map(np.array, ours.state.subnet)
    ours()  # overwrites its state
    given = benchmark.torch_arguments(dataset, weights, ours)
    for name, tree in (("weights", start.weights), ("scores", start.scores)):
        leaves = by_path(tree)
        assert given[name].keys() == leaves.keys()
        for path, leaf in leaves.items():
            np.testing.assert_array_equal(given[name][path], leaf)
    assert given["images"].shape == (BATCH, *TINY.image_shape) and len(given["labels"]) == BATCH
    assert given["threads"] >= 1 and given["device"] in ("cpu", "cuda")


def test_torch_takes_the_same_steps():
    """From the same weights and scores on the same batch, ours and torch's have the same losses."""
    pytest.importorskip("torch")
    dataset, weights = benchmark.noise(TINY)
    batch = benchmark.first_batch(dataset, BATCH)
    losses = {}
    for method in ("edge-popup", "dense"):
        ours = benchmark.OurStep(method, dataset, weights, BATCH, TINY)
        step, state = jax.jit(ours.step), ours.state
        losses[method] = []
        for _ in range(4):
            state, metrics = step(state, batch)
            losses[method].append(float(metrics["loss"]))
    assert ours.steps == 1
    with benchmark.torch_steps(dataset, weights, ours) as theirs:
        assert set(theirs) == {"torch, sort", "torch, kthvalue", "torch, dense"}
        for name, call in theirs.items():
            method = "dense" if name == "torch, dense" else "edge-popup"
            np.testing.assert_allclose([call() for _ in range(4)], losses[method], rtol=1e-4, err_msg=name)
