"""Events that every kind of training has: what saves, what stops, what guards against numbers that are not finite."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.run import processes
from experiments.run.errors import Diverged
from experiments.run.interrupt import Interrupted
from experiments.training.loop import Batch, Event, every
from supermask_jax.trees import Tree, by_path


def saving(
    save: Callable[[int, Any, Batch], Any],
    steps: int,
    last: int,
    stop_requested: Callable[[], bool],
    path: Path,
    at_end: bool = True,
) -> list[Event]:
    """The events that save every so many steps and at the last one, and that save and stop when a signal came.

    Args:
      save: (step, progress, batch) -> progress; writes a checkpoint.
      steps: between checkpoints.
      last: the last step of training.
      stop_requested: whether a signal came, in this process.
      path: of the run, for the message.
      at_end: whether the last step is saved, and stops. If not, the caller does both when training returns.
    """

    def stop(step: int, progress: Any, batch: Batch) -> Any:
        if not processes.any_of(stop_requested()) or (step == last and not at_end):
            return progress
        if step % steps and step != last:
            save(step, progress, batch)
        raise Interrupted(f"stopped by a signal; saved at step {step} of {last} in {path}.")

    due = every(steps)
    return [Event(lambda step: min(due(step), last) if at_end else due(step), save), Event(None, stop)]


def stop_if_not_finite(totals: dict[str, jax.Array], learner: Tree, path: Path) -> None:
    """Raises Diverged if a step was not finite, naming it and the layer. Nothing is saved after it."""
    step, leaf = int(totals["bad_step"]), int(totals["bad_leaf"])
    if step >= 0:
        what = "the loss" if leaf < 0 else list(by_path(learner))[leaf]
        raise Diverged(
            f"{what} is not finite (NaN or infinity) at step {step}. Checkpoints in {path}, if there are any, are from "
            "before it. Try a lower --learning-rate with another --workdir."
        )
