"""The constructive half of `experiments.pruning_only`: a trained target, and random networks pruned to be like it."""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import supermask_jax as sm
from experiments import mnist
from experiments.data import load as data
from experiments.plots.style import COLOURS, log_axis, new_figure, style_axes
from experiments.sweeps import cells
from experiments.training import recipe
from experiments.training.stepper import Driver, compiling, epoch_order, zero_totals
from supermask_jax import construction, metrics, models
from supermask_jax.trees import apply_masks, by_path, leaf_key

HIDDEN, EPOCHS, BATCH = 32, 10, 250


def construct(config, dataset: data.Dataset) -> dict:
    """A trained MLP, and for each form, width and seed a random network pruned to be like it.

    Returns:
      "target": its accuracy and the deviation of its logits; "rows": for each pruned network its form, width and seed;
      weight errors (mean and largest, as parts of the largest weight of the layer); the mean error of its logits, as a
      part of the deviation of the target's; its test accuracy; how many weights it has and keeps.
    """
    console, key = Console(file=sys.stdout), jax.random.key(0)
    model, params = train(dataset, key)
    kernels = [leaf for _, leaf in sorted(by_path(params).items())]
    wanted = logits_of(model, params, dataset.test_images)
    labels = dataset.test_labels
    target = {"accuracy": float(metrics.accuracy(wanted, labels)), "deviation": float(np.std(wanted))}
    console.print(
        f"target: {dataset.name} MLP 784-{HIDDEN}-10, test accuracy {target['accuracy']:.2%}", highlight=False
    )
    rows = []
    for form in construction.FORMS:
        for width in sorted(set(config.construction_widths)):
            for seed in range(config.seeds):
                began = time.perf_counter()
                weights = construction.random_network(leaf_key(jax.random.key(seed), "construction"), kernels, width)
                masks = construction.subset_masks(weights, kernels, form)
                row = {"form": form, "width": width, "seed": seed, **errors(weights, masks, kernels)}
                wide = models.MLP(
                    dataset.classes, use_bias=False, hidden=(kernels[0].shape[0] * width, HIDDEN, HIDDEN * width)
                )
                logits = logits_of(wide, apply_masks(weights, masks), dataset.test_images)
                row |= {
                    "output_error": float(np.mean(np.abs(logits - wanted))) / target["deviation"],
                    "test_accuracy": float(metrics.accuracy(logits, labels)),
                    "weights": sum(leaf.size for leaf in jax.tree.leaves(weights)),
                    "kept": metrics.parameter_count(weights, masks),
                }
                rows.append(row)
                console.print(
                    f"{form}, width {width}, seed {seed}: mean weight error {row['weight_error']:.2%} of the largest, "
                    f"test accuracy {row['test_accuracy']:.2%}  {time.perf_counter() - began:.0f} s",
                    highlight=False,
                    soft_wrap=True,
                )
    return {"target": target, "rows": rows}


def train(dataset: data.Dataset, key: jax.Array):
    """(model, parameters) of a 784-32-10 MLP without biases, trained by Adam on pixels in [0, 1]."""
    config = mnist.Config(
        **{**mnist.defaults("best", "dense"), "model": "mlp", "width": HIDDEN, "depth": 1, "epochs": EPOCHS}
    )
    model = recipe.build_model(config, dataset.classes)
    weights = recipe.draw_weights(config, model, dataset.train_images.shape[1:], leaf_key(key, "weights"))
    examples = len(dataset.train_labels)
    per_epoch = -(-examples // config.batch_size)
    tx = recipe.make_optimizer(config, recipe.make_schedule(config, per_epoch))
    loss_fn = recipe.make_loss(model, 0.0, 1.0)  # pixels stay in [0, 1]: the construction needs inputs >= 0
    step = sm.make_train_step(sm.identity, loss_fn, tx, learns="weights")
    advance = Driver(step, "weights", dataset, recipe.steps_per_call(config))
    subnet = sm.Subnet(weights, jax.tree.map(lambda _: None, weights))
    state, totals = sm.init_state(subnet, tx, leaf_key(key, "train"), learns="weights"), zero_totals()
    for epoch in range(EPOCHS):
        order = epoch_order(leaf_key(key, "order"), epoch, examples, config.batch_size)
        state, totals, _ = advance(state, totals, order, 0, per_epoch)
    return model, state.subnet.weights


def errors(weights, masks, kernels) -> dict[str, float]:
    """Mean and largest error of the weights that the pruned network realises, in parts of the layer's largest."""
    parts = [
        np.abs(np.asarray(realised) - np.asarray(wanted)) / np.abs(np.asarray(wanted)).max()
        for realised, wanted in zip(construction.effective_kernels(weights, masks), kernels, strict=True)
    ]
    together = np.concatenate([part.ravel() for part in parts])
    return {"weight_error": float(together.mean()), "largest_weight_error": float(together.max())}


def logits_of(model, params, images: np.ndarray) -> np.ndarray:
    """[n, classes] logits of uint8 images whose pixels are seen in [0, 1]."""

    def batch_logits(params, batch):
        return model.apply({"params": params}, batch.astype(jnp.float32) / 255)

    batch_logits, parts = compiling(batch_logits), []
    for start in range(0, len(images), BATCH):
        parts.append(np.asarray(batch_logits(params, jnp.asarray(images[start : start + BATCH]))))
    return np.concatenate(parts)


def draw(summary: dict):
    """Error of the weights, error of the logits and test accuracy of the pruned networks, by width."""
    built, dataset = summary["construction"], summary["dataset"]
    seeds = cells.seeds(summary["config"]["seeds"])
    figure = new_figure(
        f"a trained 784-{HIDDEN}-10 MLP in a random one twice as deep · {dataset} · {seeds}",
        14,
        4.4,
    )
    panels = (
        ("weight_error", "mean weight error (part of the layer's largest), log scale"),
        ("output_error", "mean error of the logits (part of their deviation), log scale"),
        ("test_accuracy", "test accuracy (%), log scale of the error"),
    )
    for ax, (name, says) in zip(figure.subplots(1, 3), panels, strict=True):
        drawn = []
        for form, colour in zip(construction.FORMS, COLOURS, strict=False):
            rows = [row for row in built["rows"] if row["form"] == form]
            widths = sorted({row["width"] for row in rows})
            values = [np.array([row[name] for row in rows if row["width"] == width]) for width in widths]
            values = [100 * (1 - v) for v in values] if name == "test_accuracy" else values
            label = {"product": "the nearest product", "subset-sum": "the nearest sum of products"}[form]
            ax.plot(widths, [v.mean() for v in values], "o-", color=colour, markersize=4, label=label)
            ax.fill_between(
                widths, [v.min() for v in values], [v.max() for v in values], color=colour, alpha=0.2, linewidth=0
            )
            drawn += [value for v in values for value in v]
        style_axes(ax, "random products to choose from, for each weight of the target", says)
        if name == "test_accuracy":
            level = 100 * (1 - built["target"]["accuracy"])
            ax.axhline(level, color="black", linestyle=":", label=f"the target: {built['target']['accuracy']:.2%}")
            drawn.append(level)
        log_axis(ax, drawn, accuracy=name == "test_accuracy")
        ax.legend(fontsize=8, edgecolor="none")
    return figure
