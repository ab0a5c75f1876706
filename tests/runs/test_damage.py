"""A damaged run directory: the run resumes with the right bits, or one error names what is wrong and what works."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.faults import damage

picked = st.integers(0, damage.MOST_PICKED)
harms = st.lists(
    st.tuples(st.sampled_from(damage.ACTIONS), picked, picked, st.integers(0, damage.LAST_PLACE)),
    max_size=damage.MOST_HARMS,
)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return damage.make_run(tmp_path_factory.mktemp("template") / "run")


@pytest.mark.parametrize("finished", (False, True))
def test_a_directory_that_nothing_happened_to_is_whole(template, finished):
    assert damage.outcome(template, finished, []) is None


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(finished=st.booleans(), done=harms)
def test_anything_done_to_a_directory_ends_in_the_right_bits_or_in_one_error_whose_way_out_works(
    template, finished, done
):
    assert damage.outcome(template, finished, done) is None


@pytest.mark.parametrize(
    ("what", "says"),
    (
        ("summary", "a wrong summary"),
        ("begins", "a silent restart"),
        ("arrays", "wrong arrays"),
        ("fails", "--restart does not begin anew"),
    ),
)
def test_what_goes_wrong_is_seen(template, monkeypatch, what, says):
    tree = {"a": damage.TREE["a"] + 1}
    results = {"summary": ({"test_accuracy": "high", "layers": {}}, None, None), "begins": (None, None, None)}
    results |= {"arrays": (None, 20, tree), "fails": None}

    def opened(path, restart=False):
        if restart:
            return None, 10, tree
        if results[what] is None:
            raise damage.UserError("no")
        return results[what]

    monkeypatch.setattr(damage, "_opened", opened)
    assert damage.outcome(template, False, []).startswith(says)
