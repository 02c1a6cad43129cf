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
from goatviz.plots import style

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
    rows = -(-len(series) // 2)
    figure = make_subplots(
        rows=rows,
        cols=min(2, len(series)),
        subplot_titles=list(series),
        vertical_spacing=0.24 / rows,
        horizontal_spacing=0.14,
    )
    # A case looks the same in every panel, and stands in the legend once.
    names = list(dict.fromkeys(case for cases in series.values() for case in cases))
    named: set[str] = set()
    for place, (metric, cases) in enumerate(series.items()):
        at = {"row": place // 2 + 1, "col": place % 2 + 1}
        for case, points in cases.items():
            number = names.index(case)
            lengths, values = zip(*sorted(points), strict=True)
            trace = go.Scatter(
                x=lengths,
                y=values,
                name=case,
                legendgroup=case,
                showlegend=case not in named,
                mode="lines+markers",
                line={
                    "color": style.LINES[number % len(style.LINES)],
                    "dash": DASHES[number // len(style.LINES) % len(DASHES)],
                },
            )
            figure.add_trace(trace, **at)
            named.add(case)
        lengths = sorted({length for points in cases.values() for length, _ in points})
        figure.update_xaxes(
            type="log",
            tickvals=lengths,
            ticktext=[f"{length:,}" for length in lengths],
            title_text="length [tokens]",
            **at,
        )
        figure.update_yaxes(
            type="log",
            dtick="D2",
            exponentformat="none",
            separatethousands=True,
            title_text=f"time [{units[metric]}]",
            **at,
        )
    figure.update_layout(
        template=style.template(),
        title_text="Time against length",
        title_subtitle_text=document["about"].replace("; ", "<br>").replace(" (", "<br>("),
        height=180 + 420 * rows + 18 * len(names),
        margin={"t": 180, "b": 40 + 18 * len(names)},
        legend={"orientation": "h", "y": -0.12, "yanchor": "top"},
    )
    return figure
