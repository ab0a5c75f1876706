"""What a traced network does with each leaf of its weights: which axes its products sum, and which they leave.

Each leaf is followed, axis by axis, through operations that move or change its numbers, to the matrix products and
convolutions that multiply it with data, which are counted. Names matter only where two leaves meet in a product.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
from jax.extend import core

from supermask_jax.moves import MOVED, Atom, View, shape_of_variable, sliced
from supermask_jax.names import low_rank, no_kernel, shape_of
from supermask_jax.trees import Tree, by_path


class Use(NamedTuple):
    """One way in which the network uses a leaf."""

    kind: str
    """"product"; "multiplied": with data, entry by entry, so that nothing passes an entry of 0; "shaped": the same of a
    function of the leaf; "added": to the data, or put beside it; "looked up"; "lost": in a way that is not followed."""
    roles: Mapping[int, str] = {}  # of a product: {axis of the leaf: what it does}
    groups: int = 1
    spacing: int = 1
    keeps_zero: bool = True  # of a product: whether a weight of 0 takes part as 0


DATA: Literal["data"] = "data"
PARAMETER: Literal["parameter"] = "parameter"
Value: TypeAlias = Literal["data", "parameter"] | tuple[View, ...] | None
"""What is known of a value: it depends on the data; it was made of parameters alone, in a way that does not matter; it
was made of these leaves; or it is a constant (None)."""

KEEP_ZERO = {
    *("mul", "neg", "abs", "sign", "max", "min", "tanh", "sin", "sinh", "asin", "asinh", "atan", "atanh", "erf"),
    *("sqrt", "square", "integer_pow", "cbrt", "expm1", "log1p", "real", "imag", "convert_element_type", "copy"),
    *("stop_gradient", "sharding_constraint", "rev", "reduce_precision"),
}
"""Operations that make 0 of 0, so that a pruned weight stays pruned; of `max` and `min`, with 0, as in ReLU."""
LOOPS = {"scan": "scan", "while": "loop", "cond": "branches"}  # {primitive: the method that walks it}
CUTS = {"slice", "dynamic_slice", "pad"}
"""Moves after which the numbers are some of the leaf's, or more than those."""
MIXES = {"sort", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "cholesky", "triangular_solve", "fft"}
"""Operations whose results have the shape of their operands, and are not made entry by entry."""


def uses(apply_fn: Callable[[Tree, Tree], Tree], weights: Tree, example: Tree) -> dict[str, list[Use]]:
    """Returns {path: how apply_fn(weights, example) uses the leaf}, in the order of the operations, each way once.

    Args:
      apply_fn: apply_fn(weights, example) -> outputs; it is traced, not run.
      weights: every parameter of the network; shapes are enough.
      example: what the network reads: a batch, or its shapes.
    """
    return _followed(apply_fn, weights, example).found


def multiplications(apply_fn: Callable[[Tree, Tree], Tree], weights: Tree, example: Tree) -> dict[str, int]:
    """Returns {path: multiplications of the leaf's weights with data in apply_fn(weights, example)}; 0 where none is.

    Every weight of a leaf is multiplied equally often: its size divides the number.

    Args:
      apply_fn: apply_fn(weights, example) -> outputs; it is traced, not run.
      weights: every parameter of the network; shapes are enough.
      example: what the network reads: a batch, or its shapes.

    Raises:
      ValueError: how often each weight of a leaf is used is not known: the leaf is cut, shifted or mixed with another
        one before it is multiplied, or that happens in `lax.cond`, `lax.while_loop`, or for rows that the data choose.
    """
    follow = _followed(apply_fn, weights, example)
    for path, doubt in follow.doubts.items():
        raise ValueError(f"{path!r} {doubt}: how often each of its weights is used cannot be counted")
    return follow.counted


def _followed(apply_fn: Callable[[Tree, Tree], Tree], weights: Tree, example: Tree) -> "_Follow":
    leaves = by_path(weights)
    jaxpr = jax.make_jaxpr(apply_fn)(weights, example).jaxpr
    known: list[Value] = [_seed(path, shape_of(leaf)) for path, leaf in leaves.items()]
    known += [DATA] * (len(jaxpr.invars) - len(known))
    inputs = {path for path, leaf in leaves.items() if no_kernel(path, shape_of(leaf)) and not low_rank(path, leaf)}
    follow = _Follow(leaves, inputs)
    follow.run(jaxpr, known)
    return follow


def _seed(path: str, shape: tuple[int, ...]) -> Value:
    return (View(path, tuple(((axis, size),) for axis, size in enumerate(shape))),)


class _Follow:
    """Walks the operations of a jaxpr, and notes what they do with the leaves, and how often."""

    def __init__(self, paths: Iterable[str], inputs: set[str]):
        self.found: dict[str, list[Use]] = {path: [] for path in paths}
        self.counted = dict.fromkeys(self.found, 0)  # multiplications with data
        self.doubts: dict[str, str] = {}  # why those of a leaf cannot be counted
        self.inputs = inputs  # paths of leaves that, by their names, are no kernels
        self.times: int | str = 1  # how often the operations run; or the operation inside which that is not known

    @contextlib.contextmanager
    def repeated(self, times: int | str) -> Iterator[None]:
        outer = self.times
        if isinstance(outer, int) and outer:
            self.times = times if isinstance(times, str) else outer * times
        yield
        self.times = outer

    def note(self, views: Sequence[View], use: Use) -> None:
        for view in views:
            if use not in self.found[view.path]:
                self.found[view.path].append(use)

    def run(self, jaxpr: core.Jaxpr, inputs: Sequence[Value]) -> list[Value]:
        """What is known of the outputs, of what is known of the inputs."""
        known: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))

        def value_of(variable: Any) -> Value:
            return None if isinstance(variable, core.Literal) else known.get(variable)

        for eqn in jaxpr.eqns:
            operands = [value_of(variable) for variable in eqn.invars]
            known |= zip(eqn.outvars, self.apply(eqn, operands), strict=True)
        return [value_of(variable) for variable in jaxpr.outvars]

    def apply(self, eqn: core.JaxprEqn, operands: list[Value]) -> list[Value]:
        name, inner = eqn.primitive.name, list(core.jaxprs_in_params(eqn.params))
        if name in LOOPS:
            return getattr(self, LOOPS[name])(eqn, operands)
        if len(inner) == 1 and len(inner[0].invars) == len(eqn.invars):  # jit, remat, custom derivatives
            with self.repeated(1 if _shapes(inner[0].invars) == _shapes(eqn.invars) else name):  # not shard_map
                return self.run(inner[0], operands)
        if not any(isinstance(operand, tuple) for operand in operands):
            result = DATA if DATA in operands else PARAMETER if PARAMETER in operands else None
            return [result] * len(eqn.outvars)
        if name == "dot_general":
            return [self.dot(eqn, operands)]
        if name == "conv_general_dilated":
            return [self.convolution(eqn, operands)]
        if name == "gather":
            return [self.gather(eqn, operands)]
        shapes, out = _shapes(eqn.invars), shape_of_variable(eqn.outvars[0])
        if name == "select_n":  # what is chosen counts, not by what
            return [self.joined(name, operands[1:])]
        if name == "concatenate":
            return [self.joined(name, operands)]
        if name == "split":
            views = _views(operands[0])
            parts = [tuple(sliced(view, eqn, shapes[0], shape) for view in views) for shape in _shapes(eqn.outvars)]
            return [_changed(name, part) for part in parts]
        if name.startswith("ragged_dot"):
            return [self.ragged_dot(eqn, operands)]
        if isinstance(operands[0], tuple) and name in MOVED and (name != "pad" or operands[1] != DATA):
            moved: Value = tuple(MOVED[name](view, eqn, shapes[0], out) for view in operands[0])
            return [_changed(name, moved) if name in CUTS else moved] * len(eqn.outvars)
        if name not in MIXES and all(_fits(shape, out) for shape in shapes):
            return [self.elementwise(name, operands, shapes, len(out))] * len(eqn.outvars)
        return [self.other(name, operands)] * len(eqn.outvars)

    def joined(self, name: str, operands: Sequence[Value]) -> Value:
        """What lies beside the others, or is one of them; with data, a leaf ends there."""
        if DATA in operands:
            self.note([view for operand in operands for view in _views(operand)], Use("added"))
        return _changed(name, _several(name, operands))

    def elementwise(self, name: str, operands: list[Value], shapes: list[tuple[int, ...]], rank: int) -> Value:
        views = []
        for place, (operand, shape) in enumerate(zip(operands, shapes, strict=True)):
            keeps_zero = name in KEEP_ZERO or (name == "div" and place == 0)
            for view in _views(operand):
                axes = ((),) * rank if view.axes is not None and not shape else view.axes
                views.append(view._replace(axes=axes, keeps_zero=view.keeps_zero and keeps_zero))
        if DATA in operands:
            for view in views:
                scaled = "multiplied" if view.keeps_zero else "shaped"
                self.note([view], Use(scaled if name in ("mul", "div") else "added"))
            return DATA
        largest = max(view.real() for view in views)
        made = tuple(dict.fromkeys(v._replace(rescales=v.rescales or v.real() < largest) for v in views))
        alike = [view for view in made if not view.rescales]
        return made if len(alike) == 1 and all(view.keeps_zero for view in made) else _changed(name, made)

    def other(self, name: str, operands: list[Value]) -> Value:
        """An operation that is not followed: with data, the leaf ends there."""
        views = [view for operand in operands for view in _views(operand)]
        if DATA in operands:
            beside = name in ("pad", "scatter", "scatter-add", "dynamic_update_slice")
            self.note(views, Use("added" if beside else "lost"))
            return DATA
        if name.startswith("reduce") or name in ("argmax", "argmin"):  # a norm, a mean: not the weights
            return PARAMETER
        return _changed(name, tuple(view._replace(axes=None) for view in views))

    def multiplied(self, eqn: core.JaxprEqn, operands: list[Value], side: int, uses: Sequence[Use]) -> Value:
        """Notes the use of each leaf of one operand in a product with the other, and counts it."""
        other = operands[1 - side]
        for view, use in zip(_views(operands[side]), uses, strict=True):
            self.note([view], use)
            if view.rescales or other is None or not self.times:
                continue
            if view.changed:
                self.doubts.setdefault(view.path, f"goes through {view.changed!r} before it is multiplied with data")
            elif isinstance(self.times, str):
                self.doubts.setdefault(view.path, f"is multiplied with data inside {self.times!r}")
            else:
                self.counted[view.path] += self.times * _multiplications(eqn)
        return DATA if other == DATA else PARAMETER

    def dot(self, eqn: core.JaxprEqn, operands: list[Value]) -> Value:
        (summed, batched) = eqn.params["dimension_numbers"]
        operands = [self.plain(operand, operands[1 - side]) for side, operand in enumerate(operands)]
        kernels = [isinstance(operand, tuple) for operand in operands]
        if kernels[0] == kernels[1]:  # of two leaves neither is data, and the names must tell
            for view in (view for operand in operands for view in _views(operand)):
                self.note([view], Use("lost"))
                self.doubts.setdefault(view.path, "is multiplied with another leaf")
            return PARAMETER
        side = kernels.index(True)
        roles = ["out"] * len(shape_of_variable(eqn.invars[side]))
        for axis in summed[side]:
            roles[axis] = "in"
        for axis in batched[side]:
            roles[axis] = "stack"
        return self.multiplied(eqn, operands, side, [_product(view, roles) for view in _views(operands[side])])

    def ragged_dot(self, eqn: core.JaxprEqn, operands: list[Value]) -> Value:
        """A product of each row with the matrix of its group."""
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (_, summed), (_, batched) = numbers.dot_dimension_numbers
        roles = ["out"] * len(shape_of_variable(eqn.invars[1]))
        for axis in (*batched, *numbers.rhs_group_dimensions):
            roles[axis] = "stack"
        for axis in summed:
            roles[axis] = "in"
        self.note(_views(operands[0]), Use("lost"))
        with self.repeated(eqn.primitive.name):  # the data choose the rows of each matrix
            return self.multiplied(eqn, operands, 1, [_product(view, roles) for view in _views(operands[1])])

    def plain(self, value: Value, other: Value) -> Value:
        """PARAMETER in place of leaves that are no kernels by their names, where they meet another leaf in a product.

        A probe that asks for attention is an input, and not the kernel.
        """
        if isinstance(value, tuple) and isinstance(other, tuple) and all(view.path in self.inputs for view in value):
            return PARAMETER
        return value

    def convolution(self, eqn: core.JaxprEqn, operands: list[Value]) -> Value:
        image, kernel = operands
        self.note(_views(image), Use("lost"))
        if not isinstance(kernel, tuple):
            return DATA if DATA in operands else PARAMETER
        dimensions = eqn.params["dimension_numbers"].rhs_spec
        roles = ["window"] * len(dimensions)
        roles[dimensions[0]], roles[dimensions[1]] = "out", "in"
        groups, spacing = eqn.params["feature_group_count"], math.prod(eqn.params["lhs_dilation"])
        uses = []
        for view in kernel:
            own = groups
            if view.axes is not None and groups > 1:  # jax.vmap makes a grouped convolution of many
                outputs = view.axes[dimensions[0]]
                if len(outputs) > 1 and groups % outputs[0][1] == 0:
                    axes = tuple(outputs[1:] if axis == dimensions[0] else a for axis, a in enumerate(view.axes))
                    view = view._replace(axes=axes, picked=view.picked | {outputs[0][0]})
                    own = groups // outputs[0][1]
            uses.append(_product(view, roles, own, spacing))
        return self.multiplied(eqn, operands, 1, uses)

    def gather(self, eqn: core.JaxprEqn, operands: list[Value]) -> Value:
        views, indices = _views(operands[0]), operands[1]
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        if not views or numbers.operand_batching_dims:
            return self.other("gather", operands)
        shape, out = shape_of_variable(eqn.invars[0]), shape_of_variable(eqn.outvars[0])
        rank = len(out)
        kept = [axis for axis in range(len(shape)) if axis not in numbers.collapsed_slice_dims]
        made = []
        for view in views:
            if view.axes is None:
                made.append(view)
                continue
            axes: list[tuple[Atom, ...]] = [()] * rank
            cut, picked = set(view.cut), set(view.picked)
            for place, axis in zip(numbers.offset_dims, kept, strict=True):
                own = view.axes[axis]
                axes[place] = own if sizes[axis] == shape[axis] else tuple((a, min(n, sizes[axis])) for a, n in own)
                cut |= {a for a, _ in own} if sizes[axis] == 1 < shape[axis] else set()
            gone = [a for axis in numbers.collapsed_slice_dims for a, _ in view.axes[axis]]
            rows = [place for place in range(rank) if place not in numbers.offset_dims]
            if indices == DATA or not rows:  # one entry for each example, or one entry
                picked |= set(gone)
            else:  # several entries, which stay an axis: a permutation, say
                for place in rows:
                    axes[place] = tuple((a, out[place]) for a in gone)
            made.append(view._replace(axes=tuple(axes), picked=frozenset(picked), cut=frozenset(cut)))
        if indices == DATA:
            tables = [view for view in made if view.axes is None or _long(view) < 2]
            self.note(tables, Use("looked up"))
            made = [view for view in made if view not in tables]
        return _changed("gather", tuple(made)) or DATA

    def scan(self, eqn: core.JaxprEqn, operands: list[Value]) -> list[Value]:
        jaxpr = _open(eqn.params["jaxpr"])
        # What is scanned over has one axis more outside than inside; jax versions count the others in different ways.
        carries = _of_one_shape(eqn.outvars, jaxpr.outvars)
        constants = _of_one_shape(eqn.invars, jaxpr.invars) - carries
        rows = [row_of(operand) for operand in operands[constants + carries :]]
        carry = operands[constants : constants + carries]
        for times in (0, eqn.params["length"]):  # from the second round on, what the first one made
            with self.repeated(times):
                outs = self.run(jaxpr, [*operands[:constants], *carry, *rows])
            carry = [_joined("scan", old, new) for old, new in zip(carry, outs[:carries], strict=True)]
        return [*carry, *(DATA if out == DATA else PARAMETER if out else None for out in outs[carries:])]

    def branches(self, eqn: core.JaxprEqn, operands: list[Value]) -> list[Value]:
        with self.repeated("cond"):
            results = [self.run(_open(branch), operands[1:]) for branch in eqn.params["branches"]]
        outs = [_several("cond", values) for values in zip(*results, strict=True)]
        return [DATA if operands[0] == DATA and out is not None else out for out in outs]

    def loop(self, eqn: core.JaxprEqn, operands: list[Value]) -> list[Value]:
        before, constants = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        body, carry = operands[before : before + constants], operands[before + constants :]
        for times in (0, "while"):
            with self.repeated(times):
                outs = self.run(_open(eqn.params["body_jaxpr"]), [*body, *carry])
            carry = [_joined("while", old, new) for old, new in zip(carry, outs, strict=True)]
        return carry


def _open(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _of_one_shape(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many variables of a loop have the shape that they have in its body."""
    return sum(a.aval.shape == b.aval.shape for a, b in zip(outside, inside, strict=True))


def _product(view: View, roles: Sequence[str], groups: int = 1, spacing: int = 1) -> Use:
    """The use of a leaf whose view is multiplied with data, and of whose axes those are the roles."""
    if view.rescales:
        return Use("multiplied" if view.keeps_zero else "shaped")
    if view.axes is None:
        return Use("lost")
    found: dict[int, str] = dict.fromkeys(view.picked, "stack")
    real = False
    for role, atoms in zip(roles, view.axes, strict=True):
        for axis, size in atoms:
            if axis < 0:
                continue
            if found.setdefault(axis, role) != role and size > 1:
                if {found[axis], role} != {"stack", "out"}:
                    return Use("lost")
                found[axis] = "out"  # a part of the axis counts, the other part remains: all of it remains
            real = real or (size > 1 and role != "stack")
    if not real:  # every entry meets one entry of the data, as in a product entry by entry
        return Use("multiplied" if view.keeps_zero else "shaped")
    return Use("product", found, groups, spacing, view.keeps_zero)


def _multiplications(eqn: core.JaxprEqn) -> int:
    """The size of what comes out, times the number of products that each entry sums."""
    left, right = _shapes(eqn.invars)
    dimensions = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        summed = math.prod(left[axis] for axis in dimensions[0][0])
    else:
        summed = math.prod(right[axis] for axis in dimensions.rhs_spec[1:])
    return summed * math.prod(shape_of_variable(eqn.outvars[0]))


def _changed(name: str, value: Value) -> Value:
    """What is known of a value after an operation whose results are no longer the weights of its leaves, one by one."""
    if not isinstance(value, tuple):
        return value
    return tuple(view._replace(changed=view.changed or name) for view in value)


def _long(view: View) -> int:
    """How many axes are longer than 1."""
    return sum(any(size > 1 for _, size in atoms) for atoms in view.axes or ())


def _fits(shape: tuple[int, ...], out: tuple[int, ...]) -> bool:
    """Whether an operand of that shape is combined with others entry by entry."""
    return not shape or (len(shape) == len(out) and all(a in (1, b) for a, b in zip(shape, out, strict=True)))


def _shapes(variables: Sequence[Any]) -> list[tuple[int, ...]]:
    return [shape_of_variable(variable) for variable in variables]


def _views(value: Value) -> tuple[View, ...]:
    return value if isinstance(value, tuple) else ()


def _several(name: str, values: Sequence[Value]) -> Value:
    """What is known of a value that is one of these, by the operation of that name."""
    first, *rest = values
    for value in rest:
        first = _joined(name, first, value)
    return first


def _joined(name: str, old: Value, new: Value) -> Value:
    if DATA in (old, new):
        return DATA
    if old == new:
        return old
    if isinstance(old, tuple) and isinstance(new, tuple):
        return _changed(name, (*old, *(view for view in new if view not in old)))
    return _changed(name, old if isinstance(old, tuple) else new if new is not None else old)


def row_of(value: Value) -> Value:
    """What a loop sees of a value whose first axis it runs over."""
    if not isinstance(value, tuple):
        return value
    return tuple(
        view
        if view.axes is None
        else view._replace(axes=view.axes[1:], picked=view.picked | {axis for axis, _ in view.axes[0]})
        for view in value
    )
