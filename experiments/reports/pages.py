"""The tables as Markdown, as a part of README, and as one HTML page that needs no other file."""

import base64
import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.plots.lines import counted
from experiments.reports.published import Experiment
from experiments.reports.tables import Row
from experiments.run.files import write_text
from experiments.run.markdown import table

Tables = Sequence[tuple[Experiment, list[Row]]]

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
HEADS = ("Network and method", "Published", "Ours", "Runs", "Difference", "Epochs", "Command", "Where and when")
README_HEADS = ("Experiment", "Command", "Test accuracy", "Published")
NOTE = (
    "Accuracies are on all test images, after the last epoch unless a table says otherwise: the mean over seeds, and "
    "in parentheses the lowest and the highest. A difference is in points, ours minus published. Where our training is "
    "shorter than the published one, the table says so. `python -m experiments.report` writes this page."
)
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid #8884; }
td:nth-child(n+2):nth-child(-n+6) { white-space: nowrap; font-variant-numeric: tabular-nums; }
code { font-size: 12px; }
img { max-width: 100%; background: white; border-radius: 6px; }
tr.missing { opacity: .55; }
"""


def markdown(tables: Tables) -> str:
    """The page docs/results/published.md."""
    parts = ["# Published figures and ours", NOTE]
    for experiment, rows in tables:
        done = [[*_cells(row)] for row in rows if row.accuracies]
        parts += [f"## {experiment.title}", experiment.text]
        parts += [table(HEADS, done).rstrip()] if done else []
        parts += [*_not_run(rows), *_sources(rows)]
    return "\n\n".join(parts) + "\n"


def readme_table(tables: Tables) -> str:
    """The rows that README shows: figures that are marked as its headlines, as far as they were run."""
    lines = []
    for _, rows in tables:
        for row in rows:
            if row.figure.headline and row.accuracies:
                published = _percent(row.figure.accuracy)
                published += f", {row.figure.epochs:,} epochs" if row.cut_short else ""
                ours = f"**{_ours(row)}**" + (f", {counted(row.epochs, 'epoch')}" if row.epochs else "")
                lines.append([_name(row), f"`{row.command}`", ours, published])
    return table(README_HEADS, lines).rstrip()


def with_table(readme: str, made: str) -> str:
    """README with another table between the two marks; ValueError where they are not."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no table between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def page(tables: Tables, picture: Callable[[Experiment, list[Row]], bytes | None]) -> str:
    """The HTML page; picture: (experiment, its rows) -> a PNG, or None where there is nothing to draw."""
    parts = []
    for experiment, rows in tables:
        parts.append(f"<h2 id='{experiment.name}'>{html.escape(experiment.title)}</h2>")
        parts.append(f"<p>{html.escape(experiment.text)}</p>")
        drawn = picture(experiment, rows)
        if drawn:
            data = base64.b64encode(drawn).decode()
            parts.append(f"<img alt='{html.escape(experiment.title)}' src='data:image/png;base64,{data}'>")
        parts.append(_html_table(rows))
        parts += [f"<p><small>{html.escape(line)}</small></p>" for line in _sources(rows)]
    head = "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Published figures and ours</title>"
    head += f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style></head><body>"
    note = html.escape(NOTE.replace("`", ""))
    return f"{head}<h1>Published figures and ours</h1><p>{note}</p>{''.join(parts)}</body></html>\n"


def write(file: Path, text: str) -> bool:
    """Writes the file atomically if its text changes; returns whether it did."""
    if file.exists() and file.read_text() == text:
        return False
    write_text(file, text)
    return True


def _not_run(rows: list[Row]) -> list[str]:
    """The published figures beside which nothing of ours stands: a line for each network and method."""
    series: dict[str, list[str]] = {}
    for figure in (row.figure for row in rows if not row.accuracies and row.figure.accuracy is not None):
        at = ", ".join(re.findall(r"[\d.]+ % kept", figure.what))
        series.setdefault(figure.series, []).append(_percent(figure.accuracy) + (f" ({at})" if at else ""))
    lines = [f"- {name}: {', '.join(figures)}" for name, figures in series.items()]
    return ["\n".join(["Published, and not run here:", "", *lines])] if lines else []


def _cells(row: Row) -> tuple[str, ...]:
    published = _percent(row.figure.accuracy)
    if not row.accuracies:
        return (_name(row), published, "not run", "", "", "", "", "")
    difference = "" if row.difference is None else f"{100 * row.difference:+.2f}"
    epochs = f"{row.epochs:,}" if row.epochs else ""
    if row.cut_short:
        epochs += f", cut short (published: {row.figure.epochs:,})"
    elif row.figure.accuracy is not None and row.epochs:
        epochs += f" (published: {row.figure.epochs:,})" if row.figure.epochs else " (published: not known)"
    when = ", ".join(filter(None, (row.device, row.date)))
    return (_name(row), published, _ours(row), str(len(row.accuracies)), difference, epochs, f"`{row.command}`", when)


def _name(row: Row) -> str:
    return f"{row.figure.what}; {row.variant}" if row.variant else row.figure.what


def _ours(row: Row) -> str:
    assert row.mean is not None
    spread = f" ({100 * row.spread[0]:.2f} to {100 * row.spread[1]:.2f})" if row.spread else ""
    return _percent(row.mean) + spread


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f} %"


def _sources(rows: list[Row]) -> list[str]:
    sources = list(dict.fromkeys(row.figure.source for row in rows if row.figure.source))
    return [f"Published figures: {'; '.join(sources)}."] if sources else []


def _html_table(rows: list[Row]) -> str:
    def cell(text: str) -> str:
        code = text.startswith("`")
        return f"<td><code>{html.escape(text.strip('`'))}</code></td>" if code else f"<td>{html.escape(text)}</td>"

    head = "".join(f"<th>{head}</th>" for head in HEADS)
    lines = [f"<tr{'' if row.accuracies else ' class=missing'}>{''.join(map(cell, _cells(row)))}</tr>" for row in rows]
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(lines)}</table></div>"
