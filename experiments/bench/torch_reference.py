"""A network's training step in PyTorch, for the benchmark to compare with. Nothing else needs torch.

Edge-popup is that of Ramanujan et al. 2020, with the two ways in which implementations compute the mask.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

Step = tuple[str, str, tuple[str, ...], str, Mapping[str, Any]]  # of `supermask_jax.commands.graphs`


class SortedMask(torch.autograd.Function):
    """The published mask: the whole layer is sorted, and zeros and ones are written by index. Straight-through."""

    @staticmethod
    def forward(ctx, scores, density):
        mask = scores.clone()
        order = scores.flatten().sort().indices
        flat, dropped = mask.view(-1), _dropped(scores, density)
        flat[order[:dropped]] = 0
        flat[order[dropped:]] = 1
        return mask

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class KthValueMask(SortedMask):
    """The faster mask: only the threshold is computed, and all scores that tie with it are kept."""

    @staticmethod
    def forward(ctx, scores, density):
        threshold = scores.flatten().kthvalue(_dropped(scores, density) + 1).values
        return (scores >= threshold).to(scores.dtype)


def _dropped(scores, density: float) -> int:
    return int((1 - density) * scores.numel())


def make_steps(
    graph: Sequence[Step],
    weights: Mapping[str, np.ndarray],
    scores: Mapping[str, np.ndarray],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    density: float,
    learning_rate: float,
    momentum: float,
    threads: int,
    device: str = "cpu",
) -> dict[str, Callable[[int], float]]:
    """{name: run}, where run(times) trains on the one batch and returns the loss before the last update.

    The batch is on the device, as floats, before the first step: torch is charged for no data handling.

    Args:
      graph: the operations of the network, from "images" to "logits".
      weights: {name: array} in torch's names and layouts, with the running statistics.
      scores: the same names and shapes, of the kernels.
      images: float32 [n, h, w, c], normalised.
      labels: int [n].
      threads: that torch may use.
    """
    torch.set_num_threads(threads)
    x = torch.tensor(images, device=device).permute(0, 3, 1, 2).contiguous()
    y = torch.tensor(labels, device=device).long()

    def make_step(mask) -> Callable[[int], float]:
        params, popups = _tensors(weights, device), _tensors(scores, device)
        learns = popups if mask else {name: params[name] for name in popups}
        for tensor in learns.values():
            tensor.requires_grad_()
        optimizer = torch.optim.SGD(learns.values(), learning_rate, momentum)

        def run(times: int) -> float:
            for _ in range(times):
                optimizer.zero_grad()
                used = params
                if mask:
                    used = params | {n: params[n] * mask.apply(s.abs(), density) for n, s in popups.items()}
                loss = F.cross_entropy(logits(graph, used, x), y)
                loss.backward()
                optimizer.step()
            return loss.item()  # waits for the device

        return run

    return {
        "torch, sort": make_step(SortedMask),
        "torch, kthvalue": make_step(KthValueMask),
        "torch, dense": make_step(None),
    }


def make_operations(
    images: np.ndarray, kernel: np.ndarray, gradient: np.ndarray, *, threads: int
) -> dict[str, Callable[[int], None]]:
    """{name: run}, where run(times) does a convolution or a BatchNorm and its gradients so many times.

    Args:
      images: float32 [n, h, w, c].
      kernel: float32 [h, w, in, out].
      gradient: of the convolution's result, and of the BatchNorm's.
      threads: that torch may use.
    """
    torch.set_num_threads(threads)
    x, g = (torch.tensor(of).permute(0, 3, 1, 2) for of in (images, gradient))  # channels last, as torch is fastest
    k = torch.tensor(kernel).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    scale, shift = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
    for tensor in (x, k, scale, shift):
        tensor.requires_grad_()

    def convolution(times: int) -> None:
        for _ in range(times):
            torch.autograd.grad(F.conv2d(x, k, padding=1), (x, k), g)

    def norm(times: int) -> None:
        for _ in range(times):
            torch.autograd.grad(F.batch_norm(x, None, None, scale, shift, training=True), (x, scale, shift), g)

    return {"torch, all three": convolution, "torch, BatchNorm": norm}


def logits(graph: Sequence[Step], params: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The logits of a network in training, for images [n, c, h, w]: BatchNorm takes the batch's own statistics."""
    values = {"images": x}
    for kind, output, inputs, layer, numbers in graph:
        a, weight, bias = values[inputs[0]], params.get(f"{layer}.weight"), params.get(f"{layer}.bias")
        match kind:
            case "conv":
                a = F.conv2d(a, weight, bias, numbers["stride"], numbers["padding"])
            case "dense":
                a = F.linear(a, weight, bias)
            case "norm":
                running = params[f"{layer}.running_mean"], params[f"{layer}.running_var"]
                a = F.batch_norm(a, *running, weight, bias, training=True)
            case "relu":
                a = F.relu(a)
            case "pool":
                a = F.max_pool2d(a, numbers["window"], numbers["stride"], numbers["padding"])
            case "flatten":
                a = a.flatten(1)
            case "mean":
                a = a.mean((2, 3))
            case "add":
                a = a + values[inputs[1]]
            case "pad":
                a = F.pad(a[:, :, :: numbers["stride"], :: numbers["stride"]], (0, 0, 0, 0, 0, numbers["channels"]))
            case _:
                raise ValueError(f"no operation {kind!r}")
        values[output] = a
    return values["logits"]


def _tensors(arrays: Mapping[str, np.ndarray], device: str) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(array, device=device) for name, array in arrays.items()}
