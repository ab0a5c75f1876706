"""Data sets by name. The registry lists them; each is read by a module of its own."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.config.registry import DATASETS
from experiments.data.source import Dataset
from experiments.run.errors import DataError, UserError

SAME_IMAGES = {"mnist", "mnist-5k", "colour-digits", "colour-digits-5k"}  # all are of MNIST's digits


def load(dataset: str = "auto", data_dir: str | os.PathLike | None = None, **options: Any) -> Dataset:
    """The data set of that name, one of `DATASETS`.

    Args:
      dataset: the name. "auto" is MNIST or, where that is neither on disk nor can be downloaded, mnist-5k with a
        `warning`; "idx" is any four IDX files; "folder" is any images in class folders.
      data_dir: the directory of the data; $SUPERMASK_DATA_DIR, $TFDS_DATA_DIR or ~/tensorflow_datasets if None.
        Files are read from its subdirectory that is named like the set, or else from the directory itself.
      options: those that the set's registry entry reads, such as `stream` for "folder".

    Raises:
      DataError: the name or an option is unknown, or the images are missing or damaged.
    """
    if dataset not in DATASETS:
        nearest = difflib.get_close_matches(str(dataset).lower(), list(DATASETS), n=1, cutoff=0)[0]
        raise DataError(f"no dataset {dataset!r}; did you mean {nearest!r}? There are: {', '.join(DATASETS)}")
    entry = DATASETS[dataset]
    if unread := [name for name in options if name not in entry.reads]:
        raise DataError(f"the data set {dataset} has no option {', '.join(unread)}")
    root = directory(data_dir)
    if os.path.exists(root) and not os.path.isdir(root):
        raise DataError(f"{root} is not a directory; name the directory of the data with --data-dir")
    try:
        return entry.resolve()(root, **options)
    except OSError as error:
        raise DataError(f"cannot use {root} ({error}); mend it or name another with --data-dir") from error


def directory(data_dir: str | os.PathLike | None = None) -> Path:
    """The absolute path of the directory of the data; see `load`."""
    env = os.environ.get
    root = data_dir or env("SUPERMASK_DATA_DIR") or env("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(os.path.abspath(os.path.expanduser(root)))


def load_ood(names: Iterable[str], data_dir: str | os.PathLike | None, trained_on: Dataset) -> tuple[Dataset, ...]:
    """The out-of-distribution data sets of these names, for a network trained on another one.

    Raises:
      UserError: it is the set that the network is trained on, or its images have another shape.
      DataError: as `load`.
    """
    return tuple(_load_other(name, data_dir, trained_on) for name in dict.fromkeys(names))


def _load_other(name: str, data_dir: str | os.PathLike | None, trained_on: Dataset) -> Dataset:
    _require_another(name, trained_on)
    dataset = load(name, data_dir)
    _require_another(dataset.name, trained_on)  # "auto" and "idx" have their true name by now
    if dataset.image_shape != trained_on.image_shape:
        shapes = [" x ".join(map(str, each.image_shape)) for each in (dataset, trained_on)]
        raise UserError(
            f"the out-of-distribution data set {dataset.name} has images of {shapes[0]}, and a network that is trained "
            f"on {trained_on.name} takes {shapes[1]}; name a set whose images have the same shape."
        )
    return dataset


def _require_another(name: str, trained_on: Dataset) -> None:
    if name == trained_on.name or {name, trained_on.name} <= SAME_IMAGES:
        raise UserError(
            f"the out-of-distribution data set {name} has the images that the network is trained on "
            f"({trained_on.name}); name another set, or leave --ood out."
        )
