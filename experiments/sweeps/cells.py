"""The cells of a sweep: many training runs, each trained, resumed or read from its files, one after the other.

The directory of a cell is named after its settings. An interrupted sweep resumes with the cells that are missing. A
widened sweep, and another sweep with a cell of the same settings, read that cell instead of training it again.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.config.presets import best_recipe
from experiments.config.run import Run, named
from experiments.config.sections import Data, Model
from experiments.config.settings import changed, flat, neutral, refuse_unread
from experiments.data.source import Dataset
from experiments.run.checkpoints import discard
from experiments.run.display import show_warning
from experiments.run.errors import Diverged, Infeasible, InUse, UserError
from experiments.run.files import write_json
from experiments.run.names import Settings, default_path
from experiments.sweeps.display import Display
from experiments.training import images
from experiments.training.fit import fit
from experiments.training.images import NO_OTHERS, Others
from experiments.training.summary import versions

CHECKPOINT_EVERY = 2000  # steps: many cells take less, and are saved when they end
FIGURES = {"test_accuracy", "test_loss", "density", "parameters", "flops", "epochs", "steps", "train_seconds"}
FIGURES |= {"test_sampled_accuracy"}  # of methods that draw masks
FIGURES |= {"emptied"}  # layers of which nothing is kept
ASSESSED = {"ece", "brier", "fgsm_accuracy", "ood_auroc", "gradient_flow", "shifted"}


class Cell(NamedTuple):
    """One run, and what the sweep calls it: its places on the axes and its name in the legend."""

    labels: Mapping[str, Any]
    config: Run


def cell(labels: Mapping[str, Any], method: str, **settings: Any) -> Cell:
    """Returns a run of a method's best recipe for the data set, with these settings in place of the recipe's.

    Args:
      labels: what the sweep calls it.
      method: one of `experiments.config.registry.METHODS`.
      settings: by the flat names of their fields.

    Raises:
      UserError: a setting is out of range, or nothing reads an option that is set.
    """
    asked = {name: settings.get(name, value) for name, value in (("dataset", "auto"), ("model", Run().model.model))}
    base = changed(Run(), **best_recipe(method=method, **asked), checkpoint_every=CHECKPOINT_EVERY)
    config = changed(base, **settings)
    config.check()
    refuse_unread(config, base)
    return Cell(labels, config)


def of_model(model: Model) -> dict[str, Any]:
    """The model's name, and its options as far as they are set: what the others are, the recipe says.

    Args:
      model: the section of a sweep's settings.
    """
    usual = flat(Model())
    return {name: value for name, value in flat(model).items() if name == "model" or value != usual[name]}


def directory(config: Run) -> str:
    """The name of a cell's directory; config: the settings, as `named` makes them."""
    return default_path(Settings(flat(config), neutral(Run)), "cells").name


def run(cells: Iterable[Cell], dataset: Dataset, folder: Path, others: Others = NO_OTHERS) -> tuple[list, list]:
    """Trains the cells and returns (a row for each, in their order, with its labels, its seed and its figures; what was
    left out, each with its labels, its seed and the reason).

    Each cell leaves its files in a directory of `folder`; a finished one is read from there. A cell that is infeasible,
    or whose training diverges, is left out, and a printed line says why.

    Args:
      cells: what to train.
      dataset: what to train and evaluate on.
      folder: the directory of all cells.
      others: the out-of-distribution and shifted sets that the cells measure on.
    """
    rows, left_out, cells = [], [], list(cells)
    with Display(len(cells)) as shown:
        for labels, config in cells:
            config = named(config, dataset.name)
            path = folder / directory(config)
            began, fresh = time.perf_counter(), not (path / "summary.json").exists()
            try:
                summary = _finish(changed(config, workdir=str(path)), dataset, others, shown)
            except (Infeasible, Diverged) as error:
                shown.left_out(labels, config.seed, error)
                left_out.append({**labels, "seed": config.seed, "reason": str(error)})
                continue
            if fresh:
                discard(path / "checkpoints")  # the summary is what a sweep needs
            row = {**labels, "seed": config.seed}
            row |= {name: summary[name] for name in sorted((FIGURES | ASSESSED) & set(summary))}
            rows.append(row)
            shown.cell(labels, config.seed, summary, time.perf_counter() - began if fresh else None)
    return rows, left_out


def _finish(config: Run, dataset: Dataset, others: Others, shown: Display) -> dict:
    """The summary of a cell; waits where another sweep is training it."""
    while True:
        try:
            return fit(config, dataset, "cells", others, single=False)
        except InUse as error:
            shown.wait(error)
            time.sleep(1)


def open_data(data: Data) -> Dataset:
    """Returns the data set that a sweep's settings name, and prints the warning that it brings."""
    dataset = images.open_data(data)
    if dataset.warning:
        show_warning(dataset.warning)
    return dataset


def carry_out(
    workdir: str,
    settings: Mapping[str, Any],
    grid: Iterable[Cell],
    dataset: Dataset,
    others: Others = NO_OTHERS,
    complete: Callable[[Path, dict], dict] = lambda path, summary: summary,
    **more: Any,
) -> tuple[Path, dict]:
    """Trains, or finishes, the cells of a sweep, and writes its summary.json.

    Args:
      workdir: the sweep's directory. The cells lie in cells/ beside it.
      settings: of the sweep, by flat name.
      grid: the cells.
      dataset, others: as in `run`.
      complete: (the sweep's directory, the summary of the cells) -> the summary that is written.
      more: what else the summary holds.

    Returns:
      The sweep's directory, and the summary: settings, versions, `more` and a row for each cell.

    Raises:
      UserError: the directory cannot be written to.
    """
    path = Path(workdir).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error}); name another with --workdir") from error
    rows, left_out = run(grid, dataset, path.parent / "cells", others)
    summary = {
        "dataset": dataset.name,
        "data_source": dataset.source,
        "config": dict(settings),
        "versions": versions(),
        **more,
        "rows": rows,
        "left_out": left_out,
    }
    summary = complete(path, summary)
    write_json(path / "summary.json", summary)
    return path, summary
