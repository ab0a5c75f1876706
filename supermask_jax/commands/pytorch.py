"""A network for PyTorch: its state_dict, and a module that reads it, as a file of Python."""

from pathlib import Path

import numpy as np

from supermask_jax.commands import files
from supermask_jax.commands.answers import Failure
from supermask_jax.commands.graphs import Step, torch_name
from supermask_jax.commands.networks import Network
from supermask_jax.models import CifarResNet, ResNet, WideCifarResNet
from supermask_jax.origins import Leaves

MADE = "# Made by `python -m supermask_jax export`."
HEAD = f'''{MADE}
"""The PyTorch module of a subnetwork, in evaluation: `load(path)` returns it with the weights of a file."""

'''
LAYERS = """from collections import OrderedDict

import torch
from torch import nn


class Network(nn.Sequential):
    \"\"\"Takes normalised images [n, {c}, {h}, {w}], and returns [n, {classes}] logits.\"\"\"

    def __init__(self):
        layers = [
{layers}
        ]
        super().__init__(OrderedDict(layers))
"""
RESNET = """

class Network(ResNet):
    \"\"\"Takes normalised images [n, {c}, {h}, {w}], and returns [n, {classes}] logits.\"\"\"

    def __init__(self):
        super().__init__({arguments})
"""
TAIL = '''

def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Returns what the network takes, of pixels [n, {c}, h, w] from 0 to 1."""
    mean, std = torch.tensor({mean}), torch.tensor({std})
    return (pixels - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def load(path: str) -> Network:
    """Returns the network with the weights of a file."""
    network = Network()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()
'''


def write(path: Path, network: Network, graph: list[Step], arrays: Leaves) -> Path:
    """Writes the state_dict to `path` and the module beside it; returns the path of the module.

    Args:
      path: of the state_dict.
      network: whose state_dict it is.
      graph: its steps.
      arrays: {name: array} in PyTorch's names and layouts.

    Raises:
      Failure: torch is not installed; the path of the module is taken by another file.
      OSError: a file cannot be written.
    """
    torch = files.module("torch", "--to torch")
    beside = path.with_suffix(".py")
    if beside == path or (beside.exists() and not beside.read_bytes().startswith(MADE.encode())):
        raise Failure(f"the module would be written to {beside}, which is another file: choose another --output", 2)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    counted = {f"{name.removesuffix('running_mean')}num_batches_tracked" for name in tensors if "running_mean" in name}
    tensors |= {name: torch.tensor(0) for name in sorted(counted)}
    with files.replacing(path) as new:
        torch.save(tensors, new)
    with files.replacing(beside) as new:
        new.write_text(module_text(network, graph, arrays))
    return beside


def module_text(network: Network, graph: list[Step], arrays: Leaves) -> str:
    """Returns the text of a Python file with the module of a network.

    Args:
      network: whose module it is.
      graph: its steps.
      arrays: {name: array} in PyTorch's names and layouts.
    """
    h, w, c = network.image_shape
    numbers = {"c": c, "h": h, "w": w, "classes": network.classes}
    if isinstance(network.module, WideCifarResNet):
        raise Failure("there is no module of a wide ResNet for PyTorch: export it --to onnx, safetensors or npz")
    if isinstance(network.module, CifarResNet | ResNet):
        template = Path(__file__).with_name("pytorch_resnet.py").read_text()
        body = template + RESNET.format(**numbers, arguments=_resnet_arguments(network))
    else:
        layers = "\n".join(f'            ("{_name(step)}", {_layer(step, arrays)}),' for step in graph)
        body = LAYERS.format(**numbers, layers=layers)
    tail = TAIL.format(c=c, mean=list(network.mean), std=list(network.std))
    return HEAD + body + tail


def _name(step: Step) -> str:
    return torch_name(step.layer) or step.output


def _layer(step: Step, arrays: Leaves) -> str:
    numbers, name = step.numbers, torch_name(step.layer)
    bias = f"{name}.bias" in arrays
    match step.kind:
        case "conv":
            out, inside, size, _ = arrays[f"{name}.weight"].shape
            return f"nn.Conv2d({inside}, {out}, {size}, padding={numbers['padding']}, bias={bias})"
        case "dense":
            out, inside = arrays[f"{name}.weight"].shape
            return f"nn.Linear({inside}, {out}, bias={bias})"
        case "pool":
            return f"nn.MaxPool2d({numbers['window']})"
        case "norm":
            channels = arrays[f"{name}.running_mean"].shape[0]
            return f"nn.BatchNorm2d({channels}, affine={f'{name}.weight' in arrays})"
        case "mean":
            return "nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())"
        case kind:
            return {"relu": "nn.ReLU()", "flatten": "nn.Flatten()"}[kind]


def _resnet_arguments(network: Network) -> str:
    module = network.module
    arguments: dict[str, object] = {"image_channels": network.image_shape[2], "classes": network.classes}
    if isinstance(module, CifarResNet):
        arguments |= {"blocks": [(module.depth - 2) // 6] * 3, "width": module.width, "inner": module.width}
        arguments |= {"expansion": 1, "large": False}
    else:
        assert isinstance(module, ResNet)
        inner = module.width * (module.widen if module.bottleneck else 1)
        arguments |= {"blocks": list(module.blocks), "width": module.width, "inner": inner}
        arguments |= {"expansion": 4 if module.bottleneck else 1, "large": True, "small_images": module.small}
        arguments["bias"] = module.bias
    arguments["affine"] = module.affine
    return "\n" + "".join(f"            {name}={value!r},\n" for name, value in arguments.items()) + " " * 8
