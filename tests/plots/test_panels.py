"""Figures side by side: all traces and marks are there, each in its cell and nowhere else."""

import numpy as np
import plotly.graph_objects as go
import pytest

from goatviz.plots import Figure, style
from goatviz.plots.panels import side_by_side


def curve(name="a", *, title="Curve"):
    figure = Figure(
        data=[go.Scatter(y=[1.0, 3.0, 2.0], name=name)],
        layout={
            "template": style.TEMPLATE,
            "title": {"text": title, "subtitle": {"text": "said below"}},
            "xaxis": {"title": {"text": "key [token]"}},
            "legend": {"orientation": "h"},
        },
    )
    figure.add_vline(x=1)
    figure.add_annotation(x=0.5, y=0.5, xref="paper", yref="paper", text="middle")
    return figure


def matrix(**trace):
    return Figure(
        data=[go.Heatmap(z=np.arange(12.0).reshape(3, 4), **trace)],
        layout={"template": style.TEMPLATE, "yaxis": {"autorange": "reversed"}},
    )


def domains(figure, trace):
    axes = [figure.layout[f"{side}axis{getattr(trace, f'{side}axis')[1:]}"].domain for side in "xy"]
    return [tuple(axis) for axis in axes]


def apart(one, other):
    return one[1] <= other[0] or other[1] <= one[0]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_figure_keeps_its_data_in_a_cell_of_its_own(count):
    figures = [curve(f"curve {n}") if n % 2 else matrix() for n in range(count)]
    found = side_by_side(figures, title="All <b>")
    assert len(found.data) == count
    cells = [domains(found, trace) for trace in found.data]
    for n, (x, y) in enumerate(cells):
        assert 0 <= x[0] < x[1] <= 1 and 0 <= y[0] < y[1] <= 1
        for other_x, other_y in cells[:n]:
            assert apart(x, other_x) or apart(y, other_y)
    for trace, figure in zip(found.data, figures, strict=True):
        name = "z" if trace.type == "heatmap" else "y"
        np.testing.assert_array_equal(trace[name], figure.data[0][name])
    assert found.layout.title.text == "All &lt;b&gt;"
    # Nothing of the originals was changed.
    assert figures[0].data[0].xaxis is None


def test_marks_move_with_their_figure():
    found = side_by_side([curve("a"), curve("b", title="Other")])
    for number, trace in enumerate(found.data):
        (low, high), _ = domains(found, trace)
        texts = [a for a in found.layout.annotations if a.text == "middle"]
        assert low < texts[number].x < high and texts[number].xref == "paper"
        line = found.layout.shapes[number]
        assert line.xref == trace.xaxis and line.yref == f"{trace.yaxis} domain"
    titles = [a.text for a in found.layout.annotations if a.text.startswith("<b>")]
    assert titles == ["<b>Curve</b><br>said below", "<b>Other</b><br>said below"]
    assert found.data[1].legend == "legend2" and found.layout.legend2.x > 0.5


def test_colour_bars_stand_beside_their_cells():
    shared = matrix(coloraxis="coloraxis")
    shared.update_layout(coloraxis={"colorscale": "Viridis", "cmin": 0, "cmax": 9})
    marked = Figure(data=[go.Scatter(y=[1], marker={"color": [1], "showscale": True})])
    found = side_by_side([matrix(), shared, shared, marked])
    cells = [domains(found, trace) for trace in found.data]
    bars = [
        found.data[0].colorbar,
        found.layout.coloraxis.colorbar,
        found.layout.coloraxis2.colorbar,
        found.data[3].marker.colorbar,
    ]
    assert [found.data[n].coloraxis for n in (1, 2)] == ["coloraxis", "coloraxis2"]
    for (x, y), bar in zip(cells, bars, strict=True):
        assert x[1] <= bar.x < x[1] + 0.05
        assert bar.y == pytest.approx(sum(y) / 2) and bar.len == pytest.approx(y[1] - y[0])


def test_figures_with_subplots_keep_their_order():
    two = Figure(
        data=[go.Scatter(y=[1, 2]), go.Scatter(y=[2, 1], xaxis="x2", yaxis="y2")],
        layout={
            "xaxis": {"matches": "x2", "anchor": "y"},
            "yaxis": {"domain": [0.6, 1]},
            "xaxis2": {"anchor": "y2"},
            "yaxis2": {"domain": [0, 0.4], "anchor": "x2"},
        },
    )
    found = side_by_side([curve(), two])
    upper, lower = (domains(found, trace)[1] for trace in found.data[1:])
    assert upper[0] > lower[1]
    assert found.layout.xaxis2.matches == "x3" and found.layout.yaxis3.anchor == "x3"


def test_one_alone_comes_back_as_it_is():
    figure = curve()
    found = side_by_side([figure], title="ignored")
    assert found.to_dict() == figure.to_dict() and found is not figure


@pytest.mark.parametrize(
    ("figures", "options", "says"),
    [([], {}, "at least one figure"), ([curve()], {"columns": 0}, "columns must be at least 1")],
)
def test_bad_input(figures, options, says):
    with pytest.raises(ValueError, match=says):
        side_by_side(figures, **options)
