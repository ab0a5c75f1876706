"""The train step: one pure function for every method. The caller compiles it, with `backend.jit` or `jax.pmap`."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from supermask_jax.supermask import Key, MaskFn, ProductFn, Subnet, identity, subnetwork
from supermask_jax.trees import Tree

Learns = Literal["scores", "weights"]
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
    tx: optax.GradientTransformation,
    key: Key,
    model_state: Tree = None,
    *,
    learns: Learns,
) -> TrainState:
    """Returns the state before the first step; `tx` is given the learning tree and nothing else.

    Args:
      subnet: the weights and scores to start from.
      tx: optax transformation, the same one that the step is made with.
      key: a `jax.random.key`; step t draws its masks and its dropout from fold_in(key, t).
      model_state: what the model carries beside its parameters: batch statistics and the like. None where it has none.
      learns: the tree of the `Subnet` that the optimizer updates.

    Raises:
      ValueError: `learns` is not "scores" or "weights", or that tree has no leaves, so that nothing would train.
    """
    return TrainState(jnp.int32(0), subnet, model_state, tx.init(_learner(subnet, learns)), key)


def make_train_step(
    mask_fn: MaskFn,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    learns: Learns,
    axis_name: str | None = None,
    product: ProductFn | None = None,
) -> Callable[[TrainState, Tree], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the function step(state, batch) -> (state, metrics), which the caller compiles (`jit`, `jax.pmap`, scan).

    The tree that does not learn stays bit-identical. With learns="scores" that is every leaf of the weights, biases
    included. `metrics` holds "loss" and what `loss_fn` returns. Donating the state to the compiled step also gives away
    the arrays of the `Subnet` that the state was made from.

        step = sm.jit(sm.make_train_step(mask_fn, loss_fn, tx, learns="scores"), donate_argnums=0)
        for batch in batches:
            state, metrics = step(state, batch)

    Args:
      mask_fn: mask_fn(scores, key) -> masks, exactly 0 or 1. Every device calls it with the same key.
      loss_fn: loss_fn(params, model_state, batch, key) -> (loss, (model_state, metrics)). Its key is for dropout and
        differs between the devices of `axis_name`.
      tx: optax transformation; the state must come from `init_state` with an equal one.
      learns: which tree of the `Subnet` the optimizer updates.
      axis_name: the pmap axis over which gradients, metrics and floating model state are averaged.
      product: product(subnet, key) -> the params that `loss_fn` is given, for products that are not weights * (0 or 1):
        rescaled, signed, with a gain. It replaces `mask_fn`, which then is not called. None means
        `subnetwork(mask_fn, subnet, key)`.

    Raises:
      ValueError: here, `learns` is unknown, or learns="scores" with `identity`, whose scores are fixed masks; at the
        first call, the learning tree has no leaves, the optimizer state does not fit it, or `loss_fn` returns anything
        but (loss, (model_state, metrics)).
    """
    _check_learns(learns)
    if mask_fn is identity and learns == "scores":
        raise ValueError("identity's scores are fixed masks and cannot learn: say learns='weights'")

    if product is None:
        product = partial(subnetwork, mask_fn)

    def step(state: TrainState, batch: Tree) -> tuple[TrainState, dict[str, jax.Array]]:
        learner = _learner(state.subnet, learns)
        _check_opt_state(tx, state.opt_state, learner, learns)
        mask_key, loss_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        if axis_name is not None:
            loss_key = jax.random.fold_in(loss_key, jax.lax.axis_index(axis_name))

        def loss_of(learner):
            params = product(state.subnet._replace(**{learns: learner}), mask_key)
            loss, aux = loss_fn(params, state.model_state, batch, loss_key)
            if not (isinstance(aux, tuple) and len(aux) == 2 and isinstance(aux[1], dict) and "loss" not in aux[1]):
                raise ValueError("loss_fn must return (loss, (model_state, metrics)); metrics: a dict without 'loss'")
            return loss, aux

        (loss, (model_state, metrics)), grads = jax.value_and_grad(loss_of, has_aux=True)(learner)
        metrics = {"loss": loss, **metrics}
        if axis_name is not None:
            grads, metrics, model_state = jax.lax.pmean((grads, metrics, model_state), axis_name)
        updates, opt_state = tx.update(grads, state.opt_state, learner)
        subnet = state.subnet._replace(**{learns: optax.apply_updates(learner, updates)})
        return TrainState(state.step + 1, subnet, model_state, opt_state, state.key), metrics

    return step


def _check_learns(learns: str) -> None:
    if learns not in Subnet._fields:
        raise ValueError(f"learns must be 'scores' or 'weights', got {learns!r}")


def _learner(subnet: Subnet, learns: Learns) -> Any:
    _check_learns(learns)
    learner = getattr(subnet, learns)
    if not jax.tree.leaves(learner):
        raise ValueError(f"the {learns} tree has no leaves: nothing would train")
    return learner


def _check_opt_state(tx: optax.GradientTransformation, opt_state: Any, learner: Any, learns: Learns) -> None:
    def layout(tree):
        return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]

    if layout(opt_state) != layout(jax.eval_shape(tx.init, learner)):
        raise ValueError(
            f"the optimizer state does not fit the {learns} tree: make the state with "
            f"init_state(..., learns={learns!r}) and the same optimizer"
        )
