"""The constructive half of `experiments.pruning_only`: a trained target, and random networks pruned to be like it."""

import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import supermask_jax as sm
from experiments.config.presets import MNIST, recipe
from experiments.config.run import Run
from experiments.config.settings import changed
from experiments.data.source import Dataset, Source
from experiments.run.placement import Placement
from experiments.training import stepper
from experiments.training.loop import train
from experiments.training.loss import make_loss
from experiments.training.network import Network, network
from experiments.training.optimizer import make_optimizer, make_schedule
from supermask_jax import construction, metrics, models
from supermask_jax.trees import Tree, apply_masks, by_path, leaf_key

HIDDEN, EPOCHS, BATCH = 32, 10, 250


class Progress(NamedTuple):
    """What training changes."""

    state: sm.TrainState
    totals: dict[str, jax.Array]
    seconds: float


def construct(widths: Sequence[int], seeds: int, dataset: Dataset) -> dict:
    """Trains an MLP, and for each form, width and seed prunes a random network to be like it.

    Args:
      widths: how many random products there are to choose from, for each weight of the target.
      seeds: how many random networks there are of each width.
      dataset: what to train and evaluate on.

    Returns:
      "target": its accuracy, the deviation of its logits, and the units of its layers. "rows": for each pruned network
      its form, width and seed; weight errors (mean and largest, as parts of the largest weight of the layer); the mean
      error of its logits, as a part of the deviation of the target's; its test accuracy; how many weights it has and
      keeps.
    """
    console = Console(file=sys.stdout)
    net, params = train_target(dataset, jax.random.key(0))
    kernels = [leaf for _, leaf in sorted(by_path(params).items())]
    wanted = logits_of(net.module, params, dataset.test)
    units = [len(kernels[0]), *(kernel.shape[1] for kernel in kernels)]
    accuracy = float(metrics.accuracy(wanted, dataset.test.labels))
    target = {"accuracy": accuracy, "deviation": float(np.std(wanted)), "units": units}
    name = f"{dataset.name} MLP {'-'.join(map(str, units))}"
    console.print(f"target: {name}, test accuracy {accuracy:.2%}", highlight=False)
    rows = []
    for form in construction.FORMS:
        for width in sorted(set(widths)):
            for seed in range(seeds):
                began = time.perf_counter()
                row = {
                    "form": form,
                    "width": width,
                    "seed": seed,
                    **pruned(form, width, seed, kernels, wanted, dataset),
                }
                rows.append(row)
                console.print(
                    f"{form}, width {width}, seed {seed}: mean weight error {row['weight_error']:.2%} of the largest, "
                    f"test accuracy {row['test_accuracy']:.2%}  {time.perf_counter() - began:.0f} s",
                    highlight=False,
                    soft_wrap=True,
                )
    return {"target": target, "rows": rows}


def pruned(
    form: str, width: int, seed: int, kernels: Sequence[jax.Array], wanted: np.ndarray, dataset: Dataset
) -> dict[str, Any]:
    """Returns the figures of one random network that is pruned to be like the target.

    Args:
      form, width, seed: of the random network.
      kernels: of the target, in the order of its layers.
      wanted: the target's logits of the test images, [n, classes].
      dataset: what the logits are of.
    """
    weights = construction.random_network(leaf_key(jax.random.key(seed), "construction"), kernels, width)
    masks = construction.subset_masks(weights, kernels, form)
    hidden = (len(kernels[0]) * width, HIDDEN, HIDDEN * width)
    wide = models.MLP(dataset.classes, use_bias=False, hidden=hidden)
    logits = logits_of(wide, apply_masks(weights, masks), dataset.test)
    return {
        **errors(weights, masks, kernels),
        "output_error": float(np.mean(np.abs(logits - wanted))) / float(np.std(wanted)),
        "test_accuracy": float(metrics.accuracy(logits, dataset.test.labels)),
        "weights": sum(leaf.size for leaf in jax.tree.leaves(weights)),
        "kept": metrics.parameter_count(weights, masks),
    }


def train_target(dataset: Dataset, key: jax.Array) -> tuple[Network, Tree]:
    """Trains an MLP of one hidden layer without biases, by Adam on pixels in [0, 1]; returns (network, parameters)."""
    settings = {"model": "mlp", "width": HIDDEN, "depth": 1, "epochs": EPOCHS}
    config = changed(Run(), **recipe(MNIST, "best", "dense"), **settings)
    net = network(config.model, config.init, dataset.classes, dataset.image_shape)
    weights, model_state = net.init(leaf_key(key, "weights"))
    epochs = stepper.epochs_of(dataset.train, config.optim.batch_size)
    last = config.epochs * epochs.steps
    tx = make_optimizer(config.optim, make_schedule(config.optim, last, epochs.steps))
    loss_fn = make_loss(net, (0.0,), (1.0,))  # pixels stay in [0, 1]: the construction needs inputs >= 0
    step = sm.make_train_step(sm.identity, loss_fn, tx, learns="weights")
    place = Placement()
    steps = stepper.make_stepper(step, "weights", dataset.train, place, stepper.steps_per_call(weights))
    subnet = sm.Subnet(weights, jax.tree.map(lambda _: None, weights))
    state = sm.init_state(subnet, tx, leaf_key(key, "train"), model_state, learns="weights")
    start = Progress(place.place(state), place.replicate(stepper.zero_totals()), 0.0)
    end = train(stepper.over(steps, epochs, leaf_key(key, "order")), start, 0, last, [])
    return net, end.state.subnet.weights


def errors(weights: Tree, masks: Tree, kernels: Sequence[jax.Array]) -> dict[str, float]:
    """Mean and largest error of the weights that the pruned network realises, in parts of the layer's largest."""
    parts = [
        np.abs(np.asarray(realised) - np.asarray(wanted)) / np.abs(np.asarray(wanted)).max()
        for realised, wanted in zip(construction.effective_kernels(weights, masks), kernels, strict=True)
    ]
    together = np.concatenate([part.ravel() for part in parts])
    return {"weight_error": float(together.mean()), "largest_weight_error": float(together.max())}


def logits_of(model, params: Tree, source: Source) -> np.ndarray:
    """[n, classes] logits of all images of a source, whose pixels the model sees in [0, 1]."""

    @sm.jit
    def batch_logits(params: Tree, batch: jax.Array) -> jax.Array:
        return model.apply({"params": params}, batch.astype(jnp.float32) / 255)

    starts = range(0, len(source), BATCH)
    batches = (source.read(np.arange(start, min(start + BATCH, len(source))))["image"] for start in starts)
    return np.concatenate([np.asarray(batch_logits(params, jnp.asarray(batch))) for batch in batches])
