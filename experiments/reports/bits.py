"""The tables of docs/results/bits.md: what `experiments.bits` found, from the summaries that the project keeps."""

from collections.abc import Mapping
from typing import Any

from experiments.plots.bits import MASKS_ONLY
from experiments.run import markdown

STORED = (MASKS_ONLY, "float32", "int8", "int4")  # the order of the columns


def by_density(summary: Mapping[str, Any]) -> str:
    """Of the networks that keep a part of their weights: a row for each part, a column for each kind of file."""
    points = [point for point in summary["points"] if point["asked"] < 1]
    cells = {(point["line"], point["asked"]): _cell(point) for point in points}
    lines = dict.fromkeys(line for line, _ in cells)
    asked = dict.fromkeys(density for _, density in cells)
    rows = [(f"{100 * density:g} %", *(cells.get((line, density), "") for line in lines)) for density in asked]
    return markdown.table(("Kept", *lines), rows)


def others(summary: Mapping[str, Any]) -> str:
    """Of the other networks: a row for each, a column for each number format."""
    networks: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for point in summary["points"]:
        if point["asked"] == 1:
            networks.setdefault((point["family"], point["network"]), {})[point["stored"]] = point
    columns = [name for name in STORED if any(name in found for found in networks.values())]
    rows = []
    for (family, network), found in networks.items():
        kept = next(iter(found.values()))["density"]
        cells = [_cell(found[name]) if name in found else "" for name in columns]
        rows.append((family, network, f"{100 * kept:.3g} %", *cells))
    return markdown.table(("Method", "Network", "Kept", *columns), rows)


def _cell(point: Mapping[str, Any]) -> str:
    """Accuracy in percent, its range over the seeds, and bytes; bold on the Pareto front."""
    text = f"{100 * point['test_accuracy']:.2f}"
    if point["seeds"] > 1:
        text += f" ({100 * point['lowest']:.2f} to {100 * point['highest']:.2f})"
    text += f", {point['file_bytes']:,.0f}"
    return f"**{text}**" if point["front"] else text


SECTIONS = ("bits", "seeds", "convnet", "conv2", "conv4")
TABLES = {
    f"{name}, {what}": lambda figures, section=name, make=make: make(figures[section]["summary"])
    for name in SECTIONS
    for what, make in (("by density", by_density), ("others", others))
}
"""{name in the document: what makes the table of the figures}."""
