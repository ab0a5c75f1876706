"""Batches that are read before they are needed, by threads or by processes."""

import errno
import pickle
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from experiments.run.errors import DataError, brief


def batches_ahead(read: Callable[[int], Any], start: int, stop: int, workers: int, ahead: int) -> Iterator[Any]:
    """read(start), ..., read(stop - 1), in this order, each read before it is asked for.

    Nothing is batched or shuffled here: what is read depends on its number alone, and on no worker's state.

    Args:
      read: (number) -> what has that number. Workers get it pickled.
      start, stop: the numbers.
      workers: processes that read in turns; 0: one thread of this process.
      ahead: how many are read ahead, by each worker.

    Raises:
      DataError: grain is not installed; or, later, a worker has ended. What `read` raises comes from `next`.
    """
    try:
        import grain
    except ImportError as error:
        raise DataError(
            f"reading images as they are needed takes grain ({error}): pip install 'supermask-jax[experiments]'"
        ) from error
    numbers = grain.MapDataset.range(start, stop)
    if workers:
        from absl import flags

        flags.FLAGS.mark_as_parsed()  # or a worker refuses to start: it copies the flags of absl
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
        packed = numbers.map(partial(_packed, read)).to_iter_dataset(grain.ReadOptions(num_threads=0))
        return _of_workers(packed.mp_prefetch(options, worker_init_fn=_ignore_signals), workers)
    return iter(numbers.map(read).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)))


def _ignore_signals(*_: int) -> None:
    """A signal to all processes of a run, as by Ctrl-C, is for the one that trains: it saves, and ends its workers."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _packed(read: Callable[[int], Any], number: int) -> bytes:
    """What has that number, pickled: grain passes arrays through shared memory, which may be short, and leaks."""
    return pickle.dumps(read(number), protocol=pickle.HIGHEST_PROTOCOL)


def _of_workers(packed: Any, workers: int) -> Iterator[Any]:
    """What grain passes on from its workers, which end with this iterator."""
    passed_on = None
    try:
        passed_on = iter(packed)
        for each in passed_on:
            yield pickle.loads(each)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(
            f"the shared memory has no room for the locks of --workers {workers} (on Linux it is /dev/shm; two workers "
            "need half a megabyte): give it more, or leave them out"
        ) from error
    except RuntimeError as error:  # so grain tells that a worker ended
        raise DataError(
            f"a process that reads images failed ({brief(error)}). Perhaps the memory did not suffice: fewer --workers "
            "take less. Give the same command again: a run resumes from its last checkpoint"
        ) from error
    finally:
        if passed_on is not None:
            passed_on.close()
