"""Inference with masked networks: the dense product, the smaller network that `compact` makes, sparse matrices, and
other libraries where they are installed.

The networks are trained for a few epochs on 4,000 digits, so that masks are those of a method and not random ones. No
candidate multiplies by the masks: that is done once, before.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import sparse

import supermask_jax as sm
from experiments.bench import child, runtimes
from experiments.bench.rows import compared, cores, interleaved, row
from experiments.config.presets import edge_popup_rate
from experiments.config.sections import Init, Model
from experiments.data.augment import normalise
from experiments.data.batches import epoch_order
from experiments.data.mnist import mnist_5k
from experiments.data.source import Dataset
from experiments.run.markdown import table
from experiments.training.loss import make_loss
from experiments.training.network import Network, network
from supermask_jax.commands import graphs, networks, onnx_file
from supermask_jax.trees import Tree, apply_masks, by_path, ones_and_sizes

NETWORKS = {"lenet-300-100": {1: 100, 256: 20}, "convnet": {1: 100, 256: 2}}
"""{name: {images of a batch: calls in a turn}}: the first call of a turn finds the caches full of another's data."""
METHODS = ("edge-popup", "gradual")
DENSITIES = (0.5, 0.1, 0.02, 0.005)
EPOCHS, BATCH_SIZE = 10, 64
OTHERS = ("compacted", "sparse", "onnxruntime", "sparselab")
RATIOS = tuple((name, "dense", None, None) for name in OTHERS)


class Trained(NamedTuple):
    """A network with masks, after training."""

    network: Network
    weights: Tree
    masks: Tree


def measure(rounds: int, status: Callable) -> dict:
    """Trains, compacts and times every network.

    Args:
      rounds: times that each candidate is measured.
      status: shows what is being measured, as a context manager.

    Returns:
      {"rows": the table of times, "networks": of each network what is left of it, "libraries": {name: version}}.
    """
    dataset, rows, found = mnist_5k(), [], []
    for name, calls in NETWORKS.items():
        for method in METHODS:
            for density in DENSITIES:
                group = f"{name}, {method}, density {density}"
                with status(f"training {group}"):
                    trained = train(name, method, density, dataset, EPOCHS)
                with status(f"inference, {group}"):
                    times, left = time_network(group, trained, dataset, calls, rounds)
                rows += times
                found.append({"network": name, "method": method, "density": density, **left})
    return {"rows": rows, "networks": found, "libraries": runtimes.installed()}


def train(name: str, method: str, density: float, dataset: Dataset, epochs: int) -> Trained:
    """A network trained by edge-popup (ERK) or gradual magnitude pruning (over all layers).

    Args:
      name: of `NETWORKS`.
      method: of `METHODS`.
      density: fraction of the weights that is left.
      dataset: the images.
      epochs: of training.
    """
    k_weights, k_scores, k_train, k_order = jax.random.split(jax.random.key(0), 4)
    scores_learn = method == "edge-popup"
    init = Init("signed-constant" if scores_learn else "kaiming-normal")
    net = network(Model(name), init, dataset.classes, dataset.image_shape)
    if scores_learn:  # as `experiments.bits` does: each layer's weights are scaled by its own density
        densities = sm.densities.erk(net.prunable, density)
        net = network(Model(name), init, dataset.classes, dataset.image_shape, densities)
    weights, _ = net.init(k_weights)
    orders = [epoch_order(k_order, epoch, len(dataset.train), BATCH_SIZE) for epoch in range(epochs)]
    steps = sum(len(indices) for indices, _ in orders)
    if scores_learn:
        tx = optax.sgd(optax.cosine_decay_schedule(edge_popup_rate(name, density, by_layer=True), steps), momentum=0.9)
        chosen = sm.methods.edge_popup(k_scores, weights, densities)
    else:
        tx = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
        chosen = sm.methods.gradual(weights, tx, density, steps=steps, every=10)
    loss_fn = make_loss(net, dataset.mean, dataset.std)
    state = sm.init_state(chosen.subnet, tx, k_train, learns=chosen.learns)
    step = sm.jit(sm.make_train_step(chosen.mask_fn, loss_fn, tx, learns=chosen.learns))
    batches = (batch for order in orders for batch in zip(*order, strict=True))
    for number, (indices, weight) in enumerate(batches, start=1):
        batch = {**dataset.train.read(indices), "weight": weight}
        state, _ = step(state, batch)
        if chosen.update and number % chosen.update_every == 0:
            state = chosen.update(number, state, batch)
    masks = chosen.mask_fn(state.subnet.scores, None)
    return Trained(net, jax.device_get(state.subnet.weights), jax.device_get(masks))


def time_network(
    group: str, trained: Trained, dataset: Dataset, calls: Mapping[int, int], rounds: int
) -> tuple[list[dict], dict]:
    """(rows of the times, what is left of the network).

    Args:
      group: the section of the table.
      trained: the network.
      dataset: whose test images it classifies.
      calls: {images of a batch: calls in a turn}.
      rounds: times that each candidate is measured.
    """
    test = dataset.test.read(np.arange(len(dataset.test)))
    images = np.asarray(normalise(test["image"], dataset.mean, dataset.std))

    def dense(params: Tree, x: jax.Array) -> jax.Array:
        return trained.network.logits(params, None, x)

    params = jax.tree.map(jnp.asarray, apply_masks(trained.weights, trained.masks))
    small = sm.compact(dense, trained.weights, trained.masks, images)
    ours: dict[str, tuple[Callable, Any]] = {
        "dense": (sm.jit(dense), params),
        "compacted": (sm.jit(small.apply_fn), small.params),
    }
    logits = {name: np.asarray(f(of, images)) for name, (f, of) in ours.items()}
    if _all_dense(params):
        matrices = [sparse.BCOO.fromdense(leaf.T) for leaf in jax.tree.leaves(params)]
        ours["sparse"] = sm.jit(sparse_layers), matrices
    largest = np.abs(logits["dense"]).max()
    rows = []
    for batch, times in calls.items():
        x = np.resize(images, (batch, *images.shape[1:]))
        turns = {name: partial(repeated, f, of, jnp.asarray(x), times) for name, (f, of) in ours.items()}
        with _other_runtimes(times, trained, params, dataset, x) as theirs:
            seconds = {name: of / times for name, of in interleaved({**turns, **theirs}, rounds).items()}
        rows += compared(f"{group}, batch {batch}", seconds, RATIOS)
    sizes = [sum(map(np.prod, shapes.values())) for shapes in (small.before, small.after)]
    rows.append(row(group, "parameters, compacted / dense", "x", sizes[1] / sizes[0]))
    left = {
        "accuracy": float((logits["dense"].argmax(-1) == test["label"]).mean()),
        "kept": sum(ones for ones, _ in ones_and_sizes(trained.masks).values()),
        "parameters": [int(size) for size in sizes],
        "units": units(small.before, small.after),
        "difference": float(np.abs(logits["compacted"] - logits["dense"]).max() / largest) if largest else 0.0,
        "changed labels": int((logits["compacted"].argmax(-1) != logits["dense"].argmax(-1)).sum()),
    }
    return rows, left


def _all_dense(params: Tree) -> bool:
    return all(np.ndim(leaf) == 2 for leaf in jax.tree.leaves(params))


@contextlib.contextmanager
def _other_runtimes(times: int, trained: Trained, params: Tree, dataset: Dataset, x: np.ndarray) -> Iterator[dict]:
    """The candidates of other libraries, as far as they are installed."""
    if not runtimes.installed():
        yield {}
        return
    with child.candidates(runtimes.make_calls, times, **_for_runtimes(trained, params, dataset, x)) as theirs:
        yield theirs


def _for_runtimes(trained: Trained, params: Tree, dataset: Dataset, images: np.ndarray) -> dict[str, Any]:
    """The arguments of `runtimes.make_calls`: the masked network, for those libraries that are installed."""
    installed = runtimes.installed()
    leaves = jax.device_get(by_path(params))
    file = None
    if "onnxruntime" in installed:
        of = networks.Network(trained.network.module, dataset.image_shape, dataset.classes, dataset.mean, dataset.std)
        graph = graphs.steps(of)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            onnx_file.write(path, of, graph, graphs.arrays(graph, leaves, {}))
            file = path.read_bytes()
    matrices = list(leaves.values()) if "sparselab" in installed and _all_dense(params) else None
    return {"file": file, "matrices": matrices, "images": np.moveaxis(images, -1, 1), "threads": cores()}


def repeated(function: Callable, params: Any, x: jax.Array, times: int) -> jax.Array:
    """Calls the function so many times, each time after the last has finished; returns its outputs."""
    for _ in range(times):
        outputs = jax.block_until_ready(function(params, x))
    return outputs


def sparse_layers(matrices: Sequence[sparse.BCOO], x: jax.Array) -> jax.Array:
    """Dense layers without biases, whose matrices are sparse [out, in], with ReLU between them."""
    x = x.reshape(len(x), -1).T
    for i, matrix in enumerate(matrices):
        x = jax.nn.relu(matrix @ x) if i + 1 < len(matrices) else matrix @ x
    return x.T


def units(before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]]) -> dict[str, list[int]]:
    """{path: output units of the kernel [before, after]}; 0 where the kernel is gone."""
    return {path: [shape[-1], after[path][-1] if path in after else 0] for path, shape in before.items()}


def results_table(measured: dict) -> str:
    """Markdown: of each network what is left, and the times as parts of the dense network's."""
    ratio = {(line["group"], line["name"]): line["median"] for line in measured["rows"]}
    batches = next(iter(NETWORKS.values()))
    lines = []
    for of in measured["networks"]:
        group = f"{of['network']}, {of['method']}, density {of['density']}"
        hidden = list(of["units"].values())
        lines.append(
            (
                *(of["network"], of["method"], of["density"], f"{of['accuracy']:.1%}"),
                " - ".join(str(after) for _, after in hidden),
                *(f"{of['kept']:,}", f"{of['parameters'][1]:,}"),
                *(
                    f"{ratio[key]:.2f}" if (key := (f"{group}, batch {batch}", f"{name} / dense")) in ratio else "-"
                    for name in OTHERS
                    for batch in batches
                ),
            )
        )
    times = [f"{name}, batch {batch}" for name in OTHERS for batch in batches]
    return table(
        ("network", "method", "density", "accuracy", "units left", "weights kept", "parameters left", *times), lines
    )
