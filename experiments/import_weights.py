"""Networks that were trained in PyTorch, as subnetworks: `python -m experiments.import_weights FILE`."""

from dataclasses import dataclass

from experiments.config.flags import parser
from experiments.config.imported import Imported
from experiments.run import command_line

PROG = "python -m experiments.import_weights"


@dataclass(frozen=True)
class Config(Imported):
    """Read a ResNet that was trained in PyTorch, prune it or take its masks, and write subnetwork.safetensors.

    The files are those of torchvision, timm and Hugging Face, and of the released code of Ramanujan et al. 2020.
    """


def main(config: Config) -> int:
    """Reads, prunes and writes; returns the number of bytes written."""
    from experiments.training import imported  # here, so that --help answers at once

    return imported.convert(config)


if __name__ == "__main__":
    command_line.run(main, parser(Config), PROG)
