"""A run of many tasks from its settings to its files: masks, the file of all masks, inference, summary, picture."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.config.registry import METHODS
from experiments.config.settings import flat, neutral
from experiments.config.tasks import CHANGE_NO_MASK, ManyTasks, named, of_masks
from experiments.data.source import Dataset, Source
from experiments.plots import style, tasks
from experiments.run import schemas
from experiments.run.display import show_warning
from experiments.run.errors import UserError
from experiments.run.interrupt import Interrupted, stopping
from experiments.run.names import Settings, default_path, plain
from experiments.run.workdir import Workdir
from experiments.tasks import stored, superposition
from experiments.tasks.display import Display, show_summary
from experiments.tasks.permuted import permuted
from experiments.tasks.superposition import Superposition
from experiments.tasks.trainer import Trainer
from experiments.training import images, summary
from experiments.training.evaluation import Split
from supermask_jax import artifact
from supermask_jax.trees import leaf_key


def run(config: ManyTasks) -> dict[str, Any]:
    """Trains the tasks that are missing, measures all of them together, and returns what summary.json holds.

    Raises:
      UserError: the data are missing or damaged; the settings do not fit them or the work directory; scores that are
        not finite.
      Interrupted: a signal came; finished tasks are saved.
    """
    dataset = images.open_data(config.data)
    if dataset.warning:
        show_warning(dataset.warning)
    why, usual = METHODS[config.method].free_density, ManyTasks.density
    if why and config.density != usual:
        show_warning(f"--density {config.density:g} has no effect: {why}.")
    config = named(config, dataset.name)
    trained_on, split = images.splits(config.data, dataset)
    if config.inferred_images > len(split.source):
        raise UserError(
            f"--inferred-images {config.inferred_images}: there are {len(split.source)} {split.name} images."
        )
    workdir = open_workdir(config, dataset)
    with stopping() as stop_requested:
        result = workdir.summary()
        if result is None or any(result["config"][name] != getattr(config, name) for name in CHANGE_NO_MASK):
            result = _finish(config, trained_on, split, workdir, stop_requested)
    show_summary(result, workdir.path)
    return result


def open_workdir(config: ManyTasks, dataset: Dataset) -> Workdir:
    """The directory that --workdir names, or one named after the settings that bear on the masks."""
    usual = {name: value for name, value in neutral(type(config)).items() if name not in CHANGE_NO_MASK}
    settings = Settings(of_masks(config), usual)
    path = Path(config.workdir).expanduser() if config.workdir else default_path(settings, "many_tasks")
    return Workdir(path, settings, dataset.fingerprint, schemas.TasksSummary, config.restart)


def _finish(
    config: ManyTasks, dataset: Dataset, split: Split, workdir: Workdir, stop_requested: Callable[[], bool]
) -> dict[str, Any]:
    path = workdir.path
    trainer = Trainer(config, dataset, split, stop_requested=stop_requested)
    packed, records = [], []
    with Display(config.tasks, trainer.steps, split.name) as shown:
        for task in range(config.tasks):
            found = stored.load_task(path, task, trainer.weights)
            if fresh := found is None:
                stored.save_task(path, task, *trainer.train(task, shown.step))
                found = stored.load_task(path, task, trainer.weights)
            packed.append(found[0])
            records.append(found[1])
            shown.task(found[1], fresh)
        pause = partial(_stop_if, stop_requested, path)
        inference = Inference(config, trainer, split.source, pause)
        write = partial(
            stored.write_artifact, path / artifact.FILE, trainer.weights, config.seed, _about(config, dataset)
        )
        asked = {name: getattr(config, name) for name in CHANGE_NO_MASK if name != "tasks"}
        growth = stored.load_growth(path, asked)
        for count in counts(config.tasks):
            pause()
            if count not in growth or count == config.tasks:
                size = write(packed[:count])
            if count not in growth:
                growth[count] = {"tasks": count, "file_bytes": size, **inference.measure(np.stack(packed[:count]))}
                stored.save_growth(path, asked, growth)
            if count > 1:
                shown.inferred(growth[count])
    result = _summary(config, dataset, split, trainer, records, [growth[count] for count in counts(config.tasks)])
    workdir.finish(result, lambda: style.save(tasks.many_tasks(result), path / "many_tasks.png"))
    return result


def _stop_if(stop_requested: Callable[[], bool], path: Path) -> None:
    """Raises Interrupted if a signal came after the training of all tasks."""
    if stop_requested():
        raise Interrupted(f"stopped by a signal; all tasks are saved in {path}.")


def counts(tasks: int) -> list[int]:
    """The numbers of tasks at which sizes and inference are measured: 1, 2, 5, 10, 20, 50, ... and all."""
    steps = [factor * 10**power for power in range(len(str(tasks))) for factor in (1, 2, 5)]
    return sorted({*(step for step in steps if step < tasks), tasks})


class Inference:
    """The tasks of images, inferred among the first so many tasks.

    The images are the same for every number of tasks, in which they take turns.

    Args:
      config: the settings.
      trainer: of the network and the tasks.
      source: of the images.
      pause: called now and then while it computes; it may raise.
    """

    def __init__(self, config: ManyTasks, trainer: Trainer, source: Source, pause: Callable[[], None]):
        self._superposition = Superposition(trainer.logits, trainer.weights, config.temperature, pause)
        self._permutation = trainer.permutation
        key = leaf_key(jax.random.key(config.seed), "inference")
        chosen = np.asarray(jax.random.permutation(key, len(source)))[: config.inferred_images]
        self._batch = source.read(chosen)

    def measure(self, packed: np.ndarray) -> dict[str, float]:
        """Fractions of the images whose task is right, and whose class is right under the inferred mask.

        Args:
          packed: uint8 [tasks, bytes].

        Returns:
          "one_shot" and "binary", of two tasks or more; "one_shot_accuracy" and "binary_accuracy"; "told_accuracy": the
          accuracy on these images under the masks of their own tasks. {} for one task.
        """
        if len(packed) == 1:
            return {}
        own = np.arange(len(self._batch["label"])) % len(packed)
        seen = np.empty_like(self._batch["image"])
        for task in range(len(packed)):
            seen[own == task] = permuted(self._batch["image"][own == task], self._permutation(task))
        groups = seen[:, None]  # of one image each

        def accuracy(tasks: np.ndarray) -> float:
            classes = np.argmax(self._superposition.logits(groups, tasks, packed), axis=-1)
            return float(np.mean(classes[:, 0] == self._batch["label"]))

        one_shot, binary = superposition.infer(self._superposition, groups, packed)
        figures = {"told_accuracy": accuracy(own)}
        for name, inferred in (("one_shot", one_shot), ("binary", binary)):
            figures |= {name: float(np.mean(inferred == own)), f"{name}_accuracy": accuracy(inferred)}
        return figures


def _about(config: ManyTasks, dataset: Dataset) -> dict[str, Any]:
    """What the file of all masks tells beside them."""
    about = {name: getattr(config, name) for name in ("method", "width", "depth", "outputs", "epochs", "seed")}
    numbers = {"mean": list(map(float, dataset.mean)), "std": list(map(float, dataset.std))}
    return {**about, "model": "mlp", "image_shape": list(dataset.image_shape), **numbers, "dataset": dataset.name}


def _summary(
    config: ManyTasks, dataset: Dataset, split: Split, trainer: Trainer, records: list[dict], growth: list[dict]
) -> dict[str, Any]:
    weights = sum(leaf.size for leaf in jax.tree.leaves(trainer.weights))
    first, last = growth[0], growth[-1]
    further = (last["file_bytes"] - first["file_bytes"]) / max(last["tasks"] - first["tasks"], 1)
    return {
        "dataset": dataset.name,
        "method": config.method,
        "split": split.name,
        "tasks": records,
        "mean_accuracy": float(np.mean([record[f"{split.name}_accuracy"] for record in records])),
        "growth": growth,
        "file_bytes": last["file_bytes"],
        "bytes_per_task": further or first["file_bytes"],
        "dense_bytes": 4 * weights,
        "weights": weights,
        "units": [int(np.prod(dataset.image_shape)), *[config.width] * config.depth, config.outputs],
        "images": len(split.source),
        "train_seconds": sum(record["train_seconds"] for record in records),
        "compile_seconds": trainer.compile_seconds,
        "device": summary.machine(),
        "versions": summary.versions(),
        "date": summary.today(),
        "seed": config.seed,
        "config": plain(flat(config)),
        "data_source": dataset.source,
    }
