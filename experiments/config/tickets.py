"""The settings of `experiments.lottery`: shared sections, and how tickets are drawn and compared."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from experiments.config.limits import counts
from experiments.config.registry import CRITERIA, DATASETS
from experiments.config.sections import Augment, Data, Init, Model, Optim, Output
from experiments.config.settings import changed, flat
from experiments.run.errors import UserError, require

# What the sweep over criteria on untrained weights is about, and nothing else.
UNTRAINED = {
    "scope": "layer",
    "unit": "weight",
    "conv_fraction": None,
    "spare_output": False,
    "layer_minimum": 0,
    "kept": "rewind",
    "pruned": "zero",
    "rewind_step": 0,
    "stability": False,
    "density": None,
}
TRAINED = ("learning-rate", "finetune")  # the choices of `kept` under which a ticket goes on from trained weights


@dataclass(frozen=True)
class Tickets:
    """How masks are drawn, and what their networks are compared with."""

    rounds: int = 8
    """How often a part of what is left is pruned. 1: one-shot pruning."""
    fraction: float = 0.2
    """The part of what is left that a round removes from each layer; half of it from the output layer, which --unit
    neuron does not prune and --scope global ranks with the rest."""
    conv_fraction: float | None = None
    """The same of each convolution, where convolutions are pruned more slowly than dense layers. [--fraction]"""
    spare_output: bool = False
    """Prune nothing of the output layer, with --scope global too."""
    density: float | None = None
    """Weights remaining after the last round: instead of --fraction, which is then computed from --rounds."""
    scope: Literal["layer", "global"] = "layer"
    """Rank weights within each layer, or all of them together."""
    layer_minimum: int = 0
    """Weights that --scope global leaves in each layer at least. Without it a round may empty a layer; a warning then
    names it."""
    unit: Literal["weight", "neuron"] = "weight"
    """Prune single weights, or whole neurons and channels (never outputs): then --fraction and --density count those,
    and the density that is reported is that of the weights into the ones that are left."""
    criterion: Literal[*CRITERIA] = "large_final"
    """What ranks the weights, from their values before and after training. large_final: their magnitude after it."""
    kept: Literal["rewind", "reinit", "reshuffle", "signed-constant", "learning-rate", "finetune"] = "rewind"
    """What the kept weights of a ticket start from: their old values; new ones; the old ones of other kept weights; or
    the old signs at one size, the layer's standard deviation. learning-rate, finetune: from what they are after the
    round before, on new batches (Renda et al. 2020); either the schedule is replayed from --rewind-step on, or they
    train for --steps more at the rate of its last step."""
    pruned: Literal["zero", "freeze"] = "zero"
    """Pruned weights are zero, or stay what they were at the start."""
    rewind_step: int = 0
    """Tickets go back to the weights of this step of training. From there they train to the last step, on the same
    schedule of the learning rate but with a new optimizer; so does the full network that the first masks are drawn
    from. What a criterion calls initial are these weights."""
    prune_at: float = 1.0
    """The part of training, in (0, 1], after which the masks are drawn. Training itself always continues to the end."""
    controls: tuple[Literal["reinit", "random"], ...] = ("reinit", "random")
    """Beside each ticket: its masks on newly drawn weights, and random masks of the same layer densities."""
    stability: bool = False
    """Train each ticket a second time on batches in another order, and report how far apart the two end."""
    trials: int = 3
    """Repetitions with other random numbers."""
    steps: int = 6000
    """Training iterations of each network."""
    eval_every: int = 100
    """Steps between evaluations: how exactly the early-stopping iteration is known."""
    transfer_to: Literal[*(name for name in DATASETS if name != "auto")] | None = None
    """Draw the tickets on --dataset, but train and measure them and the controls on this data set."""

    def check(self) -> None:
        """Raises UserError on a setting out of range, or on settings that exclude each other."""
        require(
            self,
            *counts(self, "rounds", "steps", "trials", "eval_every"),
            ("fraction", 0 < self.fraction < 1, "the part of what is left that a round removes, in (0, 1)"),
            ("conv_fraction", _is_fraction(self.conv_fraction), "the part that a round removes, in (0, 1)"),
            ("density", self.density is None or 0 < self.density < 1, "the fraction kept, in (0, 1)"),
            ("rewind_step", 0 <= self.rewind_step < self.steps, f"in [0, {self.steps}), the number of --steps"),
            ("layer_minimum", self.layer_minimum >= 0, "0 or more weights"),
            ("prune_at", 0 < self.prune_at <= 1, "a part of training, in (0, 1]"),
        )
        for wrong, says in (
            (
                round(self.prune_at * self.steps) <= self.rewind_step,
                "--prune-at draws masks before --rewind-step is passed: nothing is learned by then.",
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
                self.conv_fraction is not None and self.scope == "global",
                "--scope global ranks all layers together and has no --conv-fraction: say --scope layer.",
            ),
            (
                self.layer_minimum and self.scope == "layer",
                "--layer-minimum is for --scope global: a layer that is ranked by itself always keeps a weight.",
            ),
            (
                self.conv_fraction is not None and self.density is not None,
                "--density sets one fraction for all layers: leave --conv-fraction out, or say --conv-fraction None.",
            ),
        ):
            if wrong:
                raise UserError(says)
        if self.kept in TRAINED:
            self._check_trained()

    def _check_trained(self) -> None:
        """Raises UserError on settings that mean nothing for tickets that go on from their trained weights."""
        for wrong, says in (
            (self.prune_at < 1, "goes on from the end of training: leave --prune-at at 1."),
            (self.unit == "neuron", "keeps trained biases, and --unit neuron needs biases that begin at 0."),
            (self.transfer_to, "goes on from weights trained on --dataset: it does not go with --transfer-to."),
            (
                self.kept == "finetune" and self.rewind_step,
                "does not rewind: say --rewind-step 0, or --kept learning-rate.",
            ),
        ):
            if wrong:
                raise UserError(f"--kept {self.kept} {says}")


def _is_fraction(value: float | None) -> bool:
    return value is None or 0 < value < 1


@dataclass(frozen=True)
class Lottery:
    """Find winning tickets (Frankle & Carbin 2019): train, prune, rewind, again; beside the controls."""

    preset: Literal["short", "paper", "conv2", "conv4", "conv6", "resnet-20", "vgg-16"] = "short"
    """The defaults below. short: curves that separate within minutes. paper: the published numbers of steps, rounds and
    trials of LeNet-300-100. The others: published settings of this network on CIFAR-10, of 20,000 steps and more."""
    sweep: Literal["none", "early", "rewind", "rounds", "criterion", "untrained"] = "none"
    """Repeat the experiment, with one-shot pruning to --density (0.1), over the step that the masks are drawn at, the
    step that is rewound to, or the mask criterion; or over the number of rounds to that density. untrained: the
    accuracy of every criterion's masks on weights that were never trained (Zhou et al. 2019)."""
    seed: int = 0
    """Of everything random, in [0, 2**32). The same command gives the same masks."""
    tickets: Tickets = Tickets()
    model: Model = Model(model="lenet-300-100", biases=True)
    init: Init = Init(init="glorot-normal")
    optim: Optim = Optim(batch_size=60, learning_rate=1.2e-3, schedule="constant", optimizer="adam")
    augment: Augment = Augment()
    data: Data = Data()
    output: Output = Output(checkpoint_every=2000)

    # fmt: off
    ALWAYS_NAMED: ClassVar[frozenset[str]] = frozenset((
        "preset", "sweep", "model", "rounds", "fraction", "density", "scope", "unit", "criterion", "kept", "pruned",
        "rewind_step", "prune_at", "controls", "stability", "trials", "steps", "batch_size", "optimizer",
        "learning_rate", "schedule", "momentum", "weight_decay", "init", "dropout", "seed", "dataset", "transfer_to",
        "data_dir", "validation", "eval_every", "workdir", "checkpoint_every",
    ))
    # fmt: on

    def check(self) -> None:
        """Raises UserError on a setting out of range, or on settings that exclude each other."""
        require(self, ("seed", 0 <= self.seed < 2**32, "a whole number in [0, 2**32)"))
        for section in (self.tickets, self.model, self.init, self.optim, self.augment, self.data, self.output):
            section.check()
        tickets = self.tickets
        for wrong, says in (
            (
                tickets.kept == "finetune" and self.optim.schedule.startswith("cosine"),
                f"--kept finetune trains on at the last rate of the schedule, which is 0 with --schedule "
                f"{self.optim.schedule}: say --schedule steps, or --kept learning-rate.",
            ),
            (
                tickets.kept in TRAINED and self.sweep == "early",
                f"--sweep early draws masks before training ends, and --kept {tickets.kept} goes on from its end.",
            ),
            (
                tickets.kept == "finetune" and self.sweep == "rewind",
                "--kept finetune does not rewind, so that there is no --sweep rewind of it.",
            ),
            (
                self.init.scale_weights or self.init.scale_layers,
                "--scale-weights and --scale-layers scale by one --density, and tickets have another in every round.",
            ),
            (tickets.transfer_to and self.sweep != "none", "--transfer-to does not go with --sweep."),
            (
                self.sweep == "untrained" and flat(self) != flat(changed(self, **UNTRAINED)),
                "--sweep untrained trains nothing but full networks and ranks layer by layer: it does not go with "
                + ", ".join(f"--{name.replace('_', '-')}" for name in UNTRAINED)
                + ".",
            ),
        ):
            if wrong:
                raise UserError(says)
