"""Rows of the benchmark's table: times, ratios between candidates, targets.

Absolute times differ between machines and from day to day, so a comparison is a ratio within one run: the candidates
take turns, and a ratio is the median over the rounds of each round's own ratio.
"""

import dataclasses
import importlib.metadata
import itertools
import operator
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.training import summary

WARM_UP = 2  # rounds that are not counted
PAUSE = 0.02  # seconds after a turn: threads of other libraries wait busily for a while, and would slow the next one
HOLDS = {"<=": operator.le, ">=": operator.ge}


def row(group: str, name: str, unit: str, values, target: str | None = None, bound: float | None = None) -> dict:
    """One line of the table and of the JSON file. A target is "<=" or ">=" a bound, in `unit`."""
    median = float(np.median(values))
    line = {"group": group, "name": name, "unit": unit, "median": median}
    line |= {"min": float(np.min(values)), "max": float(np.max(values))}
    if target:
        line |= {"target": f"{target} {bound:g}", "met": HOLDS[target](median, bound)}
    return line


def interleaved(candidates: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, np.ndarray]:
    """{name: [rounds] seconds of each call}. The candidates take turns, and each starts when the last has finished."""
    seconds = {name: [] for name in candidates}
    for _ in range(WARM_UP + rounds):
        for name, call in candidates.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - began)
            time.sleep(PAUSE)
    return {name: np.array(times[WARM_UP:]) for name, times in seconds.items()}


def compared(group: str, seconds: dict[str, np.ndarray], ratios) -> list[dict]:
    """Rows of the times in milliseconds, and of the ratios between the candidates that were measured.

    Args:
      group: the section of the table.
      seconds: {candidate: [rounds] seconds}.
      ratios: (candidate, divided by candidate, "<=" or ">=" or None, the target's bound or None).
    """
    return [row(group, name, "ms", times * 1e3) for name, times in seconds.items()] + [
        row(group, f"{above} / {below}", "x", seconds[above] / seconds[below], target, bound)
        for above, below, target, bound in ratios
        if above in seconds and below in seconds
    ]


def cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def instructions() -> str:
    """The widest vectors that this machine's processor computes with; its architecture where that is not told."""
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        flags = set()
    widest = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX"), ("asimd", "NEON"))
    return next((name for flag, name in widest if flag in flags), platform.machine())


def about(config, no_torch: str | None, on_cpu: bool = False) -> dict:
    """What the figures were measured on and with.

    Args:
      config: the settings, a dataclass.
      no_torch: why PyTorch was not measured, or None.
      on_cpu: whether what is measured runs on the CPU, whatever else there is.
    """
    versions = summary.versions()
    if not no_torch:
        versions["torch"] = importlib.metadata.version("torch")
    return {
        "config": dataclasses.asdict(config),
        "device": f"cpu (cpu), {platform.machine()}" if on_cpu else summary.machine(),
        "cores": cores(),
        "instructions": instructions(),
        "torch": no_torch or versions["torch"],
        "versions": versions,
    }


def show(console: Console, result: dict) -> None:
    """Prints the faults if there are any, or the rows as a table of 80 columns with a section for each group."""
    about = result["about"]
    if "faults" in result:
        table = Table("fault", "tries", "survived", title="faults that a run survives")
        for fault in result["faults"]:
            table.add_row(fault["fault"], str(fault["tries"]), str(fault["survived"]))
        console.print(table)
        return
    machine = f"{about['device']}, {about['cores']} cores, {about['instructions']}"
    table = Table(title=f"{machine}, {about['config']['rounds']} rounds")
    for column, justify in (("", "left"), ("median", "right"), ("min - max", "right"), ("target", "left")):
        table.add_column(column, justify=justify)
    for group, lines in itertools.groupby(result["rows"], key=operator.itemgetter("group")):
        table.add_section()
        table.add_row(f"[bold]{group}")
        for line in lines:
            median, low, high = (short(line[part]) for part in ("median", "min", "max"))
            verdict = f"{line['target']} {'met' if line['met'] else 'MISSED'}" if "target" in line else ""
            spread = "" if line["min"] == line["max"] else f"{low} - {high}"
            table.add_row(line["name"], f"{median} {line['unit']}", spread, verdict)
    console.print(table)
    console.print("A ratio is the median of the rounds' own ratios. torch:", about["torch"], highlight=False)


def short(figure: float) -> str:
    """The figure with three digits, or with all digits before the point where there are more."""
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:#.3g}"
