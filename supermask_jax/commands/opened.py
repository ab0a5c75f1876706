"""The file that an argument of the command line names, and the masks in it: read, or loaded with its weights."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors

from supermask_jax import artifact, container, contents
from supermask_jax.commands.answers import USAGE, Failure
from supermask_jax.contents import Contents
from supermask_jax.header import Header
from supermask_jax.origins import Leaves, arrays_of


class Opened(NamedTuple):
    """A file that was read.

    Fields:
      path: of the file.
      name: of the masks that the argument chose; None: it chose none.
      held: what the file holds.
      max_bytes: what the network may take in memory, or None.
    """

    path: Path
    name: str | None
    held: Contents
    max_bytes: int | None

    @property
    def header(self) -> Header:
        return self.held.header

    @property
    def only(self) -> str:
        """The name of the masks that are meant.

        Raises:
          Failure: there are several, and the argument names none of them.
        """
        names = list(self.held.masks)
        if self.name is None and len(names) > 1:
            raise Failure(
                f"{self.path} holds several masks: name one as {self.path}:NAME. Names: {', '.join(names)}", USAGE
            )
        return names[0] if self.name is None else self.name


class Loaded(NamedTuple):
    """A network: NumPy arrays by path, in the layouts of the file."""

    weights: Leaves
    masks: Leaves
    state: Leaves
    about: dict[str, Any]

    def subnetwork(self) -> Leaves:
        """Returns {path: weights * masks}; the weight itself where there is no mask."""
        return {path: leaf * self.masks[path] if path in self.masks else leaf for path, leaf in self.weights.items()}


def read(argument: str, max_bytes: int | None = None) -> Opened:
    """Reads header, masks and state of the file that an argument names: FILE, or FILE:NAME for one of several masks.

    Args:
      argument: FILE, or FILE:NAME.
      max_bytes: what the network may take in memory, or None for the default of `contents.read`.

    Raises:
      Failure: the file is damaged, or holds no masks of that name.
      OSError: the file cannot be read.
    """
    path, name = Path(argument).expanduser(), None
    if not path.exists() and ":" in argument:
        parts = argument.split(":")  # a name may have a colon too: the longest file that is there is meant
        files = [":".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
        file = next((file for file in files if Path(file).expanduser().exists()), files[0])
        path, name = Path(file).expanduser(), argument[len(file) + 1 :]
    try:
        held = contents.read(path, max_bytes=max_bytes)
    except ValueError as error:
        raise _as_flags(error) from error
    if name is not None and name not in held.masks:
        raise Failure(f"{path} holds no masks of the name {name!r}. Names: {', '.join(held.masks)}", USAGE)
    return Opened(path, name, held, max_bytes)


def load(opened: Opened, base: Leaves | None = None) -> Loaded:
    """Loads the network of a file that was read, as `load_each` does.

    Raises:
      Failure: as there; or the file holds several masks, and none was chosen.
      OSError: the file cannot be read.
    """
    return load_each(opened, [opened.only], base)[opened.only]


def load_each(opened: Opened, names: Sequence[str], base: Leaves | None = None) -> dict[str, Loaded]:
    """Loads networks of a file that was read: the weights are drawn once, and all hashes compared.

    Args:
      opened: the file.
      names: of the masks.
      base: {path: array} of the weights, for masks on somebody else's network.

    Raises:
      Failure: the file is damaged; it needs base weights, and there are none, or others.
      OSError: the file cannot be read.
    """
    origin = opened.header["origin"]
    if origin["kind"] == "base" and base is None:
        raise Failure(
            f"{opened.path} holds masks on weights from {origin['source']!r}, not the weights: give them with --base",
            USAGE,
        )
    with jax.enable_x64(True):  # a file may hold 64-bit numbers; draws are the same
        try:
            found = artifact.load_subnetwork(opened.path, base=base, max_bytes=opened.max_bytes)
        except ValueError as error:
            raise _as_flags(error) from error
        several = {artifact.ONLY: found.masks} if list(opened.held.masks) == [artifact.ONLY] else found.masks
        weights, state = arrays_of(found.weights), arrays_of(found.model_state)
        return {name: Loaded(weights, arrays_of(several[name]), state, found.about) for name in names}


def base_weights(file: str, opened: Opened) -> Leaves:
    """Returns {path: array} of the leaves that the masks of `opened` are on, from a .safetensors or .npz file.

    Raises:
      Failure: the file is damaged, or lacks a leaf.
      OSError: the file cannot be read.
    """
    path, wanted = Path(file).expanduser(), opened.header["leaves"]
    try:
        arrays = _npz(path) if path.suffix == ".npz" else _safetensors(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise Failure(f"{path} is no whole .safetensors or .npz file of arrays ({error})") from error
    if missing := [leaf for leaf in wanted if leaf not in arrays]:
        raise Failure(f"{path} lacks {', '.join(missing[:5])}; it holds {', '.join([*arrays][:5]) or 'nothing'}")
    return {leaf: arrays[leaf] for leaf in wanted}


def _npz(path: Path) -> Leaves:
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _safetensors(path: Path) -> Leaves:
    stored = safetensors.deserialize(path.read_bytes())
    return {name: container.array(tensor) for name, tensor in stored if tensor["dtype"] in container.DTYPES}


def _as_flags(error: ValueError) -> Failure:
    """The failure that an error of the library is on a command line, with its argument as the flag."""
    return Failure(re.sub(r"say max_bytes=(\d+)", r"say --max-bytes \1", str(error)))
