"""The files of a run of many tasks: one of packed bits for each task, and one of all masks over one random network."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import supermask_jax as sm
from experiments.run import schemas
from experiments.run.errors import UserError
from experiments.run.files import read_arrays, read_json, write_arrays, write_json
from experiments.tasks.superposition import pack, packed_bytes, unpack
from supermask_jax import artifact
from supermask_jax.trees import Tree

FOLDER = "tasks"  # in the work directory
GROWTH = "growth.json"  # in that folder


def name_of(task: int) -> str:
    """What the masks of a task are called in every file."""
    return f"task-{task:03d}"


def save_task(path: Path, task: int, masks: Tree, record: Mapping[str, Any]) -> None:
    """Writes the masks and the figures of a finished task into the work directory `path`, atomically."""
    folder = path / FOLDER
    folder.mkdir(exist_ok=True)
    write_arrays(folder / f"{name_of(task)}.npz", {"masks": pack(masks)})
    write_json(folder / f"{name_of(task)}.json", dict(record))  # last: it marks the task as finished


def load_task(path: Path, task: int, weights: Tree) -> tuple[np.ndarray, dict[str, Any]] | None:
    """(packed masks uint8 [bytes], figures) of a finished task; None if it is not finished.

    Raises:
      UserError: its files are damaged.
    """
    report, arrays = (path / FOLDER / f"{name_of(task)}.{ending}" for ending in ("json", "npz"))
    if not os.path.lexists(report):
        return None
    trained_again = f"move it and {arrays.name} away, and the task is trained again."
    record, masks = read_json(report, schemas.Task, trained_again), read_arrays(arrays).get("masks")
    if masks is None or masks.dtype != np.uint8 or masks.shape != (packed_bytes(weights),):
        raise UserError(f"{arrays} or {report.name} is of another network; move both away, and they are made again.")
    return masks, record


def save_growth(path: Path, asked: Mapping[str, Any], rows: Mapping[int, dict[str, Any]]) -> None:
    """Writes what was measured by number of tasks, and the settings that it was asked for with."""
    write_json(path / FOLDER / GROWTH, {**asked, "rows": list(rows.values())})


def load_growth(path: Path, asked: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """{tasks: row} of what was measured with these settings; {} if nothing was.

    Raises:
      UserError: the file is damaged.
    """
    file = path / FOLDER / GROWTH
    if not os.path.lexists(file):
        return {}
    found = read_json(file, schemas.GrowthFile, "move it away, and it is measured again.")
    if any(found.get(name) != value for name, value in asked.items()):
        return {}
    whole = (row for row in found["rows"] if row["tasks"] == 1 or {"one_shot", "binary"} <= set(row))
    return {row["tasks"]: row for row in whole}


def write_artifact(file: Path, weights: Tree, seed: int, about: Mapping[str, Any], packed: Sequence[np.ndarray]) -> int:
    """Writes one file of all masks and the seed of the network that they share; returns its size in bytes.

    Args:
      file: a .safetensors file; an older one is replaced.
      weights: signed constants that were drawn with `seed`.
      seed: of the run.
      about: what else the file tells.
      packed: uint8 [bytes] for each task, from task 0 on.
    """
    weights = jax.tree.map(np.asarray, weights)
    subnets = {name_of(task): sm.Subnet(weights, unpack(masks, weights)) for task, masks in enumerate(packed)}
    return sm.save_subnetwork(file, subnets, artifact.Drawn("signed_constant", seed, "weights"), about=about)
