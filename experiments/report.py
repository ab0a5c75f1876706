"""Put our results beside the published ones: `python -m experiments.report`.

It reads every summary under `runs/` and `experiments/results/`, and writes a table for each published experiment:
the published figure and its source, ours, the difference, the command. README's table of results comes from it.
"""

from dataclasses import dataclass

from experiments.config.flags import parser
from experiments.run import command_line

PROG = "python -m experiments.report"


@dataclass(frozen=True)
class Config:
    """Put our results beside the published ones."""

    runs: str = "runs"
    """The directory of runs. It may be missing."""
    results: str = "experiments/results"
    """The directory of the results that the project keeps."""
    pages: str = "docs/results"
    """Where published.md and published.html go."""
    readme: str = "README.md"
    """The page whose table of results is replaced; "" for none. It shows only what lies in --results."""

    def check(self) -> None:
        """Every path is valid until it is read."""


def main(config: Config) -> dict:
    """Writes the pages; returns {file: whether it changed}."""
    from experiments.reports import report  # here, so that --help answers at once

    return report.write(config.runs, config.results, config.pages, config.readme)


if __name__ == "__main__":
    command_line.run(main, parser(Config), PROG)
