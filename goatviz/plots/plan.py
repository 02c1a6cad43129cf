"""Plots of a transport plan: scores, prior, the plan that they give, and one row of it.

Panels of a "plan_slice" and of a "plan_row" result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from goatviz import bins
from goatviz.plots import marks, style
from goatviz.plots.base import Panel, Words, grid
from goatviz.plots.figure import Figure
from goatviz.results import PLAN_ROW, PLAN_SLICE, check_result

if TYPE_CHECKING:
    import xarray as xr

#: Largest number of cells along a side of a map; longer windows are pooled.
MAX_CELLS = 160
#: Largest number of points of POT's solution that are drawn, half of them its largest masses.
MAX_RINGS = 40


def draw_plan(plan: xr.Dataset) -> Figure:
    """Draw a plan slice: content scores, prior, plan, and the incoming mass of every key.

    Parameters
    ----------
    plan : xarray.Dataset
        From `goatviz.plan_slice`.

    Returns
    -------
    Figure
        The caption has the KKT residual, the duality gap and the verdict of POT. Windows longer
        than 160 positions are pooled, and the caption says so: scores are averaged, masses are
        summed over keys and averaged over queries.

    Raises
    ------
    TypeError
        If `plan` is not a plan slice.
    """
    check_result(plan, PLAN_SLICE)
    window = _Window(plan)
    caption = [
        f"{plan.attrs['check'][0].upper()}{plan.attrs['check'][1:]}.",
        f"Dashed: uniform mass 1/{plan.attrs['n_keys']:,}.",
    ]
    panels = [window.masses("weights"), window.incoming()]
    # From weights alone neither scores nor prior are known.
    if plan.attrs.get("scores_known", 1):
        panels = [window.scores(), window.masses("prior"), *panels]
        kkt, gap = plan["kkt_residual"].values, np.abs(plan["duality_gap"].values)
        caption.insert(
            0,
            f"Certificates: largest KKT residual {np.nanmax(kkt):.1e}, largest duality gap "
            f"{np.nanmax(gap):.1e} (units of the scores).",
        )
    if "sink_weight" in plan:
        column = plan["sink_weight"].values
        caption.append(
            f"A column without a key takes {np.nanmean(column):.3f} of the mass on average "
            f"({np.nanmin(column):.3f} to {np.nanmax(column):.3f}); the rows shown sum to the rest."
        )
    caption += residual_sentence(plan)
    if window.pooled:
        caption.append(
            f"Pooled from {plan.sizes['query']:,} × {plan.sizes['key']:,}: scores are averaged, "
            "masses summed over keys and averaged over queries."
        )
    words = Words(
        "A transport plan",
        f"{plan.attrs['source']}, temperature τ = {plan.attrs['temperature']:g}",
        caption,
    )
    return grid(panels, words, linked="xy")


def residual_sentence(result: xr.Dataset) -> list[str]:
    """What a caption says of the kernel that made a plan, if its output was compared with it."""
    if "residual" not in result.attrs:
        return []
    return [
        "The kernel's own output differs from the plan times the values by at most "
        f"{result.attrs['residual']:.1e} of the largest value."
    ]


class _Window:
    """A plan slice, pooled to the number of cells that can be drawn."""

    def __init__(self, plan: xr.Dataset) -> None:
        self.plan = plan
        self.rows, self.columns = (
            bins.even_edges(plan.sizes[dim], MAX_CELLS) for dim in ("query", "key")
        )
        self.queries = plan["query"].values[self.rows[:-1]]
        self.keys = plan["key"].values[self.columns[:-1]]
        shape = len(self.queries), len(self.keys)
        self.pooled = shape != (plan.sizes["query"], plan.sizes["key"])
        self.mean_scores, self.seen = bins.cell_mean(
            plan["scores"].values, plan["allowed"].values, self.rows, self.columns
        )
        self.hover = "query %{y:,}, key %{x:,}" + (" (first of its bin)" if self.pooled else "")

    def axes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        keys, queries = {"title": "key [tokens]"}, {"title": "query [tokens]"}
        queries["autorange"] = "reversed"
        for dim, axis in (("key", keys), ("query", queries)):
            axis["tickformat"] = marks.tick_format(self.plan[dim].values)
            if f"{dim}_token" in self.plan.variables:
                axis |= marks.token_ticks(
                    self.plan[dim].values, self.plan[f"{dim}_token"].values, dim
                )
        return keys, queries

    def scores(self) -> Panel:
        cells = self.keys, self.queries, self.mean_scores, self.seen
        hover = f"{self.hover}<br>score {{value}}"
        traces = marks.signed_map(*cells, name="score", hover=hover, unit="score")
        return self._map("Content scores s", traces)

    def masses(self, name: str) -> Panel:
        rows = np.diff(self.rows)[:, None]
        mass = bins.bin_sum(bins.bin_sum(self.plan[name].values, self.rows, 0), self.columns) / rows
        what = "prior" if name == "prior" else "weight"
        cells = self.keys, self.queries, mass, self.seen
        hover = f"{self.hover}<br>{what} {{value}}"
        title = "Prior π" if name == "prior" else "Plan p ∝ π exp(s/τ)"
        return self._map(title, marks.probability_map(*cells, name=what, hover=hover))

    def _map(self, title: str, traces: Sequence[marks.Trace]) -> Panel:
        x, y = self.axes()
        return Panel(title, traces, x, y, height=300, masked=not self.seen.all())

    def incoming(self) -> Panel:
        x, _ = self.axes()
        mass = bins.bin_sum(self.plan["incoming_mass"].values, self.columns)
        return Panel(
            "Incoming mass of each key",
            [
                marks.bars(
                    self.keys,
                    mass,
                    name="incoming mass",
                    color=style.LINES[0],
                    hover="key %{x:,}<br>incoming mass %{y:.4g}",
                    showlegend=False,
                )
            ],
            x,
            {"title": "mass [share of the queries']", "rangemode": "tozero"},
            shapes=[marks.level(1.0 / self.plan.attrs["n_keys"], color=style.LINES[1])],
            height=300,
        )


# --- a map as an explorer shows it ---


def shares_panel(
    title: str,
    shares: np.ndarray,
    texts: Sequence[str],
    *,
    x: np.ndarray,
    y: np.ndarray,
    axes: tuple[Mapping[str, Any], Mapping[str, Any]],
    signed: bool = False,
    note: str = "",
    chosen: np.ndarray | None = None,
) -> Panel:
    """A map whose cells are shares of a scale of colours, made elsewhere.

    Parameters
    ----------
    title, note : str
        Text above the map.
    shares : array
        Shape (rows, columns), 0 at the first colour and 1 at the last; NaN where there is no cell.
    texts : sequence of str
        Values of evenly spaced shares, from 0 to 1, beside the scale.
    x, y : array
        Place of each column and each row.
    axes : tuple of mapping
        plotly's settings of the two axes, of which the vertical one runs downwards.
    signed : bool
        Whether the middle of the scale stands for 0.
    chosen : array of bool, optional
        The cells that get a frame, where cells are one unit wide.
    """
    scale = style.DIVERGING if signed else style.SEQUENTIAL
    # Cells stand around their places.
    halves = [(places[1] - places[0]) / 2 if len(places) > 1 else 0.5 for places in (x, y)]
    across = {"range": [x[0] - halves[0], x[-1] + halves[0]], **axes[0]}
    down = {"range": [y[-1] + halves[1], y[0] - halves[1]], **axes[1]}
    traces: list[marks.Trace] = [
        marks.heatmap(
            x,
            y,
            shares,
            name="weight",
            hover="query %{y:,}, key %{x:,}",
            colorscale=scale,
            zmin=0.0,
            zmax=1.0,
        ),
        marks.colour_bar(
            "weight bar",
            colorscale=scale,
            cmin=0.0,
            cmax=1.0,
            colorbar={"tickvals": np.linspace(0, 1, len(texts)).tolist(), "ticktext": list(texts)},
        ),
    ]
    if chosen is not None:
        traces += marks.double_frame(x, y, chosen, name="chosen pair")
    return Panel(
        title,
        traces,
        across,
        down,
        note=note,
        height=230,
        masked=bool(np.isnan(shares).any()),
    )


# --- one row ---


class _Curve(NamedTuple):
    """Values of a row by point, how they are drawn, and at which points."""

    name: str
    values: np.ndarray
    look: Mapping[str, Any]
    at: slice | np.ndarray = slice(None)


def row_panels(
    row: xr.Dataset, other: xr.Dataset | None = None, name: str = "other plan"
) -> list[Panel]:
    """Plan and prior of one query by key, and the scores and log-prior behind them.

    Parameters
    ----------
    row : xarray.Dataset
        From `goatviz.analysis.PlanLevels.row`.
    other : xarray.Dataset, optional
        The row of another plan at the same keys, which is drawn with the first one.
    name : str
        What the other plan is, for the legend.

    Returns
    -------
    list of Panel
        The first has the traces "plan" and "prior" and, if the row has them, "POT" (its own
        solution: rings at all points, or at the 20 largest and 20 more), "doubly stochastic" and
        the mean of several queries. The second, "What makes it", has "score / τ", "log-prior" and
        the level "−potential / τ": where the two add up to this level, the plan would be 1.

    Raises
    ------
    TypeError
        If `row` is not a plan row.
    ValueError
        If the rows are of different keys.
    """
    check_result(row, PLAN_ROW)
    masses = _masses(row)
    if other is not None:
        check_result(other, PLAN_ROW)
        if not np.array_equal(other["key_stop"], row["key_stop"]):
            raise ValueError("other must be a row of the same keys")
        masses.append(_Curve(f"plan, {name}", other["weights"].values, _line(row, 7, "dashdot")))
    start, stop = row["key"].values, row["key_stop"].values
    middle = (start + stop - 1) / 2
    hover, texts = _row_hover(row)
    ticks = {"title": "key [tokens]", "tickformat": marks.tick_format(start)}
    if "key_token" in row.variables:
        ticks |= marks.token_ticks(start, row["key_token"].values, "key")

    def traces(curves: Sequence[_Curve], unit: str) -> list[marks.Trace]:
        return [
            {
                "type": "scatter",
                "x": middle[one.at],
                "y": one.values[one.at],
                "name": one.name,
                **{name: each[one.at] for name, each in texts.items()},
                "hovertemplate": f"{hover}<br>%{{y:.4g}}{unit}"
                f"<extra>{style.escape(one.name)}</extra>",
                "connectgaps": False,
                **one.look,
            }
            for one in curves
        ]

    attrs = row.attrs
    pooled = int((stop - start).max())
    note = (
        f"temperature {attrs['temperature']:.3g}; entropy {attrs['entropy']:.3g} nats; "
        f"KL to the prior {attrs['kl_to_prior']:.3g} nats"
        + (f"; up to {pooled:,} keys a point, masses summed" if pooled > 1 else "")
    )
    if (start[0], stop[-1]) != (0, attrs["keys"]):
        note += f"; keys {start[0]:,}–{stop[-1] - 1:,} of {attrs['keys']:,}"
    title = f"Query {attrs['query']:,}: plan and prior"
    mass = {"title": "probability [1]", "rangemode": "tozero"}
    return [
        Panel(title, traces(masses, ""), ticks, mass, note=note, height=200),
        Panel("What makes it", traces(_terms(row), " nats"), ticks, {"title": "log-mass [nats]"},
              height=180),
    ]  # fmt: skip


def _row_hover(row: xr.Dataset) -> tuple[str, dict[str, Any]]:
    """The hover text for the key of a point, and the texts or numbers that it refers to."""
    start, stop = row["key"].values, row["key_stop"].values
    if "key_token" in row.variables:
        pairs = zip(start, row["key_token"].values, strict=True)
        names = [f"key {key:,} “{style.escape(token)}”" for key, token in pairs]
        return "%{text}", {"text": np.array(names, dtype=object)}
    if (stop - start).max() > 1:
        ends = np.stack([start, stop - 1], axis=-1).astype(np.int32)
        return "keys %{customdata[0]:,} to %{customdata[1]:,}", {"customdata": ends}
    # No texts: they would be most of what a slider sends.
    return "key %{x:,}", {}


def _line(row: xr.Dataset, number: int, dash: str) -> dict[str, Any]:
    return {
        "mode": "lines+markers" if row.sizes["key"] <= marks.MAX_TOKENS else "lines",
        "line": {"color": style.LINES[number], "dash": dash, "width": 2},
        "marker": {"size": 5, "color": style.LINES[number]},
    }


def _masses(row: xr.Dataset) -> list[_Curve]:
    curves = [
        _Curve("plan", row["weights"].values, _line(row, 0, "solid")),
        _Curve("prior", row["prior"].values, _line(row, 1, "dash")),
    ]
    if "solver" in row.variables:
        # Below the plan, which they must not hide.
        curves.insert(0, _rings(row["solver"].values))
    if "balanced" in row.variables:
        balanced = row["balanced"].values
        curves.append(_Curve("doubly stochastic", balanced, _line(row, 5, "dot")))
    if "mean" in row.variables:
        name = f"queries {row.attrs['mean_start']:,}–{row.attrs['mean_stop'] - 1:,}, mean"
        curves.append(_Curve(name, row["mean"].values, _line(row, 4, "longdash")))
    return curves


def _rings(values: np.ndarray) -> _Curve:
    """POT's solution as thin rings: some of its points, if there are many."""
    places = np.flatnonzero(np.isfinite(values))
    name, half = "POT", MAX_RINGS // 2
    if len(places) > MAX_RINGS:
        largest = places[np.argsort(-values[places], kind="stable")[:half]]
        others = np.setdiff1d(places, largest)
        even = others[np.linspace(0, len(others) - 1, half).round().astype(np.intp)]
        name = f"POT, {MAX_RINGS} of {len(places):,} points"
        places = np.union1d(largest, even)
    line = {"color": style.INK, "width": 1}
    marker = {"symbol": "circle-open", "size": 8, "color": style.INK, "line": line}
    return _Curve(name, values, {"mode": "markers", "marker": marker}, places)


def _terms(row: xr.Dataset) -> list[_Curve]:
    temperature = row.attrs["temperature"]
    level = np.where(row["allowed"].values, -row.attrs["potential"] / temperature, np.nan)
    dotted = {"mode": "lines", "line": {"color": style.INK, "dash": "dot", "width": 1.5}}
    return [
        _Curve("score / τ", row["scores"].values / temperature, _line(row, 2, "solid")),
        _Curve("log-prior", row["log_prior"].values, _line(row, 3, "dash")),
        _Curve("−potential / τ", level, dotted),
    ]
