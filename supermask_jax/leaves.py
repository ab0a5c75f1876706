"""What a leaf of a network's weights is, and what each of its axes does.

Fan-in, fan-out, layer densities, rankings, units and reports all read a `Leaf`. `names` tells it from the leaf's path
and shape, and `layouts.describe` from the traced network.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from supermask_jax.names import EQUINOX, equinox_axes, flax_axes, names_of, shape_of

AXES = ("stack", "window", "in", "out")
"""What an axis of a kernel does: it counts layers of one shape, spans a convolution's window, is summed, or remains."""
FanIn = Callable[[str, tuple[int, ...]], float]
"""fan_in(path, shape) -> how many inputs each output of the leaf sums."""
FanOut = Callable[[str, tuple[int, ...]], float]
"""fan_out(path, shape) -> how many outputs each input of the leaf goes to."""


class Leaf(NamedTuple):
    """One leaf of a network's weights, and what its axes do.

    `axes` has a word of `AXES` for each axis, or is None where the leaf is no kernel. `groups` is that of a grouped
    convolution, whose "in" is what one group reads. `spacing` is how many positions a transposed convolution puts in
    place of one: of a window, only one in so many meets an input. `gate` says that the data is multiplied by the leaf,
    entry by entry: where it is 0, nothing passes.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...] | None
    why: str
    groups: int = 1
    spacing: int = 1
    gate: bool = False

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes that count layers of one shape; mostly none."""
        return self.at("stack")

    def at(self, *words: str) -> tuple[int, ...]:
        """Returns the axes that do what one of the words says."""
        return tuple(axis for axis, word in enumerate(self.axes or ()) if word in words)

    def size(self, *words: str) -> int:
        """Returns how many entries those axes have together."""
        return math.prod(self.shape[axis] for axis in self.at(*words))

    @property
    def fan_in(self) -> float:
        """How many inputs each output sums; a mean where the positions of a transposed convolution differ."""
        return _whole(self.size("window", "in"), self.spacing)

    @property
    def fan_out(self) -> float:
        """How many outputs each input goes to."""
        return _whole(self.size("window", "out"), self.groups)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape of one layer as Flax writes it: the window, in, out. It is what `densities` takes."""
        window = tuple(self.shape[axis] for axis in self.at("window"))
        return (*window, self.size("in"), self.size("out"))


def _whole(count: int, parts: int) -> float:
    return count // parts if count % parts == 0 else count / parts


class Layout(Mapping[str, Leaf]):
    """The leaves of a network's weights, and what their axes do. `layouts.describe` makes it.

    It is a mapping {path: Leaf} of the kernels, which `densities.erk` and its like take as they are. Called with a path
    and a leaf, it says whether that is a kernel, so that it is given wherever a function takes `where`; fan-ins,
    rankings and units then follow it. `leaves` has every leaf, also those that are no kernels.
    """

    def __init__(self, leaves: Mapping[str, Leaf]):
        self.leaves = dict(leaves)
        self._kernels = {path: leaf for path, leaf in self.leaves.items() if leaf.axes is not None}

    def __getitem__(self, path: str) -> Leaf:
        return self._kernels[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kernels)

    def __len__(self) -> int:
        return len(self._kernels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.leaves == other.leaves

    def __hash__(self) -> int:
        return hash(frozenset(self.leaves.items()))

    def __repr__(self) -> str:
        return "\n".join(f"{path} {leaf.shape}: {' '.join(leaf.axes or ())}" for path, leaf in self._kernels.items())

    def __call__(self, path: str, leaf: Any) -> bool:
        """Returns whether the leaf is a kernel."""
        self.leaf(path, shape_of(leaf))
        return path in self._kernels

    def others(self, path: str, leaf: Any) -> bool:
        """Returns whether the leaf is no kernel, and of floats: what may learn beside the scores."""
        return not self(path, leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)

    def leaf(self, path: str, shape: Sequence[int]) -> Leaf:
        """Returns what is known of a leaf.

        Raises:
          ValueError: there is no such leaf, or it has another shape. Where scores are of units, an axis has length 1.
        """
        if path not in self.leaves:
            raise ValueError(f"the layout has no leaf {path!r}; there are: {', '.join(self.leaves)}")
        known = self.leaves[path].shape
        if len(known) != len(shape) or any(n not in (1, m) for n, m in zip(shape, known, strict=True)):
            raise ValueError(f"{path!r} has the shape {tuple(shape)}, and {self.leaves[path].shape} in the layout")
        return self.leaves[path]

    def fan_in(self, path: str, shape: Sequence[int]) -> float:
        """Returns how many inputs each output of a kernel sums."""
        return self.leaf(path, shape).fan_in

    def fan_out(self, path: str, shape: Sequence[int]) -> float:
        """Returns how many outputs each input of a kernel goes to."""
        return self.leaf(path, shape).fan_out


def unknown_axes(path: str, shape: Sequence[int], traced: bool = False) -> ValueError:
    """Returns the error that asks for what the names, and the network if it was traced, do not tell."""
    words = f"a word of {', '.join(AXES)} for each of its {len(shape)} axes"
    say = f"axes={{{path!r}: '...'}}, with {words}, or None if it is no kernel"
    if traced:
        return ValueError(
            f"neither the network nor its name tells what the axes of {path!r} {tuple(shape)} do. Say {say}"
        )
    return ValueError(
        f"neither its name nor its shape {tuple(shape)} tells what the axes of {path!r} do. Let the network tell: "
        f"layout = sm.describe(apply_fn, weights, example), and give where=layout. Or say it there: {say}"
    )


def flax_fan_in(path: str, shape: tuple[int, ...]) -> int:
    """Returns how many inputs each output of a Flax kernel sums: the product of its window and its "in" axes.

    Of (in, out) it is in; of a convolution (height, width, in, out) height * width * in; of attention's query, key and
    value kernels (in, heads, size) in, of its output kernel (heads, size, out) heads * size. Axes that count layers, as
    `nn.scan` puts them in front, do not count. A kernel of which neither name nor shape tells anything counts as a
    convolution's.

    Args:
      path: the leaf's path: "Conv_0/kernel". Its names tell convolutions, attention and stacks.
      shape: the leaf's shape.
    """
    return int(flax_leaf(path, shape).fan_in)


def flax_fan_out(path: str, shape: tuple[int, ...]) -> int:
    """Returns how many outputs each input of a Flax kernel goes to: the product of its window and its "out" axes.

    Of (in, out) it is out; of a convolution (height, width, in, out) height * width * out; of attention's query, key
    and value kernels (in, heads, size) heads * size, of its output kernel (heads, size, out) out. Axes that count
    layers do not count. A kernel of which neither name nor shape tells anything counts as a convolution's.

    Args:
      path: the leaf's path: "Conv_0/kernel". Its names tell convolutions, attention and stacks.
      shape: the leaf's shape.
    """
    return int(flax_leaf(path, shape).fan_out)


def equinox_fan_in(path: str, shape: tuple[int, ...]) -> int:
    """Returns how many inputs each output of an Equinox or PyTorch weight sums: the product of all axes but the first.

    Args:
      path: the leaf's path, which does not matter.
      shape: (out, in) or (out, in, height, width).
    """
    return math.prod(shape[1:])


def equinox_fan_out(path: str, shape: tuple[int, ...]) -> int:
    """Returns how many outputs each input of an Equinox or PyTorch weight goes to: all axes but the second.

    Args:
      path: the leaf's path, which does not matter.
      shape: (out, in) or (out, in, height, width).
    """
    return shape[0] * math.prod(shape[2:])


def named_fan_in(path: str, shape: tuple[int, ...]) -> float:
    """Returns how many inputs each output of a kernel sums: of a leaf called weight as in Equinox, else as in Flax.

    Raises:
      ValueError: neither the name nor the shape tells what the axes do. `layouts.describe` asks the network.
    """
    return _told(path, shape).fan_in


def named_fan_out(path: str, shape: tuple[int, ...]) -> float:
    """Returns how many outputs each input of a kernel goes to: of a leaf called weight as in Equinox, else as in Flax.

    Raises:
      ValueError: neither the name nor the shape tells what the axes do. `layouts.describe` asks the network.
    """
    return _told(path, shape).fan_out


def _told(path: str, shape: tuple[int, ...]) -> Leaf:
    leaf = leaf_of(path, shape)
    if leaf is None:
        raise unknown_axes(path, shape)
    return leaf


def flax_leaf(path: str, shape: tuple[int, ...]) -> Leaf:
    """Returns a kernel in Flax's layout; one of which neither name nor shape tells anything counts as a convolution's.

    Args:
      path: the leaf's path, whose names tell convolutions, attention and stacks.
      shape: the leaf's shape.
    """
    axes = flax_axes(path, shape) or ("window",) * (len(shape) - 2) + ("in", "out")
    return Leaf(path, tuple(shape), axes, "by its name")


def leaf_of(path: str, shape: Sequence[int], layout: Layout | None = None) -> Leaf | None:
    """Returns what is known of a kernel, from the layout or from its name; None where the name does not tell.

    Args:
      path: the leaf's keys joined by "/".
      shape: its shape. A score of units has the length 1 along the other axes.
      layout: what tells it; None means the name.
    """
    if layout is not None:
        return layout.leaf(path, shape)
    axes = (equinox_axes if EQUINOX.search(names_of(path)[-1]) else flax_axes)(path, shape)
    return None if axes is None else Leaf(path, tuple(shape), axes, "by its name")


def stack_of(path: str, shape: Sequence[int], layout: Layout | None = None) -> tuple[int, ...]:
    """Returns the axes of a kernel that count layers; none where neither the layout nor the name tells of any."""
    leaf = leaf_of(path, shape, layout)
    return leaf.stack if leaf else ()
