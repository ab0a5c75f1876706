"""Is pruning all you need? Width and depth decide: `python -m experiments.pruning_only`.

Two halves after Malach et al. 2020. Constructive: a trained MLP is approximated by choosing, for each of its weights, a
subset of the random products of a wider random network; that takes a minute, and is computed anew. Learned: what
edge-popup finds in networks of several widths, depths and training sets. Each learned cell is a run of
`experiments.mnist`; interrupted or widened, a sweep goes on with the cells that are there.
"""

from dataclasses import dataclass
from typing import Literal

from experiments.run import command_line
from experiments.run.errors import require

Part = Literal["construction", "width", "depth", "narrow", "data"]
Family = Literal["mlp", "cnn"]

WIDTHS = {"mlp": (10, 30, 100, 300, 1000), "cnn": (8, 16, 32)}
DEPTHS = {"mlp": (1, 2, 4, 8), "cnn": (2, 4, 8)}
PARAMETERS = {"mlp": 100_000, "cnn": 10_000}  # at every depth of the part "depth"
NARROW = {"mlp": 20, "cnn": 8}  # width at every depth of the part "narrow"
USUAL = {"mlp": (100, 2), "cnn": (16, 3)}  # width and depth of the part "data", depth of the part "width"
TRAIN_IMAGES = (1_000, 4_000, 15_000, 60_000)


@dataclass(frozen=True)
class Config:
    """Pruning is all you need (Malach et al. 2020): by construction, and as edge-popup finds it."""

    parts: tuple[Part, ...] = ("construction", "width", "depth", "narrow", "data")
    """construction: approximate a trained 784-32-10 MLP. The others, of edge-popup, against: width, for subnetworks of
    weights and of neurons; depth at one number of parameters; depth at one narrow width; the number of training
    images, at one number of steps."""
    families: tuple[Family, ...] = ("mlp", "cnn")
    """Networks of dense layers, and of convolutions."""
    construction_widths: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 20, 24, 32)
    """Random products to choose from for each weight of the target."""
    density: float = 0.5
    """Fraction of each layer that edge-popup keeps, in (0, 1)."""
    seeds: int = 3
    """Repetitions, with the seeds 0, 1, ..."""
    epochs: int = 3
    """Passes over the training images, of each run; more over fewer images, so that the steps are as many."""
    batch_size: int = 128
    """Images per step."""
    dataset: Literal["auto", "mnist", "mnist-5k", "fashion_mnist", "kmnist", "idx"] = "auto"
    """auto: MNIST from disk or by download, else the 5000 digits of mnist-5k. idx: any set in MNIST's format."""
    data_dir: str | None = None
    """Where the data are or will be put. [SUPERMASK_DATA_DIR, else ~/tensorflow_datasets]"""
    workdir: str = "runs/pruning_only"
    """Where the pictures and the figures go. Cells go into cells/ beside it, and are shared by all sweeps there."""

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(
            self,
            ("parts", len(self.parts) >= 1, "one or more parts"),
            ("families", len(self.families) >= 1, "one or more families"),
            ("construction_widths", all(1 <= w <= 32 for w in self.construction_widths), "each in [1, 32]"),
            ("density", 0 < self.density < 1, "the fraction kept, in (0, 1)"),
            ("seeds", self.seeds >= 1, "1 or more"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
        )


def main(config: Config) -> dict:
    """Runs, or finishes, every part, draws the pictures and returns what it writes to summary.json."""
    from experiments.plots.style import save
    from experiments.sweeps import cells
    from experiments.sweeps import construction as target

    dataset = cells.open_data(config)
    built = target.construct(config, dataset) if "construction" in config.parts else {}
    path, summary = cells.carry_out(config, grid(config, len(dataset.train_labels)), dataset, construction=built)
    rows = summary["rows"]
    if built:
        save(target.draw(summary), path / "construction.png")
    if rows:
        save(draw_learned(summary), path / "learned.png")
    for part, x in AXES.items():
        chosen = [row for row in rows if row["part"] == part]
        if chosen:
            title = f"test accuracy on {dataset.name}, edge-popup, by {x[1]}"
            cells.show_table(title, cells.grouped(chosen, "name", x[0], "test_accuracy"), "network")
    print(f"figures and pictures: {path}")
    return summary


AXES = {
    "width": ("width", "units or channels of each hidden layer"),
    "depth": ("depth", "hidden layers, as many parameters at each depth"),
    "narrow": ("depth", "hidden layers, all narrow"),
    "data": ("train_images", "training images, as many steps with each"),
}


def grid(config: Config, examples: int) -> list:
    """The cells of the learned parts, for a training set of so many images."""
    from experiments.sweeps import cells

    found = []

    def add(part: str, family: str, name: str, width: int, depth: int, **more) -> None:
        images = more.get("train_images", 0) or examples
        labels = {"part": part, "name": name, "width": width, "depth": depth, "train_images": images}
        shared = {"model": family, "density": config.density, "batch_size": config.batch_size}
        epochs = round(config.epochs * examples / images)
        for seed in range(config.seeds):
            settings = {**shared, "epochs": epochs, **more, "width": width, "depth": depth, "seed": seed}
            found.append(cells.cell(labels, "edge-popup", **settings))

    for family in dict.fromkeys(config.families):
        width, depth = USUAL[family]
        if "width" in config.parts:
            for unit in ("weight", "neuron"):
                for w in WIDTHS[family]:
                    add("width", family, f"{family}, {unit}s", w, depth, unit=unit)
        if "depth" in config.parts:
            for d in DEPTHS[family]:
                add("depth", family, f"{family}, {PARAMETERS[family]:,} parameters", width_for(family, d), d)
        if "narrow" in config.parts:
            for d in DEPTHS[family]:
                add("narrow", family, f"{family}, width {NARROW[family]}", NARROW[family], d)
        if "data" in config.parts:
            for count in (*(n for n in TRAIN_IMAGES if n < examples), 0):
                add("data", family, f"{family}, {depth} layers of {width}", width, depth, train_images=count)
    return found


def width_for(family: str, depth: int) -> int:
    """The width at which a network of that depth, on MNIST's images, has the part's number of parameters, nearly."""
    inputs, square, outputs = (784, 1, 10) if family == "mlp" else (9, 9, 40)
    wanted = PARAMETERS[family]
    width = 1
    while (inputs + outputs) * (width + 1) + square * (depth - 1) * (width + 1) ** 2 <= wanted:
        width += 1
    return width


def draw_learned(summary: dict):
    """What edge-popup found: accuracy by width, by depth at equal parameters, by depth when narrow, by images."""
    from experiments.plots.style import new_figure
    from experiments.sweeps import cells

    config, rows = summary["config"], summary["rows"]
    parts = [part for part in AXES if any(row["part"] == part for row in rows)]
    columns = min(2, len(parts))
    figure = new_figure(
        f"edge-popup at density {config['density']:g} on {summary['dataset']} · {config['epochs']} epochs · "
        f"{cells.seeds(config['seeds'])}",
        6 * columns,
        4.4 * -(-len(parts) // columns) + 0.6,
    )
    axes = figure.subplots(-(-len(parts) // columns), columns, squeeze=False).ravel()
    for ax in axes[len(parts) :]:
        ax.set_visible(False)
    for ax, part in zip(axes, parts, strict=False):
        x, says = AXES[part]
        chosen = [row for row in rows if row["part"] == part]
        groups = cells.grouped(chosen, "name", x, "test_accuracy")
        cells.draw_lines(ax, groups, says, "test accuracy (%), log scale of the error", True)
        cells.log_ticks(ax, [row[x] for row in chosen])
        ax.legend(fontsize=8, edgecolor="none")
    return figure


if __name__ == "__main__":
    command_line.run(main, Config, lambda **_: {}, prog="python -m experiments.pruning_only")
