"""Standard output and standard error that never end a run: one that is closed or full is given up, and named."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Undisturbed:
    """A stream that goes on as if nothing was wrong when its reader is gone (`| head -2`) or its disk is full.

    Args:
      stream: where the text goes.
      name: of the stream, for the message.
    """

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        with self._given_up():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._given_up():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _given_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # All that follows, what is buffered too, goes nowhere.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            if self._name == "standard output":
                why = error.strerror or error
                print(f"{self._name} cannot be written to ({why}): what follows is not shown.", file=sys.stderr)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """While it lasts, both standard streams are such."""
    before = sys.stdout, sys.stderr
    # Python has None for a stream that was closed from the start. A file takes its descriptor, so that no other one,
    # of a run perhaps, becomes what C code writes its messages to.
    out, err = (stream or open(os.devnull, "w") for stream in before)  # noqa: SIM115
    sys.stdout, sys.stderr = Undisturbed(out, "standard output"), Undisturbed(err, "standard error")
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
