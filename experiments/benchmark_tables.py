"""The tables that docs/scaling.md and docs/running.md have of the benchmark's figures.

`python -m experiments.benchmark_tables` writes them anew. The figures are measured by
`python -m experiments.benchmark --scaling --output experiments/results/scaling.json`, and the same with --faults.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments.config.flags import parser
from experiments.run import command_line
from experiments.run.errors import UserError

PROG = "python -m experiments.benchmark_tables"
ROOT = Path(__file__).parent.parent
FIGURES_OF = {"scaling.md": "scaling.json", "running.md": "faults.json"}


@dataclass(frozen=True)
class Config:
    """Write the benchmark's tables in the documents anew, from figures that were measured and from formulae."""

    figures: Path = ROOT / "experiments" / "results"
    """The directory with scaling.json and faults.json, which the benchmark writes."""
    documents: Path = ROOT / "docs"
    """The directory with scaling.md and running.md, whose tables are replaced."""

    def check(self) -> None:
        """Raises UserError where a file is missing."""
        for document, figures in FIGURES_OF.items():
            for file in (self.documents / document, self.figures / figures):
                if not file.is_file():
                    raise UserError(f"there is no file {file}.")


def main(config: Config) -> None:
    """Replaces the tables and leaves the rest of the documents as it is."""
    from experiments.bench.tables import with_tables  # here, so that --help answers at once
    from experiments.run import files

    for document, figures in FIGURES_OF.items():
        file = config.documents / document
        files.write_text(file, with_tables(file.read_text(), files.read_json(config.figures / figures)))


if __name__ == "__main__":
    command_line.run(main, parser(Config), PROG)
