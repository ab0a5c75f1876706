"""Stopped by a signal, a run saves and says how to resume; two processes do not work in one directory."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.run.errors import InUse
from experiments.run.interrupt import stopping
from experiments.run.names import Settings
from experiments.run.workdir import Workdir

pytestmark = pytest.mark.usefixtures("quick_processes")
ROOT = Path(__file__).parents[2]


def flags(workdir, *more):
    small = ["--model", "mlp", "--width", "16", "--dataset", "mnist-5k", "--checkpoint-every", "1000000"]
    return [sys.executable, "-m", "experiments.mnist", *small, "--workdir", str(workdir), *more]


def finished(command, **more):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **more)


def stopped(process, number, workdir):
    """Sends the signal; returns the step that the run says it has saved at, and the command that it says resumes it."""
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 3, said
    assert "stopped by a signal; saved at step" in said and "Resume with:" in said and "Traceback" not in said
    step = int(said.split("saved at step ")[1].split(" ")[0])
    assert f"saved at step {step} of {400 * 63} in {workdir}. Resume with:\n" in said
    program, *rest = shlex.split(said.strip().splitlines()[-1])
    assert str(ROOT / program) == sys.executable and rest[:2] == ["-m", "experiments.mnist"]
    return step, [sys.executable, *rest]


@pytest.mark.slow
def test_stopped_by_any_signal_it_saves_and_what_it_prints_resumes_it(tmp_path):
    command, begins, steps = flags(tmp_path / "run", "--epochs", "400"), "epoch   2/", [2 * 63]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        signal.signal(signal.SIGHUP, before)
        assert any(begins in line for line in iter(process.stdout.readline, "")), process.stderr.read()
        step, command = stopped(process, number, tmp_path / "run")
        steps.append(step)
        begins = f"resumed from step {step} of {400 * 63}"
    assert steps == sorted(steps)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(len(records)))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["| head -2", "> /dev/full", ">&-", "2>&- | head -1"])
def test_a_standard_output_that_is_closed_or_full_does_not_end_a_run(tmp_path, where):
    command = shlex.join(flags(tmp_path / "run", "--epochs", "6"))
    ended = finished(["bash", "-c", f"{command} {where}; exit ${{PIPESTATUS[0]}}"])
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 6
    assert (tmp_path / "run" / "curves.png").exists() and "Traceback" not in ended.stderr
    if where in ("| head -2", "> /dev/full"):
        assert ended.stderr.count("standard output cannot be written to (") == 1, ended.stderr


def test_a_run_that_is_told_to_ignore_a_closed_terminal_ignores_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stopping() as stop_requested:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop_requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_it_at_once_and_handlers_are_put_back():
    before, second = signal.getsignal(signal.SIGTERM), None
    with pytest.raises(KeyboardInterrupt), stopping() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not asked():
            assert time.monotonic() < deadline
        second = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    assert second is not None and time.monotonic() - second < 9
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_directory_in_use_is_refused_and_free_again_afterwards(tmp_path):
    holder = "from experiments.run.names import Settings; from experiments.run.workdir import Workdir\n"
    holder += "import sys, time\n"
    holder += "w = Workdir(sys.argv[1], Settings({}), 'digest'); print('holds', flush=True); time.sleep(300)"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "holds\n"
    with pytest.raises(InUse, match="another process is working in"):
        Workdir(tmp_path / "run", Settings({}), "digest")
    done = finished(flags(tmp_path / "run", "--epochs", "1"))
    assert done.returncode == 1 and "another process is working in" in " ".join(done.stderr.split())
    process.kill()  # and nothing is left that would have to be cleared away
    process.communicate()
    first = Workdir(tmp_path / "run", Settings({}), "digest")
    second = Workdir(tmp_path / "run", Settings({}), "digest")  # one process may open it twice
    assert first.config() == second.config()
