"""The smaller dense network that is left of a masked one without the neurons and channels that do nothing.

The network is traced on one example. Forwards, each entry of each value is found to depend on the input or not;
backwards, to be read or not. What depends on the input and is read is traced again, in smaller arrays.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from supermask_jax.backend import jit
from supermask_jax.channels import Box, Constant, Part, Value, bounding, compressed, entries, everything, filling, fit
from supermask_jax.flops import parameter_count
from supermask_jax.graph import Graph, run, trace
from supermask_jax.products import MOST, rule_of
from supermask_jax.trees import Tree, apply_masks, by_path

ALIKE = 0.05  # of the largest output: more than rounding, and less than what other examples change


class Compacted(NamedTuple):
    """A smaller network that computes what a masked one does."""

    apply_fn: Callable[[dict[str, jax.Array], Tree], Tree]  # apply_fn(params, inputs) -> outputs, pure
    params: dict[str, jax.Array]  # named by the leaves of the weights that they are a part of, or computed from
    before: dict[str, tuple[int, ...]]  # {path: shape} of the weights
    after: dict[str, tuple[int, ...]]  # {name: shape} of `params`


def compact(apply_fn: Callable[[Tree, Tree], Tree], weights: Tree, masks: Tree, inputs: Tree) -> Compacted:
    """Returns a smaller dense network with the outputs of apply_fn(weights * masks, inputs), for batches of any size.

    Neurons and channels are removed that are the same for every input, because all that they read is masked or
    constant, and those that nothing reads. What a constant neuron adds to the next layer becomes a bias there. The
    network need not be a chain: whatever jax can trace is accepted.

        small = sm.compact(lambda params, x: model.apply({"params": params}, x), weights, masks, images)
        logits = sm.jit(small.apply_fn)(small.params, images)
        parameters = sum(math.prod(shape) for shape in small.after.values())

    Units go through dense layers, convolutions, elementwise operations (activations, sums, BatchNorm in inference),
    pooling, reductions, reshapes, transpositions, slices, padding and concatenation. Any other operation gets its
    operands whole and makes results that are needed whole: fewer units go, and the outputs are the same all the same.
    Only what masks decide is found, not a ReLU that never fires.

    Some units stay because removing them would cost more than it saves. A constant channel of one branch of a sum,
    where the other branch is not constant, is removed and filled in if at least half of the branch's channels are such;
    otherwise it is computed. A constant channel that is not 0, before a padded convolution, adds less near the border:
    if at least half of the channels are such, they are replaced by a convolution of one image of ones; otherwise they
    stay. A grouped convolution keeps or loses groups whole.

    Args:
      apply_fn: apply_fn(params, inputs) -> outputs, for inference: what it computes of an example depends on no other
        example. Batch statistics and other arrays may be closed over; `params` has them too, as "closed over 0".
      weights: every parameter of the network.
      masks: 0 or 1, None at leaves that are not prunable; or None where the weights are masked already.
      inputs: a batch [n, ...], or a tree of them. Shapes and dtypes count, and the first example is run.

    Returns:
      The network; its outputs differ by rounding. It is for inference: custom derivatives are lost.

    Raises:
      ValueError: a mask that has no weight, does not fit it, or is not 0/1; inputs that are no batches of one size;
        outputs without a batch axis; outputs that depend on the other examples of the batch, as those of BatchNorm in
        training do; a network that draws random numbers.
    """
    parameter_count(weights, masks)
    weights = jax.tree.map(jnp.asarray, weights if masks is None else jit(apply_masks)(weights, masks))
    example = jax.tree.map(lambda leaf: np.asarray(leaf)[:1], _batch(inputs))
    graph = trace(apply_fn, weights, example)
    values = _values(graph, run(graph, weights, example))
    _check_examples(apply_fn, weights, example, [values[number].data for number in graph.outputs])
    smaller = _smaller(graph, values, _live(graph, values))
    found: dict[str, np.ndarray] = {}
    leaves = jax.tree.leaves(example)
    jax.eval_shape(lambda leaves: smaller(leaves, _kept_in(found)), leaves)
    params = jax.tree.map(jnp.asarray, found)
    traced = jax.make_jaxpr(lambda params, leaves: smaller(leaves, _taken_from(params)))(params, leaves)
    shapes = [{path: jnp.shape(leaf) for path, leaf in by_path(tree).items()} for tree in (weights, params)]
    return Compacted(_of_batches(traced, example, graph.structure), params, *shapes)


def _values(graph: Graph, arrays: dict[int, np.ndarray]) -> dict[int, Value]:
    """Of every value, which entries depend on the example, and what it is made of if none does."""
    values = {}
    for number, array in arrays.items():
        varies = np.broadcast_to(np.bool_(number in graph.example), array.shape)
        values[number] = Value(array, varies, graph.names.get(number, ""))
    for node in graph.nodes:
        ins = [values[number] for number in node.ins]
        if any(value.varies.any() for value in ins):
            rule = rule_of(node, ins)
            made = [Value(arrays[out], rule.varies(node, ins, arrays[out].shape), "constants") for out in node.outs]
        else:
            name = "+".join(dict.fromkeys(value.name for value in ins if value.name))
            made = [values[out]._replace(name=name) for out in node.outs]
        values |= zip(node.outs, made, strict=True)
    return values


def _live(graph: Graph, values: dict[int, Value]) -> dict[int, Box]:
    """What is read of each value, so that the outputs can be computed."""
    live = {number: everything(values[number].data.shape) for number in graph.outputs}
    for node in reversed(graph.nodes):
        boxes = [box for number in node.outs if (box := _kept(values, live, number)) is not None]
        if boxes:
            ins = [values[number] for number in node.ins]
            for number, want in zip(node.ins, rule_of(node, ins).wants(node, ins, boxes[0]), strict=True):
                live[number] = tuple(map(np.logical_or, live.get(number, want), want))
    return live


def _kept(values: dict[int, Value], live: dict[int, Box], number: int) -> Box | None:
    """What is computed of a value, or None: all that is read and varies, and constants that would cost more."""
    those = values[number].varies & entries(live[number]) if number in live else np.zeros((), bool)
    if not those.any():
        return None
    want, kept = live[number], bounding(those)
    kept = tuple(wide if axis.sum() > MOST * wide.sum() else axis for axis, wide in zip(kept, want, strict=True))
    _, others = filling(kept, want, values[number].data)
    return want if others.size > max(others.shape, default=1) else kept  # a whole map would have to be filled in


def _smaller(graph: Graph, values: dict[int, Value], live: dict[int, Box]) -> Callable[..., list[Any]]:
    """smaller(leaves of the example, constant) -> the outputs, without computing what is constant or not read."""

    def smaller(leaves: Sequence[Any], constant: Constant) -> list[Any]:
        given = [(leaf, everything(leaf.shape)) for leaf in leaves]
        there: dict[int, tuple[Any, Box]] = dict(zip(graph.example, given, strict=True))

        def operand(number: int, want: Box, compresses: bool = False) -> Any:
            value = values[number]
            if number in there:
                x, have = there[number]
                if all((some & wanted).any() for some, wanted in zip(have, want, strict=True)):
                    return fit(x, have, want, value.data, constant)
            data = value.data[np.ix_(*want)]
            if value.data.size and not data.size:
                return None
            data = compressed(data) if compresses else data
            return constant(data, value.name) if value.name else data

        for node in graph.nodes:
            boxes = [box for number in node.outs if (box := _kept(values, live, number)) is not None]
            if not boxes:
                continue
            ins, out = [values[number] for number in node.ins], values[node.outs[0]]
            rule = rule_of(node, ins)
            wants = rule.wants(node, ins, boxes[0])
            args = [operand(*of, rule.compresses) for of in zip(node.ins, wants, strict=True)]
            results, have = rule.run(Part(node, ins, out, boxes[0], wants), args, constant)
            if node.primitive.multiple_results:
                there |= {number: (x, everything(x.shape)) for number, x in zip(node.outs, results, strict=True)}
            else:
                there[node.outs[0]] = results, have
        return [operand(number, live[number]) for number in graph.outputs]

    return smaller


def _kept_in(found: dict[str, np.ndarray]) -> Constant:
    """A `constant` that adds each array to the dictionary, under a name of its own."""

    def constant(array: np.ndarray, name: str) -> np.ndarray:
        found[_unused(name, found)] = array
        return array

    return constant


def _taken_from(params: dict[str, Any]) -> Constant:
    """A `constant` that returns what `_kept_in` has added at the same call."""
    used: set[str] = set()

    def constant(array: np.ndarray, name: str) -> Any:
        used.add(name := _unused(name, used))
        return params[name]

    return constant


def _unused(name: str, used: Any) -> str:
    numbered = itertools.chain([name], (f"{name} {number}" for number in itertools.count(2)))
    return next(name for name in numbered if name not in used)


def _of_batches(traced: core.ClosedJaxpr, example: Tree, structure: Any) -> Callable[[dict[str, Any], Tree], Tree]:
    """The function of a batch, from that of one example [1, ...]."""
    call, expected = core.jaxpr_as_fun(traced), _shapes(example)

    def apply_fn(params: dict[str, jax.Array], inputs: Tree) -> Tree:
        inputs = _batch(inputs)
        if _shapes(inputs) != expected:
            raise ValueError(f"the network was compacted for examples {expected}, got {_shapes(inputs)}")
        outs = jax.vmap(lambda leaves: call(*jax.tree.leaves(params), *leaves))(
            [leaf[:, None] for leaf in jax.tree.leaves(inputs)]
        )
        return jax.tree.unflatten(structure, [out.reshape(-1, *out.shape[2:]) for out in outs])

    return apply_fn


def _batch(inputs: Tree) -> Tree:
    """The inputs as arrays. Raises ValueError unless they are batches of one size."""
    inputs = jax.tree.map(jnp.asarray, inputs)
    shapes = [leaf.shape for leaf in jax.tree.leaves(inputs)]
    if len({shape[:1] for shape in shapes}) != 1 or shapes[0][:1] in ((), (0,)):
        raise ValueError(f"inputs must be arrays [n, ...] with the same n >= 1, got shapes {shapes}")
    return inputs


def _shapes(inputs: Tree) -> dict[str, str]:
    """{path: dtype and shape of an example}."""
    return {path: f"{leaf.dtype} {list(leaf.shape[1:])}" for path, leaf in by_path(inputs).items()}


def _check_examples(
    apply_fn: Callable[[Tree, Tree], Tree], weights: Tree, example: Tree, outputs: Sequence[np.ndarray]
) -> None:
    """Raises ValueError unless the outputs have a batch axis, and another example in the batch changes nothing."""

    def with_another(leaf: np.ndarray) -> np.ndarray:
        other = np.flip(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.floating):  # an example of zeros is usual
            other = other + np.random.default_rng(0).standard_normal(leaf.shape).astype(leaf.dtype)
        return np.concatenate([leaf, other])

    results = jit(apply_fn)(weights, jax.tree.map(with_another, example))
    for alone, both in zip(outputs, jax.tree.leaves(results), strict=True):
        if alone.shape[:1] != (1,) or both.shape != (2, *alone.shape[1:]):
            raise ValueError(f"outputs must have a batch axis: one example gives {alone.shape}, two give {both.shape}")
        alone, first = alone[0].astype(np.float64), np.asarray(both[0], np.float64)
        margin = ALIKE * np.abs(alone, where=np.isfinite(alone), out=np.zeros_like(alone)).max(initial=0)
        if not np.allclose(alone, first, rtol=0, atol=margin, equal_nan=True):
            raise ValueError(
                "outputs of an example depend on the other examples of its batch (is a BatchNorm in training mode?)"
            )
