"""Photographs as tensorflow-datasets prepared them: the records of ArrayRecord files, read without tensorflow."""

import contextlib
import json
import threading
import zlib
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data.photographs import Photograph
from experiments.data.pictures import in_threads
from experiments.data.tfds import INFO, newest
from experiments.run.display import say
from experiments.run.errors import DataError, UserError, brief
from experiments.run.files import read_arrays, write_arrays
from experiments.run.surroundings import allow_files

FORMAT = "array_record"
NAMES = "label.labels.txt"  # the classes of a version
CHUNK = 1000  # labels that a thread reads at once


class Prepared(NamedTuple):
    """A set of photographs that is prepared.

    Fields:
      folder: of its newest version.
      class_names: of the labels 0, 1, ...
      splits: {name: its records}.
      fingerprint: eight hexadecimal digits: the CRC-32 of its version, its class names, and the lengths of the shards
        of all splits. What is in the records is not read.
    """

    folder: Path
    class_names: tuple[str, ...]
    splits: dict[str, "Shards"]
    fingerprint: str


def found(folder: Path) -> Prepared | None:
    """The newest version that is prepared in a directory of a set, such as imagenet2012; None where none is.

    Raises:
      DataError: only tensorflow can read what is there, or it is damaged or incomplete.
    """
    prepared = newest(folder)
    if prepared is None:
        return None
    try:
        described = json.loads((prepared / INFO).read_text())
        formats = [described.get("fileFormat"), *described.get("alternativeFileFormats", ())]
        if FORMAT in formats:
            return _described(prepared)
    except DataError:
        raise
    except ImportError as error:
        raise DataError(
            f"reading {prepared} takes tensorflow-datasets ({error}): pip install 'supermask-jax[experiments]'"
        ) from error
    except Exception as error:  # whatever damaged files make the readers raise
        raise DataError(
            f"cannot read what describes {prepared} ({brief(error)}); prepare the set again, or remove it"
        ) from error
    raise DataError(
        f"what is in {prepared} can only be read with tensorflow. This adds {FORMAT} files, which need none: "
        f"tfds convert_format --dataset_version_dir={prepared} --out_file_format={FORMAT}"
    )


def _described(prepared: Path) -> Prepared:
    info = _builder(prepared).info
    label, image = info.features["label"], info.features["image"]
    present, splits, lengths = {path.name for path in prepared.iterdir()}, {}, {}
    if NAMES not in present or len(image.shape) != 3:
        raise ValueError(f"it has no {NAMES}, or its records hold no images")
    for name, split in info.splits.items():
        if missing := [file for file in split.filenames if file not in present]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(f"{prepared} lacks {missing[0]}{more}: copy the files again, or prepare the set again")
        lengths[name] = [int(length) for length in split.shard_lengths]
        splits[name] = Shards(prepared, name, lengths[name], len(label.names))
    names = tuple(label.names)
    digest = zlib.crc32(json.dumps([prepared.name, names, lengths], sort_keys=True).encode())
    return Prepared(prepared, names, splits, f"{digest:08x}")


def _builder(prepared: Path):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(prepared)
    if builder.info.file_format.value != FORMAT:  # it was converted, and has the files of both formats
        builder.info.set_file_format(FORMAT, override=True, override_if_initialized=True)
    return builder


class Shards:
    """All records of one split. Each process opens the files when it first reads from them.

    Args:
      prepared: the directory of the set's version.
      split: the name of the split.
      lengths: how many records each file has.
      classes: how many classes there are.
    """

    def __init__(self, prepared: Path, split: str, lengths: list[int], classes: int):
        self.prepared, self.split, self.lengths, self.classes = prepared, split, lengths, classes
        self.place = f"{split} in {prepared}"
        self._opened: Any = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(self.lengths)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.prepared, self.split, self.lengths, self.classes  # neither open files nor labels

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def record(self, index: int) -> tuple[bytes, int]:
        """(the bytes of the image, its label) of one record; DataError if it cannot be read."""
        source, parse = self._source()
        try:
            features = parse(source[index]).features.feature
            image, label = features["image"].bytes_list.value[0], features["label"].int64_list.value[0]
            if not 0 <= label < self.classes:
                raise ValueError(f"its label is {label}, and there are {self.classes} classes")
        except Exception as error:  # whatever damaged records make the readers raise
            raise DataError(f"cannot read record {index} of {self.place} ({brief(error)}); {Records.cure}") from error
        return image, label

    @cached_property
    def labels(self) -> np.ndarray:
        """int32 [n], of all records, in a file beside the directory of the version once they have been read."""
        cache = self.prepared.parent / f"labels-{self.prepared.name}-{self.split}.npz"
        made_from = zlib.crc32((self.prepared / INFO).read_bytes())
        with contextlib.suppress(UserError, KeyError):
            stored = read_arrays(cache)
            if stored["made_from"] == made_from and stored["labels"].shape == (len(self),):
                return stored["labels"].astype(np.int32)
        say(f"reading the {len(self):,} labels of {self.place}, once")
        starts = range(0, len(self), CHUNK)
        parts = in_threads(
            lambda start: [self.record(index)[1] for index in range(start, min(start + CHUNK, len(self)))], starts
        )
        labels = np.array([label for part in parts for label in part], np.int32)
        with contextlib.suppress(OSError):  # a full or read-only disk costs time at each start, not the run
            write_arrays(cache, {"labels": labels, "made_from": np.array(made_from)})
        return labels

    def _source(self) -> tuple[Any, Any]:
        """(the bytes of records by index, the function that parses them), open in this process."""
        if self._opened is None:
            with self._lock:
                if self._opened is None:
                    self._opened = self._open()
        return self._opened

    def _open(self) -> tuple[Any, Any]:
        try:
            import tensorflow_datasets as tfds
            from tensorflow_datasets.proto import tf_example_pb2

            allow_files(len(self.lengths))  # each shard stays open, and ImageNet has 1,000
            raw = tfds.decode.DeserializeMethod.RAW_BYTES  # decoding by its features takes ten times as long
            source = _builder(self.prepared).as_data_source(split=self.split, deserialize_method=raw)
        except Exception as error:  # a package that is missing, and whatever damaged files make the readers raise
            raise DataError(f"cannot read {self.place} ({brief(error)}); prepare the set again") from error
        return source, tf_example_pb2.Example.FromString


class Records:
    """`experiments.data.photographs.Stored` as records of a split that tensorflow-datasets prepared.

    Args:
      shards: the split.
      indices: which of its records, int [n]; all, if None.
    """

    cure = "prepare the set again, or, in training, leave it out with --skip-corrupt"

    def __init__(self, shards: Shards, indices: np.ndarray | None = None):
        self.shards, self.place = shards, shards.place
        self.indices = np.arange(len(shards)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray:
        return self.shards.labels[self.indices]

    def photograph(self, index: int) -> Photograph:
        number = int(self.indices[index])
        image, label = self.shards.record(number)
        return Photograph(f"in record {number} of {self.place}", BytesIO(image), label)

    def take(self, indices: np.ndarray) -> "Records":
        return Records(self.shards, self.indices[indices])

    def identity(self) -> tuple[Any, ...]:
        """See `Source.identity`. Labels are left out: they are in the records."""
        return self.shards.split, self.shards.lengths, self.indices
