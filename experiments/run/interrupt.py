"""SIGTERM and Ctrl-C: a run finishes the steps under way, saves, and ends. A second one
ends it as soon as Python, and not XLA, is running."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from experiments.run.errors import UserError


class Interrupted(UserError):
    """A run that was asked to stop, and saved. The message says where it is."""


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """asked() -> whether the process was asked to stop since. Only the main thread can be: elsewhere it never is."""
    asked = []

    def ask(number: int, frame) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
