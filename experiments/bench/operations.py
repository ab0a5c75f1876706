"""Where the time of a ResNet goes on this machine: its convolutions and BatchNorms, each a program of its own."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import supermask_jax as sm
from experiments.bench.child import candidates
from experiments.bench.rows import compared, cores, interleaved

SHAPES = ((16, 32), (32, 16), (64, 8), (64, 32))  # channels and pixels along a side: ResNet-20's stages, and Conv2's
KINDS = ("forward", "gradient of the image", "gradient of the kernel", "transposing for it", "all three")
RATIOS = (("all three", "torch, all three", None, None), ("BatchNorm", "torch, BatchNorm", None, None))


def measure(batch: int, rounds: int, torch: bool) -> list[dict]:
    """Rows of a convolution of 3 x 3 with as many channels out as in, and of a BatchNorm, of each shape.

    Args:
      batch: images.
      rounds: times that each candidate is measured.
      torch: whether PyTorch's are measured too, in a process of their own.
    """
    rows = []
    for channels, side in SHAPES:
        draw = np.random.default_rng(0).standard_normal
        shapes = (batch, side, side, channels), (3, 3, channels, channels), (batch, side, side, channels)
        x, kernel, gradient = (draw(shape, np.float32) for shape in shapes)
        arguments = {"images": x, "kernel": kernel, "gradient": gradient, "threads": cores()}
        with _theirs(arguments) if torch else contextlib.nullcontext({}) as theirs:
            seconds = interleaved({**_ours(x, kernel, gradient), **theirs}, rounds)
        rows += compared(f"convolution, {channels} channels, {side} x {side}", seconds, RATIOS)
    return rows


def _ours(x: np.ndarray, kernel: np.ndarray, gradient: np.ndarray) -> dict:
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def gradients(x, kernel, gradient):
        y, pull = jax.vjp(conv, x, kernel)
        return y, *pull(gradient)

    def norm(x, kernel, gradient):
        module = nn.BatchNorm(use_running_average=False)
        variables = module.init(jax.random.key(0), x)

        def apply(x, params):
            return module.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]

        y, pull = jax.vjp(apply, x, variables["params"])
        return y, *pull(gradient)

    def transposed(x, kernel, gradient):  # as XLA's program for the gradient of the kernel takes them on a CPU
        return jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(gradient, (1, 2, 0, 3))

    functions = {
        "forward": lambda x, kernel, gradient: gradients(x, kernel, gradient)[0],
        "gradient of the image": lambda x, kernel, gradient: gradients(x, kernel, gradient)[1],
        "gradient of the kernel": lambda x, kernel, gradient: gradients(x, kernel, gradient)[2],
        "transposing for it": transposed,
        "all three": gradients,
        "BatchNorm": norm,
    }
    arguments = jax.device_put((x, kernel, gradient))
    compiled = {name: sm.jit(function).lower(*arguments).compile() for name, function in functions.items()}
    return {name: lambda run=run: run(*arguments) for name, run in compiled.items()}


def _theirs(arguments: dict) -> contextlib.AbstractContextManager[dict]:
    from experiments.bench import torch_reference

    return candidates(torch_reference.make_operations, 1, **arguments)
