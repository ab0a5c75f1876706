"""The tables of the documents that hold measured figures: `python -m experiments.doc_tables` writes them anew.

The figures lie in `experiments/results/`; each document has the commands that measure its own.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments.config.flags import parser
from experiments.run import command_line
from experiments.run.errors import UserError
from experiments.run.markdown import MARKED, with_tables

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
        """Raises UserError where a document, or the figures of one of its tables, is missing."""
        for document in DOCUMENTS:
            file = self.documents / document
            named = {match[3] for match in MARKED.finditer(file.read_text())} if file.is_file() else ()
            for needed in (file, *(self.figures / name for name in named)):
                if not needed.is_file():
                    raise UserError(f"there is no file {needed}, which the tables of {document} need.")


def main(config: Config) -> None:
    """Replaces the tables and leaves the rest of the documents as it is. None is written before all are made."""
    from experiments.bench import inference, tables  # here, so that --help answers at once
    from experiments.reports import bits
    from experiments.run import files

    makers = {**tables.TABLES, "inference": inference.results_table, **bits.TABLES}

    def made(document: str) -> str:
        text = (config.documents / document).read_text()
        try:
            return with_tables(text, makers, lambda name: files.read_json(config.figures / name))
        except KeyError as error:
            raise UserError(f"a table of {document}, or what its figures must have, is missing: {error}.") from error

    texts = {config.documents / document: made(document) for document in DOCUMENTS}
    for file, text in texts.items():
        files.write_text(file, text)


if __name__ == "__main__":
    command_line.run(main, parser(Config), PROG)
