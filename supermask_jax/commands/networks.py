"""The network that a file tells, built from a fixed table: nothing is imported by a name that a file holds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import FlaxError

from supermask_jax.commands.answers import Failure, by
from supermask_jax.commands.opened import Loaded
from supermask_jax.models import zoo
from supermask_jax.trees import by_path

TABLE: dict[str, tuple[Callable[..., zoo.Architecture], dict[str, type]]] = {
    "mnist_convnet": (zoo.mnist_convnet, {"dropout": bool}),
    "lenet_300_100": (zoo.lenet_300_100, {"biases": bool, "dropout": bool}),
    "mlp": (zoo.mlp, {"width": int, "depth": int}),
    "cnn": (zoo.cnn, {"width": int, "depth": int}),
    "conv_n": (zoo.conv_n, {"depth": int, "widen": float}),
    "vgg": (zoo.vgg, {"depth": int, "widen": float, "affine": bool}),
    "wide_resnet": (zoo.wide_resnet, {"depth": int, "widen": float, "affine": bool}),
    "small_resnet_18": (zoo.small_resnet_18, {"widen": float, "affine": bool}),
    "cifar_resnet": (zoo.cifar_resnet, {"depth": int, "widen": float, "affine": bool}),
    "resnet_18": (zoo.resnet_18, {"affine": bool, "biases": bool}),
    "resnet_34": (zoo.resnet_34, {"affine": bool, "biases": bool}),
    "resnet_50": (zoo.resnet_50, {"affine": bool, "biases": bool}),
    "resnet_101": (zoo.resnet_101, {"affine": bool, "biases": bool}),
    "wide_resnet_50": (zoo.wide_resnet_50, {"affine": bool, "biases": bool}),
}
WIDEST = 64  # factor on the widths of a network
LARGEST = 2**16  # height, width and channels of an image, and widths of layers


class Network(NamedTuple):
    """A network and what it is given.

    Fields:
      module: takes [n, h, w, c] floats and returns [n, classes] logits.
      image_shape: (h, w, c).
      classes: the number of logits.
      mean: of each channel, for pixels from 0 to 1; what the module is given is (pixels - mean) / std.
      std: of each channel.
      bfloat16: whether parameters and images are rounded to bfloat16 before it computes, as in its training.
    """

    module: nn.Module
    image_shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bfloat16: bool = False


def build(loaded: Loaded, file: Any) -> Network:
    """Returns the network that a file tells in its `about`; its parameters have the shapes of the file's weights.

    Args:
      loaded: what the file holds.
      file: its name, for errors.

    Raises:
      Failure: the file does not tell a network of the table, or its weights are not those of this network.
    """
    about = loaded.about
    name, arguments = about.get("architecture"), about.get("arguments")
    if not isinstance(name, str) or name not in TABLE or not isinstance(arguments, dict):
        raise Failure(
            f"{file} does not tell a network that this command can build. Its `about` needs the entries architecture, "
            f"arguments, classes, image_shape, mean and std; architectures are: {', '.join(TABLE)}"
        )
    make, options = TABLE[name]
    for option, value in arguments.items():
        if option not in options or type(value) is not options[option]:
            raise Failure(f"{file} gives {name} an argument that it does not take: {option} = {value!r}")
    classes, depth = about.get("classes"), arguments.get("depth", 1)
    fine = all(_is_size(size) for size in (classes, arguments.get("width", 1), depth))
    fine = fine and 0 < arguments.get("widen", 1.0) <= WIDEST
    if not isinstance(classes, int) or not fine or depth > len(loaded.weights) + 2:
        raise Failure(f"{file} holds other weights than those of {name} with {arguments} and {classes!r} classes")
    shape = _image_shape(about, file)
    channels = [_of_channels(about, which, shape[-1], file) for which in ("mean", "std")]
    network = Network(
        make(classes, **arguments).module, shape, classes, channels[0], channels[1], about.get("bfloat16") is True
    )
    _check(network, loaded, file, name)
    return network


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST


def _image_shape(about: dict[str, Any], file: Any) -> tuple[int, int, int]:
    shape = about.get("image_shape")
    if not isinstance(shape, list) or len(shape) != 3 or not all(_is_size(size) for size in shape):
        raise Failure(f"{file} does not tell the shape of its images: image_shape is {shape!r}, not [h, w, c]")
    return shape[0], shape[1], shape[2]


def _of_channels(about: dict[str, Any], which: str, channels: int, file: Any) -> tuple[float, ...]:
    numbers = about.get(which)
    fine = isinstance(numbers, list) and len(numbers) == channels
    if not isinstance(numbers, list) or not fine or not all(type(number) is float for number in numbers):
        raise Failure(f"{file} does not tell the {which} of each channel as a number: it is {numbers!r}")
    if which == "std" and not all(number > 0 for number in numbers):
        raise Failure(f"{file} has a std that is not positive: {numbers!r}")
    return tuple(numbers)


def _check(network: Network, loaded: Loaded, file: Any, name: str) -> None:
    def variables(key: jax.Array) -> Any:
        return network.module.init(key, jnp.zeros((1, *network.image_shape)))

    try:
        made = dict(jax.eval_shape(variables, jax.random.key(0)))
    except (ArithmeticError, ValueError, TypeError, FlaxError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Failure(f"{file}: {name} does not take images of {by(network.image_shape)} ({reason})") from error
    wanted = {path: leaf.shape for path, leaf in by_path(made.pop("params")).items()}
    wanted |= {f"state/{path}": leaf.shape for path, leaf in by_path(made).items()}
    there = {path: leaf.shape for path, leaf in loaded.weights.items()}
    there |= {f"state/{path}": leaf.shape for path, leaf in loaded.state.items()}
    if wanted != there:
        other = [path for path in sorted({*wanted, *there}) if wanted.get(path) != there.get(path)]
        raise Failure(
            f"{file} holds other weights than those of {name} for images of {by(network.image_shape)}. Not alike: "
            f"{', '.join(other[:5])}"
        )
