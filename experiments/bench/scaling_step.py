"""The train step on fake devices: what it exchanges, its speed, the passes of its selection.

`scaling` starts processes with as many devices as are measured, and calls `traffic`, `speed` and `passes` in them.
"""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import supermask_jax as sm
from experiments.bench import hlo
from experiments.bench.networks import NETWORKS, describe
from experiments.bench.rows import interleaved
from supermask_jax import parallel
from supermask_jax.trees import Tree

DENSITY = 0.5
SPEED_NET = "mnist-convnet"
STEPS_PER_TURN = 4
Holding = Literal["replicated", "sharded", "gathered"]
LAYOUTS: tuple[Holding, ...] = ("replicated", "sharded", "gathered")


def make_step(name: str, layout: Holding, mesh: jax.sharding.Mesh) -> tuple[Callable, Callable, Any]:
    """(the compiled edge-popup step on the mesh, the function that makes its state, that state's shardings).

    "sharded" leaves it to the compiler whether it moves weights or activations. "gathered" asks for whole masked
    weights, so that batches stay as they are split.
    """
    model, image = NETWORKS[name]
    tx = optax.sgd(0.01, 0.9)

    def make_state():
        variables = model.init(jax.random.key(0), jnp.zeros((1, *image)))
        weights = sm.initializers.signed_constant(jax.random.key(1), variables["params"])
        subnet = sm.Subnet(weights, sm.init_scores(jax.random.key(2), weights))
        return sm.init_state(subnet, tx, jax.random.key(3), variables.get("batch_stats", {}), learns="scores")

    loss_fn = make_loss(model)
    if layout == "gathered":
        loss_fn = parallel.with_whole_weights(mesh, loss_fn)
    shardings = parallel.state_shardings(mesh, jax.eval_shape(make_state), shard_scores=layout != "replicated")
    step = sm.make_train_step(selection, loss_fn, tx, learns="scores")
    return sm.jit(step, out_shardings=(shardings, None), donate_argnums=0), make_state, shardings


def selection(scores, key=None):
    """Edge-popup's masks, under a name that tells their collectives from the others."""
    with jax.named_scope("selection"):
        return sm.edge_popup(DENSITY)(scores, key)


def make_loss(model: nn.Module) -> Callable:
    """loss_fn of a batch {"image": float [n, h, w, c], "label": int [n]}: the mean cross-entropy, and no metrics.

    Unlike the loss of the commands, it normalises no images and knows no weights of examples.
    """

    def loss_fn(params, model_state, batch, key):
        variables = {"params": params, "batch_stats": model_state}
        logits, new = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), (new.get("batch_stats", {}), {})

    return loss_fn


def traffic(name: str, layout: Holding, batch: int, as_on_accelerators: bool = True) -> dict:
    """What a compiled step exchanges between all devices of this process. Nothing is run, and no state is made.

    Args:
      name, layout: as in `make_step`.
      batch: images in all.
      as_on_accelerators: count the scores of a pass as the program for GPUs and TPUs does; a CPU's sums rows first.

    Returns:
      "parts": {part: {kind: bytes of the collectives' results, per device}}; those of a pass, for one pass. "count":
      {part: how many collectives}. "state": bytes of a device's weights, scores, momentum and batch statistics.
    """
    mesh = parallel.mesh()
    step, make_state, shardings = make_step(name, layout, mesh)
    shapes = jax.eval_shape(make_state)
    state = jax.tree.map(
        lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), shapes, shardings
    )
    split = jax.NamedSharding(mesh, jax.P(parallel.AXIS))
    images = jax.ShapeDtypeStruct((batch, *NETWORKS[name][1]), jnp.float32, sharding=split)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=split)
    default_only = mock.patch.object(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    jax.clear_caches()  # of the other way of counting
    with default_only if as_on_accelerators else contextlib.nullcontext():
        compiled = step.lower(state, {"image": images, "label": labels}).compile()
    parts: dict[str, list[hlo.Collective]] = {}
    for one in hlo.collectives(compiled.as_text()):
        parts.setdefault(part_of(one), []).append(one)
    others = [images, labels, state.step, jax.eval_shape(jax.random.key_data, state.key)]
    scores = jax.tree.leaves(shapes.subnet.scores)
    return {
        "network": name,
        "layout": layout,
        "batch": batch,
        "devices": mesh.size,
        "scores": sum(leaf.size for leaf in scores),
        "layers": len(scores),
        "as_on_accelerators": as_on_accelerators,
        "parts": {part: hlo.by_kind(of) for part, of in parts.items()},
        "count": {part: len(of) for part, of in parts.items()},
        "state": compiled.memory_analysis().argument_size_in_bytes - sum(map(_bytes_on_a_device, others)),
    }


def part_of(one: hlo.Collective) -> str:
    """The part of a step that a collective belongs to. A selection loops over searches, and a search over passes."""
    if "selection" in one.name:
        assert one.data_loops, f"a collective of the selection is in no loop: {one}"
        return "selection, a pass" if one.data_loops > 1 else "selection, a search"
    return "batch statistics" if "norm" in one.name else "rest"


def _bytes_on_a_device(leaf) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def speed(counts: list[int], batch: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """{devices: {layout: [rounds] seconds of a step}}; "selection, <layout>": of its masks only.

    Each is measured on the first so many of this process's devices. All take turns, so that other work on the machine
    slows all alike.
    """
    model, image = NETWORKS[SPEED_NET]
    rng = np.random.default_rng(0)
    data = {
        "image": rng.standard_normal((batch, *image)).astype(np.float32),
        "label": rng.integers(0, 10, batch, np.int32),
    }
    candidates = {}
    for n in counts:
        mesh = parallel.mesh(n)
        placed = parallel.shard_batch(mesh, data)
        for layout in LAYOUTS:
            step, make_state, shardings = make_step(SPEED_NET, layout, mesh)
            state = sm.jit(make_state, out_shardings=shardings)()
            if layout != "gathered":
                select = sm.jit(selection, out_shardings=shardings.subnet.scores)
                # A copy: the step overwrites its state.
                scores = jax.jit(lambda s: s, out_shardings=shardings.subnet.scores)(state.subnet.scores)
                candidates[n, f"selection, {layout}"] = partial(_repeated, select, scores)
            candidates[n, layout] = _Stepping(step, state, placed)
        tx = optax.sgd(0.01, 0.9)
        step = parallel.pmap_step(selection, make_loss(model), tx, learns="scores", devices=n, donate=True)
        candidates[n, "pmap"] = _Stepping(step, sm.jit(make_state)(), data)
    seconds = {str(n): {} for n in counts}
    for (n, name), times in interleaved(candidates, rounds).items():
        seconds[str(n)][name] = (times / STEPS_PER_TURN).tolist()
    return seconds


class _Stepping:
    """Each call trains for some more steps."""

    def __init__(self, step: Callable, state: sm.TrainState, batch: dict):
        self.step, self.state, self.batch = step, state, batch

    def __call__(self):
        for _ in range(STEPS_PER_TURN):
            self.state, metrics = self.step(self.state, self.batch)
        return metrics


def _repeated(function: Callable, argument):
    for _ in range(STEPS_PER_TURN):
        result = function(argument)
    return result


def passes(name: str) -> dict[str, int]:
    """{kind of scores: passes that selection makes over them}, counted by running it.

    "uniform": as at the start of training; "normal"; "tied": normal, rounded to one decimal.
    """
    shapes = describe(name).scores
    rng = np.random.default_rng(0)
    normal = {path: jnp.asarray(rng.standard_normal(shape, np.float32)) for path, shape in shapes.items()}
    scores = {
        "uniform": sm.init_scores(jax.random.key(2), normal, where=lambda path, leaf: True),
        "normal": normal,
        "tied": jax.tree.map(lambda s: jnp.round(s, 1), normal),
    }
    return {kind: count_passes(jax.tree.map(jnp.abs, of)) for kind, of in scores.items()}


def count_passes(scores: Tree) -> int:
    """How many passes the selection of half of these scores makes over them, its searches together."""
    passes = []

    def loop(more, body, state):
        while more(state):
            before = len(passes)
            state = body(state)
            if len(passes) == before:  # a pass; the loop around it is over searches
                passes.append(1)
        return state

    with jax.disable_jit(), mock.patch.object(jax.lax, "while_loop", loop):
        sm.layerwise_masks(scores, DENSITY)
    return len(passes)
