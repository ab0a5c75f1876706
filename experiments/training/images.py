"""Which images a run trains on, and which it is evaluated on, as its settings say."""

import dataclasses
from collections.abc import Sequence

import jax

from experiments.config.registry import DATASETS
from experiments.config.sections import Data
from experiments.data.batches import hold_out
from experiments.data.load import load
from experiments.data.source import Dataset
from experiments.run import processes
from experiments.run.errors import UserError
from experiments.training.evaluation import Split


def open_data(data: Data) -> Dataset:
    """The data set that the settings name; DataError where it is missing or damaged."""
    options = {name: getattr(data, name) for name in DATASETS[data.dataset].reads}
    return load(data.dataset, data.data_dir, **options)


def splits(data: Data, dataset: Dataset) -> tuple[Dataset, Split]:
    """(the data set with the training images that the settings choose, the split that epochs are evaluated on).

    Raises:
      UserError: more training images are asked for than there are.
    """
    rest, held_out = hold_out(dataset, data.validation)
    split = Split("validation", held_out) if data.validation else Split("test", dataset.test)
    if data.train_images > len(rest.train):
        raise UserError(f"--train-images {data.train_images}: there are {len(rest.train)} to train on.")
    if 0 < data.train_images < len(rest.train):
        _, chosen = hold_out(rest, data.train_images)
        rest = dataclasses.replace(rest, train=chosen)
    return rest, split


def require_same_images(dataset: Dataset, ood: Sequence[Dataset] = ()) -> None:
    """Raises UserError unless all processes have the same images in the same order. All processes must call."""
    if jax.process_count() == 1:
        return
    parts = [dataset.fingerprint]
    for source in (dataset.train, dataset.test, *(each.test for each in ood)):
        parts += [len(source), *source.identity()]
    processes.require_alike(processes.digest(*parts), "the images and their order must be the same")
