"""Several runs in one picture: `python -m experiments.overlay RUN [RUN ...] --output FILE.png`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from experiments.config.flags import parser
from experiments.run import command_line
from experiments.run.errors import UserError

PROG = "python -m experiments.overlay"


@dataclass(frozen=True)
class Config:
    """Draw finished runs on the same images together. Runs that differ only in their seed become one line."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")] = ()
    """Work directories."""
    output: Path = Path("comparison.png")
    """The picture to write."""

    def check(self) -> None:
        """Raises UserError if there is nothing to draw."""
        if not self.runs:
            raise UserError("name the work directory of at least one run.")
        if self.output.suffix != ".png":
            raise UserError(f"--output must end in .png; got {self.output}.")


def main(config: Config) -> None:
    """Draws the picture: accuracy over epochs, and accuracy before and after training."""
    from experiments.plots import several_runs, style  # here, so that --help answers at once
    from experiments.sweeps import finished

    runs = finished.read_runs(config.runs)
    split = finished.split_of_all(runs)
    style.save(several_runs.together(finished.by_settings(runs), split), config.output)
    print(config.output)


if __name__ == "__main__":
    command_line.run(main, parser(Config), PROG)
