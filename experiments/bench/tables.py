"""The tables of docs/scaling.md and docs/running.md, from figures of the benchmark and the formulae of `cost_model`."""

import math
from functools import partial

import numpy as np

from experiments.bench.cost_model import CHIPS, collective_bytes, cost_model, most_passes
from experiments.bench.networks import describe, split_layers
from experiments.bench.operations import KINDS
from experiments.bench.rows import short
from experiments.bench.scaling import totals
from experiments.bench.scaling_step import LAYOUTS
from experiments.run.markdown import table

CHIP = "TPU v5p"
CHIPS_IN_ALL = (8, 256, 4096)
PER_CHIP, IN_ALL = 32, 4096  # images: the published batch of 256 on 8 chips; and one batch however many chips


def faults_table(measured: dict) -> str:
    """What was done to runs, how often, and how many survived."""
    lines = [(fault["fault"], f"{fault['survived']:,} of {fault['tries']:,}") for fault in measured["faults"]]
    return table(("fault", "survived"), lines)


def traffic_table(measured: dict) -> str:
    """Bytes of the compiled step, beside those of the formulae."""
    lines = []
    for one in measured["traffic"]:
        if not one["as_on_accelerators"]:
            continue
        parts = [kinds for part, kinds in one["parts"].items() if "selection" not in part]
        network = describe(one["network"])
        formulae = "-"
        if one["layout"] != "sharded":
            split = split_layers(network.scores, one["devices"]) if one["layout"] == "gathered" else ()
            by_part = collective_bytes(network, one["layout"], split)
            by_formula = sum(sum(kinds.values()) for kinds in by_part.values())
            formulae = "equal" if by_formula == totals(one)["others"] else f"{by_formula:,}"
        kinds = [sum(of.get(kind, 0) for of in parts) for kind in ("all-reduce", "all-gather")]
        others = totals(one)["others"] - sum(kinds)
        lines.append(
            (f"{one['network']}, {one['scores']:,}", one["layout"], *map("{:,}".format, (*kinds, others)), formulae)
        )
    return table(("network, scores", "scores are", "all-reduce", "all-gather", "other", "by formula"), lines)


def selection_table(measured: dict) -> str:
    """What selection exchanges where scores are split, and how often."""
    lines = []
    for one in measured["traffic"]:
        if one["layout"] != "gathered" or not one["as_on_accelerators"]:
            continue
        (on_cpu,) = (
            totals(other)["a pass"]
            for other in measured["traffic"]
            if other["network"] == one["network"] and not other["as_on_accelerators"]
        )
        bytes_, passes = totals(one), measured["passes"][one["network"]]
        largest = max(map(math.prod, describe(one["network"]).scores.values()))
        whole = bytes_["once"] + max(passes.values()) * bytes_["a pass"]
        sizes = (f"{size:,}" for size in (bytes_["a pass"], on_cpu, bytes_["once"], whole))
        counted = (", ".join(map(str, passes.values())), most_passes(largest))
        lines.append((f"{one['network']}, {one['scores']:,}", one["layers"], *sizes, *counted))
    head = ("network, scores", "layers", "bytes a pass", "on a CPU", "once", "in all", "passes", "at most")
    return table(head, lines)


def speed_table(measured: dict) -> str:
    """Steps per second of fake devices, medians, and the share of a step that selection takes."""
    lines = []
    for n, seconds in measured["speed"].items():
        seconds = {name: np.array(of) for name, of in seconds.items()}
        rates = [f"{np.median(1 / seconds[layout]):.1f}" for layout in (*LAYOUTS, "pmap")]
        shares = [seconds[f"selection, {layout}"] / seconds[layout] for layout in LAYOUTS[:2]]
        lines.append((n, *rates, *(f"{np.median(share):.0%}" for share in shares)))
    head = ("devices", *LAYOUTS, "pmap", "selection, replicated", "selection, sharded")
    return table(head, lines)


def cost_table(name: str, measured: dict) -> str:
    """The cost model's times and bytes of a step on 8, 256 and 4,096 chips."""
    network, passes, lines = describe(name), max(measured["passes"][name].values()), []
    for chips in CHIPS_IN_ALL:
        split = split_layers(network.scores, chips)
        for images in sorted({PER_CHIP, IN_ALL // chips}):
            for layout in ("replicated", "gathered"):
                cost = cost_model(network, chips, images, CHIPS[CHIP], layout, split, passes)
                times = (cost.compute, cost.selection, cost.elementwise, cost.wire, cost.latency)
                times = (f"{1e3 * seconds:.2f}" for seconds in times)
                step = f"{1e3 * cost.overlapped:.1f} - {1e3 * cost.apart:.1f}"
                memory = (f"{size / 1e9:.2f}" for size in (cost.state + cost.temporary, cost.activations))
                setting = (f"{chips:,} x {images}", f"{chips * images:,}", layout)
                lines.append((*setting, *times, step, f"{cost.sent / 1e6:,.0f}", *memory))
    times = ("compute", "selection", "update", "sending", "waiting", "step")
    return table(("chips x images", "batch", "scores are", *times, "MB sent", "GB", "GB activations"), lines)


def machine_line(measured: dict) -> str:
    """What the figures were measured on."""
    about = measured["about"]
    versions = [f"{name} {about['versions'][name]}" for name in ("jaxlib", "torch") if name in about["versions"]]
    machine = f"{about['cores']} cores, {about['device']}, {about['instructions']}"
    return f"{machine}; {about['config']['rounds']} rounds; {', '.join(versions)}.\n"


def steps_table(measured: dict) -> str:
    """Ratios of training steps: a row for each, a column for each batch size or network."""
    groups = {group: {line["name"]: line for line in lines} for group, lines in _groups(measured).items()}
    groups = {group: lines for group, lines in groups.items() if "dense" in lines}
    names = dict.fromkeys(name for lines in groups.values() for name, line in lines.items() if line["unit"] == "x")
    heads = [group.removeprefix("training step, ").removesuffix(", batch 128") for group in groups]
    return table(("ratio", *heads), [(name, *(_compared(of, name) for of in groups.values())) for name in names])


def _compared(lines: dict[str, dict], name: str) -> str:
    """A ratio, the two times of which it is one, and its target: `1.05 x (25.2 / 23.9 ms); <= 1.1 met`."""
    if name not in lines:
        return ""
    line, prefix = lines[name], "compiling, " if name.startswith("compiling, ") else ""
    parts = [prefix + part for part in name.removeprefix(prefix).split(" / ")]
    times = " / ".join(short(lines[part]["median"]) for part in parts)
    target = f"; {line['target']} {'met' if line['met'] else 'missed'}" if "target" in line else ""
    return f"{line['median']:.2f} x ({times} {lines[parts[0]]['unit']}){target}"


def operations_table(measured: dict) -> str:
    """Milliseconds of single convolutions and BatchNorms: a row for each shape."""
    groups = {group: lines for group, lines in _groups(measured).items() if group.startswith("convolution, ")}
    lines = []
    for group, own in groups.items():
        ms = {line["name"]: short(line["median"]) for line in own if line["unit"] == "ms"}
        kinds = (*KINDS, "torch, all three", "BatchNorm", "torch, BatchNorm")
        lines.append((group.removeprefix("convolution, "), *(ms.get(kind, "") for kind in kinds)))
    return table(("ms", *KINDS, "PyTorch", "BatchNorm", "PyTorch"), lines)


def partition_table(measured: dict) -> str:
    """Selection beside numpy.partition: a row for each kind of scores, a column for each density."""
    ratios = {
        group: next(line["median"] for line in lines if line["name"] == "selection / numpy.partition")
        for group, lines in _groups(measured).items()
        if group.startswith("selection, ")
    }
    kinds = dict.fromkeys(group.rpartition(", ")[0] for group in ratios)
    densities = dict.fromkeys(group.rpartition(", ")[2] for group in ratios)
    lines = [
        (kind.removeprefix("selection, "), *(f"{ratios[f'{kind}, {density}']:.1f} x" for density in densities))
        for kind in kinds
    ]
    return table(("scores", *(f"density {density}" for density in densities)), lines)


def growth_table(measured: dict) -> str:
    """Time, memory and compilation of a selection: a row for each tree and number of devices."""
    lines = []
    for of in measured["trees"]:
        done = "seconds" in of
        figures = (1e3 * np.median(of["seconds"]), of["peak_bytes"] / 1e6, of["compile_seconds"]) if done else ()
        cells = map("{:,.0f}".format, figures) if done else ("left out", "", "")
        lines.append((of["tree"], f"{of['scores'] / 1e6:,.0f}", of["arrays"], of["devices"], *cells))
    head = ("scores of", "millions", "arrays", "devices", "ms", "peak of the process, MB", "compilation, s")
    return table(head, lines)


def _groups(measured: dict) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for line in measured["rows"]:
        found.setdefault(line["group"], []).append(line)
    return found


TABLES = {
    "machine": machine_line,
    "steps": steps_table,
    "operations": operations_table,
    "selection beside numpy.partition": partition_table,
    "growth": growth_table,
    "faults": faults_table,
    "traffic": traffic_table,
    "selection": selection_table,
    "speed": speed_table,
    "resnet-50": partial(cost_table, "resnet-50"),
    "wide-resnet-50": partial(cost_table, "wide-resnet-50"),
}
"""{name in a document: what makes the table of the figures}."""
