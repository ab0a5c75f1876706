"""Iterative pruning as an experiment: trials, rounds, tickets and their controls; its files, its summary."""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.load import Dataset
from experiments.run.workdir import Workdir, digest
from experiments.tickets import display as ticket_display
from experiments.tickets import plots as ticket_plots
from experiments.tickets.trainer import Network, Trained, Trainer
from experiments.training import fit as runner
from supermask_jax import initializers, lottery, saliency
from supermask_jax.selection import unit_masks
from supermask_jax.trees import Tree, by_path, leaf_key

OUTPUT = {"lenet-300-100": "Dense_2/kernel", "convnet": "Dense_1/kernel"}  # named: never inferred from order
SUMMARY_KEYS = {"dataset", "model", "networks", "per_input", "seed", "config"}


def run(config, dataset: Dataset, target: Dataset | None = None) -> dict:
    """All rounds of all trials: their files, their pictures, and the summary.

    Args:
      config: `experiments.lottery.Config`.
      dataset: images that the tickets are drawn on.
      target: images that tickets and controls are trained and measured on, if not the same.
    """
    workdir = open_workdir(config, dataset, target)
    summary = workdir.summary()
    if not summary:
        networks, inputs = [], []
        with Experiment(config, dataset, target, workdir) as experiment:
            for trial in range(config.trials):
                for found in experiment.rounds(trial):
                    networks.extend(found.records)
                    if trial == 0 and found.per_input:
                        inputs.append(found.per_input)
        summary = {
            "dataset": (target or dataset).name,
            "tickets_from": dataset.name,
            "model": config.model,
            "networks": networks,
            "per_input": inputs,
            "compile_seconds": experiment.compile_seconds,
            "versions": runner.versions(),
            "seed": config.seed,
            "config": workdir.config(),
            "data_source": " and ".join(d.source for d in (dataset, target) if d),
        }
        workdir.finish(summary, lambda: ticket_plots.draw(workdir.path, summary))
    ticket_display.show_summary(summary, workdir.path)
    return summary


def open_workdir(
    config, dataset: Dataset, target: Dataset | None = None, summary_keys: set[str] = SUMMARY_KEYS
) -> Workdir:
    """The directory that --workdir names, or one named after the settings."""
    kind = "" if config.sweep == "none" else f"{config.sweep}-"
    name = f"{kind}{config.model}-{dataset.name}-s{config.seed}-{digest(config)}"
    path = Path(config.workdir).expanduser() if config.workdir else Path("runs/lottery") / name
    digests = [f"{zlib.crc32(images.train_images.tobytes()):08x}" for images in (dataset, target) if images]
    return Workdir(path, config, "+".join(digests), summary_keys)


class Found(NamedTuple):
    """A round: the networks that were trained under its masks."""

    number: int
    records: list[dict]  # of `tickets.Trained`, with "trial", "round", "network" and the figures of `best`
    per_input: list[float] | None  # the fraction kept of each input's connections, where inputs have such
    trained: Tree  # the weights that the next masks are drawn from


class Experiment:
    """The rounds of each trial; a context manager around what it shows while it works."""

    def __init__(self, config, dataset: Dataset, target: Dataset | None, workdir: Workdir):
        self._config = config
        kinds = 1 + len(config.controls) + config.stability
        networks = 1 + config.stability + config.rounds * kinds + (config.rounds + 1) * (target is not None)
        self._shown = ticket_display.Display(config.trials * networks, config.steps)
        self._finder = Trainer(config, dataset, workdir, self._shown.step)
        self._trainer = Trainer(config, target, workdir, self._shown.step) if target else self._finder
        self._initial: dict[int, Tree] = {}

    def __enter__(self):
        self._shown.__enter__()
        return self

    def __exit__(self, *error):
        self._shown.__exit__(*error)

    @property
    def compile_seconds(self) -> float:
        return self._finder.compile_seconds

    def rounds(self, trial: int) -> Iterator[Found]:
        """The rounds of a trial, the full network first (round 0). What is finished is read, not trained again."""
        config, key = self._config, self.key(trial)
        start, full = self.start(trial), lottery.full_masks(self.initial(trial))
        begins = _starts(config, key, start, self._finder.draw(leaf_key(key, "other weights")))
        transferred = self._trainer is not self._finder

        def network(kind: str, number: int, masks: Tree, trainer: Trainer) -> Trained:
            weights = begins(kind, number, masks)
            order = leaf_key(key, "another order" if kind == "again" else "order")
            is_new = number > 0 and (kind == "reinit" or (config.kept == "reinit" and kind != "random"))
            first_step = 0 if is_new else config.rewind_step  # new weights have all their training before them
            name, is_control = f"trial{trial}-round{number}-{kind}", kind in config.controls
            trained = trainer.train(Network(name, weights, masks, order, first_step, is_control=is_control))
            head = {"trial": trial, "round": number, "network": kind}
            trained = trained._replace(record=head | trained.record | best(trained.record["curve"]))
            self._shown.network(trained.record)
            return trained

        def train(_, masks, number):
            kind = "source" if transferred else "ticket"
            found = network(kind, number, masks, self._finder)
            return Pruned(begins(kind, number, masks), found)

        prune = make_prune(config, key)
        for number, masks, (before, found) in lottery.iterative_pruning(train, start, full, config.rounds, prune):
            ticket = network("ticket", number, masks, self._trainer) if transferred else found
            records = [ticket.record]
            if config.stability:
                again = network("again", number, masks, self._trainer)
                ticket.record["instability"] = instability(before, masks, ticket.drawn, again.drawn)
            for kind in config.controls if number else ():
                of_kind = masks if kind == "reinit" else random_control(config, key, number, masks)
                records.append(network(kind, number, of_kind, self._trainer).record)
            yield Found(number, records, per_input(masks), found.drawn)

    def key(self, trial: int) -> jax.Array:
        """What everything random in a trial comes from."""
        return jax.random.fold_in(jax.random.key(self._config.seed), trial)

    def initial(self, trial: int) -> Tree:
        """The weights that a trial begins with."""
        if trial not in self._initial:
            self._initial = {trial: self._finder.draw(leaf_key(self.key(trial), "weights"))}
        return self._initial[trial]

    def start(self, trial: int) -> Tree:
        """The weights that its tickets are rewound to: the same, or those after --rewind-step steps of training."""
        initial, steps = self.initial(trial), self._config.rewind_step
        if not steps:
            return initial
        order = leaf_key(self.key(trial), "order")
        network = Network(f"trial{trial}-rewind", initial, lottery.full_masks(initial), order, last_step=steps)
        return self._finder.train(network).drawn

    def evaluate(self, weights: Tree, masks: Tree) -> dict[str, float]:
        """Losses and accuracies of a network as it is."""
        return self._trainer.evaluate(weights, masks)


class Pruned(NamedTuple):
    """What masks are drawn from: a network's weights before training, and what came of it."""

    before: Tree
    after: Trained


def _starts(config, key: jax.Array, start: Tree, other: Tree) -> Callable[[str, int, Tree], Tree]:
    """(kind of network, round, its masks) -> the weights that it starts from. Round 0 is the full network."""
    ways = {
        "rewind": lambda masks: start,
        "reinit": lambda masks: other,
        "reshuffle": lambda masks: lottery.reshuffled(leaf_key(key, "reshuffle"), start, masks),
        "signed-constant": lambda masks: where_kept(masks, initializers.signed_deviation(start), start),
    }
    controls = {"reinit": ways["reinit"], "random": ways["rewind"]}

    def begins(kind: str, number: int, masks: Tree) -> Tree:
        return controls.get(kind, ways[config.kept])(masks) if number else start

    return begins


def random_control(config, key: jax.Array, number: int, masks: Tree) -> Tree:
    """Random masks that keep as much of each layer: as many weights, or as many whole neurons."""
    key = leaf_key(key, f"random masks {number}")
    if config.unit == "weight":
        return lottery.random_like(key, masks)
    units = lottery.random_like(key, unit_masks(masks))
    return jax.tree.map(lambda mask, unit: jnp.ones_like(mask) * unit, masks, units)


def where_kept(masks: Tree, kept: Tree, pruned: Tree) -> Tree:
    """One tree where the masks are 1 or None, the other where they are 0."""
    return jax.tree.map(lambda k, p, m: k if m is None else jnp.where(m != 0, k, p), kept, pruned, masks)


def make_prune(config, key: jax.Array) -> Callable[[Pruned, Tree], Tree]:
    """(network, masks) -> the next masks, by the criterion and at the rates that the settings name."""
    fraction, of_output = config.fraction, config.fraction / 2
    if config.density:
        fraction = lottery.round_fraction(config.density, config.rounds)
        of_output = lottery.round_fraction((1 + config.density) / 2, config.rounds)
    if config.unit == "neuron":
        of_output = 0.0
    output = OUTPUT[config.model]

    def prune(network, masks):
        left = sum(int(jnp.sum(mask)) for mask in jax.tree.leaves(masks))
        random = leaf_key(key, f"of {left}")
        scores = saliency.criterion(config.criterion, network.before, network.after.drawn, masks=masks, key=random)
        rates = {path: of_output if path == output else fraction for path in by_path(masks)}
        rates = rates if config.scope == "layer" else fraction
        return lottery.prune_by(scores, masks, rates, scope=config.scope, unit=config.unit)

    return prune


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


def per_input(masks: Tree) -> list[float] | None:
    """The fraction kept of each input's connections to the first dense layer; None for other kinds of network."""
    first = by_path(masks).get("Dense_0/kernel")
    if first is None or "Conv_0/kernel" in by_path(masks):
        return None
    return np.mean(np.asarray(first), axis=1).tolist()
