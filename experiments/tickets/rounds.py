"""Iterative pruning as an experiment: trials, rounds, tickets and their controls; its files, its summary."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config.settings import changed, flat, neutral, without_unread
from experiments.config.tickets import TRAINED, Lottery, Tickets
from experiments.data.load import load_like
from experiments.data.source import Dataset
from experiments.run import schemas
from experiments.run.display import show_warning
from experiments.run.errors import UserError
from experiments.run.interrupt import Interrupted, stopping
from experiments.run.names import Settings
from experiments.run.workdir import Workdir
from experiments.tickets import display, plots
from experiments.tickets.trainer import Candidate, Snapshot, Trained, Trainer
from experiments.training import images, summary
from supermask_jax import initializers, lottery, saliency
from supermask_jax.densities import exact, keep_count
from supermask_jax.trees import Tree, by_path, leaf_key, map_with_name
from supermask_jax.units import unit_masks

USUAL_VALIDATION = 5000  # or a tenth of a smaller set


def open_data(config: Lottery) -> tuple[Lottery, Dataset, Dataset | None]:
    """(the settings that the experiment is stored under, the images, those that tickets are transferred to).

    Raises:
      UserError: the data are missing or damaged, or fewer than --train-images.
    """
    dataset = images.open_data(config.data)
    if dataset.warning:
        show_warning(dataset.warning)
    dataset, _ = images.splits(changed(config.data, validation=0), dataset)
    transfer_to = config.tickets.transfer_to
    target = load_like(transfer_to, config.data.data_dir, dataset) if transfer_to else None
    if target and target.warning:
        show_warning(target.warning)
    if target and (target.image_shape, target.classes) != (dataset.image_shape, dataset.classes):
        raise UserError(
            f"--transfer-to {transfer_to} has images of {target.image_shape} in {target.classes} classes, and "
            f"{dataset.name} has {dataset.image_shape} in {dataset.classes}: one network must fit both."
        )
    tenth = min(len(each.train) for each in (dataset, target) if each) // 10
    validation = config.data.validation or max(min(USUAL_VALIDATION, tenth), 1)
    return changed(without_unread(config), dataset=dataset.name, validation=validation), dataset, target


def run(config: Lottery, dataset: Dataset, target: Dataset | None = None) -> dict:
    """Runs, or resumes, all rounds of all trials: their files, their pictures, and the summary.

    Args:
      config: the settings, as `open_data` makes them.
      dataset: images that the tickets are drawn on.
      target: images that tickets and controls are trained and measured on, if not the same.
    """
    workdir = open_workdir(config, dataset, target)
    result = workdir.summary()
    if not result:
        networks, inputs = [], []
        with Experiment(config, dataset, target, workdir) as experiment:
            for trial in range(config.tickets.trials):
                for outcome in experiment.rounds(trial):
                    networks.extend(outcome.records)
                    if trial == 0 and outcome.per_input:
                        inputs.append(outcome.per_input)
        result = {
            "dataset": (target or dataset).name,
            "tickets_from": dataset.name,
            "model": config.model.model,
            "networks": networks,
            "per_input": inputs,
            "compile_seconds": experiment.compile_seconds,
            "device": summary.machine(),
            "versions": summary.versions(),
            "date": summary.today(),
            "seed": config.seed,
            "config": workdir.config(),
            "data_source": " and ".join(d.source for d in (dataset, target) if d),
        }
        workdir.finish(result, lambda: plots.draw(workdir.path, result))
    display.show_summary(result, workdir.path)
    return result


def open_workdir(
    config: Lottery, dataset: Dataset, target: Dataset | None = None, schema: Any = schemas.TicketsSummary
) -> Workdir:
    """The directory that --workdir names, or one named after the settings."""
    kind = "" if config.sweep == "none" else f"{config.sweep}-"
    settings = Settings(flat(config), neutral(type(config)))
    name = f"{kind}{config.model.model}-{dataset.name}-s{config.seed}-{settings.digest()}"
    output = config.output.workdir
    path = Path(output).expanduser() if output else Path("runs/lottery") / name
    fingerprints = [each.fingerprint for each in (dataset, target) if each]
    return Workdir(path, settings, "+".join(fingerprints), schema, config.output.restart)


class Outcome(NamedTuple):
    """A round: the networks that were trained under its masks."""

    number: int
    records: list[dict]  # of `trainer.Trained`, with "trial", "round", "network" and the figures of `best`
    per_input: list[float] | None  # the fraction kept of each input's connections, where inputs have such
    trained: Snapshot  # what the next masks are drawn from


class Experiment:
    """The rounds of each trial; a context manager around what it shows while it works."""

    def __init__(self, config: Lottery, dataset: Dataset, target: Dataset | None, workdir: Workdir):
        self._seed, self._tickets = config.seed, config.tickets
        tickets = config.tickets
        kinds = 1 + len(tickets.controls) + tickets.stability
        networks = 1 + tickets.stability + tickets.rounds * kinds + (tickets.rounds + 1) * (target is not None)
        self._shown = display.Display(tickets.trials * networks, tickets.steps)
        self._opened = contextlib.ExitStack()

        def trainer(images: Dataset) -> Trainer:
            return Trainer(config, images, workdir, self._shown.step, lambda: self._stop_requested())

        self._source = trainer(dataset)
        check_densities(tickets, self._source.sizes, self._source.network.last)
        self._trainer = trainer(target) if target else self._source
        self._initial: dict[int, Snapshot] = {}

    def __enter__(self):
        self._stop_requested = self._opened.enter_context(stopping())
        self._opened.enter_context(self._shown)
        return self

    def __exit__(self, *error):
        self._opened.__exit__(*error)

    @property
    def compile_seconds(self) -> float:
        return self._source.compile_seconds

    def rounds(self, trial: int) -> Iterator[Outcome]:
        """The rounds of a trial, the full network first (round 0). What is finished is read, not trained again."""
        tickets, key = self._tickets, self.key(trial)
        start, full = self.start(trial), lottery.full_masks(self.initial(trial).weights)
        begins = _starts(tickets, key, start, self._source.draw(leaf_key(key, "other weights")))
        transferred = self._trainer is not self._source
        last = start  # the ticket of the round before, as it ended

        def network(kind: str, number: int, masks: Tree, trainer: Trainer) -> Trained:
            begin, steps = begins(kind, number, masks, last), _first_steps(tickets, kind, number)
            order = leaf_key(key, _order(tickets, kind, number))
            name, is_control = f"trial{trial}-round{number}-{kind}", kind in tickets.controls
            trained = trainer.train(Candidate(name, begin, masks, order, *steps, is_control=is_control))
            head = {"trial": trial, "round": number, "network": kind}
            trained = trained._replace(record=head | trained.record | best(trained.record["curve"]))
            self._shown.network(trained.record)
            return trained

        def train(_, masks, number):
            kind = "source" if transferred else "ticket"
            return Pruned(begins(kind, number, masks, last), network(kind, number, masks, self._source))

        prune = make_prune(tickets, key, self._source.network.last)
        for number, masks, (before, after) in lottery.iterative_pruning(train, start, full, tickets.rounds, prune):
            ticket = network("ticket", number, masks, self._trainer) if transferred else after
            records = [ticket.record]
            if tickets.stability:
                again = network("again", number, masks, self._trainer)
                ends = ticket.drawn.weights, again.drawn.weights
                ticket.record["instability"] = instability(before.weights, masks, *ends)
            for kind in tickets.controls if number else ():
                of_kind = masks if kind == "reinit" else random_control(tickets, key, number, masks)
                records.append(network(kind, number, of_kind, self._trainer).record)
            last = after.drawn
            yield Outcome(number, records, per_input(masks, self._source.network.first), after.drawn)

    def key(self, trial: int) -> jax.Array:
        """What everything random in a trial comes from."""
        return jax.random.fold_in(jax.random.key(self._seed), trial)

    def initial(self, trial: int) -> Snapshot:
        """The network that a trial begins with."""
        if trial not in self._initial:
            self._initial = {trial: self._source.draw(leaf_key(self.key(trial), "weights"))}
        return self._initial[trial]

    def start(self, trial: int) -> Snapshot:
        """What its tickets are rewound to: the same, or the network after --rewind-step steps of training."""
        initial, steps = self.initial(trial), self._tickets.rewind_step
        if not steps:
            return initial
        order = leaf_key(self.key(trial), "order")
        full = lottery.full_masks(initial.weights)
        return self._source.train(Candidate(f"trial{trial}-rewind", initial, full, order, last_step=steps)).drawn

    def stop_if_asked(self) -> None:
        """Raises Interrupted if a signal asked this process to stop."""
        if self._stop_requested():
            raise Interrupted("stopped by a signal; what was trained is kept.")

    def evaluate(self, start: Snapshot, masks: Tree) -> dict[str, float]:
        """Losses and accuracies of a network as it is."""
        return self._trainer.evaluate(start, masks)


class Pruned(NamedTuple):
    """What masks are drawn from: a network before training, and what came of it."""

    before: Snapshot
    after: Trained


def _starts(
    tickets: Tickets, key: jax.Array, start: Snapshot, other: Snapshot
) -> Callable[[str, int, Tree, Snapshot], Snapshot]:
    """(kind of network, round, its masks, the last ticket as it ended) -> what it starts from.

    Round 0 is the full network.
    """

    def trained(masks: Tree, last: Snapshot) -> Snapshot:
        return last._replace(weights=where_kept(masks, last.weights, start.weights))

    def reshuffled(masks: Tree, last: Snapshot) -> Snapshot:
        return start._replace(weights=lottery.reshuffled(leaf_key(key, "reshuffle"), start.weights, masks))

    def signed_constant(masks: Tree, last: Snapshot) -> Snapshot:
        constants = initializers.signed_deviation(start.weights)
        return start._replace(weights=where_kept(masks, constants, start.weights))

    ways = {
        "rewind": lambda masks, last: start,
        "reinit": lambda masks, last: other,
        "reshuffle": reshuffled,
        "signed-constant": signed_constant,
        **dict.fromkeys(TRAINED, trained),
    }
    controls = {"reinit": ways["reinit"], "random": ways["rewind"]}

    def begins(kind: str, number: int, masks: Tree, last: Snapshot) -> Snapshot:
        return controls.get(kind, ways[tickets.kept])(masks, last) if number else start

    return begins


def _first_steps(tickets: Tickets, kind: str, number: int) -> tuple[int, int]:
    """(the step of training, the step of the schedule) that a network begins at."""
    of_ticket = kind not in ("reinit", "random")
    if number and (kind == "reinit" or (tickets.kept == "reinit" and of_ticket)):
        return 0, 0  # new weights have all their training before them
    if number and tickets.kept == "finetune" and of_ticket:
        return 0, tickets.steps  # the schedule is over
    return tickets.rewind_step, tickets.rewind_step


def _order(tickets: Tickets, kind: str, number: int) -> str:
    """The name of the order of a network's batches: of all, but what goes on from trained weights sees new batches."""
    name = "another order" if kind == "again" else "order"
    goes_on = number and tickets.kept in TRAINED and kind not in ("reinit", "random")
    return f"{name} of round {number}" if goes_on else name


def random_control(tickets: Tickets, key: jax.Array, number: int, masks: Tree) -> Tree:
    """Random masks that keep as much of each layer: as many weights, or as many whole neurons."""
    key = leaf_key(key, f"random masks {number}")
    if tickets.unit == "weight":
        return lottery.random_like(key, masks)
    units = lottery.random_like(key, unit_masks(masks))
    return jax.tree.map(lambda mask, unit: jnp.ones_like(mask) * unit, masks, units)


def where_kept(masks: Tree, kept: Tree, pruned: Tree) -> Tree:
    """One tree where the masks are 1 or None, the other where they are 0."""
    return jax.tree.map(lambda k, p, m: k if m is None else jnp.where(m != 0, k, p), kept, pruned, masks)


def make_prune(tickets: Tickets, key: jax.Array, output: str) -> Callable[[Pruned, Tree], Tree]:
    """(network, masks) -> the next masks, by the criterion and at the rates that the settings name.

    output: the path of the last kernel, of which half as much is pruned, or nothing.
    """
    fraction, of_output = _fractions(tickets)

    def rate(path: str, mask: jax.Array) -> float:
        if path == output:
            return of_output
        return tickets.conv_fraction if mask.ndim > 2 and tickets.conv_fraction is not None else fraction

    def prune(network, masks):
        left = sum(int(jnp.sum(mask)) for mask in jax.tree.leaves(masks))
        random = leaf_key(key, f"of {left}")
        scores = saliency.criterion(
            tickets.criterion, network.before.weights, network.after.drawn.weights, masks=masks, key=random
        )
        if tickets.scope == "layer":
            rates = {path: rate(path, mask) for path, mask in by_path(masks).items()}
            return lottery.prune_by(scores, masks, rates, scope="layer", unit=tickets.unit)
        spared = output if tickets.spare_output else None
        ranked = [without(tree, spared) for tree in (scores, masks)]  # a leaf that is None is not ranked
        pruned = by_path(lottery.prune_by(*ranked, fraction, scope="global", minimum=tickets.layer_minimum))
        return map_with_name(lambda path, mask: pruned.get(path, mask), masks)

    return prune


def _fractions(tickets: Tickets) -> tuple[float, float]:
    """The part of what is left that a round removes: of the layers, and of the output layer by itself."""
    fraction, of_output = tickets.fraction, tickets.fraction / 2
    if tickets.density:
        fraction = lottery.round_fraction(tickets.density, tickets.rounds)
        of_output = lottery.round_fraction((1 + tickets.density) / 2, tickets.rounds)
    return fraction, 0.0 if tickets.spare_output or tickets.unit == "neuron" else of_output


def without(tree: Tree, path: str | None) -> Tree:
    """The tree with None in place of one leaf, if a path is given."""
    return map_with_name(lambda name, leaf: None if name == path else leaf, tree)


def check_densities(tickets: Tickets, sizes: Mapping[str, int], output: str) -> None:
    """Raises UserError where the last round leaves fewer weights than a global ranking needs for each layer.

    It needs one for each, or --layer-minimum. A layer that is ranked by itself always keeps a weight.

    Args:
      tickets: the settings.
      sizes: how many weights each layer has, by path.
      output: the path of the last kernel.
    """
    if tickets.scope == "layer":
        return
    ranked = [size for path, size in sizes.items() if path != output or not tickets.spare_output]
    left, fraction = sum(ranked), _fractions(tickets)[0]
    for _ in range(tickets.rounds):
        left = keep_count(1 - exact(fraction), left)
    needed = sum(min(max(tickets.layer_minimum, 1), size) for size in ranked)
    if left < needed:
        each = f"--layer-minimum {tickets.layer_minimum}" if tickets.layer_minimum else "one"
        raise UserError(
            f"round {tickets.rounds} would leave {left} of the weights, and {len(ranked)} layers need {needed} to have "
            f"{each} each: say fewer --rounds, a lower --fraction or a higher --density."
        )


def best(curve: dict[str, list]) -> dict[str, float]:
    """When training should have stopped (at the lowest validation loss), and the test accuracy there and at the end."""
    at = int(np.argmin(curve["validation_loss"]))
    return {
        "early_stop_step": curve["step"][at],
        "early_stop_test_accuracy": curve["test_accuracy"][at],
        "test_accuracy": curve["test_accuracy"][-1],
    }


def instability(start: Tree, masks: Tree, a: Tree, b: Tree) -> float:
    """How far apart two copies end that saw their batches in another order, in units of how far they went.

    0: at the same place; about 1.4: in unrelated directions. Kept weights only. After Frankle et al. 2019, section 4.
    """

    def distance(x, y):
        squares = jax.tree.map(lambda p, q, m: 0.0 if m is None else jnp.sum(m * (p - q) ** 2), x, y, masks)
        return float(jnp.sqrt(sum(jax.tree.leaves(squares))))

    return 2 * distance(a, b) / (distance(a, start) + distance(b, start))


def per_input(masks: Tree, first: str) -> list[float] | None:
    """The fraction kept of each input's connections to a first layer that is dense; None for other first layers.

    first: the path of the first kernel.
    """
    mask = np.asarray(by_path(masks)[first])
    return np.mean(mask, axis=1).tolist() if mask.ndim == 2 else None
