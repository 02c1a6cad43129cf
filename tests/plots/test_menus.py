"""A menu shows what its choice draws, hides what the others draw, and keeps the rest."""

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.subplots import make_subplots

from goatviz.plots import Figure
from goatviz.plots import legacy_marks as marks
from goatviz.plots.menus import add_choices


@dataclass(frozen=True)
class Head:
    label: str
    name: str = "block.<0>"


HEADS = [Head("head 0"), Head("head 1"), Head("head 2")]


def line(head):
    return go.Scatter(y=[1, 2], name=head.label)


def masked(*cells):
    return go.Heatmap(z=np.array([cells], dtype=np.float32), name="not allowed")


def shown(figure, number):
    """Names of the traces that are visible after the menu's entry of this number is taken."""
    visible = figure.layout.updatemenus[0].buttons[number].args[0]["visible"]
    assert len(visible) == len(figure.data)
    return [trace.name for trace, on in zip(figure.data, visible, strict=True) if on]


def test_one_choice_at_a_time_and_the_rest_always():
    figure = Figure(go.Scatter(y=[0], name="always"))
    add_choices(figure, HEADS, lambda head: [line(head)], "A title", pad=24)
    assert [trace.name for trace in figure.data if trace.visible is not False] == [
        "always",
        "head 0",
    ]
    for number, head in enumerate(HEADS):
        assert shown(figure, number) == ["always", head.label]
        button = figure.layout.updatemenus[0].buttons[number]
        assert button.label == head.label
        assert button.args[1] == {"title.subtitle.text": f"{head.label} (block.&lt;0&gt;)"}
    assert figure.layout.title.text == "A title"
    assert figure.layout.title.subtitle.text == "head 0 (block.&lt;0&gt;)"
    assert figure.layout.updatemenus[0].pad.b == 24


def test_a_single_choice_has_no_menu():
    figure = Figure()
    add_choices(figure, HEADS[:1], lambda head: [line(head)], "A title", pad=24)
    assert figure.layout.updatemenus == ()
    assert figure.data[0].visible and figure.layout.title.subtitle.text


def test_equal_marks_are_added_once():
    cells = {"head 0": (1, np.nan), "head 1": (1, np.nan), "head 2": (np.nan, 1)}
    figure = Figure()
    add_choices(
        figure, HEADS, lambda head: [line(head), masked(*cells[head.label])], "A title", pad=24
    )
    heatmaps = [trace for trace in figure.data if isinstance(trace, go.Heatmap)]
    assert len(heatmaps) == 2
    for number, head in enumerate(HEADS):
        visible = figure.layout.updatemenus[0].buttons[number].args[0]["visible"]
        drawn = [t for t, on in zip(figure.data, visible, strict=True) if on]
        (mask,) = [trace for trace in drawn if isinstance(trace, go.Heatmap)]
        np.testing.assert_array_equal(mask.z, [cells[head.label]])


def test_equal_marks_of_two_subplots_are_two():
    figure = Figure(make_subplots(rows=1, cols=2))
    add_choices(figure, HEADS, lambda head: [(masked(1), 1, 1), (masked(1), 1, 2)], "T", pad=46)
    axes = [trace.xaxis for trace in figure.data if isinstance(trace, go.Heatmap)]
    assert axes == ["x", "x2"]
    assert shown(figure, 2) == ["not allowed"] * 3


@pytest.mark.parametrize("name", marks.SPECIAL)
def test_special_cells_have_one_legend_entry(name):
    figure = Figure()
    heatmap = {"z": [[1.0]], "name": name}
    add_choices(figure, HEADS, lambda head: [go.Heatmap(heatmap)], "A title", pad=24)
    (entry,) = [trace for trace in figure.data if isinstance(trace, go.Scatter)]
    assert entry.name == name and entry.marker.color == marks.SPECIAL[name]
    assert all(shown(figure, number).count(name) == 2 for number in range(3))


def test_a_note_follows_the_menu():
    figure = Figure()
    figure.add_annotation(text="")
    add_choices(
        figure,
        HEADS,
        lambda head: [line(head)],
        "A title",
        pad=24,
        note=lambda head: f"note of {head.label}",
    )
    assert figure.layout.annotations[0].text == "note of head 0"
    for button in figure.layout.updatemenus[0].buttons:
        assert button.args[1]["annotations[0].text"] == f"note of {button.label}"
