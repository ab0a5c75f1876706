"""Networks that are trained under masks, one after another, by one compiled step: the engine of `experiments.lottery`.

Each network leaves a file when it is finished, and checkpoints until then: the same call resumes it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import supermask_jax as sm
from experiments.config.tickets import Lottery
from experiments.data.batches import hold_out
from experiments.data.source import Dataset
from experiments.run import schemas
from experiments.run.checkpoints import Checkpoints, discard
from experiments.run.errors import DataError
from experiments.run.files import read_arrays, read_json, write_arrays, write_json
from experiments.run.interrupt import Interrupted
from experiments.run.placement import Placement
from experiments.run.workdir import Workdir
from experiments.training import stepper, stored
from experiments.training.evaluation import Evaluator, Split
from experiments.training.events import saving, stop_if_not_finite
from experiments.training.loop import Batch, Event, at, train
from experiments.training.loss import make_loss
from experiments.training.network import Network, network
from experiments.training.optimizer import begin_schedule_at, hold_last_rate, make_optimizer, make_schedule
from supermask_jax import artifact, lottery
from supermask_jax.trees import Tree, by_path, leaf_key, map_with_name, ones_and_sizes

PAUSE_EVERY = 10  # steps, where each is a call of its own: for a signal, which would wait for an evaluation else
CURVE = ("validation_loss", "validation_accuracy", "test_accuracy")


class Snapshot(NamedTuple):
    """A network at one step: what training is rewound to."""

    weights: Tree
    model_state: Tree = None  # batch statistics; they belong to the weights


class Candidate(NamedTuple):
    """A network to train: from where, under which masks, on batches in which order, from which step on."""

    name: str
    start: Snapshot
    masks: Tree
    order: jax.Array  # key of the order of the batches
    first_step: int = 0
    schedule_step: int | None = None  # that its schedule begins at: the first step, if None
    last_step: int | None = None  # the experiment's, if None
    is_control: bool = False  # then only its record is kept, no weights


class Trained(NamedTuple):
    """A finished network."""

    record: dict  # {"density", "layers", "curve": {"step": [...], ...}, "train_seconds"}
    drawn: Snapshot | None  # at the step that the next masks are drawn from, or at its last; None of a control


class _Progress(NamedTuple):
    """What training changes; all that a checkpoint holds."""

    state: sm.TrainState
    totals: dict[str, jax.Array]
    drawn: Tree  # the weights; with batch statistics {"weights", "model_state"}
    curve: Any  # [evaluations, len(CURVE)], NaN where not yet measured
    seconds: Any


class Trainer:
    """Trains networks of one shape on one data set; the first one pays for the compilation.

    Args:
      config: the settings.
      dataset: images; `config.data.validation` of the training images are held out.
      workdir: where the networks leave their files.
      report: called with (network's name, step, the newest row of the curve or None).
      stop_requested: whether a signal asked this process to stop.
    """

    def __init__(
        self,
        config: Lottery,
        dataset: Dataset,
        workdir: Workdir,
        report: Callable,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        self._config, self._workdir, self._report, self._stop_requested = config, workdir, report, stop_requested
        self._about = stored.describe(config.model, dataset) | {"method": "lottery", "seed": config.seed}
        self.network: Network = network(config.model, config.init, dataset.classes, dataset.image_shape)
        rest, held_out = hold_out(dataset, config.data.validation)
        self._splits = Split("validation", held_out), Split("test", dataset.test)
        alternate = config.augment.flip_alternately
        self._epochs = stepper.epochs_of(rest.train, config.optim.batch_size, self.network.has_state, alternate)
        if not self._epochs.steps:
            raise DataError(
                f"--batch-size {config.optim.batch_size} needs as many training images, and {dataset.name} has "
                f"{len(rest.train)} left: {config.model.model} has batch statistics, and trains on whole batches only."
            )
        schedule = make_schedule(config.optim, config.tickets.steps, self._epochs.steps)
        if config.tickets.kept == "finetune":  # it trains on when the schedule is over
            schedule = hold_last_rate(schedule, config.tickets.steps)
        self._tx = make_optimizer(config.optim, schedule)
        loss_fn = make_loss(self.network, rest.mean, rest.std, config.augment, config.optim.label_smoothing)
        # The masks are in the optimizer's state or in the scores, never in the step: one compilation serves them all.
        blank, _ = self.network.blank(jax.random.key(0))
        full = lottery.full_masks(blank)
        self.sizes = {path: mask.size for path, mask in by_path(full).items()}  # of each layer, in weights
        tx = self._with_frozen(full)
        step = sm.make_train_step(sm.identity, loss_fn, tx, learns="weights")
        calls = stepper.steps_per_call(blank)
        self._stepper = stepper.make_stepper(step, "weights", rest.train, Placement(), calls)
        self._evaluator = Evaluator(sm.methods.dense(blank), self.network, rest)

    @property
    def compile_seconds(self) -> float:
        return self._stepper.compile_seconds

    def draw(self, key: jax.Array) -> Snapshot:
        """A new network: kernels as the settings say, all else as the model says."""
        return Snapshot(*self.network.init(key))

    def evaluate(self, start: Snapshot, masks: Tree) -> dict[str, float]:
        """The figures of `CURVE` for a network as it is."""
        return dict(zip(CURVE, self._row(self._subnet(start.weights, masks), start.model_state), strict=True))

    def train(self, candidate: Candidate) -> Trained:
        """Trains a network to its last step, or resumes it, or reads a finished one."""
        folder = self._workdir.path / "networks"
        folder.mkdir(exist_ok=True)
        report, arrays = folder / f"{candidate.name}.json", folder / f"{candidate.name}.npz"
        checkpoints = self._workdir.path / "checkpoints" / candidate.name
        if not os.path.lexists(report):
            record, drawn = self._train(candidate, checkpoints)
            if not candidate.is_control:
                masks = {f"masks/{path}": np.asarray(mask, bool) for path, mask in by_path(candidate.masks).items()}
                write_arrays(arrays, _stored(drawn) | masks)
                self._save_artifact(folder / f"{candidate.name}.safetensors", drawn, candidate.masks)
            write_json(report, record)  # last: it marks the network as finished
            if self._stop_requested():
                raise Interrupted(f"stopped by a signal, after {candidate.name} was finished in {self._workdir.path}.")
        discard(checkpoints)
        record = read_json(report, schemas.Trained, "move it away, and this network is trained again.")
        return Trained(record, None if candidate.is_control else _restored(candidate.start, read_arrays(arrays)))

    def _save_artifact(self, file: Path, drawn: Snapshot, masks: Tree) -> None:
        about = self._about | {"test_accuracy": self.evaluate(drawn, masks)["test_accuracy"]}
        subnet = self._subnet(drawn.weights, masks)
        sm.save_subnetwork(file, subnet, artifact.Stored(), model_state=drawn.model_state, about=about)

    def _train(self, candidate: Candidate, checkpoint_dir: Path) -> tuple[dict, Snapshot]:
        config, first = self._config.tickets, candidate.first_step
        last = config.steps if candidate.last_step is None else candidate.last_step
        measured = range(-(-first // config.eval_every) * config.eval_every, last, config.eval_every)
        measured_at = sorted({first, last, *measured})
        draw_at = max(round(config.prune_at * last), first) if candidate.last_step is None else last
        checkpoints = Checkpoints(checkpoint_dir)
        start = self._start(candidate, len(measured_at))
        step, progress = checkpoints.restore(start) or (first, start)
        progress = progress._replace(curve=np.array(progress.curve), seconds=float(progress.seconds))
        if step > first:
            self._report(candidate.name, step, None)
        else:
            progress.curve[0] = self._row(progress.state.subnet, progress.state.model_state)
        advance = stepper.over(self._stepper, self._epochs, candidate.order)
        events = self._events(candidate.name, measured_at, draw_at, last, checkpoints)
        at_once = PAUSE_EVERY if self._stepper.steps_per_call == 1 else last
        progress = train(advance, progress, step, last, events, at_once)
        counts = {path: {"kept": kept, "size": size} for path, (kept, size) in ones_and_sizes(candidate.masks).items()}
        curve = {name: progress.curve[:, i].tolist() for i, name in enumerate(CURVE)}
        record = {
            "name": candidate.name,
            "density": sm.density(candidate.masks),
            "layers": counts,
            "curve": {"step": measured_at, **curve},
            "train_seconds": progress.seconds,
        }
        return record, _unpacked(progress.drawn, progress.state.model_state)

    def _start(self, candidate: Candidate, evaluations: int) -> _Progress:
        weights, model_state = candidate.start
        subnet = self._subnet(weights, candidate.masks)
        tx, key = self._with_frozen(candidate.masks), leaf_key(candidate.order, "train")
        # A step gives its state away, and an optimizer may keep one array in two places: all of it is copied.
        state = jax.tree.map(jnp.copy, sm.init_state(subnet, tx, key, model_state, learns="weights"))
        first = candidate.first_step
        due = first if candidate.schedule_step is None else candidate.schedule_step
        opt_state = begin_schedule_at(due, state.opt_state)  # a rewound network is that far in the schedule too
        state = state._replace(step=jnp.int32(first), opt_state=opt_state)
        curve = jnp.full((evaluations, len(CURVE)), jnp.nan)
        return _Progress(state, stepper.zero_totals(), _packed(state), curve, jnp.float32(0))

    def _events(
        self, name: str, measured_at: list[int], draw_at: int, last: int, checkpoints: Checkpoints
    ) -> list[Event]:
        path = self._workdir.path

        def guard(step: int, progress: _Progress, batch: Batch) -> _Progress:
            stop_if_not_finite(progress.totals, progress.state.subnet.weights, path)
            return progress

        def draw(step: int, progress: _Progress, batch: Batch) -> _Progress:
            return progress._replace(drawn=_packed(progress.state))

        def measure(step: int, progress: _Progress, batch: Batch) -> _Progress:
            row = self._row(progress.state.subnet, progress.state.model_state)
            progress.curve[measured_at.index(step)] = row
            self._report(name, step, dict(zip(CURVE, row, strict=True)))
            return progress

        def save(step: int, progress: _Progress, batch: Batch) -> _Progress:
            values = progress._replace(curve=jnp.asarray(progress.curve), seconds=jnp.float32(progress.seconds))
            checkpoints.save(step, values)
            return progress

        return [
            Event(None, guard),
            Event(at([draw_at], last + 1), draw),
            Event(at(measured_at, last + 1), measure),
            *saving(save, self._config.output.checkpoint_every, last, self._stop_requested, path, at_end=False),
        ]

    def _row(self, subnet: sm.Subnet, model_state: Tree) -> list[float]:
        _, params = self._evaluator.masked(subnet)
        figures = {}
        for split in self._splits:
            figures |= self._evaluator.figures(params, model_state, split)
        return [figures[name] for name in CURVE]

    def _subnet(self, weights: Tree, masks: Tree) -> sm.Subnet:
        """Pruned weights are zero, or stay what they were: then nothing masks them, and the optimizer freezes them."""
        if self._config.tickets.pruned == "freeze":
            return sm.Subnet(weights, jax.tree.map(lambda _: None, weights))
        return sm.Subnet(weights, masks)

    def _with_frozen(self, masks: Tree) -> optax.GradientTransformation:
        if self._config.tickets.pruned != "freeze":
            return self._tx
        return optax.chain(self._tx, lottery.frozen(masks))


def _packed(state: sm.TrainState) -> Tree:
    """A copy of the weights, and of the batch statistics where there are any, as a checkpoint holds them."""
    weights, model_state = state.subnet.weights, state.model_state
    packed = weights if model_state is None else {"weights": weights, "model_state": model_state}
    return jax.tree.map(jnp.copy, packed)


def _unpacked(packed: Tree, model_state: Tree) -> Snapshot:
    return Snapshot(packed) if model_state is None else Snapshot(**packed)


def _stored(snapshot: Snapshot) -> dict[str, jax.Array]:
    """{name: array} of a network's file."""
    return {
        f"{kind}/{path}": leaf
        for kind, tree in snapshot._asdict().items()
        for path, leaf in by_path(tree).items()
    }  # fmt: skip


def _restored(like: Snapshot, arrays: dict[str, np.ndarray]) -> Snapshot:
    """The snapshot in a network's file, in the structure and dtypes of another."""
    return Snapshot(
        *(
            map_with_name(lambda path, leaf, kind=kind: jnp.asarray(arrays[f"{kind}/{path}"], leaf.dtype), tree)
            for kind, tree in like._asdict().items()
        )
    )
