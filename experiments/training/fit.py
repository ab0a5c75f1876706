"""One run from its settings to its files: data, network, method, training, evaluation, summary."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import supermask_jax as sm
from experiments.config.registry import METHODS
from experiments.config.run import Run, named
from experiments.config.sections import Masks
from experiments.config.settings import flat, neutral
from experiments.data.source import Dataset
from experiments.run import display, processes
from experiments.run.checkpoints import Checkpoints
from experiments.run.errors import UserError
from experiments.run.interrupt import Interrupted, stopping
from experiments.run.names import Settings, default_path
from experiments.run.placement import Placement
from experiments.run.workdir import Workdir
from experiments.training import pretrained, stepper, stored, summary
from experiments.training.evaluation import Split, noise_like
from experiments.training.events import saving, stop_if_not_finite
from experiments.training.images import NO_OTHERS, Others, open_data, open_others, require_same_images, splits
from experiments.training.loop import Batch, Event, every, train
from experiments.training.parts import Parts
from supermask_jax import parallel
from supermask_jax.trees import Tree, by_path, leaf_key

REPORT_EVERY = 10  # steps; bounds how many are dispatched ahead, and how late a signal is noticed


class Progress(NamedTuple):
    """What training changes; all that a checkpoint holds."""

    state: sm.TrainState
    totals: dict[str, jax.Array]  # sums over the steps of the current epoch
    masks: Tree  # at the end of the last epoch, to count flips against
    seconds: Any  # of training, without compilation and evaluation


def run(config: Run, experiment: str) -> dict:
    """Trains, or resumes, what the settings of a command say; returns the summary that it also writes.

    Args:
      config: the settings.
      experiment: the command's name, for the default work directory.

    Raises:
      UserError: as `fit` and, with `evaluate`, as `stored.evaluate`; and the data are missing or damaged.
    """
    join(config)
    if config.evaluate:
        return stored.evaluate(config)
    dataset = processes.in_turn(partial(open_data, config.data))
    others = processes.in_turn(partial(open_others, config.evaluation, config.data, dataset))
    why = METHODS[config.masks.method].free_density
    if why and config.masks.density != Masks.density and processes.is_first():
        display.show_warning(f"--density {config.masks.density:g} has no effect: {why}.")
    return fit(named(config, dataset.name), dataset, experiment, others)


def join(config: Run) -> None:
    """Joins the processes that train together, all of which must have the same settings."""
    machine = config.machine
    if machine.compilation_cache:
        processes.keep_compiled(Path(machine.compilation_cache).expanduser())
    processes.join(machine.devices, machine.coordinator, machine.num_processes, machine.process_id)
    processes.require_same_settings(flat(config))


def place(config: Run) -> Placement:
    """The devices of the settings; UserError unless they exist and divide the batch."""
    placement = Placement(config.machine.devices, config.machine.shard_scores)
    if config.optim.batch_size % placement.size:
        raise UserError(f"--batch-size {config.optim.batch_size} does not divide over {placement.size} devices.")
    return placement


def fit(config: Run, dataset: Dataset, experiment: str, others: Others = NO_OTHERS, single: bool = True) -> dict:
    """Trains, or resumes, or returns the summary of a finished run. Leaves its files in the work directory.

    Args:
      config: the settings, as `named` makes them.
      dataset: what to train and evaluate on.
      experiment: the command's name, for the default work directory.
      others: the out-of-distribution and shifted sets that the run measures on.
      single: whether it shows its progress and draws pictures; if not, it is one of many runs.

    Raises:
      UserError: settings that do not fit the data, the devices or the work directory; loss or scores that are not
        finite.
    """
    placement = place(config)
    shows = single and processes.is_first()
    require_same_images(dataset, others)
    if dataset.warning and shows:
        display.show_warning(dataset.warning)
    values = flat(config)
    if config.weights:  # a file is what is in it, wherever it lies
        values["weights"] = pretrained.digest(config.weights)
    settings = Settings(values, neutral(type(config)))
    output = config.output.workdir
    path = Path(output).expanduser() if output else default_path(settings, experiment)
    parts = Parts(config, *splits(config.data, dataset), placement)
    if config.weights:
        parts.initial  # noqa: B018 - a file that does not fit is told before there is a work directory
    restart, writes = config.output.restart, processes.is_first()
    open_workdir = partial(Workdir, path, settings, dataset.fingerprint, restart=restart, writes=writes)
    workdir = processes.in_turn(open_workdir)
    processes.require_alike(workdir.mark(), f"{path} must be on a file system that all share, and the same")
    with stopping() as stop_requested:
        result = workdir.summary()
        if result is None:
            result = _Job(parts, workdir, others, shows, stop_requested).run()
    if stop_requested() and not single:
        raise Interrupted(f"stopped by a signal, after {workdir.path} was finished.")
    if shows:
        display.show_summary(result, path)
    return result


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """A run that is not finished, from its start, or its last checkpoint, to its summary.

    Fields:
      parts: what it is made of.
      workdir: its files.
      others: the out-of-distribution and shifted sets that it measures on.
      shows: whether it shows its progress and draws pictures.
      stop_requested: whether a signal has come.
    """

    parts: Parts
    workdir: Workdir
    others: Others
    shows: bool
    stop_requested: Callable[[], bool]

    def run(self) -> dict:
        """Trains to the end, or from the last checkpoint on, and writes the summary."""
        parts = self.parts
        start = self.start()
        if self.shows:
            display.say("compiling, and evaluating the untrained network")
        masks, first = parts.measured(start.state)
        start = start._replace(masks=masks)
        checkpoints = self.workdir.checkpoints()
        restored = checkpoints.restore(start)
        step, progress = restored or (0, start)
        progress = progress._replace(seconds=float(progress.seconds))
        finished = step // parts.epochs.steps + 1 if restored else 0
        self.workdir.cut_records(step if restored else -1, epochs=finished)
        self.stop_before_training(step)
        with display.Display(parts.last_step, step, parts.config.epochs, quiet=not self.shows) as shown:
            if restored:
                shown.say(f"resumed from step {step} of {parts.last_step} in {self.workdir.path}")
            else:
                shown.epoch(self.workdir.append({"epoch": 0, "step": 0, **first}))
            if self.shows and jax.process_count() == 1 and step < parts.last_step:
                shown.say(self.estimate(progress.state, step))
            advance = stepper.over(parts.stepper, parts.epochs, leaf_key(parts.key, "order"))
            at_once = max(REPORT_EVERY, parts.stepper.steps_per_call)
            progress = train(advance, progress, step, parts.last_step, self.events(shown, checkpoints), at_once)
        return self.finish(progress)

    def estimate(self, state: sm.TrainState, step: int) -> str:
        """How long the rest of the training will take, by two calls of the step on a copy of the state.

        The first call compiles, and is not counted. An evaluation takes a third as long for each image.

        Args:
          state: before the step; it is not given away.
          step: how many steps are behind it.
        """
        parts, batch = self.parts, self.parts.config.optim.batch_size
        tried = min(parts.stepper.steps_per_call, parts.epochs.steps)
        copy = parts.placement.place(jax.tree.map(jnp.copy, state))
        totals, order = parts.placement.replicate(stepper.zero_totals()), parts.epochs.order(parts.key, 0)
        for call in range(2):
            start = call * tried if 2 * tried <= parts.epochs.steps else 0  # a stream goes on where it was
            copy, totals, seconds, _ = parts.stepper(copy, totals, order, start, start + tried)
        left, epochs = parts.last_step - step, parts.config.epochs - step // parts.epochs.steps
        seconds /= tried
        minutes = (left * seconds + epochs * seconds / batch * len(parts.split.source) / 3) / 60
        time = f"about {minutes:.1f} minutes" if minutes >= 1 else "less than a minute"
        memory = f"; a step takes {parts.stepper.memory / 1e6:,.0f} MB of memory" if parts.stepper.memory else ""
        return f"{time}: {left:,} steps of {1000 * seconds:.1f} ms, and evaluations{memory}"

    def stop_before_training(self, step: int) -> None:
        """Raises Interrupted if a signal came while all was made ready; nothing is lost then."""
        if processes.any_of(self.stop_requested()):
            raise Interrupted(f"stopped by a signal at step {step} of {self.parts.last_step} in {self.workdir.path}.")

    def start(self) -> Progress:
        """Before the first step, on the devices; the masks are not counted yet."""
        place = self.parts.placement
        totals, seconds = place.replicate((stepper.zero_totals(), jnp.float32(0)))
        return Progress(self.parts.state(), totals, None, seconds)

    def events(self, shown: display.Display, checkpoints: Checkpoints) -> list[Event]:
        """What happens between steps, in its order."""
        parts = self.parts
        rate_at, path = jax.jit(parts.schedule), self.workdir.path

        def guard(step: int, progress: Progress, batch: Batch) -> Progress:
            stop_if_not_finite(progress.totals, getattr(progress.state.subnet, parts.method.learns), path)
            return progress

        def update(step: int, progress: Progress, batch: Batch) -> Progress:
            if parts.placement.size > 1 and jax.process_count() == 1:  # a gradient is computed where its batch is
                batch = parallel.shard_batch(parts.placement.mesh, batch)
            state = parts.method.update(step, parts.placement.whole(progress.state), batch)
            return progress._replace(state=parts.placement.place(state))

        def report(step: int, progress: Progress, batch: Batch) -> Progress:
            shown.step(step, -(-step // parts.epochs.steps), *self.train_figures(step, progress))
            return progress

        def evaluate(step: int, progress: Progress, batch: Batch) -> Progress:
            figures, rate = self.train_figures(step, progress)
            masks, measured = parts.measured(progress.state)
            record = {
                "epoch": step // parts.epochs.steps,
                "step": step,
                "train_loss": figures["loss"],
                "train_accuracy": figures["accuracy"],
                **measured,
                "flips": summary.count_flips(progress.masks, masks),
                "learning_rate": float(rate_at(step - 1)),
                "train_seconds": progress.seconds,
                "images_per_second": rate,
            }
            shown.epoch(self.workdir.append(record))
            return progress._replace(masks=masks, totals=parts.placement.replicate(stepper.zero_totals()))

        def save(step: int, progress: Progress, batch: Batch) -> Progress:
            seconds = np.float32(processes.of_first(progress.seconds))
            checkpoints.save(step, progress._replace(seconds=parts.placement.replicate(seconds)))
            return progress

        updates = [Event(every(parts.method.update_every), update)] if parts.method.update else []
        return [
            Event(None, guard),
            *updates,
            Event(None, report),
            Event(every(parts.epochs.steps), evaluate),
            *saving(save, parts.config.output.checkpoint_every, parts.last_step, self.stop_requested, path),
        ]

    def train_figures(self, step: int, progress: Progress) -> tuple[dict[str, float], float]:
        """({"loss", "accuracy"} over the epoch so far, images per second of the run so far)."""
        count = float(progress.totals["count"])
        figures = {name: float(progress.totals[of]) / count for name, of in (("loss", "loss"), ("accuracy", "correct"))}
        epochs = self.parts.epochs
        before = (step - 1) // epochs.steps * epochs.seen
        return figures, (before + count) / progress.seconds

    def finish(self, progress: Progress) -> dict:
        """Measures the network at the end, draws the pictures and writes the summary."""
        parts = self.parts
        state, test = progress.state, Split("test", parts.dataset.test)
        _, params = parts.evaluator.masked(state.subnet)
        figures = self.last_figures() or parts.evaluator.figures(params, state.model_state, test)
        figures |= parts.evaluator.sampled_figures(state.subnet, state.model_state, test, parts.sample_keys)
        subnet, masks, model_state = parts.placement.whole((state.subnet, progress.masks, state.model_state))
        figures |= summary.sizes(parts.network, *parts.initial, masks)
        if parts.config.evaluation.assess:
            others = {"noise": noise_like(parts.dataset, parts.config.seed)}
            others |= {each.name: each.test for each in self.others.ood}
            figures |= parts.evaluator.assess(params, state.model_state, test, others)
            figures["gradient_flow"] = [record["gradient_flow"] for record in self.workdir.records()]  # from epoch 0 on
        if self.others.shifted:
            figures["shifted"] = {
                each.dataset.name: parts.evaluator.shifted_figures(params, state.model_state, each)
                for each in self.others.shifted
            }
        if processes.is_first():
            figures |= stored.save(parts, self.workdir.path, subnet, model_state, figures)
        result = self.summary(figures, progress.seconds)

        def draw():
            if self.shows:
                from experiments.plots import one_run  # here: a process that draws nothing starts sooner without

                trees = (
                    {path: np.asarray(leaf, np.float32) for path, leaf in by_path(tree).items()}
                    for tree in (*subnet, masks)
                )
                one_run.draw_run(self.workdir.path, result, self.workdir.records(), *trees)

        self.workdir.finish(result, draw)
        return result

    def last_figures(self) -> dict:
        """The test figures of the last epoch, if epochs are evaluated on the test set."""
        record = self.workdir.records()[-1]
        return {name: record[name] for name in ("test_loss", "test_accuracy") if name in record}

    def summary(self, figures: dict, seconds: float) -> dict:
        """What summary.json holds."""
        parts = self.parts
        config, dataset = parts.config, parts.dataset
        tested = [r["test_accuracy"] for r in self.workdir.records() if "test_accuracy" in r and r["epoch"] > 0]
        return {
            "method": config.masks.method,
            "dataset": dataset.name,
            "model": config.model.model,
            **figures,
            "best_test_accuracy": max([figures["test_accuracy"], *tested]),  # over epochs: optimistic, for no headline
            "epochs": config.epochs,
            "steps": parts.last_step,
            "train_seconds": seconds,
            "images_per_second": config.epochs * parts.epochs.seen / seconds,
            "compile_seconds": parts.stepper.compile_seconds,
            "device": summary.machine(),
            "devices": parts.placement.size,
            "processes": jax.process_count(),
            "versions": summary.versions(),
            "date": summary.today(),
            "seed": config.seed,
            "config": self.workdir.config(),
            "data_source": dataset.source,
        }
