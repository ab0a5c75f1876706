"""One training story for every method: batches in a fixed order, evaluation of all examples, resume, summary.

The step is the library's. How it is driven differs by backend: on a CPU one compiled call per step, because XLA's
CPU backend runs the gradients of convolutions inside a loop many times slower (jax issue 12868); elsewhere many steps
per call, with the images on the device.
"""

import importlib.metadata
import platform
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import supermask_jax as sm
from experiments import data, display, plots, recipe
from experiments.errors import UserError
from experiments.workdir import Workdir, default_path
from supermask_jax.trees import Tree, by_path, leaf_key, ones_and_sizes

STEPS_PER_CALL = {"cpu": 1}
STEPS_PER_CALL_ELSEWHERE = 100
REPORT_EVERY = 50  # steps; bounds how many are dispatched ahead as well
EVAL_BATCH = 250
SAMPLES, SAMPLES_PER_EPOCH = 10, 3  # masks drawn to evaluate a method that draws them: at the end, after each epoch
CPU_OPTIONS = {  # the defaults of jaxlib 0.10 make ...
    "xla_cpu_experimental_ynn_fusion_type": "",  # ... convolutions 2 to 3 times slower
    "xla_cpu_use_fusion_emitters": False,  # ... the whole step 10 % slower
}


class Progress(NamedTuple):
    """All that a checkpoint holds."""

    state: sm.TrainState
    totals: dict[str, jax.Array]  # sums over the steps of the epoch under way
    masks: Tree  # at the end of the last epoch, to count flips against
    seconds: jax.Array  # of training, without compilation and evaluation


class Held(NamedTuple):
    """Images that are evaluated after each epoch: "validation" or "test"."""

    name: str
    images: np.ndarray
    labels: np.ndarray


def fit(config, dataset: data.Dataset, method: Callable, name: str) -> dict:
    """Trains, or resumes, or returns the summary of a finished run. Leaves its files in the work directory.

    Args:
      config: settings with the fields of `experiments.mnist.Config`.
      dataset: see `experiments.data`.
      method: (config, weights, key) -> `methods.Task`.
      name: the experiment, for the default work directory.

    Raises:
      UserError: settings that do not fit the data or the work directory; loss or scores that are not finite.
    """
    if dataset.warning:
        display.show_warning(dataset.warning)
    rest, *held = data.hold_out(dataset, config.validation)
    held = Held("validation", *held) if config.validation else Held("test", dataset.test_images, dataset.test_labels)
    path = Path(config.workdir).expanduser() if config.workdir else default_path(config, name)
    workdir = Workdir(path, config, data_digest=f"{zlib.crc32(dataset.train_images.tobytes()):08x}")
    summary = workdir.summary() or _train(config, rest, held, method, workdir)
    display.show_summary(summary, path)
    return summary


def _train(config, dataset: data.Dataset, held: Held, method: Callable, workdir: Workdir) -> dict:
    examples = len(dataset.train_labels)
    steps_per_epoch = -(-examples // config.batch_size)
    last_step = config.epochs * steps_per_epoch

    key = jax.random.key(config.seed)
    model = recipe.build_model(config, dataset.classes)
    weights = recipe.draw_weights(config, model, dataset.train_images.shape[1:], leaf_key(key, "weights"))
    task = method(config, weights, leaf_key(key, "scores"))
    schedule = recipe.make_schedule(config, steps_per_epoch)
    tx = recipe.make_optimizer(config, schedule)
    loss_fn = recipe.make_loss(model, dataset.mean, dataset.std, config.shift)
    advance = Driver(sm.make_train_step(task.forward, loss_fn, tx, learns=task.learns), task.learns, dataset)
    evaluate = make_evaluate(task.forward, model, dataset)
    samples = jax.random.split(leaf_key(key, "evaluation"), SAMPLES) if task.sampled else ()
    # Copies: masks that are the scores themselves would be donated with the state.
    masks_of = jax.jit(lambda subnet: jax.tree.map(jnp.copy, task.mask_fn(subnet.scores, None)))
    state = sm.init_state(task.subnet, tx, leaf_key(key, "train"), learns=task.learns)
    progress = Progress(state, zero_totals(), masks_of(state.subnet), jnp.float32(0))

    with workdir.checkpoints() as checkpoints:
        restored = checkpoints.restore(progress)
        step, (state, totals, masks, seconds) = restored or (0, progress)
        seconds = float(seconds)
        workdir.cut_records(step if restored else -1, epochs=step // steps_per_epoch + 1 if restored else 0)
        with display.Display(last_step, step, config.epochs) as shown:
            if restored:
                shown.say(f"resumed from step {step} of {last_step} in {workdir.path}")
            else:
                figures = evaluate(state.subnet, held, samples[:SAMPLES_PER_EPOCH])
                shown.epoch(workdir.append({"epoch": 0, "step": 0, **figures}))
            while step < last_step:
                epoch = step // steps_per_epoch
                begins, ends = epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch
                order = epoch_order(leaf_key(key, "order"), epoch, examples, config.batch_size)
                while step < ends:
                    save_at = step - step % config.checkpoint_every + config.checkpoint_every
                    stop = min(ends, save_at, step + max(REPORT_EVERY, advance.steps_per_call))
                    state, totals, elapsed = advance(state, totals, order, step - begins, stop - begins)
                    step, seconds = stop, seconds + elapsed
                    stop_if_not_finite(int(totals["bad_step"]), workdir)
                    figures = train_figures(totals)
                    rate = (epoch * examples + figures["examples"]) / seconds
                    shown.step(step, epoch + 1, figures, rate)
                    if step == ends:
                        new_masks = masks_of(state.subnet)
                        record = {
                            "epoch": epoch + 1,
                            "step": step,
                            "train_loss": figures["loss"],
                            "train_accuracy": figures["accuracy"],
                            **evaluate(state.subnet, held, samples[:SAMPLES_PER_EPOCH]),
                            "flips": count_flips(masks, new_masks),
                            "learning_rate": float(schedule(step - 1)),
                            "train_seconds": seconds,
                            "images_per_second": rate,
                        }
                        shown.epoch(workdir.append(record))
                        masks, totals = new_masks, zero_totals()
                    if step in (save_at, last_step):
                        checkpoints.save(step, Progress(state, totals, masks, jnp.float32(seconds)))

    test = evaluate(state.subnet, Held("test", dataset.test_images, dataset.test_labels), samples)
    summary = _summary(config, dataset, workdir, state.subnet, masks, test, seconds, advance.compile_seconds)
    workdir.finish(summary, lambda: plots.draw_run(workdir.path, summary, workdir.records(), state.subnet, masks))
    return summary


def _summary(config, dataset, workdir, subnet, masks, test, seconds, compile_seconds) -> dict:
    layers = {
        path: {"size": size, "kept": kept, "density": kept / size}
        for path, (kept, size) in layer_counts(subnet.weights, masks).items()
    }
    steps_per_epoch = -(-len(dataset.train_labels) // config.batch_size)
    tested = [r["test_accuracy"] for r in workdir.records() if "test_accuracy" in r and r["epoch"] > 0]
    return {
        "method": config.method,
        "dataset": dataset.name,
        "model": config.model,
        "density": sum(v["kept"] for v in layers.values()) / sum(v["size"] for v in layers.values()),
        **test,
        "best_test_accuracy": max([test["test_accuracy"], *tested]),  # over epochs: optimistic, for no headline
        "epochs": config.epochs,
        "steps": config.epochs * steps_per_epoch,
        "train_seconds": seconds,
        "images_per_second": config.epochs * len(dataset.train_labels) / seconds,
        "compile_seconds": compile_seconds,
        "layers": layers,
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()}), {platform.machine()}",
        "versions": versions(),
        "seed": config.seed,
        "config": workdir.config(),
        "data_source": dataset.source,
    }


class Driver:
    """Runs train steps over the images, which stay on the device.

    Called with (state, totals, order, start, stop) it does the steps of `order` from start to stop and returns the
    new state and totals, and the seconds that it took without compiling. The state that goes in is donated.
    """

    def __init__(self, step: Callable, learns: str, dataset: data.Dataset):
        self.steps_per_call = STEPS_PER_CALL.get(jax.default_backend(), STEPS_PER_CALL_ELSEWHERE)
        self.compile_seconds = 0.0
        self._images, self._labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
        self._compiled = {}

        def one(carry, chosen, images, labels):
            state, totals = carry
            indices, weight = chosen
            batch = {"image": images[indices], "label": labels[indices], "weight": weight}
            at = state.step
            state, metrics = step(state, batch)
            finite = jnp.isfinite(metrics["loss"]) & all_finite(getattr(state.subnet, learns))
            return state, {
                "loss": totals["loss"] + metrics["loss"] * metrics["count"],
                "correct": totals["correct"] + metrics["correct"],
                "count": totals["count"] + metrics["count"],
                "bad_step": jnp.where((totals["bad_step"] < 0) & ~finite, at, totals["bad_step"]),
            }

        def many(state, totals, images, labels, indices, weights):
            if len(indices) == 1:
                return one((state, totals), (indices[0], weights[0]), images, labels)
            carry, _ = jax.lax.scan(
                lambda carry, chosen: (one(carry, chosen, images, labels), None), (state, totals), (indices, weights)
            )
            return carry

        self._many = many

    def __call__(self, state, totals, order, start: int, stop: int) -> tuple[sm.TrainState, dict, float]:
        seconds = 0.0
        while start < stop:
            # Two lengths of call and no others: each one is compiled.
            steps = self.steps_per_call if stop - start >= self.steps_per_call else 1
            chosen = [part[start : start + steps] for part in order]
            run = self._compile(steps, (state, totals, self._images, self._labels, *chosen))
            began = time.perf_counter()
            state, totals = run(state, totals, self._images, self._labels, *chosen)
            seconds += time.perf_counter() - began
            start += steps
        began = time.perf_counter()
        jax.block_until_ready(totals)
        return state, totals, seconds + time.perf_counter() - began

    def _compile(self, steps: int, arguments: tuple) -> Callable:
        if steps not in self._compiled:
            began = time.perf_counter()
            self._compiled[steps] = compile_for_backend(self._many, arguments, donate=(0, 1))
            self.compile_seconds += time.perf_counter() - began
        return self._compiled[steps]


def compile_for_backend(function: Callable, arguments: tuple, donate: tuple[int, ...] = ()) -> Callable:
    """`function` compiled for these arguments, on a CPU with the options that make its convolutions fast."""
    options = CPU_OPTIONS if jax.default_backend() == "cpu" else None
    try:
        return jax.jit(function, donate_argnums=donate, compiler_options=options).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()  # a compiler without the option


def epoch_order(key: jax.Array, epoch: int, examples: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which images each step of an epoch sees: int32 [steps, batch] indices and float32 [steps, batch] weights.

    A new permutation for each epoch, a function of (key, epoch) alone. The last batch is padded with weight 0.
    """
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), examples), np.int32)
    padding = -examples % batch_size
    weights = np.concatenate([np.ones(examples, np.float32), np.zeros(padding, np.float32)])
    order = np.concatenate([order, np.zeros(padding, np.int32)])
    return order.reshape(-1, batch_size), weights.reshape(-1, batch_size)


def make_evaluate(mask_fn: sm.MaskFn, model, dataset: data.Dataset) -> Callable[..., dict[str, float]]:
    """evaluate(subnet, held, keys=()) -> {"<held>_loss": mean cross-entropy, "<held>_accuracy": fraction}.

    Over all examples, under the deterministic masks; with keys also "<held>_sampled_loss" and
    "<held>_sampled_accuracy", the means over the masks that each of them draws.
    """

    def sums(subnet, key, images, labels, weights):
        params = sm.subnetwork(mask_fn, subnet, key)

        def one(batch):
            images, labels, weights = batch
            logits = model.apply({"params": params}, recipe.normalise(images, dataset.mean, dataset.std))
            losses, hits = recipe.losses_and_hits(logits, labels)
            return jnp.sum(losses * weights), jnp.sum(hits * weights)

        losses, hits = jax.lax.map(one, (images, labels, weights))
        return jnp.sum(losses), jnp.sum(hits)

    compiled, batches = {}, {}

    def evaluate(subnet, held, keys=()):
        examples = len(held.labels)
        if held.name not in batches:
            batches[held.name] = [_in_batches(p) for p in (held.images, held.labels, np.ones(examples, np.float32))]
        padded = batches[held.name]

        def means(key):
            arguments, kind = (subnet, key, *padded), (held.name, key is None)
            if kind not in compiled:
                compiled[kind] = compile_for_backend(sums, arguments)
            return [float(total) / examples for total in compiled[kind](*arguments)]

        figures = dict(zip((f"{held.name}_loss", f"{held.name}_accuracy"), means(None), strict=True))
        if len(keys):
            loss, accuracy = np.mean([means(key) for key in keys], axis=0).tolist()
            figures |= {f"{held.name}_sampled_loss": loss, f"{held.name}_sampled_accuracy": accuracy}
        return figures

    return evaluate


def _in_batches(part: np.ndarray) -> jax.Array:
    """[batches, EVAL_BATCH, ...] on the device, padded with zeros."""
    rest = np.zeros((-len(part) % EVAL_BATCH, *part.shape[1:]), part.dtype)
    return jnp.asarray(np.concatenate([part, rest]).reshape(-1, EVAL_BATCH, *part.shape[1:]))


def zero_totals() -> dict[str, jax.Array]:
    """The sums over an epoch's steps before its first; `bad_step` is the first that was not finite, or -1."""
    return {"loss": jnp.float32(0), "correct": jnp.float32(0), "count": jnp.float32(0), "bad_step": jnp.int32(-1)}


def train_figures(totals: dict[str, jax.Array]) -> dict[str, float]:
    """Means over the epoch so far."""
    count = float(totals["count"])
    return {"loss": float(totals["loss"]) / count, "accuracy": float(totals["correct"]) / count, "examples": count}


def all_finite(tree: Tree) -> jax.Array:
    """Whether every number of the tree is finite: a sum of magnitudes is not where one of them is not."""
    return jnp.all(jnp.isfinite(jnp.stack([jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)])))


def stop_if_not_finite(bad_step: int, workdir: Workdir) -> None:
    """Raises UserError if a step was not finite. Nothing is saved after it."""
    if bad_step >= 0:
        raise UserError(
            f"the loss or what learns is not finite (NaN or infinity) at step {bad_step}. The checkpoints in "
            f"{workdir.path} are from before it. Try a lower --learning-rate with another --workdir."
        )


def count_flips(before: Tree, after: Tree) -> dict[str, int]:
    """{path: number of mask bits that differ}."""
    old = by_path(before)
    return {path: int(jnp.sum(mask != old[path])) for path, mask in by_path(after).items()}


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
