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
def candidates(make: Callable[..., Calls], times: int, **arguments) -> Iterator[dict[str, Callable[..., Any]]]:
    """{name: call} of what `make` makes in the other process, which ends with the context.

    A call returns the result of the last of `times` calls; call(times=n) does n instead.

    Args:
      make: a function of a room that imports no JAX.
      times: calls in a turn.
      arguments: of `make`, which must pickle.
    """
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process ends a recv

    def call(name: str, times: int = times) -> Any:
        pipe.send((name, times))
        return pipe.recv()

    try:
        yield {name: partial(call, name) for name in pipe.recv()}
    finally:
        process.terminate()
        process.join()


def _serve(pipe, make: Callable[..., Calls], arguments: dict) -> None:
    calls = make(**arguments)
    pipe.send(list(calls))
    while True:
        name, times = pipe.recv()
        pipe.send(calls[name](times))
