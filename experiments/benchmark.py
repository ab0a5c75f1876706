"""Time and memory of the training step and of the selection: `python -m experiments.benchmark`.

With --cifar, it measures the networks of CIFAR-10 instead; with --scaling, what several devices cost; with --inference,
the inference of masked networks; with --growth, selections of up to 1.3 billion scores; with --faults, how many runs
survive what is done to them; with --reading, how fast photographs are read.
Figures are ratios within one run, because absolute times differ between machines and from day to day.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.config.flags import parser
from experiments.config.limits import counts
from experiments.run import command_line
from experiments.run.errors import UserError, require

PROG = "python -m experiments.benchmark"
IMAGE_SIZE = 224  # of the photographs that --reading reads


@dataclass(frozen=True)
class Config:
    """Measure training steps, and the selection of the highest scores."""

    rounds: int = 30
    """Times that each candidate is measured; the candidates take turns."""
    batch_sizes: tuple[int, ...] = (64, 512)
    """Images per step."""
    cifar: bool = False
    """Measure Conv2, Conv4, ResNet-20 and ResNet-18 on images of CIFAR-10's shape instead of the MNIST convnet. The
    batch sizes are not used: it is 128."""
    skip_torch: bool = False
    """Leave PyTorch out; it is also left out where it is not installed."""
    scaling: bool = False
    """Measure what several devices cost instead: steps per second of 1 to 8 fake devices, and the bytes that a step
    moves between them. The batch sizes are not used."""
    inference: bool = False
    """Measure inference instead: of networks trained by edge-popup and by gradual pruning at several densities, dense,
    compacted and with sparse matrices. The batch sizes are not used."""
    growth: bool = False
    """Measure selections of 25 million to 1.3 billion scores instead, on one device and on eight fake ones, and draw
    how they grow. The batch sizes are not used."""
    reading: str | None = None
    """Measure instead how fast the photographs in this directory are read, which is as --data-dir of
    experiments.imagenet."""
    faults: bool = False
    """Do harm to real runs instead: kill them, fill their disks, damage their files, and count those that end with the
    right bits or the right error. Takes an hour or so."""
    kills: int = 12
    """With --faults, how many runs are killed and flags tried; a hundred times as many directories are damaged."""
    soak_seconds: int = 60
    """With --faults, how long a run is watched that saves again and again; a process is frozen for a sixth of it, at
    least 20 seconds."""
    output: str | None = None
    """The JSON file to write. [runs/benchmark/benchmark.json, or cifar.json, scaling.json, inference.json, growth.json,
    faults.json or reading.json there]"""

    def check(self) -> None:
        """Raises UserError on a setting out of range."""
        require(
            self,
            *counts(self, "rounds", "kills", "soak_seconds", "batch_sizes"),
            ("batch_sizes", len(self.batch_sizes) >= 1, "one or more"),
        )
        if len(self._chosen) > 1:
            raise UserError(
                f"{' and '.join(f'--{name}' for name in self._chosen)} exclude each other: give one of them."
            )

    @property
    def measures(self) -> str:
        """What is measured; the name of the file."""
        return next(iter(self._chosen), "benchmark")

    @property
    def _chosen(self) -> list[str]:
        return [
            name for name in ("scaling", "inference", "cifar", "growth", "faults", "reading") if getattr(self, name)
        ]


def main(config: Config) -> dict:
    """Measures, prints the table, writes the JSON file and returns what is in it."""
    from rich.console import Console  # here, so that --help answers at once

    from experiments.bench import growth, inference, one_device, reading, rows, scaling, torch_steps
    from experiments.faults import table
    from experiments.plots import growth as plots
    from experiments.plots import style
    from experiments.run import files

    file = Path(config.output or f"runs/benchmark/{config.measures}.json")
    if file.is_dir():
        raise UserError(f"{file} is a directory; name a file with --output.")
    files.require_writable(file.parent)  # before hours are measured
    console = Console(file=sys.stdout)
    skips_torch = config.skip_torch or config.measures not in ("benchmark", "cifar")
    no_torch = "skipped" if skips_torch else torch_steps.why_no_torch()
    about = rows.about(config, no_torch, on_cpu=config.scaling or config.growth or config.faults)
    if config.scaling:
        with console.status("several devices: minutes"):
            figures = scaling.measure(config.rounds)
        measured = {"rows": scaling.rows(figures), **figures}
    elif config.reading:
        with console.status("reading photographs: minutes"):
            measured = reading.measure(Path(config.reading).expanduser(), IMAGE_SIZE, config.rounds)
    elif config.faults:
        measured = table.measure(config.kills, config.soak_seconds, console.status)
    elif config.growth:
        measured = growth.measure(config.rounds, console.status)
    elif config.inference:
        measured = inference.measure(config.rounds, console.status)
        print(inference.results_table(measured))
    elif config.cifar:
        measured = one_device.measure_cifar(config.rounds, not no_torch, console.status)
    else:
        measured = one_device.measure(config.rounds, config.batch_sizes, not no_torch, console.status)
    result = {"about": about, **measured}
    rows.show(console, result)
    files.write_json(file, result)
    if config.growth:
        style.save(plots.growth(measured), file.with_suffix(".png"))
    return result


if __name__ == "__main__":
    command_line.run(main, parser(Config), PROG)
