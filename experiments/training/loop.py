"""The one training loop. It knows no method, no data set and no file: what happens when is an event."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Progress = Any  # a NamedTuple with the fields state, totals and seconds, and more of its maker's
Batch = dict[str, Any]
Advance = Callable[[Progress, int, int], tuple[Progress, Batch]]
"""advance(progress, step, stop) -> (progress after the steps from `step` to `stop`, the batch of the last one)."""


class Event(NamedTuple):
    """Something that happens between steps."""

    after: Callable[[int], int] | None  # the first step > `step` at which it is due; None: whenever training pauses
    do: Callable[[int, Progress, Batch], Progress]


def train(
    advance: Advance, progress: Progress, step: int, last: int, events: Sequence[Event], at_once: int = 10**9
) -> Progress:
    """Trains from `step` to `last`, and carries out the events that are due, in their order.

    Args:
      advance: does the steps; it may dispatch them without waiting.
      progress: before the first step.
      step, last: where training is, and where it ends.
      events: what happens between steps. All that is due at a step happens before the next step.
      at_once: the most steps between two pauses.
    """
    while step < last:
        due = [event.after(step) if event.after else None for event in events]
        stop = min(last, step + at_once, *(at for at in due if at is not None))
        progress, batch = advance(progress, step, stop)
        step = stop
        for event, at in zip(events, due, strict=True):
            if at is None or at <= step:
                progress = event.do(step, progress, batch)
    return progress


def every(steps: int) -> Callable[[int], int]:
    """`Event.after` of what is due at every multiple of `steps`."""
    return lambda step: step - step % steps + steps


def at(steps: Sequence[int], never: int) -> Callable[[int], int]:
    """`Event.after` of what is due at the given steps, in rising order; `never`: a step that is not reached."""
    return lambda step: next((due for due in steps if due > step), never)
