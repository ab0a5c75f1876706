"""How the axes of a leaf lie in what a traced network makes of it by moving its numbers."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.extend import core

Atom = tuple[int, int]
"""(axis of the leaf, size): an axis of the leaf or, after a reshape, a part of one; axis -1 was made by a broadcast."""


class View(NamedTuple):
    """A value that was made of one leaf and no data: of each of its axes, the axes of the leaf that it runs over."""

    path: str
    axes: tuple[tuple[Atom, ...], ...] | None  # None: they could not be followed
    picked: frozenset[int] = frozenset()  # axes of the leaf of which one entry was taken, and that are gone: they count
    cut: frozenset[int] = frozenset()  # axes of the leaf of which one entry was taken, and that are still there
    keeps_zero: bool = True  # whether an entry of 0 is still 0
    rescales: bool = False  # whether it multiplies a larger leaf
    changed: str | None = None  # the first operation after which its numbers are no longer all of the leaf's

    def real(self) -> int:
        """How many entries of the leaf it runs over."""
        return math.prod(size for atoms in self.axes or () for axis, size in atoms if axis >= 0)


Moved = Callable[[View, core.JaxprEqn, tuple[int, ...], tuple[int, ...]], View]


def shape_of_variable(variable: Any) -> tuple[int, ...]:
    """Returns the shape of an operand or a result of an operation."""
    return tuple(getattr(variable.aval, "shape", ()))


def _transpose(view: View, eqn: core.JaxprEqn, before: tuple[int, ...], after: tuple[int, ...]) -> View:
    axes = view.axes or ()
    return view._replace(axes=tuple(axes[axis] for axis in eqn.params["permutation"]))


def _broadcast(view: View, eqn: core.JaxprEqn, before: tuple[int, ...], after: tuple[int, ...]) -> View:
    made: list[tuple[Atom, ...]] = [()] * len(after)
    for atoms, place in zip(view.axes or (), eqn.params["broadcast_dimensions"], strict=True):
        made[place] = atoms
    return view._replace(axes=tuple(made))


def _squeeze(view: View, eqn: core.JaxprEqn, before: tuple[int, ...], after: tuple[int, ...]) -> View:
    gone = {axis % len(before) for axis in eqn.params["dimensions"]}
    axes = view.axes or ()
    kept = tuple(atoms for axis, atoms in enumerate(axes) if axis not in gone)
    return _without(view, [atom for axis in gone for atom in axes[axis]])._replace(axes=kept)


def _reshape(view: View, eqn: core.JaxprEqn, before: tuple[int, ...], after: tuple[int, ...]) -> View:
    """The atoms in order, dealt out to the new axes; one is split where an axis ends within it."""
    if 0 in before:  # no entries, whose axes nothing tells
        return view._replace(axes=None)
    axes, sizes = view.axes or (), before
    if eqn.params["dimensions"] is not None:
        order = eqn.params["dimensions"]
        axes, sizes = tuple(axes[axis] for axis in order), tuple(before[axis] for axis in order)
    left: list[Atom] = []
    for atoms, size in zip(axes, sizes, strict=True):
        rest, uneven = divmod(size, math.prod(n for _, n in atoms))
        if uneven:
            return view._replace(axes=None)
        left += [atom for atom in atoms if atom[1] > 1] + [(-1, rest)] * (rest > 1)
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
                return view._replace(axes=None)
        made.append(tuple(own))
    return _without(view, [atom for atoms in axes for atom in atoms if atom[1] == 1])._replace(axes=tuple(made))


def sliced(view: View, eqn: core.JaxprEqn, before: tuple[int, ...], after: tuple[int, ...]) -> View:
    """Returns the view of a slice. Of an axis of which one entry is left it is not yet known what it does."""
    if view.axes is None:
        return view
    cut, axes = set(view.cut), []
    for atoms, old, new in zip(view.axes, before, after, strict=True):
        if new == old:
            axes.append(atoms)
        elif new == 1:
            cut |= {axis for axis, _ in atoms}
            axes.append(tuple((axis, 1) for axis, _ in atoms))
        elif len(atoms) == 1:
            axes.append(((atoms[0][0], new),))
        else:
            return view._replace(axes=None)
    return view._replace(axes=tuple(axes), cut=frozenset(cut))


def _padded(view: View, eqn: core.JaxprEqn, before: tuple[int, ...], after: tuple[int, ...]) -> View:
    """An axis that is made longer stays the axis; it can no longer be split."""
    return view


def _without(view: View, gone: list[Atom]) -> View:
    """The view after axes of length 1 went: those of which one entry was taken count layers."""
    picked = {axis for axis, _ in gone} & view.cut
    return view._replace(picked=view.picked | picked, cut=view.cut - picked)


def _followed(move: Moved) -> Moved:
    """A move of views that are followed; one that is lost stays lost."""
    return lambda view, *rest: view if view.axes is None else move(view, *rest)


MOVED: Mapping[str, Moved] = {
    "transpose": _followed(_transpose),
    "broadcast_in_dim": _followed(_broadcast),
    "squeeze": _followed(_squeeze),
    "reshape": _followed(_reshape),
    "slice": sliced,
    "dynamic_slice": sliced,
    "pad": _padded,
}
