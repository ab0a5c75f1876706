"""The benchmark of inference runs from end to end, and its table has what was measured. No test looks at a time."""

import json

import counting
import numpy as np
import pytest
from jax.experimental import sparse

from experiments import benchmark
from experiments.bench import child, inference, runtimes
from experiments.data.mnist import mnist_5k
from experiments.run.errors import UserError


@pytest.mark.slow
def test_end_to_end(monkeypatch, tmp_path, capsys):
    for name, value in {
        "NETWORKS": {"lenet-300-100": {1: 1, 4: 1}},
        "DENSITIES": (0.03,),
        "EPOCHS": 1,
    }.items():
        monkeypatch.setattr(inference, name, value)
    file = tmp_path / "inference.json"
    result = benchmark.main(benchmark.Config(rounds=2, inference=True, output=str(file)))
    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    assert [of["method"] for of in result["networks"]] == ["edge-popup", "gradual"]
    for of in result["networks"]:
        before, after = of["parameters"]
        assert before == 784 * 300 + 300 * 100 + 100 * 10 > after > 0
        assert of["kept"] == pytest.approx(0.03 * before, abs=3)
        assert of["difference"] < 1e-6 and of["changed labels"] == 0
        assert [units[0] for units in of["units"].values()] == [300, 100, 10]
    names = {line["name"] for line in result["rows"]}
    assert {"compacted / dense", "sparse / dense", "parameters, compacted / dense"} <= names
    table = capsys.readouterr().out
    assert "| lenet-300-100 | gradual | 0.03 |" in table and "sparse, batch 4 |" in table


@pytest.mark.parametrize(
    ("name", "needs", "model"),
    (
        ("onnxruntime", "onnx", "lenet-300-100"),
        ("onnxruntime", "onnx", "convnet"),
        ("sparselab", "torch", "lenet-300-100"),
    ),
)
def test_other_libraries_classify_as_ours(name, needs, model):
    """From a process of their own, where they are installed."""
    pytest.importorskip(needs), pytest.importorskip(name)
    digits = mnist_5k()
    trained = inference.train(model, "gradual", 0.1, digits, epochs=1)
    params = inference.apply_masks(trained.weights, trained.masks)
    images = np.asarray(inference.normalise(digits.test.read(np.arange(3))["image"], digits.mean, digits.std))
    with child.candidates(
        runtimes.make_calls, times=2, **inference._for_runtimes(trained, params, digits, images)
    ) as found:
        logits = found[name]()
    np.testing.assert_allclose(logits, trained.network.logits(params, None, images), rtol=1e-4, atol=1e-5)


def test_a_call_in_the_other_process_does_so_many():
    with child.candidates(counting.make_calls, times=3, start=10) as found:
        assert set(found) == {"add", "fail"} and found["add"]() == 13 and found["add"]() == 16


def test_a_process_that_ends_says_so():
    with (
        child.candidates(counting.make_calls, times=3, start=10) as found,
        pytest.raises(RuntimeError, match="has ended"),
    ):
        found["fail"]()
    with pytest.raises(RuntimeError, match="has ended"), child.candidates(counting.make_calls, times=3, unknown=1):
        pass


@pytest.mark.slow
def test_sparse_layers_are_dense_layers():
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=shape).astype(np.float32) * (rng.random(shape) < 0.3) for shape in ((6, 5), (5, 3))]
    x = rng.normal(size=(4, 2, 3)).astype(np.float32)
    found = inference.sparse_layers([sparse.BCOO.fromdense(kernel.T) for kernel in kernels], x)
    np.testing.assert_allclose(found, np.maximum(x.reshape(4, 6) @ kernels[0], 0) @ kernels[1], rtol=1e-5)


def test_one_thing_is_measured_at_a_time():
    with pytest.raises(UserError, match="--scaling and --inference exclude each other"):
        benchmark.Config(scaling=True, inference=True).check()
    assert benchmark.Config(inference=True).measures == "inference"
