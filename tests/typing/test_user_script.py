"""The script that mypy checks also runs."""

import runpy
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_users_script_runs():
    figures = runpy.run_path(str(Path(__file__).with_name("user_script.py")))["main"]()
    assert figures["flops"] > 0 and 0 < figures["density"] < 0.3
