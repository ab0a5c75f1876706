"""Exports: the same weights, and the same logits, in other formats."""

import runpy
import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import supermask_jax as sm
from supermask_jax import artifact
from supermask_jax.__main__ import main
from supermask_jax.commands import export, graphs, onnx_file, pytorch
from supermask_jax.commands.answers import Failure
from supermask_jax.commands.networks import Network
from supermask_jax.models import MLP, VGG, CifarResNet, ConvN, ConvNet, MnistConvNet, ResNet, WideCifarResNet
from supermask_jax.origins import arrays_of

MODULES = {
    "mlp": (MLP(3, use_bias=False, hidden=(5, 4)), (4, 3, 2)),
    "mlp with biases": (MLP(3, hidden=(5,)), (4, 3, 2)),
    "cnn": (ConvNet(3, channels=(4, 5, 6)), (21, 23, 2)),
    "cnn of one layer": (ConvNet(3, channels=(4,)), (14, 14, 1)),
    "convnet": (MnistConvNet(3, features=(4, 5, 6)), (11, 12, 2)),
    "CIFAR ResNet": (CifarResNet(3, depth=8, width=4), (9, 8, 3)),
    "affine CIFAR ResNet": (CifarResNet(3, depth=8, width=4, affine=True), (8, 8, 3)),
    "basic ResNet": (ResNet(3, blocks=(1, 2), width=4, affine=True), (33, 32, 3)),
    "bottleneck ResNet": (ResNet(3, blocks=(2, 1), width=4, bottleneck=True), (32, 32, 3)),
    "small ResNet": (ResNet(3, blocks=(1, 1), width=4, small=True), (8, 9, 3)),
    "Conv4": (ConvN(3, depth=4, widen=1 / 16), (9, 8, 3)),
    "VGG-11": (VGG(3, depth=11, widen=1 / 32, affine=True), (32, 32, 3)),
    "pre-activation ResNet": (WideCifarResNet(3, depth=10, widen=0.5, affine=True), (8, 9, 3)),
    "ResNet with a bias": (ResNet(3, blocks=(1,), width=4, small=True, affine=True, bias=True), (8, 9, 3)),
    "wide ResNet": (ResNet(3, blocks=(1, 1), width=4, bottleneck=True, widen=2), (32, 32, 3)),
}


def numbers(path, leaf):
    """Different random numbers in every leaf; variances are positive."""
    drawn = np.random.default_rng(zlib.crc32(path.encode())).normal(size=leaf.shape).astype(np.float32)
    fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 1
    return np.abs(drawn) + np.float32(0.5) if path.endswith("var") else drawn / np.float32(fan_in**0.5)


def random_masks(weights):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (rng.random(leaf.shape) < 0.7).astype(np.float32), weights)


class Case:
    """A network with random weights, batch statistics and images, and its logits by Flax."""

    def __init__(self, module, image_shape):
        self.network = Network(module, image_shape, 3, (0.25,) * image_shape[2], (0.5,) * image_shape[2])
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
        variables = {name: sm.trees.map_with_name(numbers, tree) for name, tree in dict(shapes).items()}
        self.images = np.random.default_rng(0).normal(size=(5, *image_shape)).astype(np.float32)
        self.logits = np.asarray(jax.jit(module.apply)(variables, self.images))
        self.weights = arrays_of(variables.pop("params"))
        self.state = arrays_of(variables)
        self.graph = graphs.steps(self.network)
        self.arrays = graphs.arrays(self.graph, self.weights, self.state)
        self.nchw = np.ascontiguousarray(self.images.transpose(0, 3, 1, 2))


@pytest.fixture(scope="module")
def cases():
    made = {}
    return lambda name: made[name] if name in made else made.setdefault(name, Case(*MODULES[name]))


def close(logits, expected):
    assert np.abs(expected).max() > 0.1 and np.ptp(expected, axis=0).min() > 1e-3, "the images are told apart"
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def of_step(step, arrays, x, *others):
    """What a step makes, in the layouts of PyTorch, by the definition of its kind."""
    name, told = step.layer.replace("/", "."), step.numbers
    match step.kind:
        case "conv":
            edges = [(told["padding"],) * 2] * 2
            kernel = arrays[f"{name}.weight"]
            return jax.lax.conv_general_dilated(x, kernel, (told["stride"],) * 2, edges)  # NCHW, OIHW
        case "dense":
            return x @ arrays[f"{name}.weight"].T + arrays.get(f"{name}.bias", np.zeros(1, np.float32))[None]
        case "norm":
            mean, var = (arrays[f"{name}.running_{of}"][:, None, None] for of in ("mean", "var"))
            ones = np.ones(mean.shape[0], np.float32)
            scale, bias = arrays.get(f"{name}.weight", ones), arrays.get(f"{name}.bias", 0 * ones)
            normal = (x - mean[None]) / np.sqrt(var[None] + 1e-5)
            return normal * scale[None, :, None, None] + bias[None, :, None, None]
        case "pool":
            edges = [(0, 0)] * 2 + [(told["padding"],) * 2] * 2
            window, stride = ((1, 1, told[of], told[of]) for of in ("window", "stride"))
            return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, stride, edges)
        case "pad":
            picked = x[:, :, :: told["stride"], :: told["stride"]]
            return jnp.pad(picked, [(0, 0), (0, told["channels"]), (0, 0), (0, 0)])
        case "relu":
            return jnp.maximum(x, 0)
        case "flatten":
            return x.reshape(len(x), -1)
        case "mean":
            return x.mean(axis=(2, 3))
        case "add":
            return x + others[0]


@pytest.mark.parametrize("name", MODULES)
def test_steps_and_arrays_in_the_other_layouts_make_the_same_logits(cases, name):
    case = cases(name)

    @jax.jit
    def logits(images):
        made = {graphs.INPUT: images}
        for step in case.graph:
            made[step.output] = of_step(step, case.arrays, *(made[of] for of in step.inputs))
        return made[graphs.OUTPUT]

    close(logits(case.nchw), case.logits)
    assert len({step.output for step in case.graph}) == len(case.graph)
    size = sum(leaf.size for leaf in [*case.weights.values(), *case.state.values()])
    assert sum(leaf.size for leaf in case.arrays.values()) == size, "every weight is exported, once"


TO_TORCH = [name for name in MODULES if name != "pre-activation ResNet"]


def test_a_wide_resnet_has_no_module_for_pytorch(cases):
    case = cases("pre-activation ResNet")
    with pytest.raises(Failure, match="no module of a wide ResNet for PyTorch: export it --to onnx"):
        pytorch.module_text(case.network, case.graph, case.arrays)


@pytest.mark.parametrize("name", TO_TORCH)
def test_the_pytorch_module_makes_the_same_logits(cases, tmp_path, name):
    torch = pytest.importorskip("torch")
    case = cases(name)
    beside = pytorch.write(tmp_path / "net.pt", case.network, case.graph, case.arrays)
    module = runpy.run_path(str(beside))
    with torch.inference_mode():
        network = module["load"](str(tmp_path / "net.pt"))
        close(network(torch.from_numpy(case.nchw)).numpy(), case.logits)
        pixels = torch.from_numpy(case.nchw) * 0.5 + 0.25
        close(network(module["normalised"](pixels)).numpy(), case.logits)


@pytest.mark.parametrize("name", MODULES)
def test_the_onnx_file_makes_the_same_logits(cases, tmp_path, name):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    case, path = cases(name), tmp_path / "net.onnx"
    onnx_file.write(path, case.network, case.graph, case.arrays)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for images, logits in ((case.nchw, case.logits), (case.nchw[:1], case.logits[:1])):  # any number of images
        found = session.run([graphs.OUTPUT], {graphs.INPUT: images})[0]
        np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5 * np.abs(case.logits).max())


@pytest.mark.parametrize("name", TO_TORCH)
def test_the_text_of_the_pytorch_module_is_python_and_holds_nothing_of_the_file_but_numbers(cases, name):
    case = cases(name)
    text = pytorch.module_text(case.network, case.graph, case.arrays)
    compile(text, "net.py", "exec")
    assert text.startswith(pytorch.MADE) and text.count("class Network") == 1


# by the command line


ABOUT = {
    "architecture": "cnn",
    "arguments": {"width": 3, "depth": 2},
    "classes": 3,
    "image_shape": [8, 8, 2],
    "mean": [0.5, 0.5],
    "std": [0.25, 0.25],
}


def save(path, model_state=None):
    """{path: weights * masks} of a small convnet that it writes to a file: drawn weights, and masks with a gain."""
    sizes = {"Conv_0": (3, 3, 2, 3), "Conv_1": (3, 3, 3, 3), "Dense_0": (12, 3)}
    blank = {layer: {"kernel": jnp.zeros(size)} for layer, size in sizes.items()}
    weights = sm.initializers.signed_constant(jax.random.key(0), blank)
    masks = random_masks(weights)
    product = partial(sm.subnetwork, sm.rescaled(sm.identity))
    method = sm.Method("scores", sm.identity, sm.Subnet(weights, masks), product)
    origin = artifact.Drawn("signed_constant", 0)
    sm.save_subnetwork(path, method, origin, about=ABOUT, model_state=model_state)
    product = arrays_of(product(method.subnet))
    masked = weights["Conv_1"]["kernel"] * masks["Conv_1"]["kernel"]
    assert not np.array_equal(product["Conv_1/kernel"], masked), "the gain is a part of the product"
    return product


def test_npz_and_safetensors_hold_weights_times_masks_and_the_state(tmp_path, capsys):
    file = tmp_path / "net.safetensors"
    product = save(file, model_state={"seen": jnp.arange(3)})
    for suffix in ("npz", "safetensors"):
        path = tmp_path / f"dense.{suffix}"
        assert main(["export", str(file), "--to", suffix, "--output", str(path)]) == 0
        assert capsys.readouterr().out == f"{path}: {path.stat().st_size:,} bytes\n"
        arrays = dict(np.load(path)) if suffix == "npz" else safetensors.numpy.load_file(path)
        np.testing.assert_array_equal(arrays.pop("state/seen"), np.arange(3))
        assert arrays.keys() == product.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, product[name], strict=True)


def test_bfloat16_stays_in_safetensors_and_is_widened_in_npz(tmp_path):
    weights = {"file": jnp.array([[1.5, -2.0], [0.25, 3.0]], jnp.bfloat16)}  # "file" is an argument of np.savez
    masks = {"file": jnp.array([[1, 0], [1, 1]], jnp.bfloat16)}
    sm.save_subnetwork(tmp_path / "net.safetensors", sm.Subnet(weights, masks), artifact.Stored())
    for suffix, dtype in (("npz", np.float32), ("safetensors", jnp.bfloat16)):
        path = tmp_path / f"dense.{suffix}"
        assert main(["export", str(tmp_path / "net.safetensors"), "--to", suffix, "--output", str(path)]) == 0
        array = (np.load(path) if suffix == "npz" else safetensors.numpy.load_file(path))["file"]
        assert array.dtype == dtype
        np.testing.assert_array_equal(array.astype(np.float32), [[1.5, 0], [0.25, 3]])


def test_the_bitmask_layout_by_hand():
    weight = np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 0, 0, 0, 0, 0, 0, 2]], np.float32)
    mask = np.array([[1, 0, 0, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0, 0]], np.float32)
    convolution = np.ones((2, 2, 3, 3), np.float32)
    arrays = {"Dense_0.weight": weight, "Dense_0.bias": weight[0], "Conv_0.weight": convolution}
    found = export.compressed(arrays, {"Dense_0.weight": mask, "Conv_0.weight": convolution})
    expected = {
        "Dense_0.shape": np.array([2, 9]),
        "Dense_0.compressed": np.array([1, 8, 9, 0, 1], np.float32),  # a weight of 0 that is kept is a value
        "Dense_0.bitmask": np.array([[0b10000001, 1], [0b00000011, 0]], np.uint8),
        "Dense_0.row_offsets": np.array([0, 3]),
        "Dense_0.bias": weight[0],
        "Conv_0.weight": convolution,
    }
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], strict=True)


def test_the_bitmask_layout_of_a_file_follows_pytorchs_rows(tmp_path):
    about = ABOUT | {"architecture": "mlp", "arguments": {"width": 5, "depth": 1}, "image_shape": [2, 3, 2]}
    blank = {"Dense_0": {"kernel": jnp.zeros((12, 5))}, "Dense_1": {"kernel": jnp.zeros((5, 3))}}
    weights = sm.trees.map_with_name(numbers, blank)
    masks = random_masks(weights)
    file, path = tmp_path / "net.safetensors", tmp_path / "out.safetensors"
    sm.save_subnetwork(file, sm.Subnet(weights, masks), artifact.Stored(), about=about)
    assert main(["export", str(file), "--to", "compressed-tensors", "--output", str(path)]) == 0
    arrays = safetensors.numpy.load_file(path)
    rows = np.unpackbits(arrays["Dense_0.bitmask"], axis=-1, count=12, bitorder="little").astype(bool)
    dense = np.zeros((5, 12), np.float32)
    dense[rows] = arrays["Dense_0.compressed"]
    kernel = np.asarray(weights["Dense_0"]["kernel"] * masks["Dense_0"]["kernel"]).reshape(2, 3, 2, 5)  # h, w, c, out
    np.testing.assert_array_equal(dense.reshape(5, 2, 2, 3), kernel.transpose(3, 2, 0, 1))  # out, c, h, w


def test_a_file_of_python_that_was_not_exported_is_not_replaced(tmp_path, capsys):
    pytest.importorskip("torch")
    save(tmp_path / "net.safetensors")
    arguments = ["export", str(tmp_path / "net.safetensors"), "--to", "torch", "--output", str(tmp_path / "net.pt")]
    (tmp_path / "net.py").write_text("mine = 1\n")
    assert main(arguments) == 2
    assert "another file" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "net.py").read_text() == "mine = 1\n" and not (tmp_path / "net.pt").exists()
    (tmp_path / "net.py").unlink()
    for _ in range(2):  # what an earlier export wrote is replaced
        assert main(arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"net.safetensors", "net.pt", "net.py"}


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    save(tmp_path / "net.safetensors")

    def full(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    (tmp_path / "dense.npz").write_text("before")
    assert (
        main(["export", str(tmp_path / "net.safetensors"), "--to", "npz", "--output", str(tmp_path / "dense.npz")]) == 2
    )
    assert (tmp_path / "dense.npz").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"net.safetensors", "dense.npz"}
