"""What the header of a stored network may hold: checked whole, before anything that it says is done."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from supermask_jax import codes, container
from supermask_jax.draws import DRAWS, GENERATOR

Header = dict[str, Any]
ORIGINS: dict[str, dict[str, type]] = {  # the fields of each kind; those of OPTIONAL may be missing
    "drawn": {
        "kind": str,
        "initializer": str,
        "generator": str,
        "key": list,
        "seed": int,
        "stream": str,
        "density": float,
        "fan_in": str,
    },
    "stored": {"kind": str},
    "base": {"kind": str, "source": str},
}
OPTIONAL = {"seed", "stream", "density"}
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def check(header: Header) -> None:
    """Raises ValueError unless a header has every entry that loading needs, of its type and range."""
    _require(set(header) == {"origin", "leaves", "masks", "state", "sha256", "about"}, "the entries of the header")
    origin, leaves, hashes = header["origin"], header["leaves"], header["sha256"]
    _require(isinstance(origin, dict) and origin.get("kind") in tuple(ORIGINS), "the origin")
    fields = ORIGINS[origin["kind"]]
    _require(fields.keys() - OPTIONAL <= origin.keys() <= fields.keys(), "the origin")
    _require(all(type(value) is fields[name] for name, value in origin.items()), "the origin")
    if origin["kind"] == "drawn":
        _require(origin["generator"] == GENERATOR, "the generator")
        _require(_is_whole(origin.get("seed", 0), 2**32), "the seed")
        _require(len(origin["key"]) == 2 and all(_is_whole(word, 2**32) for word in origin["key"]), "the key")
    _require(isinstance(leaves, dict) and bool(leaves), "the leaves")
    for path, entry in leaves.items():
        _check_leaf(path, entry, origin["kind"])
    _require(isinstance(header["masks"], dict) and bool(header["masks"]), "the masks")
    for name, masks in header["masks"].items():
        _require(isinstance(masks, dict) and set(masks) <= set(leaves), f"the masks {name!r}")
        for path, entry in masks.items():
            _check_mask(path, entry, origin["kind"])
    _require(isinstance(header["state"], bool) and isinstance(header["about"], dict), "the state or what is told")
    _require(isinstance(hashes, dict) and set(hashes) == {"weights", "masks", "state"}, "the hashes")
    _require(isinstance(hashes["masks"], dict) and hashes["masks"].keys() == header["masks"].keys(), "the hashes")
    _require((hashes["state"] is not None) == header["state"], "the hashes")


def _check_leaf(path: str, entry: Any, kind: str) -> None:
    wrong = f"the entry of {path!r}"
    _require(isinstance(entry, dict) and isinstance(entry.get("shape"), list) and len(entry["shape"]) <= 32, wrong)
    _require(all(_is_whole(size, 2**40) for size in entry["shape"]), wrong)
    _require(math.prod(max(size, 1) for size in entry["shape"]) < (2**32 if "draw" in entry else 2**40), wrong)
    _require(entry.get("dtype") in container.DTYPES.values(), wrong)
    _require(set(entry) <= {"shape", "dtype", "draw", "fill", "redraws"}, wrong)
    _require(kind == "drawn" or set(entry) == {"shape", "dtype"}, wrong)
    if "draw" in entry:
        draw = entry["draw"]
        _require(isinstance(draw, list) and len(draw) == 2 and _is_scale(draw[1]), wrong)
        _require(isinstance(draw[0], str) and draw[0] in DRAWS, wrong)
        _require(jnp.issubdtype(jnp.dtype(entry["dtype"]), jnp.floating) and "fill" not in entry, wrong)
    _require("fill" not in entry or (type(entry["fill"]) is float and math.isfinite(entry["fill"])), wrong)
    if "redraws" in entry:
        redraws = entry["redraws"]
        _require("draw" in entry and isinstance(redraws, list) and len(redraws) == 2, wrong)
        _require(redraws[0] in ("bits", "levels") and _are_planes(redraws[1]), wrong)


def _check_mask(path: str, entry: Any, kind: str) -> None:
    wrong = f"the entry of the mask of {path!r}"
    _require(isinstance(entry, dict) and set(entry) <= {"kind", "planes", "gain", "partition"}, wrong)
    _require(entry.get("kind") in codes.KINDS and _are_planes(entry.get("planes")), wrong)
    _require("gain" not in entry or _is_scale(entry["gain"]), wrong)
    if "partition" in entry:
        parts = entry["partition"]
        _require(kind == "drawn" and isinstance(parts, list) and len(parts) == 2, wrong)
        _require(all(_is_whole(count, 2**40) for count in parts), wrong)


def memory(header: Header) -> int:
    """The bytes that weights and masks take, and what they are made with."""
    sizes = {path: math.prod(entry["shape"]) for path, entry in header["leaves"].items()}
    widths = {path: jnp.dtype(entry["dtype"]).itemsize for path, entry in header["leaves"].items()}
    masked = [path for masks in header["masks"].values() for path in masks]
    return sum(sizes[path] * widths[path] for path in sizes) + sum(sizes[path] * (1 + widths[path]) for path in masked)


def _are_planes(planes: Any) -> bool:
    """Whether it is a list of [name, whole numbers ...]; `codes` checks the rest."""
    return isinstance(planes, list) and all(
        isinstance(plane, list)
        and len(plane) > 1
        and isinstance(plane[0], str)
        and all(_is_whole(part, 2**40) for part in plane[1:])
        for plane in planes
    )


def _is_whole(value: Any, end: int) -> bool:
    return type(value) is int and 0 <= value < end


def _is_scale(value: Any) -> bool:
    """Whether it is a finite float32."""
    return type(value) is float and abs(value) <= LARGEST_FLOAT32 and float(np.float32(value)) == value


def _require(fine: bool, what: str) -> None:
    if not fine:
        raise ValueError(f"its header does not fit the format: {what}")
