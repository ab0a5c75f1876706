"""Put our results beside the published ones: `python -m experiments.report`.

It writes a table for each published experiment: the published figure and its source, ours, the difference, the command.
The pages under `docs/` and README's table hold what lies in `experiments/results/`; a report of your own runs beside it
goes into `runs/report/`.
"""

from dataclasses import dataclass

from experiments.config.flags import parser
from experiments.run import command_line

PROG = "python -m experiments.report"


@dataclass(frozen=True)
class Config:
    """Put our results beside the published ones."""

    runs: str = "runs"
    """The directory of your runs, which may be missing. Their report goes into report/ there."""
    results: str = "experiments/results"
    """The directory of the results that the project keeps."""
    pages: str = "docs/results"
    """Where published.md and published.html of the project's own results go."""
    readme: str = "README.md"
    """The page whose table of results is replaced by what lies in --results; "" for none."""

    def check(self) -> None:
        """Every path is valid until it is read."""


def main(config: Config) -> dict:
    """Writes the pages; returns {file: whether it changed}."""
    from experiments.reports import report  # here, so that --help answers at once

    return report.write(config.runs, config.results, config.pages, config.readme)


if __name__ == "__main__":
    command_line.run(main, parser(Config), PROG)
