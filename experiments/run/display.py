"""What a run shows while it works: a progress bar on a terminal, a quiet line per epoch elsewhere."""

import sys
import time

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from experiments.run.progress import Bar

MAX_LAYERS_SHOWN = 12


class Display(Bar):
    """A context manager around a run of `steps` steps, of which `done` are behind it. `quiet`: shows nothing."""

    def __init__(self, steps: int, done: int, epochs: int, quiet: bool = False):
        label = "epoch {task.fields[epoch]}/{task.fields[epochs]}"
        super().__init__(label, steps, done, quiet, epoch=1, epochs=epochs, figures="compiling")
        self._steps, self._epochs = steps, epochs
        self._began, self._done_before = time.perf_counter(), done

    def step(self, step: int, epoch: int, figures: dict, rate: float) -> None:
        """Training loss and accuracy of the epoch so far; rate in images per second."""
        text = f"loss {figures['loss']:.4f}  accuracy {figures['accuracy']:.2%}  {rate:,.0f} images/s"
        self.update(completed=step, epoch=epoch, figures=text)

    def epoch(self, record: dict) -> None:
        """The line of an epoch that is over."""
        split = "validation" if "validation_accuracy" in record else "test"
        line = f"epoch {record['epoch']:>3}/{self._epochs}"
        if "train_loss" in record:
            line += f"   train loss {record['train_loss']:.4f}  accuracy {record['train_accuracy']:.2%}"
        line += f"   {split} loss {record[f'{split}_loss']:.4f}  accuracy {record[f'{split}_accuracy']:.2%}"
        if f"{split}_sampled_accuracy" in record:
            loss, accuracy = record[f"{split}_sampled_loss"], record[f"{split}_sampled_accuracy"]
            line += f"   sampled loss {loss:.4f}  accuracy {accuracy:.2%}"
        if "train_loss" in record:
            left = (time.perf_counter() - self._began) / max(record["step"] - self._done_before, 1)
            left *= self._steps - record["step"]
            line += f"   {record['images_per_second']:,.0f} images/s   {left / 60:.1f} min left"
        self.say(line)


def say(text: str) -> None:
    """A line of its own."""
    console = Console(file=sys.stdout)
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)  # a file gets whole lines


def show_warning(text: str) -> None:
    """A warning that brings its own frame, on standard error."""
    Console(stderr=True).print(Text(text, style="bold yellow"), soft_wrap=True)


def shifted_text(figures: dict) -> str:
    """What was measured on a shifted set, as `experiments.run.schemas.Shifted` holds it."""
    accuracy, loss = figures["test_accuracy"], figures["test_loss"]
    return f"accuracy {accuracy:.2%}, loss {loss:.4f}  ({figures['images']:,} images, {figures['classes']:,} classes)"


def show_summary(summary: dict, path) -> None:
    """The result of a run as a table, and where its files are."""
    console = Console(file=sys.stdout)
    table = Table(title=f"{summary['method']} on {summary['dataset']}", show_header=False)
    rows = {
        "test accuracy": f"{summary['test_accuracy']:.2%}  (after the last epoch)",
        "test loss": f"{summary['test_loss']:.4f}",
    }
    if "test_sampled_accuracy" in summary:
        rows["... of sampled masks"] = (
            f"accuracy {summary['test_sampled_accuracy']:.2%}, loss {summary['test_sampled_loss']:.4f}, on average"
        )
    if "ece" in summary:
        unknown = ", ".join(f"{name} {auroc:.3f}" for name, auroc in summary["ood_auroc"].items())
        rows |= {
            "calibration": f"expected error {summary['ece']:.2%}, Brier score {summary['brier']:.4f}",
            "on FGSM images": f"accuracy {summary['fgsm_accuracy']:.2%}  (8/255)",
            "out of distribution": f"AUROC {unknown}",
        }
    rows |= {f"on {name}": shifted_text(figures) for name, figures in summary.get("shifted", {}).items()}
    rows["density"] = f"{summary['density']:.4f}  (fraction of the prunable weights kept)"
    if {"parameters", "flops"} <= set(summary):  # a run of an earlier version does not record them
        rows["size"] = f"{summary['parameters']:,} parameters kept, {summary['flops']:,} FLOPs an image"
    rows |= {
        "training": f"{summary['epochs']} epochs, {summary['steps']} steps, {summary['train_seconds']:.0f} s, "
        f"{summary['images_per_second']:,.0f} images/s",
        "seed": str(summary["seed"]),
        "files": escape(str(path)),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    if summary.get("emptied"):  # a run of an earlier version does not record it
        table.add_row("layer collapse", f"nothing is kept of {', '.join(summary['emptied'])}", style="bold yellow")
    for layer, counts in list(summary["layers"].items())[:MAX_LAYERS_SHOWN]:
        table.add_row(layer, f"{counts['kept']:,} of {counts['size']:,} weights ({counts['density']:.2%})")
    if len(summary["layers"]) > MAX_LAYERS_SHOWN:
        table.add_row("...", f"and {len(summary['layers']) - MAX_LAYERS_SHOWN} more layers, in summary.json")
    console.print(table)
    if "file_bytes" in summary:  # a run of an earlier version left no such file
        size, dense = summary["file_bytes"], summary["dense_bytes"]
        say(f"the network is {size:,} bytes on disk (subnetwork.safetensors); all its weights in float32: {dense:,}")
