"""ImageNet, or any photographs of many sizes: found in class folders, or as tensorflow-datasets prepared them."""

import dataclasses
import os
import zlib
from pathlib import Path

import numpy as np

from experiments.data import records
from experiments.data.photographs import Files, Photographs
from experiments.data.pictures import visible
from experiments.data.source import Dataset
from experiments.run.errors import DataError, brief

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the training photographs, as published code has them
SUFFIXES = (".jpeg", ".jpg", ".png")
TRUTH, CLASSES = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"  # of the development kit
KIT = ("ILSVRC2012_devkit_t12/data", "data", "")  # where these two are looked for
TRAIN_IMAGES, TEST_IMAGES = 1_281_167, 50_000  # of ImageNet; other photographs do not pass for it
PREPARED = "imagenet2012"  # the set's name in tensorflow-datasets
UNPACK = {
    "ILSVRC2012_img_train.tar": "mkdir -p train && tar -xf ILSVRC2012_img_train.tar -C train && cd train && for t in "
    "*.tar; do mkdir ${t%.tar} && tar -xf $t -C ${t%.tar} && rm $t; done",
    "ILSVRC2012_img_val.tar": "mkdir -p val && tar -xf ILSVRC2012_img_val.tar -C val",
    "ILSVRC2012_devkit_t12.tar.gz": "tar -xzf ILSVRC2012_devkit_t12.tar.gz",
}


def imagenet(root: Path, image_size: int = 224, crop: float = 0.08, skip_corrupt: bool = False) -> Dataset:
    """Photographs in class folders, or as tensorflow-datasets prepared them.

    The folders are in `root`/imagenet or, if there is no such directory, in `root`. Training photographs are
    train/CLASS/NAME.JPEG; a label is the index of its class among the sorted class names. Photographs for evaluation
    are val/CLASS/NAME.JPEG; or val/NAME.JPEG, and beside val the development kit, unpacked, whose files `TRUTH` and
    `CLASSES` tell the class of each. A file may be JPEG or PNG, whatever its name says, and of any colours.

    If there is no directory train, the photographs are those of `root`/imagenet2012/VERSION, as tensorflow-datasets
    prepares them in ArrayRecord files; those for evaluation are in its split "validation". Without these too, val alone
    is enough for an evaluation.

    Args:
      root: the directory of the data.
      image_size: the side of the squares that are read, in pixels.
      crop: the smallest part of a photograph's area that a random crop has.
      skip_corrupt: whether another training photograph takes the place of one that cannot be read. Each such is named.

    The fingerprint is of the names of classes and files, and of the labels; or, of a prepared set, of its version, its
    class names and the lengths of its files. What is in 1.3 million photographs is not read.

    Raises:
      DataError: there are no photographs, a class is empty, val has classes that train lacks, archives are not
        unpacked, the development kit does not fit, or what was prepared is damaged or incomplete.
    """
    base = root / "imagenet" if (root / "imagenet").is_dir() else root
    if not (base / "train").is_dir() and (prepared := records.found(root / PREPARED)):
        return _of_records(prepared, image_size, crop, skip_corrupt)
    for split in ("train", "val"):
        if not (base / split).is_dir() and (split == "val" or not (base / "val").is_dir()):
            raise DataError(_missing(base, split))
    names_of_test, labels, of_test = listed(base / "val") if _has_folders(base / "val") else _flat(base)
    if not (base / "train").is_dir():  # enough for an evaluation
        test = Photographs(Files(base / "val", names_of_test, labels), image_size)
        dataset = _dataset(test.take(np.arange(0)), test, tuple(of_test), digest(of_test, test.stored), "")
        return dataclasses.replace(dataset, source=_missing(base))
    names_of_train, labels_of_train, names = listed(base / "train")
    files = Files(base / "train", names_of_train, labels_of_train)
    if unknown := sorted(set(of_test) - set(names)):
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise DataError(f"{base / 'val'} has classes that {base / 'train'} lacks: {shown}. Both need the same classes")
    place = np.array([names.index(name) for name in of_test], np.int32)
    test = Files(base / "val", names_of_test, place[labels])
    train = Photographs(files, image_size, crop, skip_corrupt)
    crc, source = digest(names, files, test), f"photographs in {base}"
    return _dataset(train, Photographs(test, image_size), tuple(names), crc, source)


def _of_records(prepared: records.Prepared, image_size: int, crop: float, skip_corrupt: bool) -> Dataset:
    if missing := [split for split in ("train", "validation") if split not in prepared.splits]:
        raise DataError(
            f"{prepared.folder} has no split {missing[0]}: prepare the set again, with both archives, of the training "
            "and of the validation photographs"
        )
    train, test = (records.Records(prepared.splits[split]) for split in ("train", "validation"))
    of_train = Photographs(train, image_size, crop, skip_corrupt)
    source = f"tensorflow-datasets {PREPARED} {prepared.folder.name} in {prepared.folder}"
    return _dataset(of_train, Photographs(test, image_size), prepared.class_names, prepared.fingerprint, source)


def _dataset(train: Photographs, test: Photographs, class_names: tuple[str, ...], crc: str, source: str) -> Dataset:
    classes, shape = len(class_names), (train.size, train.size, 3)
    whole = len(train) == TRAIN_IMAGES or (len(train), len(test)) == (0, TEST_IMAGES)
    name = "imagenet" if whole and classes == 1000 else f"photographs-{crc}"
    source += f": {len(train):,} to train on, {len(test):,} to evaluate on"
    return Dataset(name, train, test, classes, shape, MEAN, STD, crc, source, class_names=class_names)


Listed = tuple[np.ndarray, np.ndarray, list[str]]  # names of files, bytes [n]; labels, int32 [n]; class names


def listed(folder: Path) -> Listed:
    """The photographs in the class folders in a folder; classes are sorted by name."""
    entries = visible(folder)
    classes = [entry.name for entry in entries if entry.is_dir()]
    if tars := [entry.name for entry in entries if entry.name.endswith(".tar")]:
        raise DataError(
            f"{folder} has archives that are not unpacked ({tars[0]}, ...): cd {folder} && for t in *.tar; do mkdir "
            "${t%.tar} && tar -xf $t -C ${t%.tar} && rm $t; done"
        )
    if loose := [entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES)]:
        raise DataError(f"{folder / loose[0]} lies beside class folders: put it into the folder of its class")
    if len(classes) < 2:
        raise DataError(f"{folder} has {len(classes)} class folders; a data set needs two or more")
    names, labels = [], []
    for number, name in enumerate(classes):
        files = _photographs(folder / name)
        if not files:
            raise DataError(f"the class folder {folder / name} is empty: put its photographs there, or remove it")
        names += [os.fsencode(f"{name}/{file}") for file in files]
        labels.append(np.full(len(files), number, np.int32))
    return np.array(names), np.concatenate(labels), classes


def _flat(base: Path) -> Listed:
    """The photographs of val, which has no folders, and their classes as the development kit has them."""
    files = _photographs(base / "val")
    places = [base / kit for kit in KIT if (base / kit / TRUTH).is_file() and (base / kit / CLASSES).is_file()]
    if not places:
        raise DataError(
            f"{base / 'val'} has no class folders, and {TRUTH} and {CLASSES}, which tell the classes, are not in "
            f"{base / KIT[0]}: {UNPACK['ILSVRC2012_devkit_t12.tar.gz']} in {base}, or put the photographs into class "
            "folders"
        )
    from scipy.io import loadmat

    try:
        truth = np.loadtxt(places[0] / TRUTH, dtype=np.int64, ndmin=1)
        listed = loadmat(places[0] / CLASSES, squeeze_me=True)["synsets"]
        names = {int(number): str(name) for number, name in zip(listed["ILSVRC2012_ID"], listed["WNID"], strict=True)}
        of_each = [names[number] for number in truth.tolist()]
    except Exception as error:  # whatever damaged files make the readers raise
        raise DataError(f"cannot read the classes in {places[0]} ({brief(error)}); unpack the kit again") from error
    if len(files) != len(truth):
        raise DataError(
            f"{base / 'val'} has {len(files):,} photographs, and {TRUTH} tells the classes of {len(truth):,}"
        )
    classes = sorted(set(of_each))
    labels = np.searchsorted(classes, of_each).astype(np.int32)
    return np.array([os.fsencode(file) for file in files]), labels, classes


def digest(classes: list[str], *sources: Files) -> str:
    """The CRC-32 of the names of classes and files, and of the labels, as eight hexadecimal digits."""
    parts = ["/".join(classes).encode()]
    for source in sources:
        parts += [b"/".join(source.names), np.ascontiguousarray(source.labels).tobytes()]
    return f"{zlib.crc32(b'//'.join(parts)):08x}"


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() for entry in visible(folder))


def _photographs(folder: Path) -> list[str]:
    return [entry.name for entry in visible(folder) if entry.name.lower().endswith(SUFFIXES)]


def _missing(base: Path, split: str = "train") -> str:
    """What to do where there are no photographs."""
    archive = next((base / name for name in UNPACK if split in name and (base / name).is_file()), None)
    if archive:
        return f"{archive} is not unpacked: cd {base} && {UNPACK[archive.name]}"
    return (
        f"there are no photographs in {base / split}: put them in {base} as train/CLASS/NAME.JPEG and "
        f"val/CLASS/NAME.JPEG, or as tensorflow-datasets prepares {PREPARED}, or name another directory with "
        "--data-dir. ImageNet is never downloaded: image-net.org gives it to those who register"
    )
