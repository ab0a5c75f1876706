"""Pictures of `experiments.lottery`: tickets beside their controls, learning curves, what is left of each input."""

from pathlib import Path

import numpy as np

from experiments.plots.style import BLUE, COLOURS, ORANGE, evenly, new_figure, save, style_axes

KINDS = {  # in the order of legends and tables
    "ticket": ("winning ticket", BLUE, "o"),
    "reinit": ("same masks, other weights", ORANGE, "s"),
    "random": ("random masks, same weights", "#009E73", "^"),
}
CURVES = 6  # rounds in a picture of learning curves
TILES = 8  # rounds in a picture of inputs
PANELS = (
    ("early_stop_test_accuracy", 100, "test accuracy at early stopping (%)"),
    ("early_stop_step", 1, "early-stopping iteration"),
    ("test_accuracy", 100, "test accuracy at the end (%)"),
)


def draw(path: Path, summary: dict) -> None:
    """Draws tickets.png, curves.png and, where inputs have connections of their own, inputs.png."""
    save(tickets(summary), path / "tickets.png")
    save(curves(summary), path / "curves.png")
    if summary["per_input"]:
        save(inputs(summary), path / "inputs.png")


def by_density(records: list[dict], kind: str) -> list[tuple[float, list[dict]]]:
    """[(density, the trials' records)] of one kind of network, the full network first; controls begin with it too."""
    rounds: dict[int, list[dict]] = {}
    for record in records:
        if record["network"] == kind:
            rounds.setdefault(record["round"], []).append(record)
    return [(rounds[number][0]["density"], rounds[number]) for number in sorted(rounds)]


def tickets(summary: dict):
    """Accuracy and early-stopping iteration against the weights remaining: Frankle & Carbin 2019, figure 4."""
    figure = new_figure(_title(summary), 12, 4.2)
    axes = figure.subplots(1, 3)
    full = by_density(summary["networks"], "ticket")[:1]
    for ax, (name, scale, label) in zip(axes, PANELS, strict=True):
        for kind, (kind_label, colour, marker) in KINDS.items():
            points = by_density(summary["networks"], kind)
            if not points:
                continue
            points = points if kind == "ticket" else [*full, *points]
            x = [100 * density for density, _ in points]
            values = [[scale * record[name] for record in records] for _, records in points]
            band(ax, x, values, colour, marker, kind_label)
        ax.axhline(scale * np.mean([r[name] for r in full[0][1]]), color="0.5", linestyle=":", linewidth=1)
        style_axes(ax, "weights remaining (%)", label)
        remaining_axis(ax, [100 * density for density, _ in by_density(summary["networks"], "ticket")])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def band(ax, x, values: list[list[float]], colour: str, marker: str, label: str) -> None:
    """A line through the means, in a band from the lowest to the highest."""
    ax.plot(x, [np.mean(v) for v in values], color=colour, marker=marker, markersize=4, label=label)
    ax.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, linewidth=0)


def remaining_axis(ax, percents: list[float]) -> None:
    """A log axis from 100 % down, with a tick at every density if there is room, else at every second, and so on."""
    ax.set_xscale("log")
    shown = percents[:: -(-len(percents) // 8)]
    ax.set_xticks(shown, [f"{percent:.3g}" for percent in shown])
    ax.set_xticks([], minor=True)
    ax.set_xlim(max(percents) * 1.08, min(percents) / 1.08)


def curves(summary: dict):
    """Test accuracy over the iterations, of tickets and of the same masks on other weights; means of the trials."""
    figure = new_figure(_title(summary), 9, 4.2)
    kinds = [kind for kind in ("ticket", "reinit") if by_density(summary["networks"], kind)]
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    rounds = [number for number, _ in enumerate(by_density(summary["networks"], "ticket"))]
    chosen = [int(number) for number in evenly(rounds, CURVES)]
    lows = []
    for ax, kind in zip(axes, kinds, strict=True):
        points = {records[0]["round"]: (density, records) for density, records in by_density(summary["networks"], kind)}
        for _i, number in enumerate(n for n in chosen if n in points):
            density, records = points[number]
            step = np.array(records[0]["curve"]["step"])
            accuracy = 100 * np.mean([record["curve"]["test_accuracy"] for record in records], axis=0)
            ax.plot(step[1:], accuracy[1:], color=COLOURS[chosen.index(number)], label=f"{100 * density:.3g} % left")
            lows.append(accuracy[len(accuracy) // 4 :].min())
        style_axes(ax, "iteration", "test accuracy (%)")
        ax.set_title(KINDS[kind][0], fontsize=10)
        ax.legend(fontsize=8, frameon=False, loc="lower right")
    axes[0].set_ylim(bottom=2 * min(lows) - 100 if 60 < min(lows) < 99 else 0, top=100)
    return figure


def inputs(summary: dict):
    """The part of each pixel's connections that is left, a tile for each round."""
    figure = new_figure(f"connections left of each pixel · {summary['model']} on {summary['dataset']}", 11, 2.6)
    densities = [density for density, _ in by_density(summary["networks"], "ticket")]
    chosen = evenly(list(range(len(summary["per_input"]))), TILES)
    axes = figure.subplots(1, len(chosen), squeeze=False)[0]
    for ax, number in zip(axes, chosen, strict=True):
        kept = np.array(summary["per_input"][number])
        side = round(len(kept) ** 0.5)
        image = ax.imshow(kept.reshape(side, -1) if side * side == len(kept) else kept[None], vmin=0, vmax=1)
        ax.set_title(f"{100 * densities[number]:.3g} % left", fontsize=9)
        ax.set_axis_off()
    figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.4, label="fraction kept", aspect=40)
    return figure


def _title(summary: dict) -> str:
    config = summary["config"]
    how = "one-shot" if config["rounds"] == 1 else f"{config['rounds']} rounds"
    to = f"to step {config['rewind_step']}" if config["rewind_step"] else "to the start"
    ways = {"learning-rate": f"learning rate rewound {to}", "finetune": "fine-tuned"}
    where = ways.get(config["kept"], f"rewound {to}")
    usual = {"criterion": "large_final", "kept": "rewind", "pruned": "zero", "scope": "layer", "unit": "weight"}
    named = [name for name, value in usual.items() if config[name] != value and config[name] not in ways]
    others = [f"{name} {config[name]}" for name in named]
    if summary["tickets_from"] != summary["dataset"]:
        others.append(f"tickets from {summary['tickets_from']}")
    trials = f"{config['trials']} trials, lowest to highest" if config["trials"] > 1 else "1 trial"
    return " · ".join([f"{summary['model']} on {summary['dataset']}", f"{how}, {where}", *others, trials])
