"""Flags and files that a user gives: values that no run can have, and archives that unpack to more than they should."""

import gzip
import random
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from experiments.faults.child_run import CIFAR, MNIST, ROOT, ChildRun, Fault, Job, finished, is_an_error, make_fault

COMMANDS = (MNIST.command, CIFAR.command, "experiments.lottery", "experiments.many_tasks")
# Values of numbers that no run can have, and others that only some flags take.
NEVER_RIGHT = ("inf", "-inf", "nan", "1e309", "-1000000000000")
VALUES = (*NEVER_RIGHT, "1000000000000", "-1", "0", "0x10", "1e3", "", " ", "é", "x" * 5000, "--seed")
PLACES = {"--help", "--workdir", "--data-dir", "--coordinator", "--evaluate"}  # and what takes any text
UNPACKED = 2**30  # bytes of an archive that should hold some thousands
SOON = 30  # seconds until a run with a hostile value has been refused, or has begun


def hostile_flags(scratch: Path, tries: int = 40, seed: int = 0) -> Fault:
    """A random flag of a random command with a hostile value: refused in one message, or a run with a finite value.

    Args:
      scratch: a directory for the runs.
      tries: how many.
      seed: of the choices.
    """
    rng, details, flags = random.Random(seed), [], {}
    for command in COMMANDS:
        told = subprocess.run([sys.executable, "-m", command, "--help"], cwd=ROOT, capture_output=True, text=True)
        flags[command] = sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", told.stdout)) - PLACES)
    for number in range(tries):
        command = rng.choice(COMMANDS)
        flag, value = rng.choice(flags[command]), rng.choice(VALUES)
        with ChildRun(scratch, scratch / f"flag-{number}", flag, value, job=Job("flag", command, (), 1, 1, 1)) as run:
            end = time.monotonic() + SOON
            begun = run.workdir / "config.json"
            while run.statuses() == [None] and not begun.exists() and time.monotonic() < end:
                time.sleep(0.05)
            status = run.statuses()[0]
        seen = {"command": command, "flag": flag, "value": value[:20], "status": status, "said": run.output()[-300:]}
        if status is None:
            seen["survived"] = begun.exists() and value not in NEVER_RIGHT
        else:
            seen["survived"] = status in (1, 2) and bool(run.output()) and "Traceback" not in run.output()
        details.append(seen)
    return make_fault("a flag with a hostile value", details)


def swollen_archives(scratch: Path) -> Fault:
    """A .gz of MNIST and a .tar.gz of CIFAR-10 that unpack to 1 GB: refused, and not unpacked whole."""
    details = []
    mnist, cifar = scratch / "swollen" / "idx", scratch / "swollen" / "cifar10"
    for folder in (mnist, cifar):
        folder.mkdir(parents=True)
    header = bytes((0, 0, 8, 1)) + (1000).to_bytes(4, "big") + bytes(1000)  # 1,000 labels, all 0
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (mnist / name).write_bytes(header)
    _swell(mnist / "train-labels-idx1-ubyte.gz", header)
    images = bytes((0, 0, 8, 3)) + b"".join(length.to_bytes(4, "big") for length in (1000, 28, 28))
    (mnist / "train-images-idx3-ubyte").write_bytes(images + random.Random(0).randbytes(1000 * 28 * 28))
    member = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
    member.size = UNPACKED
    _swell(cifar / "cifar-10-binary.tar.gz", member.tobuf())
    for command, dataset in ((MNIST.command, "idx"), (CIFAR.command, "cifar10")):
        job = Job("swollen", command, ("--dataset", dataset, "--data-dir", str(scratch / "swollen")), 1, 1, 1)
        began = time.monotonic()
        run = finished(scratch, scratch / f"swollen-{dataset}", job=job)
        seen = {"dataset": dataset, "status": run.ended(), "said": run.output()[-500:]}
        seen |= {"seconds": time.monotonic() - began}
        seen["survived"] = run.ended() == 1 and is_an_error(run.output()) and str(scratch / "swollen") in run.output()
        details.append(seen)
    return make_fault("an archive that unpacks to 1 GB", details)


def _swell(file: Path, header: bytes) -> None:
    """A small file of gzip that unpacks to a header and a gigabyte of zeros, as many short members."""
    zeros = gzip.compress(bytes(2**24))
    with open(file, "wb") as stream:
        stream.write(gzip.compress(header))
        for _ in range(UNPACKED // 2**24):
            stream.write(zeros)
