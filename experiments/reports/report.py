"""The report from its files to its pages."""

from pathlib import Path

from experiments.plots import style
from experiments.plots.published import published
from experiments.reports import gather, pages, tables
from experiments.reports.published import EXPERIMENTS, Experiment
from experiments.reports.tables import Row
from experiments.run.display import say, show_warning
from experiments.run.errors import UserError


def write(runs: str, results: str, folder: str, readme: str) -> dict[str, bool]:
    """Writes the pages, and says what was found; returns {file: whether it changed}.

    Args:
      runs: the directory of runs, which may be missing. A report of them and of `results` goes into report/ there.
      results: the directory of the results that the project keeps.
      folder: where the pages of `results` alone go.
      readme: the page whose table is replaced, by `results` alone; "" for none.

    Raises:
      UserError: there is no directory of results, or README has no table to replace.
    """
    if not Path(results).is_dir():
        raise UserError(
            f"{results} is no directory: name that of the results with --results, or run this in the project."
        )
    kept = _tables([Path(results)])
    changed = _pages(Path(folder), kept)
    if readme:
        changed[readme] = pages.write(Path(readme), _readme(Path(readme), kept))
    if Path(runs).is_dir():
        changed |= _pages(Path(runs) / "report", _tables([Path(results), Path(runs)]))
    for file, is_new in changed.items():
        say(f"{file}: {'written' if is_new else 'as it was'}")
    return changed


def _tables(folders: list[Path]) -> pages.Tables:
    """The rows of every table, from the results in these folders."""
    results, damaged = gather.results(folders)
    for file in damaged:
        show_warning(f"left out, since it is no summary that can be read: {file}")
    made = by_experiment(results)
    shown = [bool(row.accuracies) for _, rows in made for row in rows]
    where = " and ".join(map(str, folders))
    say(f"{where}: {len(results)} results, in {sum(shown)} rows of {len(shown)}")
    return made


def _pages(folder: Path, made: pages.Tables) -> dict[str, bool]:
    """Writes published.md and published.html; returns {file: whether it changed}."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"published.md": pages.markdown(made), "published.html": pages.page(made, picture)}
    return {str(folder / name): pages.write(folder / name, text) for name, text in texts.items()}


def by_experiment(results: list[gather.Result]) -> pages.Tables:
    """(published experiment, the rows of its table) of each."""
    return [(experiment, tables.rows(experiment, results)) for experiment in EXPERIMENTS]


def picture(experiment: Experiment, rows: list[Row]) -> bytes | None:
    """A PNG of accuracy by density, published and ours; None where nothing was run at two densities."""
    points = [
        {
            "name": row.figure.series,
            "density": _rounded(row.density if row.density is not None else row.figure.settings.get("density")),
            "published": row.figure.accuracy,
            "accuracies": row.accuracies,
            "variant": row.variant,
        }
        for row in rows
    ]
    figure = published(experiment.title, points)
    if figure is None:
        return None
    return style.png(figure, dpi=120, metadata={"Software": None})


def _rounded(density: float | None) -> float | None:
    """A density of three digits, as an axis shows it."""
    return None if density is None else float(f"{density:.3g}")


def _readme(readme: Path, kept: pages.Tables) -> str:
    """README with another table of results."""
    try:
        return pages.with_table(readme.read_text(), pages.readme_table(kept))
    except FileNotFoundError as error:
        raise UserError(f"there is no {readme}; name it with --readme, or say --readme '' for none.") from error
    except ValueError as error:
        raise UserError(f"{readme} cannot take the table of results: {error}. Say --readme '' for none.") from error
