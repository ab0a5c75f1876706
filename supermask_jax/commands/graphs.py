"""The networks of the zoo as lists of steps, with images and weights in the layouts of PyTorch and ONNX.

Images are [n, c, h, w] there, convolution kernels (out, in, h, w) and dense kernels (out, in).
"""

from typing import Any, NamedTuple

import numpy as np

from supermask_jax.commands.answers import Failure
from supermask_jax.commands.networks import Network
from supermask_jax.models import MLP, VGG, CifarResNet, ConvN, ConvNet, MnistConvNet, ResNet, WideCifarResNet
from supermask_jax.models.conv import CONV_STAGES, VGG_STAGES, scaled
from supermask_jax.origins import Leaves

INPUT, OUTPUT, EPSILON = "images", "logits", 1e-5


class Step(NamedTuple):
    """One operation.

    Fields:
      kind: "conv", "dense", "norm", "relu", "pool" (the maximum of windows), "flatten", "mean" (over all pixels),
        "add", or "pad" (every stride-th pixel, and zeros as added channels).
      output: the name of what it makes.
      inputs: the names of what it takes: `INPUT`, or outputs of steps before.
      layer: the path of its weights: "Conv_0"; "" where it has none.
      numbers: of a convolution: stride, padding. Of a pool: window, stride, padding. Of a pad: stride, channels. Of a
        dense layer on a flattened image: image, its (c, h, w).
    """

    kind: str
    output: str
    inputs: tuple[str, ...]
    layer: str
    numbers: dict[str, Any]


class _Steps(list[Step]):
    def add(self, kind: str, *inputs: str, layer: str = "", **numbers: Any) -> str:
        output = layer or f"{kind}_{sum(step.kind == kind for step in self)}"
        self.append(Step(kind, output, inputs, layer, numbers))
        return output


def steps(network: Network) -> list[Step]:
    """Returns the steps from `INPUT`, normalised images, to `OUTPUT`, in evaluation: without dropout.

    Args:
      network: whose module is one of the zoo's.

    Raises:
      Failure: there are no steps for this module.
    """
    module, (h, w, c) = network.module, network.image_shape
    found = _Steps()
    match module:
        case MLP():
            _dense_layers(found, found.add("flatten", INPUT), [*module.hidden, network.classes], (c, h, w))
        case ConvNet():
            _convnet(found, module.channels, network.classes, (h, w))
        case MnistConvNet():
            x = found.add("relu", found.add("conv", INPUT, layer="Conv_0", stride=1, padding=0))
            x = found.add("conv", x, layer="Conv_1", stride=1, padding=0)
            x = found.add("flatten", found.add("pool", x, window=2, stride=2, padding=0))
            image = (module.features[1], (h - 4) // 2, (w - 4) // 2)
            _dense_layers(found, x, [module.features[2], network.classes], image)
        case ConvN():
            _conv_n(found, module, network.classes, (h, w))
        case VGG():
            _vgg(found, module)
        case WideCifarResNet():
            _wide_resnet(found, module)
        case CifarResNet():
            _resnet(found, [(module.depth - 2) // 6] * 3, module.width)
        case ResNet():
            _resnet(found, list(module.blocks), module.width, module)
        case _:
            raise Failure(f"there is no export of {type(module).__name__} to this format")
    found[-1] = found[-1]._replace(output=OUTPUT)
    return found


def arrays(graph: list[Step], weights: Leaves, state: Leaves) -> Leaves:
    """Returns {name: float32 array} in PyTorch's names and layouts: "Conv_0.weight", "norm.running_mean".

    Args:
      graph: the steps.
      weights: {path: array}, or masks; a layer that has none is left out.
      state: {path: array} of the batch statistics.
    """
    found = {}
    for step in graph:
        name = torch_name(step.layer)
        leaves = {leaf: weights.get(f"{step.layer}/{leaf}") for leaf in ("kernel", "scale", "bias")}
        if step.layer and leaves["kernel"] is not None:
            found[f"{name}.weight"] = _kernel(leaves["kernel"], step.numbers.get("image"))
        if step.layer and leaves["scale"] is not None:
            found[f"{name}.weight"] = leaves["scale"]
        if step.layer and leaves["bias"] is not None:
            found[f"{name}.bias"] = leaves["bias"]
        for statistic in ("mean", "var"):
            path = f"batch_stats/{step.layer}/{statistic}"
            if step.kind == "norm" and path in state:
                found[f"{name}.running_{statistic}"] = state[path]
    return {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in found.items()}


def torch_name(layer: str) -> str:
    """Returns the name of a layer in PyTorch: "stage_0_block_0.conv_0"."""
    return layer.replace("/", ".")


def _kernel(kernel: np.ndarray, image: tuple[int, int, int] | None) -> np.ndarray:
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1)
    if image is not None:  # its rows follow an image (h, w, c), and there they follow (c, h, w)
        c, h, w = image
        kernel = kernel.reshape(h, w, c, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
    return kernel.T


def _dense_layers(found: _Steps, x: str, widths: list[int], image: tuple[int, int, int]) -> None:
    for i in range(len(widths)):
        x = found.add("dense", x, layer=f"Dense_{i}", **({} if i else {"image": image}))
        x = found.add("relu", x) if i + 1 < len(widths) else x


def _convnet(found: _Steps, channels: tuple[int, ...], classes: int, size: tuple[int, int]) -> None:
    (h, w), x = size, INPUT
    for i in range(len(channels)):
        x = found.add("relu", found.add("conv", x, layer=f"Conv_{i}", stride=1, padding=1))
        if i < 2:
            x, h, w = found.add("pool", x, window=2, stride=2, padding=0), h // 2, w // 2
    window = h // 2
    x = found.add("flatten", found.add("pool", x, window=window, stride=window, padding=0))
    _dense_layers(found, x, [classes], (channels[-1], h // window, w // window))


def _conv_n(found: _Steps, module: ConvN, classes: int, size: tuple[int, int]) -> None:
    (h, w), x, channels = size, INPUT, 0
    for i in range(module.depth):
        x = found.add("relu", found.add("conv", x, layer=f"Conv_{i}", stride=1, padding=1))
        if i % 2:
            x, h, w = found.add("pool", x, window=2, stride=2, padding=0), h // 2, w // 2
        channels = scaled(CONV_STAGES[i // 2], module.widen)
    hidden = scaled(256, module.widen)
    _dense_layers(found, found.add("flatten", x), [hidden, hidden, classes], (channels, h, w))


def _vgg(found: _Steps, module: VGG) -> None:
    x = INPUT
    for stage, layers in enumerate(VGG_STAGES[module.depth]):
        for i in range(layers):
            name = f"stage_{stage}_conv_{i}"
            x = found.add("conv", x, layer=name, stride=1, padding=1)
            x = found.add("relu", found.add("norm", x, layer=f"{name}_norm"))
        x = found.add("pool", x, window=2, stride=2, padding=0)
    found.add("dense", found.add("mean", x), layer="dense")


def _wide_resnet(found: _Steps, module: WideCifarResNet) -> None:
    x, channels = found.add("conv", INPUT, layer="conv", stride=1, padding=1), 16
    for stage in range(3):
        out = scaled(16 * 2**stage, module.widen)
        for i in range((module.depth - 4) // 6):
            name, stride = f"stage_{stage}_block_{i}", 2 if stage and not i else 1
            y = found.add("relu", found.add("norm", x, layer=f"{name}/norm_0"))
            if channels != out or stride != 1:
                x = found.add("conv", y, layer=f"{name}/shortcut", stride=stride, padding=0)
            y = found.add("conv", y, layer=f"{name}/conv_0", stride=stride, padding=1)
            y = found.add("relu", found.add("norm", y, layer=f"{name}/norm_1"))
            x, channels = found.add("add", x, found.add("conv", y, layer=f"{name}/conv_1", stride=1, padding=1)), out
    x = found.add("relu", found.add("norm", x, layer="norm"))
    found.add("dense", found.add("mean", x), layer="dense")


def _resnet(found: _Steps, blocks: list[int], width: int, large: ResNet | None = None) -> None:
    """The steps of a ResNet for CIFAR, or of one that has `large` ones' blocks, and mostly their first layers."""
    small = large is None or large.small
    stride, size = (1, 3) if small else (2, 7)
    x = found.add("conv", INPUT, layer="conv", stride=stride, padding=size // 2)
    x = found.add("relu", found.add("norm", x, layer="norm"))
    if not small:
        x = found.add("pool", x, window=3, stride=2, padding=1)
    channels = width
    for stage, count in enumerate(blocks):
        inner, widen = width * 2**stage, 4 if large is not None and large.bottleneck else 1
        for i in range(count):
            stride = 2 if stage and not i else 1
            x = _block(found, x, f"stage_{stage}_block_{i}", channels, inner * widen, stride, large)
            channels = inner * widen
    found.add("dense", found.add("mean", x), layer="dense")


def _block(found: _Steps, x: str, name: str, channels: int, out: int, stride: int, large: ResNet | None) -> str:
    shortcut = x
    if channels != out or stride != 1:
        if large is None:
            shortcut = found.add("pad", x, stride=stride, channels=out - channels)
        else:
            shortcut = found.add("conv", x, layer=f"{name}/shortcut", stride=stride, padding=0)
            shortcut = found.add("norm", shortcut, layer=f"{name}/shortcut_norm")
    layers = [(3, stride), (3, 1)]
    if large is not None and large.bottleneck:
        layers = [(1, 1), (3, stride), (1, 1)]
    for i, (size, step) in enumerate(layers):
        x = found.add("relu", x) if i else x
        x = found.add("conv", x, layer=f"{name}/conv_{i}", stride=step, padding=size // 2)
        x = found.add("norm", x, layer=f"{name}/norm_{i}")
    return found.add("relu", found.add("add", x, shortcut))
