"""The train step: one pure function for every method. The caller compiles it, with `backend.jit` or `jax.pmap`."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from supermask_jax.leaves import stack_of
from supermask_jax.names import gate_stack, is_closed, is_gate
from supermask_jax.supermask import Key, MaskFn, ProductFn, Subnet, identity, subnetwork
from supermask_jax.trees import Tree, Where, by_path, map_with_name, mean_over

Learns = Literal["scores", "weights"]
Learner = Learns | tuple[Literal["scores"], Where]
"""What an optimizer updates: a tree of the `Subnet`; or the scores and, beside them, those weights that are chosen."""
Optimizer: TypeAlias = optax.GradientTransformation | tuple[optax.GradientTransformation, optax.GradientTransformation]
"""One optimizer of all that learns; or that of the scores and that of the weights beside them."""
LossFn = Callable[[Tree, Tree, Tree, Any], tuple[jax.Array, tuple[Tree, dict[str, jax.Array]]]]
"""loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics)): a scalar, a tree, {name: scalar}."""


class TrainState(NamedTuple):
    """Everything that a step changes, and the key: step t draws from fold_in(key, t)."""

    step: jax.Array  # int32, the number of steps done
    subnet: Subnet
    model_state: Tree  # batch statistics and the like; None where the model has none
    opt_state: optax.OptState
    key: Key


def init_state(
    subnet: Subnet,
    tx: Optimizer,
    key: Key,
    model_state: Tree = None,
    *,
    learns: Learner,
) -> TrainState:
    """Returns the state before the first step; `tx` is given what learns and nothing else.

    A warning names frozen leaves of zeros that stop all that comes after them, as the last normalisation of a residual
    block often has: scores behind them never move. `initializers.open_gates` sets them to 1.

    Args:
      subnet: the weights and scores to start from.
      tx: optax transformation, the same one that the step is made with; with learns=("scores", where) possibly a pair.
      key: a `jax.random.key`; step t draws its masks and its dropout from fold_in(key, t).
      model_state: what the model carries beside its parameters: batch statistics and the like. None where it has none.
      learns: the tree of the `Subnet` that the optimizer updates; or ("scores", where), so that the leaves of the
        weights that where(path, leaf) chooses learn beside the scores. Those leaves must have no scores: they are
        biases, scales and the like.

    Raises:
      ValueError: `learns` is none of these, its tree has no leaves, or `where` chooses none, or one that has scores;
        `tx` is no optax transformation, nor, with ("scores", where), a pair of them.
      TypeError: `where` chooses a leaf that is not of floats.
    """
    # An update makes weak types strong, and the second step would be compiled again.
    subnet = jax.tree.map(lambda x: jnp.asarray(x, x.dtype) if getattr(x, "weak_type", False) else x, subnet)
    learner = _learner(subnet, learns)
    if learns != "weights":
        _warn_of_closed_gates(subnet, by_path(learner[1]) if isinstance(learns, tuple) else {})
    return TrainState(jnp.int32(0), subnet, model_state, _optimizer(tx, learns).init(learner), key)


def make_train_step(
    mask_fn: MaskFn,
    loss_fn: LossFn,
    tx: Optimizer,
    *,
    learns: Learner,
    axis_name: str | None = None,
    product: ProductFn | None = None,
) -> Callable[[TrainState, Tree], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the function step(state, batch) -> (state, metrics), which the caller compiles (`jit`, `jax.pmap`, scan).

    What does not learn stays bit-identical. With learns="scores" that is every leaf of the weights, biases included.
    `metrics` holds "loss" and what `loss_fn` returns. Donating the state to the compiled step also gives away
    the arrays of the `Subnet` that the state was made from.

        step = sm.jit(sm.make_train_step(mask_fn, loss_fn, tx, learns="scores"), donate_argnums=0)
        for batch in batches:
            state, metrics = step(state, batch)

    Args:
      mask_fn: mask_fn(scores, key) -> masks, exactly 0 or 1. Every device calls it with the same key.
      loss_fn: loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics)), where metrics is a dict
        without "loss", which the step adds. Its key is for dropout and differs between the devices of `axis_name`.
      tx: optax transformation; the state must come from `init_state` with an equal one. It is given the loss as
        `value`, the gradient as `grad` and the loss as a function of what learns as `value_fn`, for those that ask.
        With learns=("scores", where) it may be a pair: one for the scores, one for the weights beside them; then those
        that call `value_fn`, as a line search does, do not work.
      learns: which tree of the `Subnet` the optimizer updates; or ("scores", where): the scores, and beside them the
        leaves of the weights that where(path, leaf) chooses, such as biases and scales:

            learns = ("scores", lambda path, leaf: path.endswith(("bias", "scale")))
            tx = (optax.sgd(0.1), optax.adam(1e-3))
      axis_name: the pmap axis over which gradients, metrics and floating model state are averaged.
      product: product(subnet, key) -> the params that `loss_fn` is given, for products that are not weights * (0 or 1):
        rescaled, signed, with a gain. It replaces `mask_fn`, which then is not called. None means
        `subnetwork(mask_fn, subnet, key)`.

    Raises:
      ValueError: here, `learns` or `tx` is none of these, or learns="scores" with `identity`, whose scores are fixed
        masks; at the first call, the learning tree has no leaves, the optimizer state does not fit it, or `loss_fn`
        returns anything but (loss, (model_state, metrics)).
    """
    _check_learns(learns)
    if mask_fn is identity and learns == "scores":
        raise ValueError("identity's scores are fixed masks and cannot learn: say learns='weights'")

    product, optimizer = product or partial(subnetwork, mask_fn), _optimizer(tx, learns)

    def step(state: TrainState, batch: Tree) -> tuple[TrainState, dict[str, jax.Array]]:
        return _step(product, loss_fn, optimizer, learns, axis_name, state, batch)

    return step


def _step(
    product: ProductFn,
    loss_fn: LossFn,
    tx: optax.GradientTransformationExtraArgs,
    learns: Learner,
    axis_name: str | None,
    state: TrainState,
    batch: Tree,
) -> tuple[TrainState, dict[str, jax.Array]]:
    learner, mean = _learner(state.subnet, learns), partial(mean_over, axis_name)
    _check_opt_state(tx, state.opt_state, learner, learns)
    mask_key, loss_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    if axis_name is not None:
        loss_key = jax.random.fold_in(loss_key, jax.lax.axis_index(axis_name))

    def loss_of(learner: Any) -> Any:
        params = product(_with_learner(state.subnet, learns, learner), mask_key)
        return _checked(loss_fn(params, state.model_state, batch, loss_key))

    def loss_at(tried: Any) -> jax.Array:  # in the dtypes of what learns: a line search with 64 bits has other ones
        return mean(loss_of(jax.tree.map(lambda x, new: new.astype(x.dtype), learner, tried))[0])

    (loss, (model_state, metrics)), grads = jax.value_and_grad(loss_of, has_aux=True)(learner)
    grads, metrics = mean((grads, {"loss": loss, **metrics}))
    told = {"value": metrics["loss"], "grad": grads, "value_fn": loss_at}
    updates, opt_state = tx.update(grads, state.opt_state, learner, **told)
    subnet = _with_learner(state.subnet, learns, optax.apply_updates(learner, updates))
    # Only floats have a mean: counters, flags and keys are carried as they are.
    model_state = jax.tree.map(lambda x: mean(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, model_state)
    return TrainState(state.step + 1, subnet, model_state, opt_state, state.key), metrics


def _checked(result: Any) -> Any:
    """What a `loss_fn` returned; ValueError where that is not (loss, (model_state, metrics))."""
    aux = result[1] if isinstance(result, tuple) and len(result) == 2 else None
    if not (isinstance(aux, tuple) and len(aux) == 2 and isinstance(aux[1], dict) and "loss" not in aux[1]):
        raise ValueError("loss_fn must return (loss, (model_state, metrics)); metrics: a dict without 'loss'")
    return result


def _check_learns(learns: Learner) -> None:
    beside = isinstance(learns, tuple) and len(learns) == 2 and learns[0] == "scores" and callable(learns[1])
    if not beside and learns not in Subnet._fields:
        raise ValueError(f"learns must be 'scores' or 'weights', or ('scores', where), got {learns!r}")


def _learner(subnet: Subnet, learns: Learner) -> Any:
    """What learns: a tree of the subnet, or a pair of the scores and the chosen weights, None at the others."""
    _check_learns(learns)
    tree = subnet.scores if isinstance(learns, tuple) else getattr(subnet, learns)
    if not jax.tree.leaves(tree):
        raise ValueError(
            f"the {'scores' if isinstance(learns, tuple) else learns} tree has no leaves: nothing would train"
        )
    if not isinstance(learns, tuple):
        return tree
    scores, where = by_path(subnet.scores), learns[1]

    def choose(path: str, leaf: jax.Array) -> jax.Array | None:
        if not where(path, leaf):
            return None
        if path in scores:
            raise ValueError(f"{path!r} has scores, so its weights are frozen and cannot learn beside them")
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"only floats can learn; {path!r} has {jnp.result_type(leaf)}")
        return leaf

    beside = map_with_name(choose, subnet.weights)
    if not jax.tree.leaves(beside):
        others = ", ".join(path for path in by_path(subnet.weights) if path not in scores)
        raise ValueError(f"no weights are chosen to learn beside the scores; there are: {others or '(none)'}")
    return tree, beside


def _with_learner(subnet: Subnet, learns: Learner, learner: Any) -> Subnet:
    if not isinstance(learns, tuple):
        return subnet._replace(**{learns: learner})
    scores, beside = learner
    weights = jax.tree.map(lambda frozen, new: frozen if new is None else new, subnet.weights, beside)
    return Subnet(weights, scores)


def _optimizer(tx: Optimizer, learns: Learner) -> optax.GradientTransformationExtraArgs:
    """One transformation of all that learns, which takes more arguments than it may need."""
    if isinstance(tx, optax.GradientTransformation):
        return optax.with_extra_args_support(tx)
    if not isinstance(learns, tuple) or not isinstance(tx, tuple) or len(tx) != 2:
        raise ValueError(
            f"tx must be an optax transformation, or a pair of them with learns=('scores', where); got {tx!r}"
        )
    parts = [optax.with_extra_args_support(part) for part in tx]

    def init(learner: Any) -> tuple[Any, ...]:
        return tuple(part.init(own) for part, own in zip(parts, learner, strict=True))

    def update(grads: Any, states: Any, learner: Any, *, value: jax.Array, grad: Any, value_fn: Any) -> tuple[Any, Any]:
        results = [
            part.update(own, state, params, value=value, grad=own, value_fn=value_fn)
            for part, own, state, params in zip(parts, grads, states, learner, strict=True)
        ]
        updates, new = zip(*results, strict=True)
        return updates, new

    return optax.GradientTransformationExtraArgs(init, update)


def _warn_of_closed_gates(subnet: Subnet, learning: Mapping[str, Any]) -> None:
    """Warns of frozen leaves of zeros that the data is multiplied by; under jit nothing is known."""
    scores = by_path(subnet.scores)
    for path, leaf in by_path(subnet.weights).items():
        may_close = path in scores or (path not in learning and is_gate(path, leaf))
        if not may_close or isinstance(leaf, jax.core.Tracer):
            continue
        shape = jnp.shape(leaf)
        if not is_closed(leaf, stack_of(path, shape) if path in scores else gate_stack(shape)):
            continue
        way_out = (
            "draw it with a function of sm.initializers"
            if path in scores
            else "set it to 1 with sm.initializers.open_gates, or let it learn: learns=('scores', where)"
        )
        warnings.warn(
            f"{path!r} is frozen at 0: where the data is multiplied by it, nothing passes, and no score before or "
            f"behind it moves; {way_out}",
            stacklevel=3,
        )


def _check_opt_state(tx: optax.GradientTransformation, opt_state: Any, learner: Any, learns: Learner) -> None:
    def layout(tree):
        return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]

    if layout(opt_state) != layout(jax.eval_shape(tx.init, learner)):
        raise ValueError(
            f"the optimizer state does not fit the {learns} tree: make the state with "
            f"init_state(..., learns={learns!r}) and the same optimizer"
        )
