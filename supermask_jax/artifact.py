"""A network as one small file: what its weights come from, and its masks. `docs/format.md` tells the format.

A supermask network is a seed and one bit a weight. Its file holds how the weights are drawn, the coded masks, and what
no seed can give back: batch statistics and other state. Files of trained networks hold the kept weights instead, files
of masks on somebody else's network the hash of its weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from supermask_jax import codes, container, contents, origins
from supermask_jax.contents import Contents
from supermask_jax.header import Header, check
from supermask_jax.methods import Method
from supermask_jax.origins import Base, Drawn, Leaves, Origin, Stored, arrays_of, partition
from supermask_jax.supermask import Masks, Params, Subnet
from supermask_jax.trees import Tree, by_path, map_with_name, nested

__all__ = ["Base", "Drawn", "Stored", "Subnetwork", "load_run", "load_subnetwork", "partition", "save_subnetwork"]

ONLY = "default"  # the name of masks that were saved without one
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
        masks * one factor a leaf (that of `rescaled` is not, on a stack whose layers keep different numbers); several
        masks whose weights differ or, with `Stored`, which do not mask the same leaves; a name of masks that is empty,
        "default", or has a slash; what the file cannot hold.
      TypeError: an argument of another type; a leaf that NumPy cannot hold, as a random key.
      OSError: the file cannot be written; an older one is then unchanged.
    """
    many = _by_name(subnet_or_method)
    if not isinstance(origin, Origin):
        raise TypeError(f"origin must be artifact.Drawn, Stored or Base, got {type(origin).__name__}")
    weights = _weights_of_all(many)
    masks = {name: _masks(one) for name, one in many.items()}
    values = {name: {path: value for path, (value, _) in leaves.items()} for name, leaves in masks.items()}
    if isinstance(origin, Stored):
        _require_same_leaves(values)
    header, arrays, loaded = origins.store(origin, weights, _kept(values))
    header["masks"] = {}
    for name, leaves in masks.items():
        coded = {path: _encode(header, path, *mask, origin) for path, mask in leaves.items()}
        header["masks"][name] = {path: entry for path, (entry, _) in coded.items()}
        arrays[f"masks/{name}"] = np.frombuffer(b"".join(payload for _, payload in coded.values()), np.uint8)
    state = None if model_state is None else arrays_of(model_state)
    header["state"] = state is not None
    arrays |= {f"state/{path}": leaf for path, leaf in (state or {}).items()}
    header["sha256"] = {
        "weights": container.digest(loaded),
        "masks": {name: contents.masks_digest(leaves, header["masks"][name]) for name, leaves in values.items()},
        "state": None if state is None else container.digest(state),
    }
    header["about"] = dict(about)
    check(header)  # what is written can be read
    return container.write(Path(path).expanduser(), arrays, header)


def load_subnetwork(
    path: str | Path,
    *,
    base: Params = None,
    like: Params = None,
    state_like: Tree = None,
    max_bytes: int | None = None,
) -> Subnetwork:
    """Reads a network that `save_subnetwork` wrote: (weights, masks, model_state, about).

    Nothing in the file is executed. Weights, masks and state have the hashes that they had when they were saved; what
    `about` tells has a checksum only.

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
        `state_like` is missing or does not fit; the file holds numbers of 64 bits, and `jax_enable_x64` is off.
      OSError: the file cannot be read.
    """
    path = Path(path).expanduser()
    held = contents.read(path, max_bytes=max_bytes)
    try:
        return _restore(held, base, like, state_like)
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


def _weights_of_all(many: Mapping[str, Subnet | Method]) -> Params:
    """The weights that all have in common; ValueError where they differ, or a file cannot hold them."""
    first, *others = many
    weights = _subnet(many[first]).weights
    for path, leaf in arrays_of(weights).items():
        if leaf.dtype.name not in container.DTYPES.values():
            raise ValueError(f"{path!r} has {leaf.dtype} numbers; a file holds {', '.join(container.DTYPES.values())}")
    others = [name for name in others if _subnet(many[name]).weights is not weights]
    digest = container.digest(arrays_of(weights)) if others else ""
    for name in others:
        if container.digest(arrays_of(_subnet(many[name]).weights)) != digest:
            raise ValueError(f"the weights under {name!r} are not those of the first masks: a file holds one origin")
    return weights


def _masks(one: Subnet | Method) -> dict[str, tuple[np.ndarray, float | None]]:
    """{path: (whole numbers, what they are multiplied by)} of every mask."""
    subnet = _subnet(one)
    weights, tree = by_path(subnet.weights), subnet.scores
    product: Leaves = {}
    if isinstance(one, Method):
        tree = one.mask_fn(subnet.scores, None)
        product = arrays_of(one.product(subnet, None)) if one.product else {}
    masks = arrays_of(tree)
    found: dict[str, tuple[np.ndarray, float | None]] = {}
    for path, mask in masks.items():
        if path not in weights or mask.shape != jnp.shape(weights[path]):
            raise ValueError(f"the mask of {path!r} has shape {mask.shape}, and no weight has this path and shape")
        with np.errstate(invalid="ignore"):  # NaN, which is refused
            whole = mask.astype(np.int8 if (mask < 0).any() else np.uint8)
        low, high = int(whole.min(initial=0)), int(whole.max(initial=0))
        if not np.array_equal(whole, mask) or low < -1 or (low < 0 and high > 1):
            raise ValueError(
                f"the mask of {path!r} holds other values than 0 and 1, or -1, 0 and 1, or whole numbers from 0 to "
                "255. Are they scores? Give the Method that makes masks of them, or Subnet(weights, masks)."
            )
        found[path] = whole, None
    for path, result in product.items():
        weight = np.asarray(weights[path])
        gains: list[float | None] = [None]
        if path in found and (ones := np.count_nonzero(found[path][0])):
            gains.append(float((np.float32(weight.size) / np.float32(ones)).astype(masks[path].dtype)))
        whole = found[path][0] if path in found else np.ones((), np.uint8)
        fits = [gain for gain in gains if np.array_equal(result, weight * _times(whole, gain, weight.dtype))]
        if not fits:
            raise ValueError(
                f"the method's product at {path!r} is not its weights * its masks * one factor for all of it"
            )
        if path in found:
            found[path] = whole, fits[0]
    return found


def _times(values: np.ndarray, gain: float | None, dtype: Any) -> np.ndarray:
    """What weights of a dtype are multiplied by."""
    return values.astype(dtype) if gain is None else values.astype(dtype) * np.float32(gain).astype(dtype)


def _kept(values: Mapping[str, Leaves]) -> Leaves:
    """{path: bool} where any of several masks is not 0."""
    kept: Leaves = {}
    for leaves in values.values():
        for path, value in leaves.items():
            kept[path] = kept.get(path, False) | (value != 0)
    return kept


def _by_name(subnet_or_method: Any) -> Mapping[str, Subnet | Method]:
    """{name: what `save_subnetwork` was given}; one without a name has the name `ONLY`."""
    many = subnet_or_method if isinstance(subnet_or_method, Mapping) else {ONLY: subnet_or_method}
    if not many or not all(isinstance(one, Subnet | Method) for one in many.values()):
        raise TypeError("save_subnetwork takes a Subnet, a Method, or {name: Subnet or Method}")
    for name in subnet_or_method if many is subnet_or_method else ():
        if not name or "/" in name or name == ONLY:
            raise ValueError(f"masks cannot have the name {name!r}: not an empty one, nor {ONLY!r}, nor with a slash")
    return many


def _require_same_leaves(values: Mapping[str, Leaves]) -> None:
    """Raises ValueError where a network keeps a leaf whole of which others keep a part: the file holds the part."""
    every = sorted(set().union(*values.values()))
    for name, leaves in values.items():
        if missing := [path for path in every if path not in leaves]:
            raise ValueError(
                f"the masks {name!r} have none of {', '.join(missing[:5])}, and other masks do: of stored weights, a "
                "file holds what the masks keep. Give it a mask of ones."
            )


def _encode(
    header: Header, path: str, values: np.ndarray, gain: float | None, origin: Origin
) -> tuple[dict[str, Any], bytes]:
    """The entry of a mask in the header, and its bytes."""
    entry: dict[str, Any] = {} if gain is None else {"gain": gain}
    parted = origin.partition if isinstance(origin, Drawn) and origin.partition else {}
    if path in parted:
        entry["partition"] = [int(count) for count in parted[path]]
        pruned, locked, free = origins.parts(header["origin"], path, values.size, *parted[path])
        flat = values.ravel()
        if (flat[pruned] != 0).any() or (flat[locked] != 1).any():
            raise ValueError(f"the mask of {path!r} keeps a position that is pruned for good, or drops a locked one")
        values = flat[free]
    kind, planes, payload = codes.encode(values)
    return entry | {"kind": kind, "planes": planes}, payload


def _restore(held: Contents, base: Params, like: Params, state_like: Tree) -> Subnetwork:
    header, masks, state, arrays, _ = held
    origin, entries = header["origin"], header["masks"]
    if origin["kind"] != "base":
        weights = origins.restore(header, arrays, _kept(masks))
    elif base is not None:
        weights = arrays_of(base)
    else:
        raise ValueError(f"it holds masks on weights from {origin['source']!r}: give them as base=...")
    if arrays:
        raise ValueError(f"it holds arrays that its header does not name: {', '.join([*arrays][:5])}")
    if container.digest(weights) != header["sha256"]["weights"]:
        wrong = "the base weights" if origin["kind"] == "base" else "its weights"
        raise ValueError(f"{wrong} are not those that it was saved with: their hash differs")

    def tree(name: str) -> Masks:
        found = masks[name]
        gains = {path: entry.get("gain") for path, entry in entries[name].items()}
        leaves = {p: _times(found[p], gains[p], leaf.dtype) if p in found else None for p, leaf in weights.items()}
        return _tree({p: None if leaf is None else _array(leaf) for p, leaf in leaves.items()}, like)

    return Subnetwork(
        _tree({path: _array(leaf) for path, leaf in weights.items()}, like),
        tree(ONLY) if list(entries) == [ONLY] else {name: tree(name) for name in entries},
        _tree({path: _array(leaf) for path, leaf in state.items()}, state_like) if header["state"] else None,
        header["about"],
    )


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
    return nested(leaves)
