"""`diff`: how much two masks of the same network overlap, beside what chance gives."""

import json
from typing import Any

import numpy as np

from supermask_jax.commands import opened
from supermask_jax.commands.answers import WRONG, Answer, Failure, table
from supermask_jax.origins import Leaves

ALL = "all masks"
COUNTS = ("size", "kept_a", "kept_b", "both", "chance_both", "other_values")


def diff(first: str, second: str, *, as_json: bool, max_bytes: int | None) -> Answer:
    """Returns the overlap of two masks, layer by layer and altogether; its status is 1 where they differ.

    Args:
      first: FILE, or FILE:NAME for one of several masks.
      second: likewise.
      as_json: whether the answer is one JSON object.
      max_bytes: what each network may take in memory, or None.

    Raises:
      Failure: a file is damaged, or holds several masks and none is named; the masks are of different networks.
      OSError: a file cannot be read.
    """
    files = [opened.read(argument, max_bytes) for argument in (first, second)]
    masks = [file.held.masks[file.only] for file in files]
    shapes = [{path: mask.shape for path, mask in leaves.items()} for leaves in masks]
    if shapes[0] != shapes[1]:
        other = [path for path in sorted({*shapes[0], *shapes[1]}) if shapes[0].get(path) != shapes[1].get(path)]
        raise Failure(f"{first} and {second} hold masks of different networks. Not alike: {', '.join(other[:5])}")
    layers = overlaps(*masks)
    total = {key: sum(layer[key] for layer in layers) for key in COUNTS}
    facts: dict[str, Any] = {"a": first, "b": second, "layers": layers, "total": _measured({"path": ALL, **total})}
    status = WRONG if facts["total"]["hamming"] or facts["total"]["other_values"] else 0
    return Answer(json.dumps(facts, indent=2).splitlines() if as_json else _text(facts), status)


def overlaps(a: Leaves, b: Leaves) -> list[dict[str, Any]]:
    """Returns the overlap of each layer.

    "jaccard" is the number of positions that both keep over the number that at least one keeps; "hamming" is the number
    of positions where just one keeps. "chance_hamming" is its expectation for two random masks of the same densities,
    and "chance_jaccard" the ratio of the two expectations. "other_values" is the number of positions that both keep
    with different values, which masks of signs or of multiplicities can have.

    Args:
      a: {path: mask}; a position is kept where it is not 0.
      b: likewise, with the same paths and shapes.
    """
    layers = []
    for path in a:
        one, other = a[path] != 0, b[path] != 0
        kept = np.count_nonzero(one), np.count_nonzero(other)
        layer = {"path": path, "size": one.size, "kept_a": int(kept[0]), "kept_b": int(kept[1])}
        layer |= {"both": int(np.count_nonzero(one & other)), "chance_both": kept[0] * kept[1] / max(one.size, 1)}
        layer["other_values"] = int(np.count_nonzero(one & other & (a[path] != b[path])))
        layers.append(_measured(layer))
    return layers


def _measured(layer: dict[str, Any]) -> dict[str, Any]:
    kept, size = layer["kept_a"] + layer["kept_b"], layer["size"]
    found: dict[str, Any] = {}
    for prefix, both in (("", layer["both"]), ("chance_", float(layer["chance_both"]))):
        found[f"{prefix}jaccard"] = both / (kept - both) if kept - both else None  # both masks are empty
        found[f"{prefix}hamming"] = kept - 2 * both
    densities = {f"density_{which}": layer[f"kept_{which}"] / size if size else None for which in "ab"}
    return {**layer, **densities, **found}


def _text(facts: dict[str, Any]) -> list[str]:
    rows = [["layer", "density a", "density b", "jaccard", "chance", "hamming", "chance", "of"]]
    for layer in [*facts["layers"], facts["total"]]:
        fractions = (layer[key] for key in ("density_a", "density_b", "jaccard", "chance_jaccard"))
        row = [layer["path"], *("-" if value is None else f"{value:.4f}" for value in fractions)]
        rows.append([*row, f"{layer['hamming']:,}", f"{layer['chance_hamming']:,.0f}", f"{layer['size']:,}"])
    last = "the masks keep different positions" if facts["total"]["hamming"] else "the masks keep the same positions"
    if others := facts["total"]["other_values"]:
        last += f", {others:,} of them with different values"
    return [f"a: {facts['a']}", f"b: {facts['b']}", "", *table(rows), "", last]
