"""The step on fake devices: what it exchanges, its speed, the passes of its selection. See `scaling`.

`traffic`, `speed` and `passes` run in a process that was started with as many devices as they are for.
"""

import contextlib
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal
from unittest import mock

import numpy as np

from experiments import benchmark
from experiments.bench import hlo
from experiments.bench.cost_model import Network

DENSITY = 0.5
SPEED_NET = "mnist-convnet"
STEPS_PER_TURN = 4
Holding = Literal["replicated", "sharded", "gathered"]
LAYOUTS: tuple[Holding, ...] = ("replicated", "sharded", "gathered")


def networks() -> dict[str, tuple]:
    """{name: (model, shape of an image)} of the networks here."""
    from supermask_jax import models

    return {
        "mnist-convnet": (models.MnistConvNet(), (28, 28, 1)),  # 1.2 million scores
        "mlp": (models.MLP(use_bias=False, hidden=(4096, 2048)), (64, 64, 1)),  # 25 million, quick to compile
        "resnet-50": (models.ResNet50(), (224, 224, 3)),
        "wide-resnet-50": (models.WideResNet50(), (224, 224, 3)),
        "tiny-resnet": (models.ResNet(10, (1, 1), bottleneck=True, width=16), (64, 64, 3)),
    }


def describe(name: str) -> Network:
    """What the formulae need to know of a network; from shapes, nothing is run."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from supermask_jax.products import products_with_data
    from supermask_jax.trees import by_path

    model, image = networks()[name]
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image)))
    statistics = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes.get("batch_stats", {}))

    def put_out(module, method):
        return method == "__call__" and isinstance(module, nn.Conv | nn.Dense | nn.BatchNorm)

    def apply(weights, images, **options):
        return model.apply({"params": weights, "batch_stats": statistics}, images, **options)

    images = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    _, seen = jax.eval_shape(partial(apply, capture_intermediates=put_out), shapes["params"], images)
    norms = [leaf.size for path, leaf in by_path(statistics).items() if path.endswith("/mean")]
    return Network(
        scores={path: leaf.shape for path, leaf in by_path(shapes["params"]).items()},
        channels=sum(norms),
        norms=len(norms),
        flops=2 * sum(products_with_data(apply, shapes["params"], image).values()),
        activations=sum(leaf.size for leaf in jax.tree.leaves(seen)),
    )


def split_layers(shapes: dict[str, tuple[int, ...]], devices: int) -> set[str]:
    """Paths of the layers that `parallel.state_shardings` splits over so many devices, which need not be there."""
    import jax
    import jax.numpy as jnp

    import supermask_jax as sm
    from supermask_jax import parallel

    mesh = jax.sharding.AbstractMesh((devices,), (parallel.AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    weights = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    state = sm.TrainState(None, sm.Subnet(weights, weights), None, None, None)
    layout = parallel.state_shardings(mesh, state, shard_scores=True).subnet.scores
    return {path for path, sharding in layout.items() if not sharding.is_fully_replicated}


def make_step(name: str, layout: Holding, mesh) -> tuple[Callable, Callable, Any]:
    """(the jitted edge-popup step on the mesh, the function that makes its state, that state's shardings).

    "sharded" leaves it to the compiler whether it moves weights or activations. "gathered" asks for whole masked
    weights, so that batches stay as they are split.
    """
    import jax
    import jax.numpy as jnp
    import optax

    import supermask_jax as sm
    from supermask_jax import parallel

    model, image = networks()[name]
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
    return jax.jit(step, out_shardings=(shardings, None), donate_argnums=0), make_state, shardings


def selection(scores, key=None):
    """Edge-popup's masks, under a name by which their collectives are told from the rest."""
    import jax

    import supermask_jax as sm

    with jax.named_scope("selection"):
        return sm.edge_popup(DENSITY)(scores, key)


def make_loss(model) -> Callable:
    """loss_fn of a batch {"image": float [n, h, w, c], "label": int [n]}: the mean cross-entropy, and no metrics.

    `recipe.make_loss` without weights of examples, and with batch statistics as model state.
    """
    import optax

    def loss_fn(params, model_state, batch, key):
        variables = {"params": params, "batch_stats": model_state}
        logits, new = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), (new.get("batch_stats", {}), {})

    return loss_fn


def traffic(name: str, layout: Holding, batch: int, as_on_accelerators: bool = True) -> dict:
    """What a compiled step exchanges between all devices of this process. Nothing is run, and no state is made.

    Args:
      batch: images in all.
      as_on_accelerators: count the scores of a pass as the program for GPUs and TPUs does; a CPU's sums rows first.

    Returns:
      "parts": {part: {kind: bytes of the collectives' results, per device}}; those of a pass, for one pass. "count":
      {part: how many collectives}. "state": bytes of a device's weights, scores, momentum and batch statistics.
    """
    import jax
    import jax.numpy as jnp

    from supermask_jax import parallel

    mesh = parallel.mesh()
    step, make_state, shardings = make_step(name, layout, mesh)
    shapes = jax.eval_shape(make_state)
    state = jax.tree.map(
        lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), shapes, shardings
    )
    split = jax.NamedSharding(mesh, jax.P(parallel.AXIS))
    images = jax.ShapeDtypeStruct((batch, *networks()[name][1]), jnp.float32, sharding=split)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=split)
    default_only = mock.patch.object(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    jax.clear_caches()  # of the other way of counting
    with default_only if as_on_accelerators else contextlib.nullcontext():
        compiled = step.lower(state, {"image": images, "label": labels}).compile()
    found = hlo.collectives(compiled.as_text())
    parts = {}
    for one in found:
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
    """The part of a step that a collective belongs to. Those of a second search run only where scores tie at a cut."""
    if "selection" in one.name:
        return ("selection, a pass" if one.data_loops else "selection, once") + (", ties" if one.conditional else "")
    return "batch statistics" if "norm" in one.name else "rest"


def _bytes_on_a_device(leaf) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def speed(counts: list[int], batch: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """{devices: {layout: [rounds] seconds of a step}}; "selection, <layout>": of its masks alone.

    On the first so many of this process's devices; all take turns, so that other work on the machine slows all alike.
    """
    import jax
    import optax

    from supermask_jax import parallel

    model, image = networks()[SPEED_NET]
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
            state = jax.jit(make_state, out_shardings=shardings)()
            if layout != "gathered":
                select = jax.jit(selection, out_shardings=shardings.subnet.scores)
                # A copy: the step overwrites its state.
                scores = jax.jit(lambda s: s, out_shardings=shardings.subnet.scores)(state.subnet.scores)
                candidates[n, f"selection, {layout}"] = partial(_repeated, select, scores)
            candidates[n, layout] = _Stepping(step, state, placed)
        tx = optax.sgd(0.01, 0.9)
        step = parallel.pmap_step(selection, make_loss(model), tx, learns="scores", devices=n, donate=True)
        candidates[n, "pmap"] = _Stepping(step, jax.jit(make_state)(), data)
    seconds = {str(n): {} for n in counts}
    for (n, name), times in benchmark.interleaved(candidates, rounds).items():
        seconds[str(n)][name] = (times / STEPS_PER_TURN).tolist()
    return seconds


class _Stepping:
    """Each call goes some steps on."""

    def __init__(self, step, state, batch):
        self.step, self.state, self.batch = step, state, batch

    def __call__(self):
        for _ in range(STEPS_PER_TURN):
            self.state, metrics = self.step(self.state, self.batch)
        return metrics


def _repeated(function, argument):
    for _ in range(STEPS_PER_TURN):
        result = function(argument)
    return result


def passes(name: str) -> dict[str, int]:
    """{kind of scores: passes that selection makes over them}, counted by running it.

    "uniform": as at the start of training; "normal"; "tied": normal, rounded to one decimal.
    """
    import jax
    import jax.numpy as jnp

    import supermask_jax as sm

    shapes = describe(name).scores
    rng = np.random.default_rng(0)
    normal = {path: jnp.asarray(rng.standard_normal(shape, np.float32)) for path, shape in shapes.items()}
    scores = {
        "uniform": sm.init_scores(jax.random.key(2), normal, where=lambda path, leaf: True),
        "normal": normal,
        "tied": jax.tree.map(lambda s: jnp.round(s, 1), normal),
    }
    counted = {}
    for kind, of in scores.items():
        trips = []

        def loop(more, body, state, trips=trips):
            while more(state):
                state = body(state)
                trips.append(1)
            return state

        with jax.disable_jit(), mock.patch.object(jax.lax, "while_loop", loop):
            sm.layerwise_masks(jax.tree.map(jnp.abs, of), DENSITY)
        counted[kind] = len(trips)
    return counted


def answer(task: str, calls: str) -> None:
    """What a child does."""
    print(json.dumps([globals()[task](*arguments) for arguments in json.loads(calls)]))
