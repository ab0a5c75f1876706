"""Networks that are trained under masks, one after another, by one compiled step: the engine of `experiments.lottery`.

Each network leaves a file when it is finished, and checkpoints until then: the same call again goes on where it was.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import supermask_jax as sm
from experiments.data import load as data
from experiments.run.checkpoints import Checkpoints
from experiments.run.files import read_arrays, read_json, write_arrays, write_json
from experiments.run.interrupt import stopping
from experiments.run.workdir import Workdir
from experiments.training import recipe
from experiments.training.evaluation import Evaluator, Held
from experiments.training.fit import stop_if_not_finite, stop_unless_done
from experiments.training.stepper import Driver, epoch_order, zero_totals
from supermask_jax import lottery, models
from supermask_jax.trees import Tree, by_path, leaf_key, map_with_name, ones_and_sizes

CURVE = ("validation_loss", "validation_accuracy", "test_accuracy")


def build_model(config, classes: int):
    """The Flax module that the settings name, as Frankle & Carbin 2019 have it: with biases where LeNet has them."""
    if config.model == "lenet-300-100":
        return models.LeNet300100(classes, dropout=0.5 if config.dropout else 0.0)
    return recipe.build_model(config, classes)


class Network(NamedTuple):
    """What is trained: from which weights, under which masks, on batches in which order, from which step on."""

    name: str
    weights: Tree
    masks: Tree
    order: jax.Array  # key of the order of the batches
    first_step: int = 0
    last_step: int | None = None  # the experiment's, if None
    is_control: bool = False  # then only its record is kept, no weights


class Trained(NamedTuple):
    """A finished network."""

    record: dict  # {"density", "layers", "curve": {"step": [...], ...}, "train_seconds"}
    drawn: Tree | None  # its weights at the step that the next masks are drawn from, or at its last; None of a control


class _Progress(NamedTuple):
    """All that a checkpoint holds."""

    state: sm.TrainState
    totals: dict[str, jax.Array]
    drawn: Tree
    curve: jax.Array  # [evaluations, len(CURVE)], NaN where not yet measured
    seconds: jax.Array


class Trainer:
    """Trains networks of one shape on one data set; the first one pays for the compilation.

    Args:
      config: settings with the fields of `experiments.lottery.Config`.
      dataset: images; `config.validation` of the training images are held out.
      workdir: where the networks leave their files.
      report: called with (network's name, step, the newest row of the curve or None).
    """

    def __init__(self, config, dataset: data.Dataset, workdir: Workdir, report: Callable):
        self._config, self._workdir, self._report = config, workdir, report
        model = build_model(config, dataset.classes)
        self._blank = recipe.zero_weights(model, dataset.train_images.shape[1:])
        rest, *held = data.hold_out(dataset, config.validation)
        self._held = Held("validation", *held)
        self._test = Held("test", dataset.test_images, dataset.test_labels)
        self._examples = len(rest.train_labels)
        decay = optax.cosine_decay_schedule(config.learning_rate, config.steps)
        schedule = decay if config.schedule == "cosine" else optax.constant_schedule(config.learning_rate)
        self._tx = recipe.make_optimizer(config, schedule)
        loss_fn = recipe.make_loss(model, rest.mean, rest.std)
        # The masks are in the optimizer's state or in the scores, never in the step: one compilation serves them all.
        tx = self._with_frozen(lottery.full_masks(self._blank))
        step = sm.make_train_step(sm.identity, loss_fn, tx, learns="weights")
        self._advance = Driver(step, "weights", rest, recipe.steps_per_call(config))
        self._evaluator = Evaluator(sm.identity, sm.identity, model, rest)
        self._orders = {}

    @property
    def compile_seconds(self) -> float:
        return self._advance.compile_seconds

    def draw(self, key: jax.Array) -> Tree:
        """New weights: kernels as the settings say, biases 0."""
        return recipe.INITIALIZERS[self._config.init](key, self._blank)

    def evaluate(self, weights: Tree, masks: Tree) -> dict[str, float]:
        """The figures of `CURVE` for a network as it is."""
        return dict(zip(CURVE, self._row(self._subnet(weights, masks)), strict=True))

    def train(self, network: Network) -> Trained:
        """Trains a network to its last step, or goes on with it, or reads a finished one."""
        folder = self._workdir.path / "networks"
        folder.mkdir(exist_ok=True)
        report, arrays = folder / f"{network.name}.json", folder / f"{network.name}.npz"
        checkpoints = self._workdir.path / "checkpoints" / network.name
        if not report.exists():
            record, drawn = self._train(network, checkpoints)
            if not network.is_control:
                masks = {f"masks/{path}": np.asarray(mask, bool) for path, mask in by_path(network.masks).items()}
                write_arrays(arrays, {f"weights/{path}": leaf for path, leaf in by_path(drawn).items()} | masks)
            write_json(report, record)  # last: it marks the network as finished
        shutil.rmtree(checkpoints, ignore_errors=True)
        record = read_json(report)
        if network.is_control:
            return Trained(record, None)
        kept = read_arrays(arrays)
        return Trained(
            record, map_with_name(lambda path, leaf: jnp.asarray(kept[f"weights/{path}"], leaf.dtype), network.weights)
        )

    def _train(self, network: Network, checkpoint_dir: Path) -> tuple[dict, Tree]:
        config, first = self._config, network.first_step
        last = config.steps if network.last_step is None else network.last_step
        at = sorted({first, last, *range(-(-first // config.eval_every) * config.eval_every, last, config.eval_every)})
        draw_at = max(round(config.prune_at * last), first) if network.last_step is None else last
        per_epoch = -(-self._examples // config.batch_size)
        subnet = jax.tree.map(jnp.copy, self._subnet(network.weights, network.masks))  # a step gives its state away
        tx = self._with_frozen(network.masks)
        # Copied as well: an optimizer may keep one array in two places, and the same buffer cannot be donated twice.
        state = jax.tree.map(jnp.copy, sm.init_state(subnet, tx, leaf_key(network.order, "train"), learns="weights"))
        state = state._replace(step=jnp.int32(first))
        drawn = jax.tree.map(jnp.copy, network.weights)
        curve = jnp.full((len(at), len(CURVE)), jnp.nan)
        start = _Progress(state, zero_totals(), drawn, curve, jnp.float32(0))
        checkpoints = Checkpoints(checkpoint_dir)
        with stopping() as asked:
            step, (state, totals, drawn, curve, seconds) = checkpoints.restore(start) or (first, start)
            curve, seconds = np.array(curve), float(seconds)
            if step > first:
                self._report(network.name, step, None)
            if step == first:
                curve[0] = self._row(state.subnet)
            while step < last:
                epoch = step // per_epoch
                begins, ends = epoch * per_epoch, (epoch + 1) * per_epoch
                save_at = step - step % config.checkpoint_every + config.checkpoint_every
                stop = min(ends, save_at, *(s for s in (*at, draw_at) if s > step))
                order = self._order(network.order, epoch)
                state, totals, elapsed = self._advance(state, totals, order, step - begins, stop - begins)
                step, seconds = stop, seconds + elapsed
                stop_if_not_finite(totals, state.subnet.weights, self._workdir)
                if step == draw_at:
                    drawn = jax.tree.map(jnp.copy, state.subnet.weights)
                if step in at:
                    curve[at.index(step)] = self._row(state.subnet)
                    self._report(network.name, step, dict(zip(CURVE, curve[at.index(step)], strict=True)))
                leaves = asked()
                if (step == save_at or leaves) and step < last:
                    values = _Progress(state, totals, drawn, jnp.asarray(curve), jnp.float32(seconds))
                    checkpoints.save(step, values)
                if leaves:
                    stop_unless_done(step, last, self._workdir)
        counts = {path: {"kept": kept, "size": size} for path, (kept, size) in ones_and_sizes(network.masks).items()}
        record = {
            "name": network.name,
            "density": sm.density(network.masks),
            "layers": counts,
            "curve": {"step": at, **{name: curve[:, i].tolist() for i, name in enumerate(CURVE)}},
            "train_seconds": seconds,
        }
        return record, drawn

    def _row(self, subnet: sm.Subnet) -> list[float]:
        _, params = self._evaluator.found(subnet)
        figures = self._evaluator.figures(params, self._held) | self._evaluator.figures(params, self._test)
        return [figures[name] for name in CURVE]

    def _order(self, key: jax.Array, epoch: int):
        """The order of the batches; the last one made is remembered, because the next call most often wants it."""
        name = (*jax.random.key_data(key).tolist(), epoch)
        if name not in self._orders:
            self._orders = {name: epoch_order(key, epoch, self._examples, self._config.batch_size)}
        return self._orders[name]

    def _subnet(self, weights: Tree, masks: Tree) -> sm.Subnet:
        """Pruned weights are zero, or stay what they were: then nothing masks them, and the optimizer freezes them."""
        if self._config.pruned == "freeze":
            return sm.Subnet(weights, jax.tree.map(lambda _: None, weights))
        return sm.Subnet(weights, masks)

    def _with_frozen(self, masks: Tree) -> optax.GradientTransformation:
        if self._config.pruned != "freeze":
            return self._tx
        return optax.chain(self._tx, lottery.frozen(masks))
