"""Several runs in one picture: `python -m experiments.overlay RUN [RUN ...] --output FILE.png`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import Positional, arg

from experiments.plots.style import (
    COLOURS,
    MARKERS,
    OTHER_STAGES,
    STAGES,
    diamond,
    epoch_axis,
    held_of,
    log_axis,
    new_figure,
    save,
    style_axes,
)
from experiments.run import command_line
from experiments.run.errors import UserError

Run = tuple[dict, list[dict]]  # the contents of summary.json and of metrics.jsonl


def draw_together(runs: list[Path], output: Path) -> None:
    """Draws finished runs together: accuracy over epochs, and beside it accuracy before and after training.

    Runs that differ in nothing but the seed are one line: their mean, in a band from the lowest to the highest.

    Raises:
      UserError: a run is unfinished or damaged, or the runs were not measured on the same images.
    """
    runs = [_read_run(Path(run)) for run in runs]
    measured = {(summary["dataset"], held_of(records)) for summary, records in runs}
    if len(measured) > 1:
        found = "; ".join(sorted(f"{dataset}, {held} images" for dataset, held in measured))
        raise UserError(f"these runs were measured on different images ({found}); compare those of one kind only.")
    [(dataset, held)] = measured
    groups = _groups(runs)
    models = " and ".join(sorted({summary["model"] for summary, _ in runs}))

    figure = new_figure(f"{held} accuracy on {dataset} · {models}", 9, 2.8 + 0.9 * len(groups))
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    drawn, bars = [], {}
    for i, (label, members) in enumerate(groups.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        accuracies = 100 * np.array([[record[f"{held}_accuracy"] for record in records] for _, records in members])
        errors, epochs = 100 - accuracies, range(accuracies.shape[1])
        drawn.extend(errors.ravel())
        label += f" (mean of {len(members)} seeds)" if len(members) > 1 else " (1 seed)"
        left.plot(epochs, errors.mean(axis=0), color=colour, marker=marker, markersize=4, label=label)
        left.fill_between(epochs, errors.min(axis=0), errors.max(axis=0), color=colour, alpha=0.25, linewidth=0)
        diamond(left, errors[:, 0].mean(), colour)
        right.text(0, 3 * i - 0.6, label, fontsize=9, va="bottom")
        for y, at, stage in zip(
            (3 * i, 3 * i + 1), (0, -1), STAGES.get(members[0][0]["method"], OTHER_STAGES), strict=True
        ):
            bars[y] = stage
            right.barh(y, accuracies[:, at].mean(), height=0.9, color=colour, alpha=1 if at else 0.5)
            right.text(102, y, f"{accuracies[:, at].mean():.2f}%", fontsize=9, va="center")
            if len(members) > 1:
                right.plot(accuracies[:, at], [y] * len(members), "|", color="black", markersize=9)
    style_axes(left, "epoch", "accuracy (%), log scale of the error")
    log_axis(left, drawn, accuracy=True)
    epoch_axis(left, 0, max(len(records) for _, records in runs) - 1)
    left.set_title("over epochs; diamonds: before training", fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    style_axes(right, "accuracy (%); strokes: single seeds" if len(runs) > len(groups) else "accuracy (%)", "")
    right.grid(axis="y", visible=False)
    right.set_yticks(list(bars), bars.values(), fontsize=9)
    right.set(xlim=(0, 100), ylim=(3 * len(groups) - 1.25, -1.25))
    right.set_title("before and after training", fontsize=10)
    save(figure, output)


def _read_run(path: Path) -> Run:
    try:
        summary = json.loads((path / "summary.json").read_text())
        records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for key in ("dataset", "model", "method", "seed", "density", "config"):
            summary[key]
        if [record["epoch"] for record in records] != list(range(summary["epochs"] + 1)):
            raise ValueError(f"metrics.jsonl does not hold the epochs 0 to {summary['epochs']} in order")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not hold a finished run: {error}. Give its command again to finish it, or leave it out."
        ) from error
    return summary, records


def _groups(runs: list[Run]) -> dict[str, list[Run]]:
    """{label: runs that differ in nothing but the seed}. A label says the method and all that sets it apart."""
    from experiments.run.workdir import CHANGE_NO_RESULT

    ignored = (*CHANGE_NO_RESULT, "seed", "data")  # data: the same images come in another order from another source
    by_settings = {}
    for summary, records in runs:
        settings = json.dumps({k: v for k, v in summary["config"].items() if k not in ignored}, sort_keys=True)
        by_settings.setdefault(settings, {})[summary["seed"]] = summary, records  # a run given twice counts once
    by_name = {}
    for by_seed in by_settings.values():
        members = list(by_seed.values())
        summary, _ = members[0]
        name = summary["method"]
        if name != "dense":
            name += f", density {np.mean([summary['density'] for summary, _ in members]):.3g}"
        if len({summary["model"] for summary, _ in runs}) > 1:
            name += f", {summary['model']}"
        by_name.setdefault(name, []).append((summary["config"], members))
    groups = {}
    for name, same in by_name.items():
        first = same[0][0]
        differing = [k for k in first if k not in ignored and any(config.get(k) != first[k] for config, _ in same)]
        if 1 < len(same) == len({config.get("preset") for config, _ in same}):
            differing = ["preset"]
        for config, members in same:
            groups[", ".join([name, *(f"{k} {config.get(k)}" for k in differing)])] = members
    return groups


@dataclass(frozen=True)
class Config:
    """Draw finished runs on the same images together; runs that differ only in their seed become one line."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")] = ()
    """Work directories."""
    output: Path = Path("comparison.png")
    """The picture to write."""

    def check(self) -> None:
        """Raises UserError if there is nothing to draw."""
        if not self.runs:
            raise UserError("name the work directory of at least one run.")


def main(config: Config) -> None:
    """Draws the comparison and says where it is."""
    draw_together(list(config.runs), config.output)
    print(config.output)


if __name__ == "__main__":
    command_line.run(main, Config, dict, prog="python -m experiments.overlay")
