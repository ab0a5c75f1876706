"""A loss of power, at every moment of a run: what had reached the disk is a run that resumes with the right bits."""

import json

import pytest

from experiments.faults import power

pytestmark = pytest.mark.skipif(not power.can_be_recorded(), reason="this is no Linux")


@pytest.mark.slow
def test_power_that_is_lost_at_any_moment_loses_nothing_that_was_saved():
    fault = power.power_loss()
    assert fault.survived == fault.tries > 100, json.dumps(fault.details, indent=2)


@pytest.mark.slow
def test_what_a_loss_of_power_would_lose_is_seen(monkeypatch):
    monkeypatch.setattr("experiments.run.checkpoints.sync", lambda path: None)
    monkeypatch.setattr("experiments.run.checkpoints.sync_all", lambda path: None)
    monkeypatch.setattr(power, "EPOCHS", 2)
    fault = power.power_loss()
    wrong = [seen for seen in fault.details if not seen["survived"]]
    assert wrong and {seen["kept"] for seen in wrong} == {"synced"}
