"""Pages, figures and README's tables, all rendered from the documents that benchmarks wrote.

A block of a README begins with ``<!-- benchmark: NAME -->`` for the whole table, with ``NAME,
targets`` for what the targets say, or with ``NAME, ratios`` for a Markdown table of ratios
(``ratios of TEXT``: of cases whose name contains it). All up to ``<!-- end -->`` is made by `fill`,
never typed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from benchmarks._report import Document, read, render_text, verdict

BLOCK = re.compile(
    r"(?P<begin><!-- benchmark: (?P<name>\w+)(?:, (?P<view>[^>]+?))? -->)\n.*?"
    r"(?P<end><!-- end -->)",
    re.DOTALL,
)
DASHES = ("solid", "dash", "dot", "dashdot")


def documents(folder: Path) -> dict[str, Document]:
    """The documents of a folder by the name of their benchmark."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def view(document: Document, what: str | None) -> str:
    """A document as Markdown: whole, or one of its summaries.

    Raises
    ------
    ValueError
        If there is no such view.
    """
    if what is None:
        return f"```text\n{render_text(document)}\n```"
    if what == "targets":
        return "\n".join(f"- {' '.join(verdict(each).split())}" for each in document["targets"])
    if what == "ratios":
        return ratios(document)
    if what.startswith("ratios of "):
        return ratios(document, what.removeprefix("ratios of "))
    raise ValueError(f"a block must show targets, ratios or ratios of TEXT, got {what!r}")


def ratios(document: Document, part: str = "") -> str:
    """A Markdown table: a row for each metric and case, a column for each length."""
    rows = [row for row in document["rows"] if row["ratio"] is not None and part in row["case"]]
    lengths = sorted({row["length"] for row in rows})
    table: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        table.setdefault((row["metric"], row["case"]), {})[row["length"]] = row["ratio"]
    lines = [
        "| what | case | " + " | ".join(f"{length:,}" for length in lengths) + " |",
        "|---|---|" + "---:|" * len(lengths),
    ]
    for (metric, case), found in table.items():
        cells = [f"{found[length]:.2f}" if length in found else "" for length in lengths]
        lines.append("| " + " | ".join([metric, case, *cells]) + " |")
    return "\n".join(lines)


def fill(text: str, found: Mapping[str, Document]) -> str:
    """A README with every block made anew.

    Raises
    ------
    ValueError
        If a block names a benchmark that has no document.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in found:
            raise ValueError(f"a block shows benchmark {name!r}, of which there is no result")
        return f"{match['begin']}\n{view(found[name], match['view'])}\n{match['end']}"

    return BLOCK.sub(block, text)


def page(found: Mapping[str, Document]) -> str:
    """One Markdown page of all documents."""
    parts = ["# Benchmarks", *(f"## {name}\n\n{view(each, None)}" for name, each in found.items())]
    return "\n\n".join(parts) + "\n"


def scaling(document: Document) -> go.Figure | None:
    """Time against length on logarithmic axes, a panel for each metric; None without lengths."""
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    units = {}
    for row in document["rows"]:
        if row["ratio"] is not None and row["length"] is not None:
            case = series.setdefault(row["metric"], {}).setdefault(row["case"], [])
            case.append((row["length"], row["value"]))
            units[row["metric"]] = row["unit"]
    series = {
        metric: cases
        for metric, cases in series.items()
        if any(len(points) > 1 for points in cases.values())
    }
    if not series:
        return None
    return _draw(document, series, units)


def _draw(
    document: Document,
    series: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
    units: Mapping[str, str],
) -> go.Figure:
    figure = make_subplots(cols=len(series), subplot_titles=list(series))
    for column, (metric, cases) in enumerate(series.items(), start=1):
        for number, (case, points) in enumerate(cases.items()):
            lengths, values = zip(*sorted(points), strict=True)
            trace = go.Scatter(
                x=lengths,
                y=values,
                name=case,
                legend=f"legend{column}" if column > 1 else "legend",
                mode="lines+markers",
                line_dash=DASHES[number % len(DASHES)],
            )
            figure.add_trace(trace, row=1, col=column)
        figure.update_xaxes(type="log", title_text="length, tokens", row=1, col=column)
        figure.update_yaxes(type="log", title_text=f"time, {units[metric]}", row=1, col=column)
        place = {"x": (column - 0.95) / len(series), "y": -0.2, "yanchor": "top"}
        figure.update_layout({f"legend{column}" if column > 1 else "legend": place})
    figure.update_layout(
        title_text=document["about"], height=650, width=420 * len(series), margin_b=220
    )
    return figure
