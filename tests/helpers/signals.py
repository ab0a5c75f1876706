"""A signal that comes once training has begun."""

import contextlib
from collections.abc import Callable, Iterator

import pytest

from experiments.training import fit


@contextlib.contextmanager
def stopped_once_training() -> Iterator[None]:
    """Within it, every run is told to stop when it asks the second time: the first is before training."""

    @contextlib.contextmanager
    def stopping() -> Iterator[Callable[[], bool]]:
        calls: list[bool] = []
        yield lambda: bool(calls) or bool(calls.append(True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "stopping", stopping)
        yield
