"""Batches that are read before they are needed, by threads or by processes."""

from collections.abc import Callable, Iterator
from typing import Any

from experiments.run.errors import DataError


def batches_ahead(read: Callable[[int], Any], start: int, stop: int, workers: int, ahead: int) -> Iterator[Any]:
    """read(start), ..., read(stop - 1), in this order, each read before it is asked for.

    Nothing is batched or shuffled here: what is read depends on its number alone, and on no worker's state.

    Args:
      read: (number) -> what has that number. Workers get it pickled.
      start, stop: the numbers.
      workers: processes that read in turns; 0: one thread of this process.
      ahead: how many are read ahead, by each worker.

    Raises:
      DataError: grain is not installed.
    """
    try:
        import grain
    except ImportError as error:
        raise DataError(
            f"reading images as they are needed takes grain ({error}): pip install 'supermask-jax[experiments]'"
        ) from error
    numbers = grain.MapDataset.range(start, stop).map(read)
    if not workers:
        return iter(numbers.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)))
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # or a worker refuses to start: it copies the flags of absl
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
    in_turn = numbers.to_iter_dataset(grain.ReadOptions(num_threads=0))
    return iter(in_turn.mp_prefetch(options))
