"""The MNIST convnet's training step in PyTorch, for the benchmark to compare with. Nothing else needs torch.

Edge-popup is that of Ramanujan et al. 2020, with the two ways in which implementations compute the mask.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F

LAYERS = ("Conv_0/kernel", "Conv_1/kernel", "Dense_0/kernel", "Dense_1/kernel")


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


def serve(pipe, arguments: dict) -> None:
    """Answers calls from another process: sends the names of the steps, then, for each (name, times), the loss.

    `arguments` are those of `make_steps` and "threads", the number that torch may use.
    """
    torch.set_num_threads(arguments.pop("threads"))
    steps = make_steps(**arguments)
    pipe.send(list(steps))
    while True:
        name, times = pipe.recv()
        pipe.send(steps[name](times))


def make_steps(
    weights: Mapping[str, np.ndarray],
    scores: Mapping[str, np.ndarray],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    density: float,
    learning_rate: float,
    momentum: float,
    device: str = "cpu",
) -> dict[str, Callable[[int], float]]:
    """{name: run}, where run(times) trains on the one batch and returns the loss before the last update.

    The batch is on the device, as floats, before the first step: torch is charged for no data handling.

    Args:
      weights: {path: array} of `supermask_jax.models.MnistConvNet`.
      scores: the same paths and shapes.
      images: float32 [n, h, w, 1], normalised.
      labels: int [n].
    """
    x = torch.tensor(images, device=device).permute(0, 3, 1, 2).contiguous()
    y = torch.tensor(labels, device=device).long()

    def make_step(mask) -> Callable[[int], float]:
        kernels, popups = _as_nchw(weights, device), _as_nchw(scores, device)
        learns = popups if mask else kernels
        for tensor in learns:
            tensor.requires_grad_()
        optimizer = torch.optim.SGD(learns, learning_rate, momentum)

        def run(times: int) -> float:
            for _ in range(times):
                optimizer.zero_grad()
                params = kernels
                if mask:
                    params = [w * mask.apply(s.abs(), density) for w, s in zip(kernels, popups, strict=True)]
                loss = F.cross_entropy(_logits(x, *params), y)
                loss.backward()
                optimizer.step()
            return loss.item()  # waits for the device

        return run

    return {
        "torch, sort": make_step(SortedMask),
        "torch, kthvalue": make_step(KthValueMask),
        "torch, dense": make_step(None),
    }


def _logits(x, conv_0, conv_1, dense_0, dense_1):
    x = F.relu(F.conv2d(x, conv_0))
    x = F.max_pool2d(F.conv2d(x, conv_1), 2).flatten(1)
    return F.linear(F.relu(F.linear(x, dense_0)), dense_1)


def _as_nchw(kernels: Mapping[str, np.ndarray], device: str) -> list[torch.Tensor]:
    """The layers' kernels in torch's layouts: (out, in, h, w), and (out, in) with channels first where flattened."""
    conv_0, conv_1, dense_0, dense_1 = (np.asarray(kernels[path]) for path in LAYERS)
    channels, side = conv_1.shape[-1], int((dense_0.shape[0] // conv_1.shape[-1]) ** 0.5)
    dense_0 = dense_0.reshape(side, side, channels, -1).transpose(2, 0, 1, 3).reshape(dense_0.shape)
    arrays = [conv_0.transpose(3, 2, 0, 1), conv_1.transpose(3, 2, 0, 1), dense_0.T, dense_1.T]
    return [torch.tensor(np.ascontiguousarray(array), device=device) for array in arrays]
