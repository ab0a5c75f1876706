"""Random checkpoints of small ResNets, by the names and layouts of PyTorch's model collections, and their logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import torch_zip


def torchvision(
    blocks=(1, 2), *, bottleneck=False, width=4, widen=1, classes=5, affine=True, bias=True, seed=0
) -> dict[str, np.ndarray]:
    """{name: array} of a ResNet, as torchvision and timm have it."""
    rng, found = np.random.default_rng(seed), {}

    def conv(name, inputs, outputs, size):
        fan_in = inputs * size * size
        found[f"{name}.weight"] = rng.normal(size=(outputs, inputs, size, size)) * (2 / fan_in) ** 0.5

    def norm(name, channels):
        if affine:
            found[f"{name}.weight"] = rng.uniform(0.5, 1.5, channels)
            found[f"{name}.bias"] = rng.normal(size=channels)
        found[f"{name}.running_mean"] = rng.normal(size=channels)
        found[f"{name}.running_var"] = rng.uniform(0.5, 1.5, channels)
        found[f"{name}.num_batches_tracked"] = np.array(7)

    conv("conv1", 3, width, 7)
    norm("bn1", width)
    inputs = width
    for stage, count in enumerate(blocks):
        out = width * 2**stage
        inner = out * widen
        layers = [(inner, 1), (inner, 3), (4 * out, 1)] if bottleneck else [(out, 3), (out, 3)]
        for i in range(count):
            name, entering = f"layer{stage + 1}.{i}", inputs
            for number, (outputs, size) in enumerate(layers, 1):
                conv(f"{name}.conv{number}", inputs, outputs, size)
                norm(f"{name}.bn{number}", outputs)
                inputs = outputs
            if entering != inputs or (stage and not i):
                conv(f"{name}.downsample.0", entering, inputs, 1)
                norm(f"{name}.downsample.1", inputs)
    found["fc.weight"] = rng.normal(size=(classes, inputs))
    if bias:
        found["fc.bias"] = rng.normal(size=classes)
    return {name: array.astype(array.dtype.name.replace("float64", "float32")) for name, array in found.items()}


def hugging_face(arrays: dict[str, np.ndarray], prefix="resnet.") -> dict[str, np.ndarray]:
    """The same checkpoint as Hugging Face's `ResNetForImageClassification` has it."""

    def named(name):
        kinds = {"conv": "convolution", "bn": "normalization"}
        if name.startswith("fc"):
            return name.replace("fc", "classifier.1")
        if match := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
            return f"{prefix}embedder.embedder.{kinds[match[1]]}.{match[2]}"
        stage, block, rest = re.fullmatch(r"layer(\d)\.(\d+)\.(.*)", name).groups()
        place = f"{prefix}encoder.stages.{int(stage) - 1}.layers.{block}"
        if match := re.fullmatch(r"downsample\.([01])\.(\w+)", rest):
            return f"{place}.shortcut.{('convolution', 'normalization')[int(match[1])]}.{match[2]}"
        kind, number, leaf = re.fullmatch(r"(conv|bn)(\d)\.(\w+)", rest).groups()
        return f"{place}.layer.{int(number) - 1}.{kinds[kind]}.{leaf}"

    return {named(name): array for name, array in arrays.items()}


def hidden(arrays: dict[str, np.ndarray], dense=(), seed=1) -> dict[str, np.ndarray]:
    """A checkpoint of the code of Ramanujan et al.: scores beside weights, and the last layer a 1x1 convolution."""
    rng, found = np.random.default_rng(seed), {}
    for name, array in arrays.items():
        array = array[:, :, None, None] if name == "fc.weight" else array
        found[f"module.{name}"] = array
        layer = name.removesuffix(".weight")
        if array.ndim == 4 and layer not in dense:
            found[f"module.{layer}.scores"] = rng.normal(size=array.shape).astype(np.float32)
    return found


def logits(arrays: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """What PyTorch's network makes of images [n, 3, h, w]: [n, classes], layer by layer, as the names tell."""
    return np.asarray(jax.jit(lambda images: _logits(arrays, images))(images))


def _logits(arrays, images):
    def conv(x, name, stride=1):
        kernel = arrays[f"{name}.weight"]
        edges = [(kernel.shape[2] // 2,) * 2] * 2
        return jax.lax.conv_general_dilated(x, jnp.asarray(kernel), (stride,) * 2, edges)  # NCHW, OIHW

    def norm(x, name):
        def of(leaf, otherwise=None):
            return jnp.asarray(arrays.get(f"{name}.{leaf}", otherwise))[None, :, None, None]

        ones = np.ones(x.shape[1], np.float32)
        normal = (x - of("running_mean")) / jnp.sqrt(of("running_var") + 1e-5)
        return normal * of("weight", ones) + of("bias", 0 * ones)

    def relu(x):
        return jnp.maximum(x, 0)

    x = relu(norm(conv(images, "conv1", 2), "bn1"))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), [(0, 0)] * 2 + [(1, 1)] * 2)
    for block in dict.fromkeys(name[: name.index(".", 7)] for name in arrays if name.startswith("layer")):
        stride = 2 if block[5] != "1" and block.endswith(".0") else 1
        deep = f"{block}.conv3.weight" in arrays
        y = relu(norm(conv(x, f"{block}.conv1", 1 if deep else stride), f"{block}.bn1"))
        y = norm(conv(y, f"{block}.conv2", stride if deep else 1), f"{block}.bn2")
        y = norm(conv(relu(y), f"{block}.conv3"), f"{block}.bn3") if deep else y
        if f"{block}.downsample.0.weight" in arrays:
            x = norm(conv(x, f"{block}.downsample.0", stride), f"{block}.downsample.1")
        x = relu(y + x)
    weight = arrays["fc.weight"].reshape(arrays["fc.weight"].shape[:2])
    return x.mean((2, 3)) @ weight.T + arrays.get("fc.bias", np.zeros(1, np.float32))[None]


def write(path, arrays):
    """Writes a checkpoint in the format that the name of the file tells; returns the path."""
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    else:
        path.write_bytes(torch_zip.saved({"epoch": 1, "state_dict": arrays}, ordered=True))
    return path
