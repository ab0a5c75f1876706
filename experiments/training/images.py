"""Which images a run trains on, and which it is evaluated on, as its settings say."""

import dataclasses
from typing import NamedTuple

import jax

from experiments.config.registry import DATASETS
from experiments.config.sections import Data, Evaluation
from experiments.data.batches import hold_out
from experiments.data.load import load, load_ood, load_shifted
from experiments.data.source import Dataset, Shifted
from experiments.run import processes
from experiments.run.errors import DataError, UserError
from experiments.training.evaluation import Split


class Others(NamedTuple):
    """What a run measures on beside its own test images: out-of-distribution and shifted sets."""

    ood: tuple[Dataset, ...] = ()
    shifted: tuple[Shifted, ...] = ()


NO_OTHERS = Others()


def open_others(evaluation: Evaluation, data: Data, dataset: Dataset) -> Others:
    """The sets that the settings name, for a network that is trained on `dataset`.

    Raises:
      UserError: a set does not fit the network, or its images are missing or damaged.
    """
    ood = load_ood(evaluation.ood, data.data_dir, dataset)
    return Others(ood, load_shifted(evaluation.shifted, data.data_dir, dataset))


def open_data(data: Data) -> Dataset:
    """The data set that the settings name; DataError where it is missing or damaged."""
    options = {name: getattr(data, name) for name in DATASETS[data.dataset].reads}
    return load(data.dataset, data.data_dir, **options)


def splits(data: Data, dataset: Dataset) -> tuple[Dataset, Split]:
    """(the data set with the training images that the settings choose, the split that epochs are evaluated on).

    Raises:
      UserError: more training images are asked for than there are.
    """
    if not len(dataset.train):
        raise DataError(dataset.source)  # which says what is missing
    rest, held_out = hold_out(dataset, data.validation)
    split = Split("validation", held_out) if data.validation else Split("test", dataset.test)
    if data.train_images > len(rest.train):
        raise UserError(f"--train-images {data.train_images}: there are {len(rest.train)} to train on.")
    if 0 < data.train_images < len(rest.train):
        _, chosen = hold_out(rest, data.train_images)
        rest = dataclasses.replace(rest, train=chosen)
    return rest, split


def require_same_images(dataset: Dataset, others: Others = NO_OTHERS) -> None:
    """Raises UserError unless all processes have the same images in the same order. All processes must call."""
    if jax.process_count() == 1:
        return
    parts = [dataset.fingerprint]
    tests = [each.test for each in others.ood] + [each.dataset.test for each in others.shifted]
    for source in (dataset.train, dataset.test, *tests):
        parts += [len(source), *source.identity()]
    processes.require_alike(processes.digest(*parts), "the images and their order must be the same")
