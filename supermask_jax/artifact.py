"""A network as one small file: what its weights come from, and its masks. `docs/format.md` tells the format.

A supermask network is a seed and one bit a weight. Its file holds how the weights are drawn, the coded masks, and what
no seed can give back: batch statistics and other state. Files of trained networks hold the kept weights instead, files
of masks on somebody else's network the hash of its weights.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from supermask_jax import codes, container, origins
from supermask_jax.header import Header, check, memory
from supermask_jax.methods import Method
from supermask_jax.origins import Base, Drawn, Leaves, Origin, Stored, arrays_of, partition
from supermask_jax.supermask import Masks, Params, Subnet
from supermask_jax.trees import Tree, by_path, map_with_name

__all__ = ["Base", "Drawn", "Stored", "Subnetwork", "load_run", "load_subnetwork", "partition", "save_subnetwork"]

ONLY = "default"  # the name of masks that were saved without one
SMALLEST_BOUND, BOUND = 2**24, 4096  # bytes, and times the size of the file
FILE, SETTINGS = "subnetwork.safetensors", "config.json"  # in the directory of a run


class Subnetwork(NamedTuple):
    """What a file holds.

    Fields:
      weights: every parameter; of trained networks, pruned ones are 0.
      masks: None at leaves that are not pruned, else in the dtype of the weights; {name: masks} if they were saved by
        name.
      model_state: what the model carries beside its parameters, or None.
      about: what else the file tells.
    """

    weights: Params
    masks: Masks
    model_state: Tree
    about: dict[str, Any]


def save_subnetwork(
    path: str | Path,
    subnet_or_method: Subnet | Method | Mapping[str, Subnet | Method],
    origin: Origin,
    *,
    model_state: Tree = None,
    about: Mapping[str, Any] = {},
) -> int:
    """Writes a network to a .safetensors file, atomically; returns the size of the file in bytes.

        method = sm.methods.edge_popup(k_scores, weights, 0.5)  # and after its training:
        found, origin = method._replace(subnet=state.subnet), sm.artifact.Drawn("signed_constant", k_weights)
        sm.save_subnetwork("net.safetensors", found, origin, model_state=state.model_state)

    Args:
      path: of the file; an older one is replaced.
      subnet_or_method: the weights, and the masks or what they are computed from. Of a `Method`, the masks are
        `mask_fn(scores, None)`; of a `Subnet`, they are its scores: exactly 0 or 1, or -1, 0 and 1, or whole numbers to
        255, None at leaves that are not pruned. Several masks over the same weights: {name: Subnet or Method}.
      origin: what the weights come from: `artifact.Drawn` (frozen weights), `artifact.Stored` (trained ones) or
        `artifact.Base` (somebody else's).
      model_state: what the model carries beside its parameters. It is stored whole: no seed gives it back.
      about: whatever else the file should tell, as far as JSON can: model, data set, accuracy.

    Raises:
      ValueError: the origin draws other weights than these; scores that are no masks; a product that is not weights *
        masks * one factor a layer; several masks whose weights differ; what the file cannot hold.
      TypeError: an argument of another type.
      OSError: the file cannot be written; an older one is then unchanged.
    """
    many = subnet_or_method if isinstance(subnet_or_method, Mapping) else {ONLY: subnet_or_method}
    if not many or not all(isinstance(one, Subnet | Method) for one in many.values()):
        raise TypeError("save_subnetwork takes a Subnet, a Method, or {name: Subnet or Method}")
    if not isinstance(origin, Origin):
        raise TypeError(f"origin must be artifact.Drawn, Stored or Base, got {type(origin).__name__}")
    weights = _subnet(next(iter(many.values()))).weights
    for name, one in many.items():
        if not name or "/" in name:
            raise ValueError(f"masks cannot have the name {name!r}: it must not be empty, nor contain a slash")
        if container.digest(arrays_of(_subnet(one).weights)) != container.digest(arrays_of(weights)):
            raise ValueError(f"the weights under {name!r} are not those of the first masks: a file holds one origin")
    masks = {name: _masks(one) for name, one in many.items()}
    values = {name: {path: value for path, (value, _) in leaves.items()} for name, leaves in masks.items()}
    header, arrays, loaded = origins.store(origin, weights, _kept(values))
    header["masks"] = {}
    for name, leaves in masks.items():
        coded = {path: _encode(header, path, *mask, origin) for path, mask in leaves.items()}
        header["masks"][name] = {path: entry for path, (entry, _) in coded.items()}
        arrays[f"masks/{name}"] = np.frombuffer(b"".join(payload for _, payload in coded.values()), np.uint8)
    state = None if model_state is None else arrays_of(model_state)
    header["state"] = state is not None
    arrays |= {f"state/{path}": leaf for path, leaf in (state or {}).items()}
    header["sha256"] = _hashes(loaded, values, state)
    return container.write(path, arrays, header | {"about": dict(about)})


def load_subnetwork(
    path: str | Path,
    *,
    base: Params = None,
    like: Params = None,
    state_like: Tree = None,
    max_bytes: int | None = None,
) -> Subnetwork:
    """Reads a network that `save_subnetwork` wrote: (weights, masks, model_state, about).

    Nothing in the file is executed, and every part of it is checked: weights, masks and state have the hashes that they
    had when they were saved.

        weights, masks, model_state, about = sm.load_subnetwork("net.safetensors")
        logits = model.apply({"params": sm.subnetwork(sm.identity, sm.Subnet(weights, masks)), **model_state}, images)

    Args:
      path: of the file.
      base: the weights that the masks belong to, for a file that holds masks on somebody else's weights.
      like: a tree of the structure that weights and masks should have; by default nested dictionaries, which Flax has.
      state_like: the same of the model state.
      max_bytes: what the network may take in memory. By default 4096 times the size of the file, and 16 MiB at least:
        a file that claims more is refused before anything is allocated.

    Raises:
      ValueError: the file is damaged, or of another format; the network is too large for `max_bytes`; `base`, `like` or
        `state_like` is missing or does not fit.
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
        return _restore(header, arrays, base, like, state_like)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_run(workdir: str | Path) -> Subnetwork:
    """Reads the network that a finished run left in its directory: (weights, masks, model_state, settings).

    Args:
      workdir: the directory of the run.

    Raises:
      ValueError: the run's files are damaged.
      OSError: the run is not finished, or there is none.
    """
    folder = Path(workdir).expanduser()
    if not (folder / FILE).exists():
        raise FileNotFoundError(f"{folder} holds no {FILE}: the run is not finished, or there is none")
    found = load_subnetwork(folder / FILE)
    try:
        return found._replace(about=json.loads((folder / SETTINGS).read_text()))
    except ValueError as error:
        raise ValueError(f"{folder / SETTINGS} is damaged ({error})") from error


def _subnet(one: Subnet | Method) -> Subnet:
    return one.subnet if isinstance(one, Method) else one


def _masks(one: Subnet | Method) -> dict[str, tuple[np.ndarray, np.float32 | None]]:
    """{path: (whole numbers, what they are multiplied by)} of every mask."""
    subnet = _subnet(one)
    weights, masks = by_path(subnet.weights), subnet.scores
    product: Leaves = {}
    if isinstance(one, Method):
        masks = one.mask_fn(subnet.scores, None)
        product = arrays_of(one.product(subnet, None)) if one.product else {}
    found = {}
    for path, mask in arrays_of(masks).items():
        if path not in weights or mask.shape != jnp.shape(weights[path]):
            raise ValueError(f"the mask of {path!r} has shape {mask.shape}, and no weight has this path and shape")
        whole = mask.astype(np.int8 if (mask < 0).any() else np.uint8)
        if not np.array_equal(whole, mask):
            raise ValueError(
                f"the mask of {path!r} holds other values than whole numbers from -1 to 255. Are they scores? Give the "
                "Method that makes masks of them, or Subnet(weights, masks)."
            )
        gain = None
        if path in product:
            weight, ones = np.asarray(weights[path]), int(np.count_nonzero(whole))
            factors: tuple[Any, ...] = (None, np.float32(mask.size) / np.float32(max(ones, 1)))
            fits = [f for f in factors if np.array_equal(product[path], weight * (mask if f is None else mask * f))]
            if not fits:
                raise ValueError(f"the method's product at {path!r} is not its weights * its masks * one factor")
            gain = fits[0]
        found[path] = whole, gain
    return found


def _kept(values: Mapping[str, Leaves]) -> Leaves:
    """{path: bool} where any of several masks is not 0."""
    kept: Leaves = {}
    for leaves in values.values():
        for path, value in leaves.items():
            kept[path] = kept.get(path, False) | (value != 0)
    return kept


def _encode(
    header: Header, path: str, values: np.ndarray, gain: np.float32 | None, origin: Origin
) -> tuple[dict[str, Any], bytes]:
    """The entry of a mask in the header, and its bytes."""
    entry: dict[str, Any] = {} if gain is None else {"gain": float(gain)}
    parted = origin.partition if isinstance(origin, Drawn) and origin.partition else {}
    if path in parted:
        entry["partition"] = list(parted[path])
        pruned, locked, free = origins.parts(header["origin"], path, values.size, *parted[path])
        flat = values.ravel()
        if (flat[pruned] != 0).any() or (flat[locked] != 1).any():
            raise ValueError(f"the mask of {path!r} keeps a position that is pruned for good, or drops a locked one")
        values = flat[free]
    kind, planes, payload = codes.encode(values)
    return entry | {"kind": kind, "planes": planes}, payload


def _decode(header: Header, name: str, stream: codes.Stream) -> Leaves:
    """{path: whole numbers} of the masks of one name."""
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


def _hashes(weights: Leaves, masks: Mapping[str, Leaves], state: Leaves | None) -> dict[str, Any]:
    return {
        "weights": container.digest(weights),
        "masks": {name: container.digest(leaves) for name, leaves in masks.items()},
        "state": container.digest(state or {}),
    }


def _restore(header: Header, arrays: Leaves, base: Params, like: Params, state_like: Tree) -> Subnetwork:
    origin, entries = header["origin"], header["masks"]
    masks = {name: _decode(header, name, origins.take_stream(arrays, f"masks/{name}")) for name in entries}
    if origin["kind"] != "base":
        weights = origins.restore(header, arrays, _kept(masks))
    elif base is not None:
        weights = arrays_of(base)
    else:
        raise ValueError(f"it holds masks on weights from {origin['source']!r}: give them as base=...")
    state = {path.removeprefix("state/"): arrays.pop(path) for path in list(arrays) if path.startswith("state/")}
    if arrays or (state and not header["state"]):
        raise ValueError(f"it holds arrays that its header does not name: {', '.join([*arrays, *state][:5])}")
    for what, now in _hashes(weights, masks, state).items():
        if now != header["sha256"][what]:
            wrong = "the base weights" if what == "weights" and origin["kind"] == "base" else f"its {what}"
            raise ValueError(f"{wrong} are not those that it was saved with: their hash differs")

    def tree(name: str) -> Masks:
        found = masks[name]
        gains = {path: entry.get("gain") for path, entry in entries[name].items()}
        return _tree({p: _mask(found[p], w.dtype, gains[p]) if p in found else None for p, w in weights.items()}, like)

    return Subnetwork(
        _tree({path: _array(leaf) for path, leaf in weights.items()}, like),
        tree(ONLY) if list(entries) == [ONLY] else {name: tree(name) for name in entries},
        _tree({path: _array(leaf) for path, leaf in state.items()}, state_like) if header["state"] else None,
        header["about"],
    )


def _mask(values: np.ndarray, dtype: Any, gain: float | None) -> jax.Array:
    mask = jnp.asarray(values.astype(dtype))
    return mask if gain is None else mask * jnp.asarray(np.float32(gain).astype(dtype))


def _array(leaf: np.ndarray) -> jax.Array:
    array = jnp.asarray(leaf)
    if array.dtype != leaf.dtype:
        raise ValueError(f"it holds {leaf.dtype} numbers: switch jax_enable_x64 on to load them")
    return array


def _tree(leaves: Mapping[str, Any], like: Tree) -> Tree:
    """The leaves in nested dictionaries, or in the structure of `like`."""
    if like is not None:
        if (names := by_path(like).keys()) != leaves.keys():
            different = sorted(names ^ leaves.keys())
            raise ValueError(f"its leaves are not those of the given tree; only one has: {', '.join(different[:5])}")
        return map_with_name(lambda path, leaf: leaves[path], like)
    if list(leaves) == [""]:
        return leaves[""]
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        inside = tree
        for parent in parents:
            inside = inside.setdefault(parent, {})
            if not isinstance(inside, dict):
                raise ValueError(f"it has a leaf at {path!r} and one above it")
        if last in inside:
            raise ValueError(f"it has a leaf at {path!r} and one below it")
        inside[last] = leaf
    return tree
