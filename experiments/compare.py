"""Every method at every density, in one picture: `python -m experiments.compare`.

Each cell is a run of `experiments.mnist` with the method's own best recipe; interrupted or widened, a comparison goes
on with the cells that are there.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from experiments.run import command_line
from experiments.run.errors import require

Method = Literal[
    "dense", "edge-popup", "bernoulli", "random", "magnitude", "snip", "grasp", "synflow", "gradual", "set", "rigl"
]
# Better than the main job's recipe at low densities, and no worse at a half, on held-out images.
LAYERS_APART = {"distribution": "erk", "scale_weights": True}
ALL = get_args(Method)


@dataclass(frozen=True)
class Config:
    """Compare methods at several densities, with several seeds, on one data set."""

    methods: tuple[Method, ...] = ALL
    """What to compare; see `python -m experiments.mnist --help`. dense and bernoulli ignore the densities. edge-popup
    runs twice: with layer densities by erk and scaled weights, and as the main job has it."""
    densities: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05, 0.02)
    """Fractions of the weights that are kept, each in (0, 1)."""
    seeds: int = 3
    """Repetitions, with the seeds 0, 1, ..."""
    model: Literal["lenet-300-100", "convnet", "mlp", "cnn"] = "lenet-300-100"
    """The network; mlp and cnn are as wide and deep as --width and --depth say."""
    width: int = 100
    """Units (mlp) or channels (cnn) of each hidden layer."""
    depth: int = 2
    """Hidden layers of mlp and cnn."""
    epochs: int = 5
    """Passes over the training images, of each run."""
    judge: bool = True
    """Measure calibration, out-of-distribution detection and adversarial robustness as well."""
    strangers: Literal["none", "mnist", "mnist-5k", "fashion_mnist", "kmnist"] = "none"
    """A second data set, whose images the networks should be unsure of, beside Gaussian noise: with
    --judge."""
    dataset: Literal["auto", "mnist", "mnist-5k", "fashion_mnist", "kmnist", "idx"] = "auto"
    """auto: MNIST from disk or by download, else the 5000 digits of mnist-5k. idx: any set in MNIST's format."""
    data_dir: str | None = None
    """Where the data are or will be put. [SUPERMASK_DATA_DIR, else ~/tensorflow_datasets]"""
    workdir: str = "runs/compare"
    """Where the picture and the figures go. Cells go into cells/ beside it, and are shared by all sweeps there."""

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(
            self,
            ("methods", len(self.methods) >= 1, "one or more methods"),
            ("densities", self.densities and all(0 < d < 1 for d in self.densities), "fractions kept, in (0, 1)"),
            ("seeds", self.seeds >= 1, "1 or more"),
            ("width", self.width >= 1, "1 or more"),
            ("depth", self.depth >= 1, "1 or more"),
            ("epochs", self.epochs >= 1, "1 or more"),
        )


def main(config: Config) -> dict:
    """Runs, or finishes, every cell, draws compare.png and returns what it writes to summary.json."""
    from experiments.mnist import FREE_DENSITY
    from experiments.plots.style import save
    from experiments.sweeps import cells

    dataset = cells.open_data(config)
    names = ("model", "width", "depth", "epochs", "judge", "strangers")
    shared = {name: getattr(config, name) for name in names}
    variants = {method: (method, {}) for method in dict.fromkeys(config.methods)}
    if "edge-popup" in variants:
        variants |= {"edge-popup": ("edge-popup", LAYERS_APART), "edge-popup, uniform": ("edge-popup", {})}
    grid = [
        cells.cell({"method": name, "asked": density}, method, density=density, seed=seed, **shared, **more)
        for name, (method, more) in variants.items()
        for density in ([1.0] if method in FREE_DENSITY else sorted(set(config.densities), reverse=True))
        for seed in range(config.seeds)
    ]
    path, summary = cells.carry_out(config, grid, dataset)
    save(draw(summary), path / "compare.png")
    chosen = [row for row in summary["rows"] if row["method"] not in FREE_DENSITY]
    cells.show_table(
        f"test accuracy on {dataset.name}", cells.grouped(chosen, "method", "asked", "test_accuracy"), "density"
    )
    print(f"figures and picture: {path}")
    return summary


def draw(summary: dict):
    """Accuracy against density and against FLOPs, and what was judged beside it, of every method."""
    import numpy as np

    from experiments.mnist import FREE_DENSITY
    from experiments.plots.style import log_axis, new_figure
    from experiments.sweeps import cells

    rows, config = summary["rows"], summary["config"]
    masked = [row for row in rows if row["method"] not in FREE_DENSITY]
    panels = [("test_accuracy", "asked"), ("test_accuracy", "flops")]
    panels += [(name, "asked") for name in ("ece", "fgsm_accuracy") if all(name in row for row in rows)]
    figure = new_figure(
        f"{config['model']} on {summary['dataset']} · {config['epochs']} epochs · {cells.seeds(config['seeds'])}",
        6.2 * 2,
        4.3 * (len(panels) // 2) + 1.1,
    )
    words = {
        "test_accuracy": "test accuracy (%), log scale of the error",
        "ece": "expected calibration error, log scale",
        "fgsm_accuracy": "accuracy on FGSM images, 8/255 (%), log scale of the error",
        "asked": "density (% of the weights that are kept)",
        "flops": "FLOPs of one image's way through (kept weights only)",
    }
    for ax, (y, x) in zip(figure.subplots(-(-len(panels) // 2), 2).ravel(), panels, strict=True):
        values = masked if x == "asked" else cells.at_mean(masked, "method", "asked", "flops")
        groups = cells.grouped(values, "method", x, y)
        accuracy = y.endswith("accuracy")
        if groups:
            cells.draw_lines(ax, groups, words[x], words[y], accuracy)
            places = sorted({place for points in groups.values() for place in points})
            cells.log_ticks(ax, places, percent=True) if x == "asked" else ax.set_xscale("log")
            ax.tick_params(which="both", labelsize=8)
        dense = [row[y] for row in rows if row["method"] == "dense"]
        drawn = [row[y] for row in masked] + dense
        if dense:
            level = float(np.mean(dense))
            level = 100 * (1 - level) if accuracy else level
            ax.axhline(level, color="black", linestyle=":", linewidth=1.3, label="dense, all weights")
        free = [row for row in rows if row["method"] == "bernoulli"]
        if free and y == "test_accuracy":  # all else is of the deterministic mask, which is not what it learns
            at = float(np.mean([row["density" if x == "asked" else "flops"] for row in free]))
            level = float(np.mean([row["test_sampled_accuracy"] for row in free]))
            label = "bernoulli, drawn masks, density learned"
            ax.plot(at, 100 * (1 - level), "*", color="black", markersize=11, label=label)
            drawn += [row["test_sampled_accuracy"] for row in free]
        log_axis(ax, [100 * (1 - v) if accuracy else v for v in drawn], accuracy=accuracy)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


if __name__ == "__main__":
    command_line.run(main, Config, lambda **_: {}, prog="python -m experiments.compare")
