"""Figures of a transport plan: scores, prior, and the plan that they make, with its certificates.

Everything is drawn from a "plan_slice" result.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from goatviz.plots import legacy_marks as marks
from goatviz.plots import style
from goatviz.plots.figure import Figure
from goatviz.results import PLAN_SLICE, check_result

#: Cells along one side of a map; longer windows are pooled.
MAX_CELLS = 160
#: Tokens along one side that still have room for their text.
MAX_TOKENS = 32


def draw_plan(plan: xr.Dataset) -> Figure:
    """Draw a plan slice: content scores, prior, plan, and the incoming mass of every key.

    Parameters
    ----------
    plan : xarray.Dataset
        From `goatviz.plan_slice`.

    Returns
    -------
    Figure
        Windows longer than 160 positions are pooled: scores averaged, masses summed over keys
        and averaged over queries; the caption says so. It also carries the KKT residual, the
        duality gap and POT's verdict.

    Raises
    ------
    TypeError
        If `plan` is not a plan slice.
    """
    check_result(plan, PLAN_SLICE)
    queries, query_edges = _bins(plan["query"].values)
    keys, key_edges = _bins(plan["key"].values)
    allowed = plan["allowed"].values
    seen = _sum(_sum(allowed.astype(float), query_edges, 0), key_edges, 1)
    scores = np.where(allowed, plan["scores"].values, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        scores = _sum(_sum(scores, query_edges, 0), key_edges, 1) / seen
    rows = np.diff(query_edges)[:, None]
    prior, weights = (
        _sum(_sum(plan[name].values, query_edges, 0), key_edges, 1) / rows
        for name in ("prior", "weights")
    )
    visible = seen > 0
    tokens = "key_token" in plan.variables
    figure = Figure(
        make_subplots(
            rows=2,
            cols=3,
            row_heights=[0.22, 0.78],
            horizontal_spacing=0.13,
            vertical_spacing=0.09,
            specs=[[None, None, {}], [{}, {}, {}]],
            subplot_titles=(
                "Incoming mass of each key",
                "Content scores s",
                "Prior π",
                "Plan p = softmax(s/τ + log π)",
            ),
        )
    )
    pooled = len(queries) < plan.sizes["query"] or len(keys) < plan.sizes["key"]
    hover = "query %{y}, key %{x}" + (" (first of its bin)" if pooled else "")
    place = {"y": 0.0, "yanchor": "bottom", "len": 0.72, "thickness": 10}
    maps = [
        marks.signed_map(
            keys,
            queries,
            np.where(visible, scores, np.nan),
            hover=hover + "<br>score {value}",
            bar={"title": "score", "x": 0.248, **place},
        ),
        marks.probability_map(
            keys, queries, np.where(visible, prior, np.nan), hover=hover + "<br>prior {value}"
        ),
        marks.probability_map(
            keys, queries, np.where(visible, weights, np.nan), hover=hover + "<br>weight {value}"
        ),
    ]
    figure.add_trace(marks.probability_bar(x=1.005, **place), row=2, col=3)
    for col, (heatmap, values) in enumerate(
        zip(maps, (scores, prior, weights), strict=True), start=1
    ):
        figure.add_trace(heatmap, row=2, col=col)
        for special in marks.special_cells(keys, queries, values, visible):
            figure.add_trace(special, row=2, col=col)
    if not visible.all():
        figure.add_trace(marks.legend_square("not allowed", style.MASKED))
    incoming = _sum(plan["incoming_mass"].values, key_edges, 0)
    figure.add_trace(
        go.Bar(
            x=marks.compact(keys),
            y=incoming.astype(np.float32),
            marker={"color": style.LINES[0], "line": {"width": 0}},
            showlegend=False,
            hovertemplate="key %{x}<br>incoming mass %{y:.4g}<extra></extra>",
        ),
        row=1,
        col=3,
    )
    uniform = 1.0 / plan.attrs["n_keys"]
    figure.add_hline(
        y=uniform, line={"color": style.LINES[1], "dash": "dash", "width": 1.5}, row=1, col=3
    )
    figure.update_yaxes(title_text="mass", rangemode="tozero", row=1, col=3)
    figure.update_xaxes(showticklabels=False, row=1, col=3)
    figure.update_xaxes(title_text="key [tokens]", showgrid=False, row=2)
    figure.update_yaxes(title_text="query [tokens]", autorange="reversed", showgrid=False, row=2)
    room = _token_ticks(figure, plan) if tokens and not pooled else 0
    for col in (2, 3):
        figure.update_yaxes(title_text="", showticklabels=False, row=2, col=col)
    figure.update_layout(
        template=style.TEMPLATE,
        title={
            "text": "A transport plan",
            "subtitle": {
                "text": f"{style.escape(plan.attrs['source'])}, τ = {plan.attrs['temperature']:g}"
            },
        },
        height=630 + room,
        bargap=0.0,
        margin={"t": 100, "b": 140 + room, "l": 70, "r": 80},
        legend={"x": 0.0, "y": 0.98, "yanchor": "top"},
    )
    kkt, gap = plan["kkt_residual"].values, np.abs(plan["duality_gap"].values)
    lines = [
        f"certificates: largest KKT residual {np.max(kkt):.1e}, largest duality gap "
        f"{np.max(gap):.1e} (units of the scores); dashed: uniform mass 1/{plan.attrs['n_keys']}",
        style.escape(plan.attrs["check"]),
    ]
    if pooled:
        lines.append(
            f"pooled from {plan.sizes['query']} × {plan.sizes['key']}: scores averaged, masses "
            "summed over keys and averaged over queries"
        )
    figure.add_annotation(marks.caption("<br>".join(lines), yshift=-62 - room))
    return figure


def _bins(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First position of each bin, and the edges of the bins as indices."""
    count = len(positions)
    edges = np.unique(np.linspace(0, count, min(count, MAX_CELLS) + 1).round().astype(int))
    return positions[edges[:-1]], edges


def _sum(values: np.ndarray, edges: np.ndarray, axis: int) -> np.ndarray:
    return np.add.reduceat(values, edges[:-1], axis=axis)


def _token_ticks(figure: Figure, plan: xr.Dataset) -> int:
    """Integer axes with token texts: repeated labels would hide cells, tags would be markup.

    Returns the pixels that upright texts need below the axis.
    """
    if plan.sizes["query"] <= MAX_TOKENS:
        texts = [style.escape(t) for t in plan["query_token"].values]
        figure.update_yaxes(
            tickvals=plan["query"].values.tolist(),
            ticktext=texts,
            tickfont_size=_text_size(len(texts)),
            row=2,
        )
    if plan.sizes["key"] > MAX_TOKENS:
        return 0
    texts = [style.escape(t) for t in plan["key_token"].values]
    figure.update_xaxes(
        tickvals=plan["key"].values.tolist(),
        ticktext=texts,
        tickangle=90,
        tickfont_size=_text_size(len(texts)),
        row=2,
    )
    return 7 * max(len(str(t)) for t in plan["key_token"].values)


def _text_size(count: int) -> int:
    """The largest font that keeps `count` labels apart along one map."""
    return max(6, min(11, 170 // count))
