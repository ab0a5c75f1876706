"""Many tasks, one random network: `python -m experiments.many_tasks`.

Supermasks in superposition (Wortsman et al. 2020) on permuted MNIST. The weights are drawn once and never trained; each
task has a mask of its own, 1 bit a weight, and a further task changes no earlier one. Which task an unlabelled image
belongs to is inferred from the image: all masks are superposed, and one gradient tells which of them makes the outputs
more certain. The same command with more --tasks trains the missing ones.
"""

from dataclasses import dataclass

from experiments.config.flags import parser
from experiments.config.tasks import ManyTasks, recipe
from experiments.run import command_line

PROG = "python -m experiments.many_tasks"


@dataclass(frozen=True)
class Config(ManyTasks):
    """Many tasks in one random network (Wortsman et al. 2020): a mask for each task, no weight is ever trained."""


def main(config: Config) -> dict:
    """Trains the tasks, or those that are missing, and returns the summary that it also writes to summary.json."""
    from experiments.tasks import suite  # here, so that --help answers at once

    return suite.run(config)


if __name__ == "__main__":
    command_line.run(main, parser(Config, recipe), PROG)
