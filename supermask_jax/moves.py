"""How the axes of a leaf lie in what a traced network makes of it by moving its numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core

Atom = tuple[int, int]
"""(axis of the leaf, size): an axis of the leaf or, after a reshape, a part of one."""


class View(NamedTuple):
    """A value that was made of one leaf and no data: of each of its axes, the axes of the leaf that it runs over."""

    path: str
    axes: tuple[tuple[Atom, ...], ...] | None  # None: they could not be followed
    picked: frozenset[int] = frozenset()  # axes of the leaf of which one entry was taken: they count layers


def shape_of_variable(variable: Any) -> tuple[int, ...]:
    return tuple(getattr(variable.aval, "shape", ()))


Moved = Callable[[View, core.JaxprEqn, tuple[int, ...], tuple[int, ...]], View]


def _followed(move: Callable[..., Sequence[tuple[Atom, ...]] | None]) -> Moved:
    """A move of a view's axes as one of the view; a view that is lost stays lost."""

    def moved(view: View, eqn: core.JaxprEqn, before: tuple[int, ...], after: tuple[int, ...]) -> View:
        axes = None if view.axes is None else move(view.axes, eqn.params, before, after)
        return view._replace(axes=None if axes is None else tuple(axes))

    return moved


def _transpose(axes, params, before, after):
    return [axes[axis] for axis in params["permutation"]]


def _broadcast(axes, params, before, after):
    made = [()] * len(after)
    for axis, place in enumerate(params["broadcast_dimensions"]):
        made[place] = axes[axis]
    return made


def _squeeze(axes, params, before, after):
    gone = [axis % len(before) for axis in params["dimensions"]]
    return [atoms for axis, atoms in enumerate(axes) if axis not in gone]


def _reshape(axes, params, before, after):
    """The atoms in order, dealt out to the new axes; one is split where an axis ends within it."""
    if params["dimensions"] is not None:
        axes = [axes[axis] for axis in params["dimensions"]]
    left = [atom for atoms in axes for atom in atoms if atom[1] > 1]
    if math.prod(size for _, size in left) != math.prod(after):
        return None  # an axis that was broadcast
    made = []
    for size in after:
        own, have = [], 1
        while have < size:
            axis, length = left.pop(0)
            need = size // have
            if need % length == 0:
                own.append((axis, length))
                have *= length
            elif length % need == 0:
                own.append((axis, need))
                left.insert(0, (axis, length // need))
                have *= need
            else:
                return None
        made.append(tuple(own))
    return made


def sliced(view: View, eqn: core.JaxprEqn, before: tuple[int, ...], after: tuple[int, ...]) -> View:
    """One entry of an axis: the axis counts layers. A part of it: it stays the axis, of another size."""
    if view.axes is None:
        return view
    picked, axes = set(view.picked), []
    for atoms, old, new in zip(view.axes, before, after, strict=True):
        if new == old:
            axes.append(atoms)
        elif new == 1:
            picked |= {axis for axis, _ in atoms}
            axes.append(())
        elif len(atoms) == 1:
            axes.append(((atoms[0][0], new),))
        else:
            return view._replace(axes=None)
    return View(view.path, tuple(axes), frozenset(picked))


MOVED: Mapping[str, Moved] = {
    "transpose": _followed(_transpose),
    "broadcast_in_dim": _followed(_broadcast),
    "squeeze": _followed(_squeeze),
    "reshape": _followed(_reshape),
    "slice": sliced,
    "dynamic_slice": sliced,
}
