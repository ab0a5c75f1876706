"""What every leaf of a user's own network is: read from the traced network, from names, or as the user says.

`describe` makes the `Layout` that is given wherever the library takes `where` or `layout`. `inspect` shows it as a
table, with warnings of what would silently go wrong.
"""

import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from supermask_jax.densities import keep_count
from supermask_jax.leaves import AXES, Layout, Leaf, leaf_of, unknown_axes
from supermask_jax.names import PLAIN, gate_stack, is_closed, is_gate, low_rank, names_of, no_kernel
from supermask_jax.trees import Tree, by_path, checked_shape
from supermask_jax.usage import Use, uses

TRACED, TIED = "read from the network", "read from the network, which multiplies it in several ways"
MULTIPLIED, ADDED = "the data is multiplied by it", "it is added to the data, or put beside it"
FILLED = "read from the network, which changes its zeros"
UNUSED = "by its name: the network does not use it"
CHANGED = "by its name: the network changes it before its use"
NOTES = {
    TIED: "is multiplied in several ways, which sum different axes; the first one tells its fan-in",
    FILLED: "does not stay sparse: the network adds to it, or shifts it, before the product; a mask only chooses",
    UNUSED: "is not used, as far as could be seen: its scores never move",
    CHANGED: "could not be followed to a product, so that its name and shape tell its axes: a guess; say it with axes",
}
OPEN, DRAW = "sm.initializers.open_gates", "a function of sm.initializers, or, if it starts at 0 for good, axes: None,"
LAYERS_FOR = 16  # an unstacked leaf whose first axis is at most this may be a stack that nothing tells


def describe(
    apply_fn: Callable[[Tree, Tree], Tree] | None,
    weights: Tree,
    example: Tree = None,
    axes: Mapping[str, str | None] | None = None,
) -> Layout:
    """Returns what every leaf of the weights is: whether it is a kernel, and what each of its axes does.

    With an `apply_fn`, each leaf is followed through the traced network to the products that multiply it with data, in
    whatever framework, through einsums, `nn.scan` and `vmap`. Without one, the names of Flax, Haiku and Equinox tell.
    What neither tells is an error that asks; what may mislead is a warning of `inspect`.

        layout = sm.describe(lambda params, x: model.apply({"params": params}, x), weights, batch["image"])
        scores = sm.init_scores(key, weights, layout)
        mask_fn = sm.edge_popup(sm.densities.erk(layout, 0.1), layout)

    Args:
      apply_fn: apply_fn(weights, example) -> outputs; it is traced, not run. None: the names tell.
      weights: every parameter of the network; shapes are enough.
      example: what the network reads: a batch, or its shapes.
      axes: {pattern of paths: a word for each axis, or None for leaves that are no kernels}, which overrules all else.
        The words are "stack" (the axis counts layers of one shape), "window" (of a convolution), "in" (it is summed)
        and "out"; the patterns are those of `fnmatch`: {"*/qkv/kernel": "stack in out", "*/router/*": None}.

    Raises:
      ValueError: nothing tells the axes of a kernel; a pattern matches no leaf, or has words that do not fit it; no
        leaf is a kernel.
      TypeError: a leaf is neither an array nor a number.
    """
    shapes = {path: checked_shape(path, leaf) for path, leaf in by_path(weights).items()}
    said = _said(axes or {}, shapes)
    used = dict.fromkeys(shapes) if apply_fn is None else uses(apply_fn, weights, example)
    leaves = {path: said.get(path) or _leaf(path, shape, used[path]) for path, shape in shapes.items()}
    layout = Layout(leaves)
    if not layout:
        raise ValueError(f"no leaf is a kernel; the leaves are: {', '.join(shapes) or '(none)'}")
    return layout


def _said(axes: Mapping[str, str | None], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Leaf]:
    """What the user says; of several patterns that match a leaf, the last."""
    said = {}
    for pattern, words in axes.items():
        paths = [path for path in shapes if fnmatch.fnmatchcase(path, pattern)]
        if not paths:
            raise ValueError(f"no leaf matches {pattern!r}; there are: {', '.join(shapes)}")
        roles = None if words is None else tuple(words.split())
        for path in paths:
            if roles is not None and (len(roles) != len(shapes[path]) or not set(roles) <= set(AXES)):
                raise ValueError(
                    f"{pattern!r}: {words!r} does not fit {path!r} {shapes[path]}: "
                    f"each axis needs one of {', '.join(AXES)}"
                )
            if roles is not None and not {"in", "out"} & set(roles):
                raise ValueError(f"{pattern!r}: {words!r} has neither an axis 'in' nor one 'out'")
            said[path] = Leaf(path, shapes[path], roles, "as you say")
    return said


def _leaf(path: str, shape: tuple[int, ...], found: list[Use] | None) -> Leaf:
    """What a leaf is, by its uses in the traced network, then by its name; `found` None: the network was not traced."""
    kinds, no = {use.kind for use in found or ()}, no_kernel(path, shape)
    roles, tied = _roles([use.roles for use in found or () if use.kind == "product"])
    gate = kinds == {"multiplied"} if found else is_gate(path, shape)
    never_summed = bool(kinds) and kinds <= {"multiplied", "shaped", "added"}
    if "looked up" in kinds:
        no = no or "it is looked up, as a table is"
    elif {"out"} < set(roles.values()) or (kinds and low_rank(path, shape)):
        no = ""  # a product tells more than a name
    elif never_summed and not (names_of(path)[-1] in PLAIN and _long(shape) > 1):
        no = no or (ADDED if "added" in kinds else MULTIPLIED)
    if no:
        return Leaf(path, shape, None, no, gate=gate)
    if roles:
        if "out" not in roles.values():  # depthwise: each channel has weights of its own
            roles = {axis: "out" if role == "stack" else role for axis, role in roles.items()}
        rest = "window" if "in" in roles.values() else "in"  # of axes of length 1, which reshapes drop
        use = next(use for use in found or () if use.kind == "product")
        axes = tuple(roles.get(axis, rest) for axis in range(len(shape)))
        why = TIED if tied else TRACED if use.keeps_zero else FILLED
        return Leaf(path, shape, axes, why, use.groups, use.spacing)
    known = leaf_of(path, shape)
    if known is None:
        raise unknown_axes(path, shape, found is not None)
    return known if found is None else known._replace(why=CHANGED if found else UNUSED)


def _long(shape: tuple[int, ...]) -> int:
    """How many axes are longer than 1."""
    return sum(size > 1 for size in shape)


def _roles(products: list[Mapping[int, str]]) -> tuple[dict[int, str], bool]:
    """({axis: what it does} over all products with a leaf, whether some of them sum what others leave)."""
    roles: dict[int, str] = {}
    tied = False
    for product in products:
        for axis, role in product.items():
            old = roles.setdefault(axis, role)
            if {old, role} == {"stack", "out"}:
                roles[axis] = "out"  # one entry here and the others there: they are parts of one axis
            elif old != role:
                tied = True
    return roles, tied


class Row(NamedTuple):
    """One line of the table of `inspect`."""

    path: str
    shape: tuple[int, ...]
    axes: str  # what the axes do; "" of leaves that are no kernels
    why: str
    layers: int  # how many the leaf stacks
    fan_in: float | None
    fan_out: float | None
    kept: int | None  # weights of each layer at the density


class Inspection(NamedTuple):
    """What `inspect` found; `print` shows it as a table."""

    layout: Layout
    rows: list[Row]
    warnings: list[str]
    density: float

    def __str__(self) -> str:
        heads = ("path", "shape", "axes", "layers", "fan-in", "fan-out", f"kept at {self.density:g}", "why")
        table: list[tuple[str, ...]] = [heads]
        for row in self.rows:
            cells = (row.layers if row.axes else None, row.fan_in, row.fan_out, row.kept)
            numbers = ["" if cell is None else f"{cell:,}" for cell in cells]
            shape = " x ".join(map(str, row.shape)) or "()"
            table.append((row.path, shape, row.axes or "no kernel", *numbers, row.why))
        widths = [max(len(line[i]) for line in table) for i in range(len(heads))]
        right = (3, 4, 5, 6)
        lines = [
            "  ".join(
                cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(line)
            ).rstrip()
            for line in table
        ]
        notes = [f"! {warning}" for warning in self.warnings] or ["nothing to warn of"]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], "", *notes])


def inspect(
    weights: Tree,
    apply_fn: Callable[[Tree, Tree], Tree] | None = None,
    example: Tree = None,
    *,
    axes: Mapping[str, str | None] | None = None,
    density: float = 0.1,
) -> Inspection:
    """Returns a table of every leaf, to print: is it a kernel, and why; what its axes do; its fan-in; what it keeps.

    It is the first thing to do with a network of one's own:

        print(sm.inspect(weights, lambda params, x: model.apply({"params": params}, x), images))

    Below the table stand warnings: of scales and gates of 0, which keep what they multiply dead; of kernels of 0; of
    leaves that the network uses in several ways, or not at all; of kernels whose axes are a guess, that do not stay
    sparse, or that are not floats; of layers that would keep fewer weights than they have inputs or outputs; of what
    may be a stack of layers.

    Args:
      weights: every parameter of the network; shapes are enough, but then nothing is known of zeros.
      apply_fn: apply_fn(weights, example) -> outputs; it is traced, not run. None: the names tell.
      example: what the network reads: a batch, or its shapes.
      axes: {pattern of paths: a word for each axis, or None}, as `describe` takes it.
      density: fraction kept, in [0, 1], for the column of what each layer would keep.

    Raises:
      ValueError: nothing tells the axes of a kernel, and so on: see `describe`; or a density out of range.
    """
    layout, arrays = describe(apply_fn, weights, example, axes), by_path(weights)
    rows = []
    for path, leaf in layout.leaves.items():
        layers = leaf.size("stack")
        kept = None if leaf.axes is None else keep_count(density, math.prod(leaf.shape) // max(layers, 1))
        fan_in, fan_out = (None, None) if leaf.axes is None else (leaf.fan_in, leaf.fan_out)
        rows.append(Row(path, leaf.shape, " ".join(leaf.axes or ()), leaf.why, layers, fan_in, fan_out, kept))
    return Inspection(layout, rows, _warnings(layout, arrays, rows, density, apply_fn is not None), density)


def _warnings(layout: Layout, arrays: Mapping[str, Any], rows: list[Row], density: float, traced: bool) -> list[str]:
    notes = []
    for path, leaf in layout.leaves.items():
        array = arrays[path]
        known = hasattr(array, "dtype") and not isinstance(array, jax.ShapeDtypeStruct | jax.core.Tracer)
        if known and (leaf.gate or leaf.axes) and is_closed(array, gate_stack(leaf.shape) if leaf.gate else leaf.stack):
            notes.append(f"{path} is 0: frozen, it lets nothing pass; {OPEN if leaf.gate else DRAW} changes that")
        if leaf.why == MULTIPLIED and _long(leaf.shape) > 1:
            notes.append(f"{path} {leaf.shape} is multiplied with data entry by entry, and taken for no kernel")
        if leaf.axes is None:
            continue
        if not jnp.issubdtype(getattr(array, "dtype", jnp.float32), jnp.floating):
            notes.append(f"{path} has {array.dtype}: only floats are prunable")
        if leaf.why in NOTES:
            notes.append(f"{path} {NOTES[leaf.why]}")
        if not traced and len(leaf.shape) > 2 and leaf.at("window") and leaf.shape[0] <= LAYERS_FOR:
            notes.append(f"{path} {leaf.shape} is taken for a convolution, by its name and shape; is it a stack?")
    few = [row.path for row in rows if row.kept is not None and row.kept < max(layout[row.path].layer_shape[-2:])]
    if few:
        notes.append(
            f"at density {density:g} these keep fewer weights than they have inputs or outputs: {', '.join(few)}"
        )
    return notes
