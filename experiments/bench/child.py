"""Candidates of a benchmark that live in a process of their own.

In one process, the threads of another library and of XLA would wait busily for work and slow each other down. This room
imports no JAX, and neither does the process.
"""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

Calls = Mapping[str, Callable[[int], Any]]
"""{name: call}, where call(times) does the work so many times and returns a small result."""


@contextlib.contextmanager
def candidates(make: Callable[..., Calls], times: int, **arguments) -> Iterator[dict[str, Callable[[], Any]]]:
    """{name: call} of what `make` makes in the other process, which ends with the context.

    A call does the work `times` times, and returns the last result. It takes the time of a message there and one back
    as well.

    Args:
      make: a function of a room that imports no JAX.
      times: how often.
      arguments: of `make`, which must pickle.

    Raises:
      RuntimeError: here or in a call: the other process has ended. It has printed why.
    """
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process ends a recv

    def received() -> Any:
        try:
            return pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process of {make.__name__} has ended; what it printed says why") from None

    def call(name: str) -> Any:
        pipe.send((name, times))
        return received()

    try:
        yield {name: partial(call, name) for name in received()}
    finally:
        process.terminate()
        process.join()


def _serve(pipe, make: Callable[..., Calls], arguments: dict) -> None:
    calls = make(**arguments)
    pipe.send(list(calls))
    while True:
        name, times = pipe.recv()
        pipe.send(calls[name](times))
