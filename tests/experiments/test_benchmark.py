"""The benchmark measures what it says, and runs from end to end with and without torch. No test looks at a time."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

import supermask_jax as sm
from experiments import benchmark
from experiments.bench import growth, one_device, operations, rows, tables, torch_steps, train_step
from experiments.config.sections import Model
from experiments.run.errors import UserError
from supermask_jax.trees import by_path

TINY = train_step.Sizes(images=800, image_shape=(8, 8, 1), examples_per_turn=8, streamed=(64, 16))
BATCH = 8


def check_rows(lines):
    for line in lines:
        assert {"group", "name", "unit", "median", "min", "max"} <= line.keys()
        assert line["unit"] in ("ms", "s", "x", "MB", "GB/s", "images/s")
        assert 0 < line["min"] <= line["median"] <= line["max"] < math.inf


@pytest.mark.slow
def test_end_to_end_without_torch(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    monkeypatch.setattr(one_device, "TARGET_BATCH", BATCH)
    monkeypatch.setattr(one_device, "MNIST", TINY)
    file = tmp_path / "new" / "benchmark.json"
    result = benchmark.main(benchmark.Config(rounds=2, batch_sizes=(BATCH,), output=str(file)))

    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    assert result["about"].keys() == {"config", "device", "cores", "instructions", "torch", "versions"}
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


@pytest.mark.slow
def test_the_networks_of_cifar_and_single_convolutions_are_measured(monkeypatch):
    sizes, faster = one_device.CIFAR["conv2"]
    tiny = sizes._replace(model=Model(model="conv2", width=0.05), images=256, examples_per_turn=128)
    monkeypatch.setattr(one_device, "CIFAR", {"conv2": (tiny, faster)})
    monkeypatch.setattr(operations, "SHAPES", ((4, 6),))
    result = benchmark.main(benchmark.Config(rounds=2, cifar=True, skip_torch=True))
    check_rows(result["rows"])
    names = {}
    for line in result["rows"]:
        names.setdefault(line["group"], []).append(line["name"])
    assert {"compiling, edge-popup / dense", "edge-popup / dense", "selection / numpy.partition"} <= set(
        names["conv2, batch 128"]
    )
    assert names["convolution, 4 channels, 6 x 6"] == [*operations.KINDS, "BatchNorm"]
    (row,) = [line for line in tables.operations_table(result).splitlines() if "4 channels" in line]
    assert row.count("|") == 10 and row.endswith("|  |")  # PyTorch was not measured


@pytest.mark.slow
def test_growth_measures_the_trees_that_fit_and_draws_them(monkeypatch, tmp_path):
    trees = {"small": lambda: {"a": (64, 40), "b": (8, 8)}, "large": lambda: {"a": (2**40,)}}
    monkeypatch.setattr(growth, "TREES", trees)
    file = tmp_path / "growth.json"
    result = benchmark.main(benchmark.Config(rounds=2, growth=True, output=str(file)))
    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    assert [(of["tree"], of["devices"], of["scores"], "seconds" in of) for of in result["trees"]] == [
        *(("small", devices, 64 * 40 + 64, True) for devices in (1, 8)),
        *(("large", devices, 2**40, False) for devices in (1, 8)),
    ]
    check_rows(result["rows"])
    assert len(result["trees"][0]["seconds"]) == 2 and len(result["rows"]) == 6
    assert file.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(("name", "scores"), (("GPT-2 medium", 354e6), ("transformer of 1.3 billion", 1.31e9)))
def test_the_transformers_of_growth_are_as_large_as_their_names_say(name, scores):
    """Sizes published for GPT-2 medium (355 million, biases and norms among them) and GPT-3 XL (1.3 billion)."""
    assert sum(map(math.prod, growth.TREES[name]().values())) == pytest.approx(scores, rel=0.01)


def test_a_selection_on_a_pod_takes_less_time_the_more_chips_it_has_while_its_arrays_divide():
    """No axis of the table of tokens divides over 4,096 chips, so that each of them holds it whole."""
    times = [growth.on_pod("GPT-2 medium", chips) for chips in (8, 256, 4096)]
    assert times[1] < times[0] < times[2]


def test_the_bandwidth_of_accelerators_runs_here_too():
    lines = one_device.time_bandwidth(TINY.streamed, rounds=2)
    check_rows(lines)
    assert [line["name"] for line in lines if line["unit"] == "GB/s"] == ["selection", "copy"]


def test_candidates_take_turns_after_the_warm_up():
    calls = []
    seconds = rows.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * (rows.WARM_UP + 3)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_the_median_of_each_rounds_own_ratio_and_is_compared_with_its_target():
    seconds = {"a": np.array([1.0, 10.0, 3.0]), "b": np.array([1.0, 5.0, 1.0])}
    ratio = rows.compared("g", seconds, [("a", "b", "<=", 2.5), ("a", "absent", "<=", 1)])[-1]
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
    assert not rows.compared("g", seconds, [("a", "b", ">=", 2.5)])[-1]["met"]


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"batch_sizes": ()}, {"batch_sizes": (64, 0)}])
def test_settings_out_of_range_are_user_errors(wrong):
    with pytest.raises(UserError, match=next(iter(wrong)).replace("_", "-")):
        benchmark.Config(**wrong).check()


def test_an_output_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(one_device, "measure", lambda *_: pytest.fail("it measures"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        benchmark.main(benchmark.Config(output=str(tmp_path / "file" / "b.json"), skip_torch=True))


def test_flags_are_parsed_before_anything_heavy_is_imported():
    code = (
        "import sys, experiments.benchmark; sys.exit(any(m in sys.modules for m in ('jax', 'numpy', 'torch', 'flax')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_torch_is_given_what_our_edge_popup_starts_from():
    start = train_step.noise(TINY)
    ours = train_step.OurStep("edge-popup", start, BATCH, TINY)
    subnet = jax.tree.map(np.array, ours.state.subnet)
    ours()  # overwrites its state
    given = torch_steps.torch_arguments(start, ours)
    for name, tree in (("weights", subnet.weights), ("scores", subnet.scores)):
        leaves = by_path(tree)
        assert given[name].keys() == {path.replace("/kernel", ".weight") for path in leaves}
        for path, leaf in leaves.items():
            theirs = given[name][path.replace("/kernel", ".weight")]
            assert theirs.size == leaf.size and theirs.shape[0] == leaf.shape[-1]
            np.testing.assert_array_equal(np.sort(theirs.ravel()), np.sort(leaf.ravel()))
    assert given["images"].shape == (BATCH, *TINY.image_shape) and len(given["labels"]) == BATCH
    assert given["threads"] >= 1 and given["device"] in ("cpu", "cuda")


@pytest.mark.parametrize("model", ["convnet", "conv2", "resnet-20", "resnet-18"])
def test_torch_takes_the_same_steps(model):
    """From the same weights and scores on the same batch, ours and torch's have the same losses."""
    pytest.importorskip("torch")
    sizes = TINY if model == "convnet" else train_step.Sizes(Model(model=model, widen=0.5), 64, (8, 8, 3), BATCH)
    start = train_step.noise(sizes)
    batch = train_step.first_batch(start.dataset.train, BATCH)
    number = 4 if model == "convnet" else 2  # in deep networks rounding grows with every step
    losses = {}
    for method in ("edge-popup", "dense"):
        ours = train_step.OurStep(method, start, BATCH, sizes)
        step, state = sm.jit(ours.step), ours.state
        losses[method] = []
        for _ in range(number):
            state, metrics = step(state, batch)
            losses[method].append(float(metrics["loss"]))
    assert ours.steps == 1
    with torch_steps.torch_steps(start, ours) as theirs:
        assert set(theirs) == {"torch, sort", "torch, kthvalue", "torch, dense"}
        for name, call in theirs.items():
            method = "dense" if name == "torch, dense" else "edge-popup"
            np.testing.assert_allclose([call() for _ in range(number)], losses[method], rtol=1e-4, err_msg=name)
