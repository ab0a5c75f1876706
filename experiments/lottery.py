"""Find winning tickets, and hold them against their controls: `python -m experiments.lottery`.

One command runs the published experiment from end to end: train, prune, rewind, train again, round after round, each
ticket beside the same masks on other random weights and beside random masks; then draws what came out. `--sweep` asks
one of the questions that the papers ask: does it matter when the ticket is drawn, where it is rewound to, in how many
rounds it is found, by which criterion?
"""

from dataclasses import dataclass, replace
from typing import Literal

from experiments.run import command_line
from experiments.run.errors import UserError, require

# Frankle & Carbin 2019, table 1 (LeNet): Adam 1.2e-3, batches of 60, 20 % a round, the output layer at half of it.
PRESETS = {"short": {}, "paper": {"steps": 50_000, "rounds": 20, "trials": 5, "checkpoint_every": 10_000}}
CRITERIA = Literal[
    "large_final",
    "small_final",
    "large_init",
    "small_init",
    "large_init_large_final",
    "small_init_small_final",
    "magnitude_increase",
    "movement",
    "large_final_same_sign",
    "large_final_diff_sign",
    "magnitude_increase_same_sign",
    "magnitude_increase_diff_sign",
    "random",
]

# What the sweep over criteria on untrained weights is about, and nothing else.
UNTRAINED = {
    "scope": "layer",
    "unit": "weight",
    "kept": "rewind",
    "pruned": "zero",
    "rewind_step": 0,
    "stability": False,
}


@dataclass(frozen=True)
class Config:
    """Find winning tickets (Frankle & Carbin 2019): train, prune, rewind, again; beside the controls."""

    preset: Literal["short", "paper"] = "short"
    """short: curves that separate within minutes. paper: the published numbers of steps, rounds and trials."""
    sweep: Literal["none", "early", "rewind", "rounds", "criterion", "untrained"] = "none"
    """Repeat the experiment, with one-shot pruning to --density (0.1), over the step that the masks are drawn at, the
    step that is rewound to, or the mask criterion; or over the number of rounds to that density. untrained: the
    accuracy of every criterion's masks on weights that were never trained (Zhou et al. 2019)."""
    model: Literal["lenet-300-100", "convnet"] = "lenet-300-100"
    """The network; LeNet-300-100 has biases, as published, and they are never pruned."""
    rounds: int = 8
    """How often a part of what is left is pruned. 1: one-shot pruning."""
    fraction: float = 0.2
    """The part of what is left that a round removes from each layer; half of it from the output layer, which --unit
    neuron leaves alone and --scope global ranks with the rest."""
    density: float | None = None
    """Weights remaining after the last round: instead of --fraction, which is then computed from --rounds."""
    scope: Literal["layer", "global"] = "layer"
    """Rank weights within each layer, or all of them together."""
    unit: Literal["weight", "neuron"] = "weight"
    """Prune single weights, or whole neurons and channels (never outputs): then --fraction and --density count those,
    and the density that is reported is that of the weights into the ones that are left."""
    criterion: CRITERIA = "large_final"
    """What ranks the weights, from their values before and after training. large_final: their magnitude after it."""
    kept: Literal["rewind", "reinit", "reshuffle", "signed-constant"] = "rewind"
    """What the kept weights of a ticket start from: their old values; new ones; the old ones of other kept weights; or
    the old signs at one size, the layer's standard deviation."""
    pruned: Literal["zero", "freeze"] = "zero"
    """Pruned weights are zero, or stay what they were at the start."""
    rewind_step: int = 0
    """Tickets go back to the weights of this step of training, and train from there with a new optimizer; so does the
    full network that the first masks are drawn from. What a criterion calls initial are these weights."""
    prune_at: float = 1.0
    """The part of training, in (0, 1], after which the masks are drawn. Training itself always goes on to the end."""
    controls: tuple[Literal["reinit", "random"], ...] = ("reinit", "random")
    """Beside each ticket: its masks on newly drawn weights, and random masks of the same layer densities."""
    stability: bool = False
    """Train each ticket a second time on batches in another order, and report how far apart the two end."""
    trials: int = 3
    """Repetitions with other random numbers."""
    steps: int = 6000
    """Training iterations of each network."""
    batch_size: int = 60
    """Images per step."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """SGD uses --momentum."""
    learning_rate: float = 1.2e-3
    """Of the optimizer."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How the learning rate falls, step by step."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 0.0
    """Added to the gradient. It moves pruned weights too, but never back into the network."""
    init: Literal["glorot-normal", "kaiming-normal", "kaiming-uniform"] = "glorot-normal"
    """What the weights are drawn from."""
    dropout: bool = False
    """At 0.5 after each hidden layer of LeNet; the convnet's as published."""
    seed: int = 0
    """Of everything random, in [0, 2**32). The same command gives the same masks."""
    dataset: Literal["auto", "mnist", "mnist-5k", "fashion_mnist", "kmnist", "idx"] = "auto"
    """auto: MNIST from disk or by download, else the 5000 digits of mnist-5k. idx: any set in MNIST's format."""
    transfer_to: Literal["mnist", "mnist-5k", "fashion_mnist", "kmnist", "idx"] | None = None
    """Draw the tickets on --dataset, but train and measure them and the controls on this one."""
    data_dir: str | None = None
    """Where the data are or will be put. [SUPERMASK_DATA_DIR, else ~/tensorflow_datasets]"""
    validation: int | None = None
    """Training images held out, whose loss says when to stop early. [5000, or a tenth of a smaller set]"""
    eval_every: int = 100
    """Steps between evaluations: how exactly the early-stopping iteration is known."""
    workdir: str | None = None
    """Where the files go, and what is resumed from. [runs/lottery/<a name made from the settings>]"""
    checkpoint_every: int = 2000
    """Steps between the checkpoints of a network."""

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(
            self,
            ("rounds", self.rounds >= 1, "1 or more"),
            ("fraction", 0 < self.fraction < 1, "the part of what is left that a round removes, in (0, 1)"),
            ("density", self.density is None or 0 < self.density < 1, "the fraction kept, in (0, 1)"),
            ("steps", self.steps >= 1, "1 or more"),
            ("rewind_step", 0 <= self.rewind_step < self.steps, f"in [0, {self.steps}), the number of --steps"),
            ("prune_at", 0 < self.prune_at <= 1, "a part of training, in (0, 1]"),
            ("trials", self.trials >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("validation", self.validation is None or self.validation >= 1, "1 or more images"),
            ("eval_every", self.eval_every >= 1, "1 or more steps"),
            ("checkpoint_every", self.checkpoint_every >= 1, "1 or more steps"),
            ("seed", 0 <= self.seed < 2**32, "a whole number in [0, 2**32)"),
        )
        for wrong, says in (
            (
                round(self.prune_at * self.steps) <= self.rewind_step,
                "--prune-at draws masks before --rewind-step is passed: nothing is learned by then.",
            ),
            (
                self.rewind_step and self.schedule == "cosine",
                "--rewind-step begins a new schedule: say --schedule constant.",
            ),
            (
                self.unit == "neuron" and self.pruned == "freeze",
                "--unit neuron removes neurons for good: it does not go with --pruned freeze.",
            ),
            (
                self.unit == "neuron" and self.rewind_step,
                "--unit neuron needs biases that begin at 0: leave --rewind-step at 0.",
            ),
            (
                self.unit == "neuron" and self.scope == "global",
                "--unit neuron with --scope global would prune outputs of the network: say --scope layer.",
            ),
            (
                self.stability and self.prune_at < 1,
                "--stability compares networks at the end of training: leave --prune-at at 1.",
            ),
            (
                self.kept == "reinit" and "reinit" in self.controls,
                "--kept reinit makes the tickets what the control reinit is: say --controls random.",
            ),
            (
                self.transfer_to and self.sweep != "none",
                "--transfer-to does not go with --sweep.",
            ),
            (
                self.sweep == "untrained" and self != replace(self, **UNTRAINED),
                "--sweep untrained trains nothing but full networks and ranks layer by layer: it does not go with "
                + ", ".join(f"--{name.replace('_', '-')}" for name in UNTRAINED)
                + ".",
            ),
        ):
            if wrong:
                raise UserError(says)


def defaults(preset: str = "short") -> dict:
    """The settings of a preset, as far as they differ from the fields' own defaults."""
    return {"preset": preset, **PRESETS[preset]}


def main(config: Config) -> dict:
    """Runs, or resumes, the experiment or the sweep; returns the summary that it also writes to summary.json."""
    from experiments.data import load as data
    from experiments.run import display
    from experiments.tickets import questions as ticket_sweeps  # here, so that --help answers at once
    from experiments.tickets import rounds as ticket_rounds

    dataset = data.load(config.dataset, config.data_dir)
    if dataset.warning:
        display.show_warning(dataset.warning)
    target = data.load(config.transfer_to, config.data_dir) if config.transfer_to else None
    tenth = min(len(images.train_labels) for images in (dataset, target) if images) // 10
    config = replace(config, dataset=dataset.name, validation=config.validation or max(min(5000, tenth), 1))
    if config.sweep == "none":
        return ticket_rounds.run(config, dataset, target)
    return ticket_sweeps.run(config, dataset)


if __name__ == "__main__":
    command_line.run(main, Config, defaults, prog="python -m experiments.lottery")
