"""What the names and shapes of Flax, Haiku, Equinox and PyTorch tell of a leaf: is it a kernel, what do its axes do?

A name can mislead. `layouts.describe` reads the same from the traced network.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

NOT_KERNELS = ("bias", "b", "scale", "embedding")
"""Names of leaves that are no kernels, whatever their shape. `is_kernel` knows more of them, by their parts."""

ADDED = re.compile(r"bias|offset|beta$|^beta|shift$|^b\d+$|^mean$|^var$", re.IGNORECASE)
"""Parts of the names of leaves that are added to the data: one of zeros is harmless."""
SCALES = re.compile(r"scale$|^scale|gamma|(^|_)gain|^g\d*$|^A_?log$|^log_|^mu$", re.IGNORECASE)
"""Parts of the names of leaves that the data is multiplied by, entry by entry."""
GATES = re.compile(r"scale$|^scale|gamma|(^|_)gain|^g\d*$|gate|alpha|rezero|resweight", re.IGNORECASE)
"""The same, and what may also name a kernel. One of zeros may stop all that comes after it."""
TABLES = re.compile(
    r"(^|_)emb(ed|edding)?s?$|^embed_table|^w[tp]e$|^pos_|^pos$|posemb|position|^cls|class_token|(^|_)tokens?$"
    r"|^probe|^registers?$|^latents?$|^queries$|^[hc]0$",
    re.IGNORECASE,
)
"""Names of tables and of learned inputs: looked up by an index, added to the data, or put beside it."""
NORMS = re.compile(
    r"(^|_)(layer|batch|group|rms|instance)?_?norm(s|\d|_|$)|norm(_\d+)?$|^(ln|bn)(_|\d|$)|_(ln|bn)$", re.IGNORECASE
)
LOOKED_UP = re.compile(r"(^|_)emb(ed|edding)?s?$|embedding|^w[tp]e$", re.IGNORECASE)
PLAIN = ("kernel", "weight", "w")  # names of what may be a kernel, or the one array of a layer that has none
EQUINOX = re.compile(r"(^|_)weight(_|$)")  # names of Equinox's and PyTorch's kernels: weight, weight_ih, in_proj_weight

ATTENTION = re.compile(r"attention|attn|mha", re.IGNORECASE)
CONVOLUTION = re.compile(r"(^|_|depthwise|transposed)conv", re.IGNORECASE)
STEM = re.compile(r"conv|patch|embed|stem|down", re.IGNORECASE)  # parts of paths whose windows may have any size
UNLIKE = re.compile(r"attention|attn|einsum|qkv|expert|moe", re.IGNORECASE)
"""Parts of paths whose kernels are no convolutions, also where their first axes are equal."""
WINDOWS = (1, 2, 3, 5, 7)  # the usual square ones; others are told by a name only
WIDEST = 32  # no convolution's window is wider; patch embeddings have 14, 16 or 32


def shape_of(leaf: Any) -> tuple[int, ...]:
    """Returns the shape of an array, of a number, or of anything that has a shape; a tuple is a shape itself."""
    shape = leaf if isinstance(leaf, tuple) else leaf.shape if hasattr(leaf, "shape") else np.shape(leaf)
    return tuple(int(n) for n in shape)


def is_kernel(path: str, leaf: Any) -> bool:
    """Returns whether a leaf is prunable by default: the kernels of dense layers, convolutions and attention are.

    A kernel has two or more axes. By their names, these are none: biases, scales and offsets, also where a stack of
    layers gives them a second axis; embedding tables; position embeddings, class tokens, probes and the like. An array
    of three or more axes whose entries lie all along one is none either, unless it is called kernel, weight or w.

    A name can mislead. `layouts.describe` looks at what the network does with a leaf.

    Args:
      path: the leaf's keys joined by "/": "Conv_0/kernel".
      leaf: the array, or its shape.
    """
    return not no_kernel(path, shape_of(leaf))


def names_of(path: str) -> list[str]:
    """Returns the names in a path, also in one of a flat PyTorch state: "0/attn.weight" -> [0, attn, weight]."""
    return re.split(r"[/.]", path)


def no_kernel(path: str, shape: Sequence[int]) -> str:
    """Returns why, by its name and shape, a leaf is no kernel; "" where it may be one."""
    *parents, name = names_of(path)
    parent = parents[-1] if parents else ""
    if len(shape) < 2:
        return "it has fewer than two axes"
    if name in NOT_KERNELS or ADDED.search(name) or SCALES.search(name):
        return f"it is called {name}"
    if name in PLAIN:
        if NORMS.search(parent):
            return f"it belongs to {parent}, a normalisation"
        if name != "kernel" and LOOKED_UP.search(parent) and "patch" not in parent.lower() and len(shape) == 2:
            return f"it belongs to {parent}, a table"
        return ""
    if TABLES.search(name):
        return f"it is called {name}"
    if len(shape) > 2 and sum(size != 1 for size in shape) < 2:
        return "all its entries lie along one axis"
    return ""


def low_rank(path: str, leaf: Any) -> bool:
    """Returns whether a leaf called b may be the second matrix of a low-rank product, and no bias."""
    return names_of(path)[-1] == "b" and sum(n != 1 for n in shape_of(leaf)) > 1


def is_gate(path: str, leaf: Any) -> bool:
    """Returns whether, by its name, the data is multiplied by this leaf, entry by entry: it is a scale or a gate.

    Args:
      path: the leaf's keys joined by "/": "BatchNorm_0/scale".
      leaf: the array, or its shape.
    """
    *parents, name = names_of(path)
    if ADDED.search(name):
        return False
    norm = bool(parents) and name in PLAIN and bool(NORMS.search(parents[-1]))
    return bool(no_kernel(path, shape_of(leaf))) and bool(norm or GATES.search(name))


def flax_axes(path: str, shape: Sequence[int]) -> tuple[str, ...] | None:
    """Returns what the axes of a kernel do, in the layouts of Flax and Haiku; None where neither name nor shape tells.

    Known are dense layers (in, out); convolutions (window, in, out); attention's query, key and value (in, heads, size)
    and out (heads, size, out); and all of them under `nn.scan` or `nn.vmap`, with axes in front that count layers.
    A convolution is told by its name, or by a square window.
    """
    parts = names_of(path)[:-1]
    parent, ndim = parts[-1] if parts else "", len(shape)
    if ndim <= 2:
        return ("in", "out")[2 - ndim :]
    attends = any(ATTENTION.search(part) for part in parts[:-1])
    if attends and parent in ("query", "key", "value"):
        return ("stack",) * (ndim - 3) + ("in", "out", "out")
    if attends and parent == "out":
        return ("stack",) * (ndim - 3) + ("in", "in", "out")
    if re.fullmatch(r"Dense(_\d+)?|linear(_\d+)?", parent):
        return ("stack",) * (ndim - 2) + ("in", "out")
    if _is_convolution(parts, tuple(shape[:-2])):
        last = ("out", "in") if "conv" in parent and "transpose" in parent else ("in", "out")  # Haiku's
        return ("window",) * (ndim - 2) + last
    return None


def equinox_axes(path: str, shape: Sequence[int]) -> tuple[str, ...] | None:
    """Returns what the axes of a weight do, in the layouts of Equinox and PyTorch; None where nothing tells.

    Known are dense layers (out, in) and convolutions (out, in, window).
    """
    if len(shape) <= 2:
        return ("out", "in")[: len(shape)]
    if _is_convolution(names_of(path)[:-1], tuple(shape[2:])):
        return ("out", "in") + ("window",) * (len(shape) - 2)
    return None


def _is_convolution(parts: list[str], window: tuple[int, ...]) -> bool:
    """Whether those axes are a convolution's window: by the name, or because they are square."""
    square = len(window) > 1 and len(set(window)) == 1 and window[0] <= WIDEST
    if parts and CONVOLUTION.search(parts[-1]):  # where it is not square, a stack looks the same
        return len(window) == 1 or square or (len(window) == 2 and min(window) == 1)
    if any(UNLIKE.search(part) for part in parts) and window[:1] != (1,):
        return False
    return square and (window[0] in WINDOWS or any(STEM.search(part) for part in parts))


def is_closed(leaf: Any, stack: Sequence[int] = ()) -> bool:
    """Returns whether a concrete array is 0: all of it, or all of one of the layers that the axes `stack` count."""
    values = np.asarray(leaf)
    if not values.size:
        return False
    layers = math.prod(values.shape[axis] for axis in stack)
    rows = np.moveaxis(values, stack, range(len(stack))).reshape(layers, -1)
    return bool((rows == 0).all(axis=1).any())


def gate_stack(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the axis of a gate that may count layers: the first, of a gate that has more than one."""
    return (0,) if sum(n != 1 for n in shape) > 1 else ()
