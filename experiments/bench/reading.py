"""How fast photographs are read from disk, cropped and decoded: images a second, and memory while many pass."""

import os
import time
from functools import partial
from pathlib import Path

import numpy as np

from experiments.bench.rows import cores, row
from experiments.data.imagenet import imagenet
from experiments.data.photographs import Photographs
from experiments.data.stream import batches_ahead
from experiments.run.errors import DataError

BATCH = 256
AHEAD = 4  # batches that are read before they are needed
EXAMPLES = 20_000  # that pass while memory is watched
ROUND = 400  # photographs whose reading is timed at once


def measure(root: Path, image_size: int, rounds: int) -> dict:
    """Reads the training photographs of a directory, again and again.

    Args:
      root: as `experiments.data.imagenet.imagenet` takes it.
      image_size: the side of the squares, in pixels.
      rounds: how often each way is timed.

    Returns:
      "rows": images a second of one core, of all cores by threads, and by as many workers; and the growth of memory.
    """
    dataset = imagenet(root, image_size)
    train = dataset.train
    if not len(train):
        raise DataError(f"{dataset.source}: there are no training photographs to read")
    group = f"reading photographs of {_pixels(train)} megapixels to {image_size} pixels"
    one, every = _rates(train, rounds, 1), _rates(train, rounds, cores())
    workers = _rate_of_workers(train, cores())
    before = _resident()
    for number in range(-(-EXAMPLES // BATCH)):
        _read(train, number)
    grown = (_resident() - before) / 1e6
    rows = [
        row(group, "one core", "images/s", one),
        row(group, f"{cores()} cores, threads", "images/s", every),
        row(group, f"{cores()} cores, workers, their start included", "images/s", [workers]),
        row(group, f"memory that {EXAMPLES:,} photographs leave", "MB", [max(grown, 0.0)]),
    ]
    return {"rows": rows}


def _read(train: Photographs, number: int, count: int = BATCH) -> dict:
    """The batch of that number, of random crops; the photographs come again and again."""
    places = np.arange(number * count, (number + 1) * count)
    return train.read(places % len(train), places.astype(np.uint32))


def _rates(train: Photographs, rounds: int, limit: int) -> list[float]:
    """Images a second of each round, on so many cores."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if allowed:
        os.sched_setaffinity(0, allowed[:limit])
    try:
        rates = []
        for number in range(rounds):
            began = time.perf_counter()
            _read(train, number, ROUND)
            rates.append(ROUND / (time.perf_counter() - began))
        return rates
    finally:
        if allowed:
            os.sched_setaffinity(0, allowed)


def _rate_of_workers(train: Photographs, workers: int) -> float:
    steps, began = 10, time.perf_counter()
    for _ in batches_ahead(partial(_read, train), 0, steps, workers, AHEAD):
        pass
    return steps * BATCH / (time.perf_counter() - began)


def _pixels(train: Photographs) -> str:
    """The mean size of the first photographs."""
    from PIL import Image

    sizes = []
    for index in range(min(len(train), 200)):
        with Image.open(train.stored.photograph(index).file) as image:
            sizes.append(image.size[0] * image.size[1] / 1e6)
    return f"{np.mean(sizes):.2f}"


def _resident() -> int:
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
