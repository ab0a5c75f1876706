"""One training story for every method: batches in a fixed order, evaluation of all examples, resume, summary."""

import dataclasses
import importlib.metadata
import platform
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import supermask_jax as sm
from experiments.data import load as data
from experiments.run import display, processes
from experiments.run.errors import Diverged, UserError
from experiments.run.interrupt import Interrupted, stopping
from experiments.run.placement import Layout
from experiments.run.workdir import Workdir, default_path
from experiments.training import recipe
from experiments.training.evaluation import Evaluator, Held, make_flow, noise_like
from experiments.training.methods import METHODS, Start
from experiments.training.stepper import Driver, PmapDriver, batch_at, epoch_order, train_figures, zero_totals
from supermask_jax import metrics, parallel
from supermask_jax.trees import Tree, by_path, leaf_key, ones_and_sizes

REPORT_EVERY = 50  # steps; bounds how many are dispatched ahead as well
SAMPLES, SAMPLES_PER_EPOCH = 10, 3  # masks drawn to evaluate a method that draws them: at the end, after each epoch
FLOW_IMAGES = 50  # of each class, that the gradient flow is measured on


class Progress(NamedTuple):
    """All that a checkpoint holds."""

    state: sm.TrainState
    totals: dict[str, jax.Array]  # sums over the steps of the epoch under way
    masks: Tree  # at the end of the last epoch, to count flips against
    seconds: jax.Array  # of training, without compilation and evaluation


def fit(config, dataset: data.Dataset, name: str, strangers: data.Dataset | None = None, alone: bool = True) -> dict:
    """Trains, or resumes, or returns the summary of a finished run. Leaves its files in the work directory.

    Args:
      config: settings with the fields of `experiments.mnist.Config`.
      dataset: see `experiments.data`.
      name: the experiment, for the default work directory.
      strangers: a data set whose test images the network should not be sure of, if it is to be judged.
      alone: whether it shows its progress and draws pictures; if not, it is one of many.

    Raises:
      UserError: settings that do not fit the data, the devices or the work directory; loss or scores that are not
        finite.
    """
    layout = Layout(config.devices, config.shard_scores)
    if config.batch_size % layout.size:
        raise UserError(f"--batch-size {config.batch_size} does not divide over {layout.size} devices.")
    shows = alone and processes.is_first()
    if jax.process_count() > 1:
        images = [dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels]
        images += [strangers.test_images] if strangers else []
        processes.require_alike(processes.digest(*images), "the images and their order must be the same")
    if dataset.warning and shows:
        display.show_warning(dataset.warning)
    rest, *held = data.hold_out(dataset, config.validation)
    held = Held("validation", *held) if config.validation else Held("test", dataset.test_images, dataset.test_labels)
    if config.train_images > len(rest.train_labels):
        raise UserError(f"--train-images {config.train_images}: there are {len(rest.train_labels)} to train on.")
    if 0 < config.train_images < len(rest.train_labels):
        _, images, labels = data.hold_out(rest, config.train_images)
        rest = dataclasses.replace(rest, train_images=images, train_labels=labels)
    path = Path(config.workdir).expanduser() if config.workdir else default_path(config, name)
    digest = f"{zlib.crc32(dataset.train_images.tobytes()):08x}"
    workdir = processes.in_turn(lambda: Workdir(path, config, digest, writes=processes.is_first()))
    processes.require_alike(workdir.mark(), f"{path} must be on a file system that all share, and the same")
    with stopping() as asked:
        summary = workdir.summary() or _train(config, rest, held, workdir, layout, strangers, shows, asked)
    if asked() and not alone:
        raise Interrupted(f"stopped as asked, when {workdir.path} was finished.")
    if shows:
        display.show_summary(summary, path)
    return summary


def _train(config, dataset, held: Held, workdir: Workdir, layout: Layout, strangers, shows: bool, asked) -> dict:
    examples = len(dataset.train_labels)
    steps_per_epoch = -(-examples // config.batch_size)
    last_step = config.epochs * steps_per_epoch

    key = jax.random.key(config.seed)
    model = recipe.build_model(config, dataset.classes)
    weights = recipe.draw_weights(config, model, dataset.train_images.shape[1:], leaf_key(key, "weights"))
    schedule = recipe.make_schedule(config, steps_per_epoch)
    rate_at, tx = jax.jit(schedule), recipe.make_optimizer(config, schedule)
    make_loss = partial(recipe.make_loss, model, dataset.mean, dataset.std)
    sample = partial(class_sample, dataset, leaf_key(key, "sample"))
    start = Start(config, weights, leaf_key(key, "scores"), tx, model, make_loss, sample, last_step)
    task = METHODS[config.method](start)
    advance = make_driver(config, task, make_loss, tx, dataset, layout)
    evaluator = Evaluator(task.mask_fn, task.forward, model, dataset, layout)
    flow = make_flow(make_loss(), layout.replicate(sample(FLOW_IMAGES))) if config.judge else None
    samples = jax.random.split(leaf_key(key, "evaluation"), SAMPLES) if task.sampled else ()
    samples = [layout.replicate(key) for key in samples]

    def measured(subnet: sm.Subnet) -> tuple[Tree, dict]:
        """The masks, and what is recorded of them after an epoch."""
        masks, params = evaluator.found(subnet)
        figures = evaluator.figures(params, held)
        figures |= evaluator.sampled_figures(subnet, held, samples[:SAMPLES_PER_EPOCH])
        return masks, figures | ({"gradient_flow": flow(params, masks)} if flow else {})

    state = layout.place(sm.init_state(task.subnet, tx, leaf_key(key, "train"), learns=task.learns))
    masks, first = measured(state.subnet)
    progress = Progress(state, layout.replicate(zero_totals()), masks, layout.replicate(jnp.float32(0)))

    checkpoints = workdir.checkpoints()
    restored = checkpoints.restore(progress)
    step, (state, totals, masks, seconds) = restored or (0, progress)
    seconds = float(seconds)
    workdir.cut_records(step if restored else -1, epochs=step // steps_per_epoch + 1 if restored else 0)
    with display.Display(last_step, step, config.epochs, quiet=not shows) as shown:
        if restored:
            shown.say(f"resumed from step {step} of {last_step} in {workdir.path}")
        else:
            shown.epoch(workdir.append({"epoch": 0, "step": 0, **first}))
        while step < last_step:
            epoch = step // steps_per_epoch
            begins, ends = epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch
            order = epoch_order(leaf_key(key, "order"), epoch, examples, config.batch_size)
            while step < ends:
                save_at = _next(config.checkpoint_every, step)
                update_at = _next(task.update_every, step) if task.update else last_step + 1
                stop = min(ends, save_at, update_at, step + max(REPORT_EVERY, advance.steps_per_call))
                state, totals, elapsed = advance(state, totals, order, step - begins, stop - begins)
                step, seconds = stop, seconds + elapsed
                stop_if_not_finite(totals, getattr(state.subnet, task.learns), workdir)
                if step == update_at:
                    batch = batch_at(dataset, order, step - 1 - begins)
                    state = layout.place(task.update(step, layout.whole(state), batch))
                figures = train_figures(totals)
                rate = (epoch * examples + figures["examples"]) / seconds
                shown.step(step, epoch + 1, figures, rate)
                if step == ends:
                    new_masks, held_figures = measured(state.subnet)
                    record = {
                        "epoch": epoch + 1,
                        "step": step,
                        "train_loss": figures["loss"],
                        "train_accuracy": figures["accuracy"],
                        **held_figures,
                        "flips": count_flips(masks, new_masks),
                        "learning_rate": float(rate_at(step - 1)),
                        "train_seconds": seconds,
                        "images_per_second": rate,
                    }
                    shown.epoch(workdir.append(record))
                    masks, totals = new_masks, layout.replicate(zero_totals())
                leaves = processes.any_of(asked())
                if step in (save_at, last_step) or leaves:
                    spent = layout.replicate(np.float32(processes.of_first(seconds)))
                    checkpoints.save(step, Progress(state, totals, masks, spent))
                if leaves:
                    stop_unless_done(step, last_step, workdir)

    test = Held("test", dataset.test_images, dataset.test_labels)
    _, params = evaluator.found(state.subnet)
    figures = evaluator.figures(params, test) | evaluator.sampled_figures(state.subnet, test, samples)
    subnet, masks = layout.whole((state.subnet, masks))
    figures |= sizes(model, weights, masks, dataset.train_images.shape[1:])
    if config.judge:
        others = {"noise": noise_like(dataset, config.seed)}
        others |= {strangers.name: strangers.test_images} if strangers else {}
        figures |= evaluator.judge(params, test, others)
        figures["gradient_flow"] = [record["gradient_flow"] for record in workdir.records()]  # epochs from 0 on
    summary = _summary(config, dataset, workdir, layout, figures, seconds, advance.compile_seconds)

    def draw():
        if shows:
            from experiments.plots import one_run as plots  # here: a process that draws nothing starts sooner without

            plots.draw_run(workdir.path, summary, workdir.records(), subnet, masks)

    workdir.finish(summary, draw)
    return summary


def make_driver(config, task, make_loss, tx, dataset: data.Dataset, layout: Layout) -> Driver | PmapDriver:
    """What trains a task: by jit over the layout's mesh, or by pmap."""
    if config.parallel == "pmap":
        loss_fn = make_loss(config.shift, axis_name=parallel.AXIS)
        step = parallel.pmap_step(task.forward, loss_fn, tx, learns=task.learns, devices=layout.size, donate=True)
        return PmapDriver(step, task.learns, dataset, layout)
    step = sm.make_train_step(task.forward, layout.loss(make_loss(config.shift)), tx, learns=task.learns)
    return Driver(step, task.learns, dataset, recipe.steps_per_call(config), layout)


def _next(every: int, step: int) -> int:
    """The first multiple of `every` after `step`."""
    return step - step % every + every


def _summary(config, dataset, workdir, layout, figures, seconds, compile_seconds) -> dict:
    layers = figures["layers"]
    steps_per_epoch = -(-len(dataset.train_labels) // config.batch_size)
    tested = [r["test_accuracy"] for r in workdir.records() if "test_accuracy" in r and r["epoch"] > 0]
    return {
        "method": config.method,
        "dataset": dataset.name,
        "model": config.model,
        "density": sum(v["kept"] for v in layers.values()) / sum(v["size"] for v in layers.values()),
        **figures,
        "best_test_accuracy": max([figures["test_accuracy"], *tested]),  # over epochs: optimistic, for no headline
        "epochs": config.epochs,
        "steps": config.epochs * steps_per_epoch,
        "train_seconds": seconds,
        "images_per_second": config.epochs * len(dataset.train_labels) / seconds,
        "compile_seconds": compile_seconds,
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()}), {platform.machine()}",
        "devices": layout.size,
        "processes": jax.process_count(),
        "versions": versions(),
        "seed": config.seed,
        "config": workdir.config(),
        "data_source": dataset.source,
    }


def stop_if_not_finite(totals: dict[str, jax.Array], learner: Tree, workdir: Workdir) -> None:
    """Raises Diverged if a step was not finite, naming it and the layer. Nothing is saved after it."""
    step, leaf = int(totals["bad_step"]), int(totals["bad_leaf"])
    if step >= 0:
        what = "the loss" if leaf < 0 else list(by_path(learner))[leaf]
        raise Diverged(
            f"{what} is not finite (NaN or infinity) at step {step}. The checkpoints in {workdir.path} are from before "
            "it. Try a lower --learning-rate with another --workdir."
        )


def stop_unless_done(step: int, last_step: int, workdir: Workdir) -> None:
    """Raises Interrupted, of a run that was asked to stop; what is saved is at this step."""
    if step < last_step:
        raise Interrupted(f"stopped as asked; saved at step {step} of {last_step} in {workdir.path}.")


def count_flips(before: Tree, after: Tree) -> dict[str, int]:
    """{path: number of mask bits that differ}."""
    old = by_path(before)
    return {path: int(jnp.count_nonzero(m != old[path])) for path, m in by_path(after).items()}


def class_sample(dataset: data.Dataset, key: jax.Array, per_class: int) -> dict[str, np.ndarray]:
    """A batch of training images: at random so many of each class, in the order of the classes."""
    order = np.asarray(jax.random.permutation(key, len(dataset.train_labels)))
    labels = dataset.train_labels[order]
    chosen = np.concatenate([order[labels == c][:per_class] for c in range(dataset.classes)])
    images, labels = dataset.train_images[chosen], dataset.train_labels[chosen]
    return {"image": images, "label": labels, "weight": np.ones(len(chosen), np.float32)}


def sizes(model, weights: Tree, masks: Tree, image_shape: tuple[int, ...]) -> dict:
    """ "layers": {path: how many weights are kept}, "parameters", and "flops" of one image's way through."""
    layers = {
        path: {"size": size, "kept": kept, "density": kept / size}
        for path, (kept, size) in layer_counts(weights, masks).items()
    }
    flops = metrics.flops(lambda params, images: model.apply({"params": params}, images), weights, masks, image_shape)
    return {"layers": layers, "parameters": metrics.parameter_count(weights, masks), "flops": flops}


def layer_counts(weights: Tree, masks: Tree) -> dict[str, tuple[int, int]]:
    """{path: (kept, size)} of every prunable leaf; where there are no masks, all of every kernel is kept."""
    if jax.tree.leaves(masks):
        return ones_and_sizes(masks)
    kernels = {path: leaf.size for path, leaf in by_path(weights).items() if sm.is_kernel(path, leaf)}
    return {path: (size, size) for path, size in kernels.items()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    packages = ("supermask-jax", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
