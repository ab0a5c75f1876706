"""Data sets by name. The registry lists them; each is read by a module of its own."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config.registry import DATASETS, TEST_SETS
from experiments.data.source import Dataset, Shifted
from experiments.run.errors import DataError, UserError

SAME_IMAGES = {"mnist", "mnist-5k", "colour-digits", "colour-digits-5k"}  # all are of MNIST's digits


def load(dataset: str = "auto", data_dir: str | os.PathLike | None = None, **options: Any) -> Dataset:
    """The data set of that name, one of `DATASETS`.

    Args:
      dataset: the name, or one of `TEST_SETS`. "auto" is MNIST or, where that is neither on disk nor can be
        downloaded, mnist-5k with a `warning`; "idx" is any four IDX files; "folder" is any images in class folders.
      data_dir: the directory of the data; $SUPERMASK_DATA_DIR, $TFDS_DATA_DIR or ~/tensorflow_datasets if None.
        Files are read from its subdirectory that is named like the set, or else from the directory itself.
      options: those that the set's registry entry reads, such as `stream` for "folder".

    Raises:
      DataError: the name or an option is unknown, or the images are missing or damaged.
    """
    entries = {**DATASETS, **TEST_SETS}
    if dataset not in entries:
        nearest = difflib.get_close_matches(str(dataset).lower(), list(DATASETS), n=1, cutoff=0)[0]
        raise DataError(f"no dataset {dataset!r}; did you mean {nearest!r}? There are: {', '.join(DATASETS)}")
    entry = entries[dataset]
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


def load_like(name: str, data_dir: str | os.PathLike | None, trained_on: Dataset) -> Dataset:
    """As `load`, with the options that make the images fit a network trained on another set: photographs are cropped
    to the size of its images."""
    entries = {**DATASETS, **TEST_SETS}
    reads = entries[name].reads if name in entries else ()
    options = {"image_size": trained_on.image_shape[0]} if "image_size" in reads else {}
    return load(name, data_dir, **options)


def load_shifted(names: Iterable[str], data_dir: str | os.PathLike | None, trained_on: Dataset) -> tuple[Shifted, ...]:
    """The sets of these names, with other images of the classes that a network is trained on.

    Raises:
      UserError: the classes of the set that it is trained on have no names.
      DataError: as `load`; or a set has other classes.
    """
    return tuple(_shifted(load_like(name, data_dir, trained_on), trained_on) for name in dict.fromkeys(names))


def _shifted(dataset: Dataset, trained_on: Dataset) -> Shifted:
    """The test images of a set, with the labels that its classes have in the set that a network is trained on.

    Classes are matched by name. Where most names are numbers, they are places among the sorted names of `trained_on`,
    and all of its classes must be there: a part of the numbers would fit any set.

    Raises:
      UserError: the classes of `trained_on` have no names.
      DataError: a class is none of `trained_on`, or numbers are missing.
    """
    known = trained_on.class_names
    if not known:
        raise UserError(
            f"--shifted {dataset.name} needs a network that is trained on photographs in the same classes, and "
            f"{trained_on.name} has no names of classes: leave --shifted out, or train on --dataset imagenet."
        )
    numbers = sum(name.isdecimal() for name in dataset.class_names)
    by_number = 2 * numbers > len(dataset.class_names) and not set(dataset.class_names) <= set(known)
    names = sorted(known)
    label = {(str(place) if by_number else name): known.index(name) for place, name in enumerate(names)}
    if unknown := [name for name in dataset.class_names if name not in label]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise DataError(
            f"{dataset.source} has the class folder {unknown[0]}{more}, which is no class of {trained_on.name} "
            f"({len(known)} classes, {names[0]} to {names[-1]}): remove it, or leave --shifted {dataset.name} out"
        )
    if by_number and (missing := sorted(set(label) - set(dataset.class_names), key=int)):
        raise DataError(
            f"{dataset.source} lacks the class folder {missing[0]}: the {len(known)} classes of {trained_on.name} have "
            f"the numbers 0 to {len(known) - 1}. Unpack {dataset.name} again, or leave --shifted {dataset.name} out"
        )
    return Shifted(dataset, np.array([label[name] for name in dataset.class_names], np.int32))


def load_ood(names: Iterable[str], data_dir: str | os.PathLike | None, trained_on: Dataset) -> tuple[Dataset, ...]:
    """The out-of-distribution data sets of these names, for a network trained on another one.

    Raises:
      UserError: it is the set that the network is trained on, or its images have another shape.
      DataError: as `load`.
    """
    return tuple(_load_other(name, data_dir, trained_on) for name in dict.fromkeys(names))


def _load_other(name: str, data_dir: str | os.PathLike | None, trained_on: Dataset) -> Dataset:
    _require_another(name, trained_on)
    dataset = load_like(name, data_dir, trained_on)
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
