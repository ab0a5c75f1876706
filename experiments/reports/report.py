"""The report from its files to its pages."""

import io
from pathlib import Path

from experiments.plots.published import published
from experiments.reports import gather, pages, tables
from experiments.reports.published import EXPERIMENTS, Experiment
from experiments.reports.tables import Row
from experiments.run.display import say, show_warning
from experiments.run.errors import UserError


def write(runs: str, results: str, folder: str, readme: str) -> dict[str, bool]:
    """Writes the pages, and says what was found; returns {file: whether it changed}.

    Args:
      runs: the directory of runs, which may be missing.
      results: the directory of the results that the project keeps.
      folder: where the pages go.
      readme: the page whose table is replaced, by what lies in `results` alone; "" for none.

    Raises:
      UserError: there is no directory of results, or README has no table to replace.
    """
    kept, found = Path(results), [Path(results), Path(runs)]
    if not kept.is_dir():
        raise UserError(f"{kept} is no directory: name that of the results with --results, or run this in the project.")
    everything, damaged = gather.results([each for each in found if each.is_dir()])
    for file in damaged:
        show_warning(f"left out, since it is no summary that can be read: {file}")
    rows = by_experiment(everything)
    changed = {}
    for file, text in (
        (Path(folder) / "published.md", pages.markdown(rows)),
        (Path(folder) / "published.html", pages.page(rows, picture)),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        changed[str(file)] = pages.write(file, text)
    if readme:
        changed[readme] = pages.write(Path(readme), _readme(Path(readme), kept))
    shown = [bool(row.accuracies) for _, of_one in rows for row in of_one]
    say(f"{len(everything)} results, in {sum(shown)} rows of {len(shown)}")
    for file, is_new in changed.items():
        say(f"{file}: {'written' if is_new else 'as it was'}")
    return changed


def by_experiment(results: list[gather.Result]) -> pages.Tables:
    """(published experiment, the rows of its table) of each."""
    return [(experiment, tables.rows(experiment, results)) for experiment in EXPERIMENTS]


def picture(experiment: Experiment, rows: list[Row]) -> bytes | None:
    """A PNG of accuracy by density, published and ours; None where nothing was run at two densities."""
    points = [
        {
            "name": row.figure.what.split(", ")[0] + ", " + row.figure.settings.get("method", ""),
            "density": row.density if row.density is not None else row.figure.settings.get("density"),
            "published": row.figure.accuracy,
            "accuracies": row.accuracies,
            "variant": row.variant,
        }
        for row in rows
    ]
    figure = published(experiment.title, points)
    if figure is None:
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _readme(readme: Path, kept: Path) -> str:
    """README with the table of the results that the project keeps."""
    results, _ = gather.results([kept])
    try:
        return pages.with_table(readme.read_text(), pages.readme_table(by_experiment(results)))
    except FileNotFoundError as error:
        raise UserError(f"there is no {readme}; name it with --readme, or say --readme '' for none.") from error
    except ValueError as error:
        raise UserError(f"{readme} cannot take the table of results: {error}. Say --readme '' for none.") from error
