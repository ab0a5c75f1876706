"""What the file of a network holds, as far as it can be read without drawing weights: header, masks and state."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from supermask_jax import codes, container, origins
from supermask_jax.header import Header, check, memory
from supermask_jax.origins import Leaves

SMALLEST_BOUND, BOUND = 2**24, 4096  # bytes, and times the size of the file


class Contents(NamedTuple):
    """What a file holds.

    Fields:
      header: with checked entries.
      masks: {name: {path: whole numbers}}, before their gain.
      state: {path: array} of the model state.
      arrays: {name: array} of the others, which the weights are made with.
      size: of the file, in bytes.
    """

    header: Header
    masks: dict[str, Leaves]
    state: Leaves
    arrays: Leaves
    size: int


def read(path: str | Path, *, max_bytes: int | None = None) -> Contents:
    """Reads the header, the masks and the state of a file; the weights are neither drawn nor checked.

    Masks and state have the hashes that they had when they were saved.

    Args:
      path: of the file.
      max_bytes: what the whole network may take in memory. By default 4096 times the size of the file, and 16 MiB at
        least: a file that claims more is refused before anything is allocated.

    Raises:
      ValueError: the file is damaged, or of another format; the network is too large for `max_bytes`. The message names
        the file.
      OSError: the file cannot be read.
    """
    header, arrays, size = container.read(path)
    try:
        check(header)
        bound = max(SMALLEST_BOUND, BOUND * size) if max_bytes is None else max_bytes
        if (needed := memory(header)) > bound:
            raise ValueError(
                f"its network takes {needed} bytes, more than the bound of {bound} for a file of {size}. If you trust "
                f"the file, say max_bytes={needed}"
            )
        masks = {name: _decode(header, name, arrays) for name in header["masks"]}
        state = {path.removeprefix("state/"): arrays.pop(path) for path in list(arrays) if path.startswith("state/")}
        if state and not header["state"]:
            raise ValueError(f"it holds a state that its header does not name: {', '.join([*state][:5])}")
        hashes = {
            "masks": {name: masks_digest(leaves, header["masks"][name]) for name, leaves in masks.items()},
            "state": container.digest(state) if header["state"] else None,
        }
        for what, now in hashes.items():
            if now != header["sha256"][what]:
                raise ValueError(f"its {what} are not those that it was saved with: their hash differs")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Contents(header, masks, state, arrays, size)


def masks_digest(masks: Leaves, entries: Header) -> str:
    """Returns the SHA-256 of the masks of one name and of their gains.

    Args:
      masks: {path: whole numbers}.
      entries: {path: entry of the mask in the header}.
    """
    gains = {f"gains/{p}": np.array(entry["gain"], np.float32) for p, entry in entries.items() if "gain" in entry}
    return container.digest({f"masks/{path}": mask for path, mask in masks.items()} | gains)


def _decode(header: Header, name: str, arrays: Leaves) -> Leaves:
    """{path: whole numbers} of the masks of one name, whose bytes are taken out of `arrays`."""
    stream = origins.take_stream(arrays, f"masks/{name}")
    masks: Leaves = {}
    for path, entry in header["masks"][name].items():
        shape, planes = tuple(header["leaves"][path]["shape"]), entry["planes"]
        if "partition" not in entry:
            masks[path] = codes.decode(entry["kind"], planes, stream.take(planes), shape)
            continue
        _, locked, free = origins.parts(header["origin"], path, math.prod(shape), *entry["partition"])
        values = codes.decode(entry["kind"], planes, stream.take(planes), free.shape)
        flat = np.zeros(math.prod(shape), values.dtype)
        flat[locked], flat[free] = 1, values
        masks[path] = flat.reshape(shape)
    stream.end()
    return masks
