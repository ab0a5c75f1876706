"""How far does random pruning go? Density, layer densities, width and depth: `python -m experiments.random_pruning`.

Two sweeps after Liu et al. 2022. One network under random masks of every distribution and under the masks of methods
that choose, at several densities; and networks of several widths and depths, dense and randomly pruned, because the
paper's claim is that random pruning catches up as they grow. Each cell is a run of `experiments.mnist`; interrupted or
widened, a sweep goes on with the cells that are there.
"""

from dataclasses import dataclass
from typing import Literal

from experiments.run import command_line
from experiments.run.errors import require

Distribution = Literal["uniform", "uniform+", "er", "erk", "erk+", "snip", "grasp", "synflow"]
Method = Literal["magnitude", "snip", "grasp", "synflow", "gradual", "set", "rigl"]


@dataclass(frozen=True)
class Config:
    """Random pruning (Liu et al. 2022): by density, distribution, width and depth; beside dense training and others."""

    densities: tuple[float, ...] = (0.2, 0.1, 0.05)
    """Fractions of the weights that are kept, each in (0, 1)."""
    distributions: tuple[Distribution, ...] = ("uniform", "uniform+", "er", "erk", "erk+", "snip", "grasp")
    """What part of each layer random masks keep; see `python -m experiments.mnist --help`."""
    methods: tuple[Method, ...] = ("magnitude", "snip", "grasp", "synflow", "set", "rigl")
    """What random pruning is held against, beside dense training."""
    model: Literal["cnn", "mlp"] = "cnn"
    """The network. In an mlp er and erk are the same."""
    width: int = 16
    """Channels (cnn) or units (mlp) of each hidden layer, in the sweep over distributions and methods."""
    depth: int = 3
    """Hidden layers, in that sweep."""
    widths: tuple[int, ...] = (4, 8, 16)
    """In the sweep over sizes."""
    depths: tuple[int, ...] = (2, 4)
    """In the sweep over sizes."""
    size_distributions: tuple[Distribution, ...] = ("erk",)
    """In the sweep over sizes; name more for the full grid of density, distribution, width and depth."""
    seeds: int = 3
    """Repetitions, with the seeds 0, 1, ..."""
    epochs: int = 2
    """Passes over the training images, of each run."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 0.01
    """Of Adam, at the start; chosen on held-out images at density 0.1."""
    strangers: Literal["none", "mnist", "mnist-5k", "fashion_mnist", "kmnist"] = "none"
    """A second data set, whose images the networks should be unsure of, beside Gaussian noise."""
    dataset: Literal["auto", "mnist", "mnist-5k", "fashion_mnist", "kmnist", "idx"] = "auto"
    """auto: MNIST from disk or by download, else the 5000 digits of mnist-5k. idx: any set in MNIST's format."""
    data_dir: str | None = None
    """Where the data are or will be put. [SUPERMASK_DATA_DIR, else ~/tensorflow_datasets]"""
    workdir: str = "runs/random_pruning"
    """Where the pictures and the figures go. Cells go into cells/ beside it, and are shared by all sweeps there."""

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(
            self,
            ("densities", self.densities and all(0 < d < 1 for d in self.densities), "fractions kept, in (0, 1)"),
            ("width", self.width >= 1, "1 or more"),
            ("depth", self.depth >= 1, "1 or more"),
            ("widths", all(w >= 1 for w in self.widths), "1 or more each"),
            ("depths", all(d >= 1 for d in self.depths), "1 or more each"),
            ("seeds", self.seeds >= 1, "1 or more"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
        )


def main(config: Config) -> dict:
    """Runs, or finishes, every cell, draws the pictures and returns what it writes to summary.json."""
    from experiments.plots.style import save
    from experiments.sweeps import cells

    dataset = cells.open_data(config)
    path, summary = cells.carry_out(config, grid(config), dataset)
    for name, picture in (("distributions.png", draw_distributions), ("sizes.png", draw_sizes)):
        figure = picture(summary)
        if figure is not None:
            save(figure, path / name)
    chosen = [row for row in summary["rows"] if row["part"] == "distribution" and row["asked"] < 1]
    cells.show_table(
        f"test accuracy on {dataset.name}", cells.grouped(chosen, "name", "asked", "test_accuracy"), "density"
    )
    print(f"figures and pictures: {path}")
    return summary


def grid(config: Config) -> list:
    """The cells of both sweeps."""
    from experiments.sweeps import cells

    densities = sorted(set(config.densities), reverse=True)
    shared = {name: getattr(config, name) for name in ("model", "epochs", "batch_size", "learning_rate", "strangers")}
    shared["judge"] = True
    found = []

    def add(part: str, name: str, method: str, density: float, width: int, depth: int, **more) -> None:
        labels = {"part": part, "name": name, "asked": density, "width": width, "depth": depth}
        for seed in range(config.seeds):
            settings = {**shared, **more, "density": density, "width": width, "depth": depth, "seed": seed}
            found.append(cells.cell(labels, method, **settings))

    base = config.width, config.depth
    add("distribution", "dense", "dense", 1.0, *base)
    for density in densities:
        for distribution in dict.fromkeys(config.distributions):
            add("distribution", f"random, {distribution}", "random", density, *base, distribution=distribution)
        for method in dict.fromkeys(config.methods):
            add("distribution", method, method, density, *base)
    for depth in sorted(set(config.depths)):
        for width in sorted(set(config.widths)):
            add("size", "dense", "dense", 1.0, width, depth)
            for distribution in dict.fromkeys(config.size_distributions):
                for density in densities:
                    name = f"random, {distribution}, {100 * density:g}% kept"
                    add("size", name, "random", density, width, depth, distribution=distribution)
    return found


def draw_distributions(summary: dict):
    """One network by density: accuracy, calibration, out-of-distribution detection, robustness, gradient flow."""
    import numpy as np

    from experiments.plots.style import log_axis, new_figure
    from experiments.sweeps import cells

    config = summary["config"]
    rows = [row for row in summary["rows"] if row["part"] == "distribution"]
    rows = cells.at_mean(rows, "name", "asked", "density")  # uniform+ keeps more than it is asked to
    for row in rows:
        row["noise"] = row["ood_auroc"]["noise"]
        row["flow"] = row["gradient_flow"][-1]
    masked = [row for row in rows if row["asked"] < 1]
    is_random = [row["name"].startswith("random") for row in masked]
    randoms = [row for row, it_is in zip(masked, is_random, strict=True) if it_is]
    preferred = [row for row in randoms if row["name"] == "random, erk"] or randoms
    others = [row for row, it_is in zip(masked, is_random, strict=True) if not it_is] + preferred
    names = [*dict.fromkeys(row["name"] for row in (*preferred, *others, *randoms))]
    x = "density (% of the weights that are kept)"
    accuracy = "test accuracy (%), log scale of the error"
    figure = new_figure(
        f"{config['model']}, {config['depth']} hidden layers of {config['width']}, on {summary['dataset']} · "
        f"{config['epochs']} epochs · {cells.seeds(config['seeds'])}",
        15,
        9.5,
    )
    panels = (
        ("random masks, by distribution", randoms, "test_accuracy", accuracy),
        ("random masks and others", others, "test_accuracy", accuracy),
        ("calibration", others, "ece", "expected calibration error"),
        ("images of noise told from digits", others, "noise", "AUROC of the highest probability"),
        ("robustness", others, "fgsm_accuracy", "accuracy on FGSM images, 8/255 (%), log scale of the error"),
        ("gradient flow after training", others, "flow", "norm of the gradient over the kept weights"),
    )
    for ax, (title, chosen, y, says) in zip(figure.subplots(2, 3).ravel(), panels, strict=True):
        is_accuracy = y.endswith("accuracy")
        cells.draw_lines(ax, cells.grouped(chosen, "name", "density", y), x, says, is_accuracy, names)
        dense = [row[y] for row in rows if row["name"] == "dense"]
        level = float(np.mean(dense))
        ax.axhline(100 * (1 - level) if is_accuracy else level, color="black", linestyle=":", label="dense")
        if is_accuracy:
            log_axis(ax, [100 * (1 - v) for v in [*dense, *(row[y] for row in chosen)]], accuracy=True)
        cells.log_ticks(ax, [row["asked"] for row in masked], percent=True)
        ax.set_title(title, fontsize=10)
    shown = {label: line for ax in figure.axes[:2] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return figure


def draw_sizes(summary: dict):
    """Accuracy by width, a panel for each depth: dense, and randomly pruned to each density. None without sizes."""
    from experiments.plots.style import log_axis, new_figure
    from experiments.sweeps import cells

    config = summary["config"]
    rows = [row for row in summary["rows"] if row["part"] == "size"]
    depths = sorted({row["depth"] for row in rows})
    if not rows:
        return None
    figure = new_figure(
        f"random pruning by size · {config['model']} on {summary['dataset']} · {config['epochs']} epochs · "
        f"{cells.seeds(config['seeds'])}",
        5.6 * len(depths) + 1,
        4.6,
    )
    for ax, depth in zip(figure.subplots(1, len(depths), squeeze=False, sharey=True)[0], depths, strict=True):
        chosen = [row for row in rows if row["depth"] == depth]
        groups = cells.grouped(chosen, "name", "width", "test_accuracy")
        unit = "channels" if config["model"] == "cnn" else "units"
        cells.draw_lines(ax, groups, f"{unit} of each hidden layer", "test accuracy (%), log scale of the error", True)
        cells.log_ticks(ax, [row["width"] for row in chosen])
        ax.set_title(f"hidden layers: {depth}", fontsize=10)
    log_axis(figure.axes[0], [100 * (1 - row["test_accuracy"]) for row in rows], accuracy=True)  # shared by all panels
    figure.axes[0].legend(fontsize=8, edgecolor="none")
    return figure


if __name__ == "__main__":
    command_line.run(main, Config, lambda **_: {}, prog="python -m experiments.random_pruning")
