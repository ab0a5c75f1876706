"""The tables of the documents that hold measured figures: `python -m experiments.doc_tables` writes them anew.

The figures lie in `experiments/results/`; each document has the commands that measure its own.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments.config.flags import parser
from experiments.run import command_line
from experiments.run.errors import UserError

PROG = "python -m experiments.doc_tables"
ROOT = Path(__file__).parent.parent
DOCUMENTS = ("scaling.md", "running.md", "inference.md", "speed.md", "results/bits.md")


@dataclass(frozen=True)
class Config:
    """Write the tables of the documents anew, from figures that were measured and from formulae."""

    figures: Path = ROOT / "experiments" / "results"
    """The directory with the figures, which the benchmark and the sweeps write."""
    documents: Path = ROOT / "docs"
    """The directory with the documents whose tables are replaced."""

    def check(self) -> None:
        """Raises UserError where a document is missing."""
        for document in DOCUMENTS:
            if not (self.documents / document).is_file():
                raise UserError(f"there is no file {self.documents / document}.")


def main(config: Config) -> None:
    """Replaces the tables and leaves the rest of the documents as it is."""
    from experiments.bench import inference, tables  # here, so that --help answers at once
    from experiments.reports import bits
    from experiments.run import files, markdown

    makers = {**tables.TABLES, "inference": inference.results_table, **bits.TABLES}
    for document in DOCUMENTS:
        file = config.documents / document
        text = markdown.with_tables(file.read_text(), makers, lambda name: files.read_json(config.figures / name))
        files.write_text(file, text)


if __name__ == "__main__":
    command_line.run(main, parser(Config), PROG)
