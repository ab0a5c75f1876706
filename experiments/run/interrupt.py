"""SIGTERM, Ctrl-C and a closed terminal (SIGHUP): a run finishes the steps that it has begun, saves, and ends.

A second signal ends it as soon as Python, and not XLA, is running.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from experiments.run.errors import UserError


class Interrupted(UserError):
    """A run that a signal stopped, after saving. The message says where its files are."""


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """stop_requested() -> whether a signal has come since. Only the main thread gets signals: elsewhere, never."""
    signals = []

    def request(number: int, frame) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield lambda: bool(signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
