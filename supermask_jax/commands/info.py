"""`info`: what a file holds, and its size beside others of the same network."""

import gzip
import json
import math
from typing import Any

import numpy as np

from supermask_jax.commands import opened
from supermask_jax.commands.answers import Answer, by, table
from supermask_jax.commands.opened import Loaded, Opened
from supermask_jax.header import Header


def info(argument: str, *, as_json: bool, with_gzip: bool, max_bytes: int | None) -> Answer:
    """Returns what a file holds, as JSON or as text.

    Args:
      argument: FILE, or FILE:NAME for one of several masks.
      as_json: whether the answer is one JSON object.
      with_gzip: whether the weights are drawn and compressed for comparison.
      max_bytes: what the network may take in memory, or None.

    Raises:
      Failure: the file is damaged; gzip of weights that are not in the file.
      OSError: the file cannot be read.
    """
    file = opened.read(argument, max_bytes)
    names = list(file.held.masks) if file.name is None else [file.name]
    facts: dict[str, Any] = {
        "file": str(file.path),
        "origin": file.header["origin"],
        "masks": {name: _masks(file, name) for name in names},
        "unmasked": {
            path: entry["shape"]
            for path, entry in file.header["leaves"].items()
            if not any(path in file.held.masks[name] for name in names)
        },
        "state": {path: list(leaf.shape) for path, leaf in file.held.state.items()},
        "sizes": _sizes(file),
        "sha256": file.header["sha256"],
        "about": file.header["about"],
    }
    if with_gzip:
        for name, loaded in opened.load_each(file, names).items():
            facts["masks"][name]["gzip_bytes"] = _gzip_bytes(file, loaded)
    return Answer(json.dumps(facts, indent=2).splitlines() if as_json else _text(facts))


def told_origin(origin: Header) -> str:
    """Returns where weights come from, in a line."""
    if origin["kind"] == "base":
        return f"masks on weights from {origin['source']}"
    if origin["kind"] == "stored":
        return "weights stored in the file"
    seed = f"seed {origin['seed']}" if "seed" in origin else f"key {origin['key']}"
    stream = f", stream {origin['stream']!r}" if origin.get("stream") else ""
    return f"weights drawn by {origin.get('initializer')} with {seed}{stream}"


def _masks(file: Opened, name: str) -> dict[str, Any]:
    layers = []
    for path, mask in file.held.masks[name].items():
        kept = int(np.count_nonzero(mask))
        layer: dict[str, Any] = {"path": path, "shape": list(mask.shape), "size": mask.size, "kept": kept}
        entry = file.header["masks"][name][path]
        layer |= {"density": _density(kept, mask.size), "kind": entry["kind"]}
        layers.append(layer | ({"gain": entry["gain"]} if "gain" in entry else {}))
    kept, size = (sum(layer[of] for layer in layers) for of in ("kept", "size"))
    return {"layers": layers, "kept": kept, "size": size, "density": _density(kept, size), "gzip_bytes": None}


def _density(kept: int, size: int) -> float | None:
    return kept / size if size else None


def _sizes(file: Opened) -> dict[str, int]:
    """Bytes of the file, and of the same network with all weights in float32, or in 8 bits."""
    state = sum(leaf.nbytes for leaf in file.held.state.values())
    dense = coded = state
    for entry in file.header["leaves"].values():
        shape, size = entry["shape"], math.prod(entry["shape"])
        dense += 4 * size
        coded += size + 4 * shape[-1] if len(shape) >= 2 else 4 * size  # a scale for each index of the last axis
    return {"file": file.held.size, "dense_float32": dense, "dense_int8": coded, "state": state}


def _gzip_bytes(file: Opened, loaded: Loaded) -> int:
    """Bytes of the subnetwork's weights in float32, and of the state, compressed by gzip."""
    weights = b"".join(leaf.astype(np.float32).tobytes() for leaf in loaded.subnetwork().values())
    state = b"".join(leaf.tobytes() for leaf in file.held.state.values())
    return len(gzip.compress(weights + state, 6, mtime=0))


def _text(facts: dict[str, Any]) -> list[str]:
    lines = [f"{facts['file']}: {told_origin(facts['origin'])}"]
    for name, masks in facts["masks"].items():
        rows = [["layer", "shape", "kept", "of", "density"]]
        for layer in masks["layers"]:
            rows.append([layer["path"], by(layer["shape"]), *_kept(layer)])
        heading = [f"masks {name!r}"] if len(facts["masks"]) > 1 else []
        lines += ["", *heading, *table([*rows, ["all masks", "", *_kept(masks)]], left=2)]
        if gains := {layer["path"]: layer["gain"] for layer in masks["layers"] if "gain" in layer}:
            lines += [f"what is kept of {path} is multiplied by {gain:g}" for path, gain in gains.items()]
    for what, told in (("unmasked", "without a mask"), ("state", "state of the model")):
        if facts[what]:
            some = [f"{path} ({by(shape)})" for path, shape in facts[what].items()]
            more = [f"and {len(some) - 4} more"] if len(some) > 5 else []
            lines += ["", f"{told}: {', '.join([*some[: 4 if more else 5], *more])}"]
    return [*lines, "", *_size_lines(facts), *_about_lines(facts["about"])]


def _kept(part: dict[str, Any]) -> list[str]:
    density = "-" if part["density"] is None else f"{part['density']:.4f}"
    return [f"{part['kept']:,}", f"{part['size']:,}", density]


def _size_lines(facts: dict[str, Any]) -> list[str]:
    sizes = facts["sizes"]
    shown = {"this file": sizes["file"]}
    for name, masks in facts["masks"].items():
        if masks["gzip_bytes"] is not None:
            which = f" of {name!r}" if len(facts["masks"]) > 1 else ""
            shown[f"weights * masks{which} in float32, gzip"] = masks["gzip_bytes"]
    shown |= {"all weights in 8 bits": sizes["dense_int8"], "all weights in float32": sizes["dense_float32"]}
    rows = [[name, f"{size:,}", f"{size / sizes['file']:.2f} x"] for name, size in shown.items()]
    return table([["size", "bytes", "of this file"], *rows])


def _about_lines(about: dict[str, Any]) -> list[str]:
    if not about:
        return []
    rows = [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in about.items()]
    return ["", *table([["about", ""], *rows], left=2)]
