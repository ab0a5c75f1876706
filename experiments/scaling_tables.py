"""The tables of docs/scaling.md: `python -m experiments.scaling_tables` writes them anew.

`python -m experiments.benchmark --scaling --output experiments/results/scaling.json` measures the figures.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments.config.flags import parser
from experiments.run import command_line
from experiments.run.errors import UserError

PROG = "python -m experiments.scaling_tables"
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Config:
    """Write the tables of the document on scaling anew, from figures that were measured and from formulae."""

    figures: Path = ROOT / "experiments" / "results" / "scaling.json"
    """The JSON file of the benchmark."""
    document: Path = ROOT / "docs" / "scaling.md"
    """The Markdown file whose tables are replaced."""

    def check(self) -> None:
        """Raises UserError where a file is missing."""
        for file in (self.figures, self.document):
            if not file.is_file():
                raise UserError(f"there is no file {file}.")


def main(config: Config) -> None:
    """Replaces the tables and leaves the rest of the document as it is."""
    from experiments.bench.tables import with_tables  # here, so that --help answers at once
    from experiments.run import files

    text = config.document.read_text()
    files.write_text(config.document, with_tables(text, files.read_json(config.figures)))


if __name__ == "__main__":
    command_line.run(main, parser(Config), PROG)
