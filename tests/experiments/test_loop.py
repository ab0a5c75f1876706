"""The one training loop: every event at its steps and in its order, whatever is trained. No array is needed."""

import itertools
from typing import NamedTuple

import pytest

from experiments.training.loop import Event, at, every, train


class Progress(NamedTuple):
    steps: tuple = ()  # that were done, in their order
    events: tuple = ()


def advance(progress, step, stop):
    assert step < stop
    return progress._replace(steps=(*progress.steps, *range(step, stop))), {"last": stop - 1}


def noting(name, after):
    """An event that notes when it happens, and what it is given."""

    def do(step, progress, batch):
        assert progress.steps[-1] == batch["last"] == step - 1  # it comes right after the step, with its batch
        return progress._replace(events=(*progress.events, (step, name)))

    return Event(after, do)


def test_events_happen_at_their_steps_in_their_order():
    events = [noting("update", every(4)), noting("evaluate", every(6)), noting("save", at((5, 12), never=99))]
    done = train(advance, Progress(), 0, 14, events)
    assert done.steps == tuple(range(14))
    assert done.events == (
        (4, "update"),
        (5, "save"),
        (6, "evaluate"),
        (8, "update"),
        (12, "update"),
        (12, "evaluate"),
        (12, "save"),
    )


@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 7), (3, 7), (4, 6), (100, 3), (100, 100)])
@pytest.mark.parametrize("at_once", [1, 5, 10**9])
def test_an_event_happens_at_every_multiple_of_its_steps_and_never_else(first, second, at_once):
    events = [noting("a", every(first)), noting("b", every(second))]
    done = train(advance, Progress(), 0, 50, events, at_once)
    due = [(step, name) for step in range(1, 51) for name, n in (("a", first), ("b", second)) if step % n == 0]
    assert done.events == tuple(due) and done.steps == tuple(range(50))


@pytest.mark.parametrize("at_once", [1, 4, 7, 100])
def test_no_pause_is_longer_than_at_once_and_what_has_no_steps_happens_at_each(at_once):
    events = [noting("pause", None), noting("update", every(6))]
    done = train(advance, Progress(), 0, 20, events, at_once)
    pauses = [0, *(step for step, name in done.events if name == "pause")]
    lengths = [after - before for before, after in itertools.pairwise(pauses)]
    assert pauses[-1] == 20 and all(0 < length <= min(at_once, 6) for length in lengths)
    assert {step for step, name in done.events if name == "update"} == {6, 12, 18} < set(pauses)


@pytest.mark.parametrize("step", [0, 1, 5, 6, 11, 13])
def test_begun_in_the_middle_it_does_what_is_left(step):
    events = [noting("a", every(3)), noting("b", every(4)), noting("c", at((5, 6, 13), never=99))]
    whole = train(advance, Progress(), 0, 14, events)
    done = train(advance, Progress(), step, 14, events)
    assert done.steps == tuple(range(step, 14))
    assert done.events == tuple((when, name) for when, name in whole.events if when > step)


def test_an_event_is_given_what_the_one_before_it_returned_and_so_is_the_next_step():
    def relabel(step, progress, batch):
        return progress._replace(steps=("relabelled", step - 1))

    done = train(advance, Progress(), 0, 4, [Event(every(2), relabel), noting("after", every(2))])
    assert done == Progress(("relabelled", 3), ((2, "after"), (4, "after")))


def test_an_event_that_raises_ends_training_at_its_step():
    seen = []

    def stop(step, progress, batch):
        seen.append(progress.steps)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(advance, Progress(), 0, 9, [Event(every(4), stop), noting("never", every(4))])
    assert seen == [(0, 1, 2, 3)]


def test_at_the_last_step_nothing_is_left_to_do():
    assert train(None, "as it is", 5, 5, [Event(every(1), None)]) == "as it is"


def test_when_an_event_is_due():
    assert [every(5)(step) for step in (0, 1, 4, 5, 9)] == [5, 5, 5, 10, 10]
    assert [at((3, 7), never=99)(step) for step in (0, 2, 3, 6, 7, 50)] == [3, 3, 7, 7, 99, 99]
