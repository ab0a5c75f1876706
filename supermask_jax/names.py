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

ADDED = re.compile(r"bias|offset|beta|shift", re.IGNORECASE)
"""Parts of the names of leaves that are added to the data: one of zeros is harmless."""
SCALES = re.compile(r"scale|gamma|gain", re.IGNORECASE)
"""Parts of the names of leaves that the data is multiplied by, entry by entry."""
GATES = re.compile(rf"{SCALES.pattern}|gate|alpha|rezero|resweight", re.IGNORECASE)
"""The same, and what may also name a kernel. One of zeros stops all that comes after it."""
TABLES = re.compile(
    r"embedding$|embeddings$|embed$|embed_table|^pos_|^pos$|posemb|pos_emb|position|^cls|class_token|cls_token"
    r"|^tokens?$|_tokens?$|^probe|^registers?$|^latents?$",
    re.IGNORECASE,
)
"""Names of tables and of learned inputs: looked up by an index, added to the data, or put beside it."""
NORMS = re.compile(r"norm|^ln(_|\d|$)|^bn(_|\d|$)|_ln$|_bn$", re.IGNORECASE)
LOOKED_UP = re.compile(r"embed", re.IGNORECASE)
PLAIN = ("kernel", "weight", "w")  # names of what may be a kernel, or the one array of a layer that has none

UNLIKE = re.compile(r"attention|attn|einsum|qkv|expert", re.IGNORECASE)
"""Parts of paths whose kernels are no convolutions, also where their first axes are equal."""
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


def no_kernel(path: str, shape: Sequence[int]) -> str:
    """Returns why, by its name and shape, a leaf is no kernel; "" where it may be one."""
    *parents, name = path.split("/")
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


def is_gate(path: str, leaf: Any) -> bool:
    """Returns whether, by its name, the data is multiplied by this leaf, entry by entry: it is a scale or a gate.

    Args:
      path: the leaf's keys joined by "/": "BatchNorm_0/scale".
      leaf: the array, or its shape.
    """
    *parents, name = path.split("/")
    norm = bool(parents) and name in PLAIN and bool(NORMS.search(parents[-1]))
    return bool(no_kernel(path, shape_of(leaf))) and bool(norm or GATES.search(name))


def flax_axes(path: str, shape: Sequence[int]) -> tuple[str, ...] | None:
    """Returns what the axes of a kernel do, in the layouts of Flax and Haiku; None where neither name nor shape tells.

    Known are dense layers (in, out); convolutions (window, in, out); attention's query, key and value (in, heads, size)
    and out (heads, size, out); and all of them under `nn.scan` or `nn.vmap`, with axes in front that count layers.
    A convolution is told by its name, or by a square window.
    """
    parts = [*path.split("/")[:-1]]
    parent, ndim = parts[-1] if parts else "", len(shape)
    if ndim <= 2:
        return ("in", "out")[2 - ndim :]
    if parent in ("query", "key", "value") and ndim >= 3:
        return ("stack",) * (ndim - 3) + ("in", "out", "out")
    if parent == "out" and (ndim == 3 or (ndim > 3 and any(map(_is_attention, parts[:-1])))):
        return ("stack",) * (ndim - 3) + ("in", "in", "out")
    if re.fullmatch(r"Dense(_\d+)?|linear(_\d+)?", parent):
        return ("stack",) * (ndim - 2) + ("in", "out")
    if _is_convolution(parts, shape, tuple(shape[:-2])):
        last = ("out", "in") if "conv" in parent and "transpose" in parent else ("in", "out")  # Haiku's
        return ("window",) * (ndim - 2) + last
    return None


def equinox_axes(path: str, shape: Sequence[int]) -> tuple[str, ...] | None:
    """Returns what the axes of a weight do, in the layouts of Equinox and PyTorch; None where nothing tells.

    Known are dense layers (out, in) and convolutions (out, in, window).
    """
    if len(shape) <= 2:
        return ("out", "in")[: len(shape)]
    if _is_convolution(path.split("/")[:-1], shape, tuple(shape[2:])):
        return ("out", "in") + ("window",) * (len(shape) - 2)
    return None


def _is_attention(part: str) -> bool:
    return bool(re.search(r"attention|attn", part, re.IGNORECASE))


def _is_convolution(parts: list[str], shape: Sequence[int], window: tuple[int, ...]) -> bool:
    """Whether those axes are a convolution's window: by the name, or because they are square."""
    square = len(window) > 1 and len(set(window)) == 1 and window[0] <= WIDEST
    if any(re.search("conv", part, re.IGNORECASE) for part in parts):  # not square: a stack looks the same
        return len(window) == 1 or square or (len(window) == 2 and min(window) == 1)
    return square and (window[0] == 1 or not any(UNLIKE.search(part) for part in parts))


def is_closed(leaf: Any, stack: Sequence[int] = ()) -> bool:
    """Returns whether a concrete array is 0: all of it, or all of one of the layers that the axes `stack` count."""
    values = np.asarray(leaf)
    layers = math.prod(values.shape[axis] for axis in stack)
    rows = np.moveaxis(values, stack, range(len(stack))).reshape(layers, -1)
    return bool(values.size and (rows == 0).all(axis=1).any())


def gate_stack(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the axis of a gate that may count layers: the first, of a gate that has more than one."""
    return (0,) if sum(n != 1 for n in shape) > 1 else ()
