"""Iterative pruning as an experiment: trials, rounds, tickets and their controls; its files, its summary."""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import runner, ticket_display, ticket_plots
from experiments.data import Dataset
from experiments.tickets import Network, Trained, Trainer
from experiments.workdir import Workdir, digest
from supermask_jax import initializers, lottery, saliency
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
    workdir = open_workdir(config, dataset)
    summary = workdir.summary()
    if not summary:
        with Experiment(config, dataset, target, workdir) as experiment:
            found = [found for trial in range(config.trials) for found in experiment.rounds(trial)]
        summary = {
            "dataset": (target or dataset).name,
            "model": config.model,
            "networks": [record for f in found for record in f.records],
            "per_input": [f.per_input for f in found if f.trial == 0 and f.per_input],
            "compile_seconds": experiment.compile_seconds,
            "versions": runner.versions(),
            "seed": config.seed,
            "config": workdir.config(),
            "data_source": dataset.source,
        }
        ticket_plots.draw(workdir.path, summary)
        workdir.finish(summary)
    ticket_display.show_summary(summary, workdir.path)
    return summary


def open_workdir(config, dataset: Dataset, summary_keys: set[str] = SUMMARY_KEYS) -> Workdir:
    """The directory that --workdir names, or one named after the settings."""
    kind = "" if config.sweep == "none" else f"{config.sweep}-"
    name = f"{kind}{config.model}-{dataset.name}-s{config.seed}-{digest(config)}"
    path = Path(config.workdir).expanduser() if config.workdir else Path("runs/lottery") / name
    return Workdir(path, config, f"{zlib.crc32(dataset.train_images.tobytes()):08x}", summary_keys)


class Found(NamedTuple):
    """A round: the networks that were trained under its masks."""

    trial: int
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
            order = leaf_key(key, "another order" if kind == "again" else "order")
            name = f"trial{trial}-round{number}-{kind}"
            first_step = (
                0 if kind == "reinit" else config.rewind_step
            )  # new weights have all their training before them
            trained = trainer.train(Network(name, begins[kind](masks), masks, order, first_step))
            head = {"trial": trial, "round": number, "network": kind}
            trained = trained._replace(record=head | trained.record | best(trained.record["curve"]))
            self._shown.network(trained.record)
            return trained

        def train(weights, masks, number):
            return network("source" if transferred else "ticket", number, masks, self._finder)

        prune = make_prune(config, key, start)
        for number, masks, found in lottery.iterative_pruning(train, start, full, config.rounds, prune):
            ticket = network("ticket", number, masks, self._trainer) if transferred else found
            records = [ticket.record]
            if config.stability:
                again = network("again", number, masks, self._trainer)
                ticket.record["instability"] = instability(start, masks, ticket.drawn, again.drawn)
            if number:
                random = lottery.random_like(leaf_key(key, f"random masks {number}"), masks)
                for kind in config.controls:
                    of_kind = random if kind == "random" else masks
                    records.append(network(kind, number, of_kind, self._trainer).record)
            yield Found(trial, number, records, per_input(masks), found.drawn)

    def key(self, trial: int) -> jax.Array:
        """What everything random in a trial comes from."""
        return jax.random.fold_in(jax.random.key(self._config.seed), trial)

    def initial(self, trial: int) -> Tree:
        """The weights that a trial begins with."""
        return self._finder.draw(leaf_key(self.key(trial), "weights"))

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


def _starts(config, key: jax.Array, start: Tree, other: Tree) -> dict[str, Callable[[Tree], Tree]]:
    """{kind of network: its masks -> the weights that it starts from}."""
    ways = {
        "rewind": lambda masks: start,
        "reinit": lambda masks: other,
        "reshuffle": lambda masks: lottery.reshuffled(leaf_key(key, "reshuffle"), start, masks),
        "signed-constant": lambda masks: where_kept(masks, initializers.signed_deviation(start), start),
    }
    ticket = ways[config.kept]
    return {"ticket": ticket, "source": ticket, "again": ticket, "reinit": ways["reinit"], "random": ways["rewind"]}


def where_kept(masks: Tree, kept: Tree, pruned: Tree) -> Tree:
    """One tree where the masks are 1 or None, the other where they are 0."""
    return jax.tree.map(lambda k, p, m: k if m is None else jnp.where(m != 0, k, p), kept, pruned, masks)


def make_prune(config, key: jax.Array, start: Tree) -> Callable[[Trained, Tree], Tree]:
    """(trained network, masks) -> the next masks, by the criterion and at the rates that the settings name."""
    fraction, of_output = config.fraction, config.fraction / 2
    if config.density:
        fraction = lottery.round_fraction(config.density, config.rounds)
        of_output = lottery.round_fraction((1 + config.density) / 2, config.rounds)
    if config.unit == "neuron":
        of_output = 0.0
    output = OUTPUT[config.model]

    def prune(trained, masks):
        left = sum(int(jnp.sum(mask)) for mask in jax.tree.leaves(masks))
        scores = saliency.criterion(
            config.criterion, start, trained.drawn, masks=masks, key=leaf_key(key, f"of {left}")
        )
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
