"""Find winning tickets, and compare them with their controls: `python -m experiments.lottery`.

One command runs the published experiment from end to end: train, prune, rewind, train again, round after round, each
ticket beside the same masks on other random weights and beside random masks; then it draws the results. `--sweep` asks
one of the questions of the papers: does it matter when the ticket is drawn, where it is rewound to, in how many rounds
it is pruned, by which criterion?
"""

from dataclasses import dataclass

from experiments.config.flags import parser
from experiments.config.presets import LOTTERY
from experiments.config.tickets import Lottery
from experiments.run import command_line

PROG = "python -m experiments.lottery"


@dataclass(frozen=True)
class Config(Lottery):
    """Find winning tickets (Frankle & Carbin 2019): train, prune, rewind, again; beside the controls."""


def defaults(preset: str = "short") -> dict:
    """The settings of a preset, as far as they differ from the fields' own defaults."""
    return {"preset": preset, **LOTTERY[preset]}


def main(config: Config) -> dict:
    """Runs, or resumes, the experiment or the sweep; returns the summary that it also writes to summary.json."""
    from experiments.tickets import questions, rounds  # here, so that --help answers at once

    config, dataset, target = rounds.open_data(config)
    if config.sweep == "none":
        return rounds.run(config, dataset, target)
    return questions.run(config, dataset)


if __name__ == "__main__":
    command_line.run(main, parser(Config, defaults), PROG)
