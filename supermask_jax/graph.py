"""A function traced by jax as one list of operations, and what the operations make of given arguments."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from supermask_jax.backend import jit
from supermask_jax.trees import Tree, by_path

_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"}


class Node(NamedTuple):
    """One operation. Values go by number."""

    primitive: Any
    params: dict[str, Any]
    ins: tuple[int, ...]
    outs: tuple[int, ...]


class Graph(NamedTuple):
    """All operations in order, those inside functions that are called included."""

    nodes: list[Node]
    weights: list[int]  # the arguments: the leaves of the weights, then those of the example
    example: list[int]
    outputs: list[int]
    constants: dict[int, Any]
    names: dict[int, str]  # of the weights, their paths, and of arrays that are closed over
    structure: Any  # of the outputs


def trace(apply_fn: Callable[[Tree, Tree], Tree], weights: Tree, example: Tree) -> Graph:
    """Returns the operations of apply_fn(weights, example); calls are replaced by what they call."""
    closed, shape = jax.make_jaxpr(apply_fn, return_shape=True)(weights, example)
    numbers = itertools.count()
    nodes: list[Node] = []
    constants: dict[int, Any] = {}
    arguments = [next(numbers) for _ in closed.jaxpr.invars]
    names = {number: path or "weights" for number, path in zip(arguments, by_path(weights), strict=False)}
    ends, closed_over = len(names), itertools.count()

    def constant(value: Any) -> int:
        number = next(numbers)
        constants[number] = value
        return number

    def named(value: Any) -> int:
        number = constant(value)
        names[number] = f"closed over {next(closed_over)}"
        return number

    def walk(jaxpr: core.Jaxpr, ins: Sequence[int]) -> list[int]:
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), ins, strict=True))

        def number_of(variable: Any) -> int:
            return constant(variable.val) if isinstance(variable, core.Literal) else known[variable]

        for eqn in jaxpr.eqns:
            ins, inner = tuple(map(number_of, eqn.invars)), _called(eqn)
            if inner:
                outs = walk(inner.jaxpr, [*map(named, inner.consts), *ins])
            else:
                outs = [next(numbers) for _ in eqn.outvars]
                nodes.append(Node(eqn.primitive, eqn.params, ins, tuple(outs)))
            known |= zip(eqn.outvars, outs, strict=True)
        return list(map(number_of, jaxpr.outvars))

    outputs = walk(closed.jaxpr, [*map(named, closed.consts), *arguments])
    return Graph(nodes, arguments[:ends], arguments[ends:], outputs, constants, names, jax.tree.structure(shape))


def run(graph: Graph, weights: Tree, example: Tree) -> dict[int, np.ndarray]:
    """Returns {number: array} of all values.

    Raises:
      ValueError: a value is a random key.
    """

    given = {number: value for number, value in graph.constants.items() if number in graph.names}
    leaves = [*jax.tree.leaves(weights), *jax.tree.leaves(example)]
    given |= zip((*graph.weights, *graph.example), leaves, strict=True)

    @jit
    def computed(given: dict[int, Any]) -> dict[int, Any]:  # arrays are arguments: constants would be folded
        known = graph.constants | given
        for node in graph.nodes:
            results = bind(node, [known[number] for number in node.ins])
            known |= zip(node.outs, results if node.primitive.multiple_results else [results], strict=True)
        return {number: value for number, value in known.items() if number not in graph.constants}

    values = graph.constants | computed(given)
    if any(jax.dtypes.issubdtype(getattr(value, "dtype", float), jax.dtypes.extended) for value in values.values()):
        raise ValueError("apply_fn uses a random key: give an apply_fn for inference, which draws nothing")
    return {number: np.asarray(value) for number, value in values.items()}


def bind(node: Node, args: Sequence[Any], **changes: Any) -> Any:
    """Returns the result of the operation on these operands: one value, or a list of an operation with several."""
    return node.primitive.bind(*args, **{**node.params, **changes})


def _called(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The function that the operation does nothing but call, or None."""
    inner = [part for part in eqn.params.values() if isinstance(part, core.Jaxpr | core.ClosedJaxpr)]
    if eqn.primitive.name not in _CALLS or len(inner) != 1:
        return None
    return inner[0] if isinstance(inner[0], core.ClosedJaxpr) else core.ClosedJaxpr(inner[0], ())
