"""Panels and their lowering: whatever is drawn has its own place, and a choice is that drawing."""

import itertools
import json

import numpy as np
import plotly.graph_objects as go
import pytest

from goatviz.plots import marks
from goatviz.plots.base import (
    LIMIT_BYTES,
    Entry,
    Panel,
    Words,
    as_figure,
    as_json,
    grid,
    menu,
    single,
)
from tests.factories import unpacked

WORDS = Words("Title", "a subtitle", ["A caption."])


def panels(seed: int, *, more: bool = False, cells: int = 6) -> list[Panel]:
    rng = np.random.default_rng(seed)
    x = np.arange(cells)
    z = rng.normal(size=(cells, cells))
    curves = [marks.curve(x, z[0], name="kernel", color="#000000", hover="%{y}")]
    if more:
        curves.append(marks.curve(x, z[1], name="recency", color="#ff0000", hover="%{y}"))
    return [
        Panel(
            "Curve", curves, {"title": "lag [tokens]"}, {"title": "κ [nats]"}, note=f"seed {seed}"
        ),
        Panel(
            "Map",
            marks.signed_map(
                x, x, z, np.ones_like(z, bool), name="K", hover="{value}", unit="nats"
            ),
            {"title": "key [tokens]"},
            {"title": "query [tokens]", "autorange": "reversed"},
            masked=True,
        ),
    ]


def entries(layers: int, heads: int, **kwargs) -> list[Entry]:
    return [
        Entry(
            f"head {head}",
            panels(10 * layer + head, more=bool(head % 2), **kwargs),
            f"layer {layer}",
            f"block {layer}",
            rank=-abs(layer - 1) - abs(head - 1),
        )
        for layer, head in itertools.product(range(layers), range(heads))
    ]


def data_of(figure: go.Figure) -> list[dict]:
    """What is visible of a figure, without what a legend needs."""
    drawn = [trace for trace in figure.to_dict()["data"] if trace.pop("visible", True)]
    return [{name: v for name, v in one.items() if name != "showlegend"} for one in drawn]


def checked(figure: go.Figure) -> go.Figure:
    """The figure, every setting of which plotly knows."""
    go.Figure(figure.to_dict())
    return figure


def test_panels_have_places_of_their_own():
    figure = checked(grid(panels(0) + panels(1), WORDS))
    spans = [
        (figure.layout[f"xaxis{n}"].domain, figure.layout[f"yaxis{n}"].domain)
        for n in ("", 2, 3, 4)
    ]
    for (ax, ay), (bx, by) in itertools.combinations(spans, 2):
        apart = ax[1] < bx[0] or bx[1] < ax[0] or ay[1] < by[0] or by[1] < ay[0]
        assert apart
    assert all(0 <= low < high <= 1 for span in spans for low, high in span)


def test_a_panel_keeps_its_axes_and_references():
    shape = marks.upright(3.0)
    figure = checked(grid([Panel("A", []), Panel("B", [], shapes=[shape])], WORDS))
    (moved,) = figure.layout.shapes
    assert (moved.xref, moved.yref) == ("x2", "y2 domain")


def test_equal_legend_entries_are_shown_once():
    figure = grid(panels(0) + panels(1), WORDS)
    shown = [trace.name for trace in figure.data if trace.showlegend]
    assert shown == ["kernel"]


def test_a_choice_is_that_entry_drawn():
    chosen = menu(entries(3, 3), WORDS)
    for layer, head in itertools.product(range(3), range(3)):
        alone = menu([entries(3, 3)[3 * layer + head]], WORDS)
        picked = checked(chosen.choose(layer=layer, head=head))
        assert data_of(picked) == data_of(alone)
        assert picked.layout.title.subtitle.text == f"a subtitle; block {layer}<br>"
        assert not picked.layout.updatemenus


def test_a_menu_opens_on_the_highest_rank_and_reaches_every_head():
    figure = checked(menu(entries(3, 3), WORDS))
    layers, *heads = figure.layout.updatemenus
    assert (layers.active, [m.visible for m in heads]) == (1, [False, True, False])
    assert [m.active for m in heads] == [1, 1, 1]
    assert [[b.label for b in m.buttons] for m in heads] == [["head 0", "head 1", "head 2"]] * 3
    assert data_of(figure) == data_of(figure.choose(layer=1, head=1))


def test_one_group_has_one_menu_and_one_entry_none():
    assert len(menu(entries(1, 3), WORDS).layout.updatemenus) == 1
    assert not menu(entries(1, 1), WORDS).layout.updatemenus


def test_a_choice_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"head must be one of the menu's \(head 0, .*got 7"):
        menu(entries(2, 3), WORDS).choose(layer=0, head=7)
    with pytest.raises(ValueError, match="none: this figure has no such menu"):
        single(panels(0)[0]).choose(head=1)


def test_a_menu_of_hundreds_of_heads_stays_small():
    figure = menu(entries(30, 9, cells=16), WORDS)
    assert len(figure.to_json(validate=False)) < LIMIT_BYTES
    assert len(figure.data) == 3


def test_images_have_no_menu_and_a_ground():
    image = menu(entries(2, 2), WORDS).as_image(layer=1, head=0, theme="dark")
    assert not image.layout.updatemenus and image.layout.paper_bgcolor == "#111111"


def test_texts_are_texts():
    hostile = "<b>x</b> & %{y} <img src=x onerror=alert(1)>"
    figure = grid(
        [Panel(hostile, [], note=hostile, caption=[])], Words(hostile, hostile, [hostile])
    )
    texts = [note.text for note in figure.layout.annotations]
    texts += [figure.layout.title.text, figure.layout.title.subtitle.text]
    assert all("<img" not in text and "&lt;img" in text for text in texts)


def test_long_words_are_wrapped_and_given_room():
    long = "a sentence that is far too long for one line of a narrow figure " * 4
    short, tall = (grid(panels(0), Words("T", text, [text])) for text in ("short", long))
    assert tall.layout.height > short.layout.height
    lines = tall.layout.title.subtitle.text.split("<br>")
    assert max(map(len, lines)) < 100
    assert tall.layout.margin.t > short.layout.margin.t


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="panels must hold"):
        grid([], WORDS)
    with pytest.raises(ValueError, match="entries must hold"):
        menu([], WORDS)
    with pytest.raises(ValueError, match="equally many panels"):
        menu([Entry("a", panels(0)), Entry("b", panels(0)[:1])], WORDS)


def test_captions_of_panels_are_said_once():
    both = [Panel("A", [], caption=["shared"]), Panel("B", [], caption=["shared", "its own"])]
    caption = grid(both, WORDS).layout.annotations[-1].text
    assert caption.split("<br>") == ["A caption.", "shared", "its own"]


@pytest.mark.parametrize("drawn", [panels(0)[0], panels(0)[1], panels(1), single(panels(0)[1])])
def test_a_panels_json_is_that_of_its_figure(drawn):
    quick, slow = (
        unpacked(json.loads(text))
        for text in (as_json(drawn), as_figure(drawn).to_json(validate=False))
    )
    if not isinstance(drawn, go.Figure):
        # Its text, for a page that is wider.
        first = drawn if isinstance(drawn, Panel) else drawn[0]
        assert quick["layout"].pop("meta")["title"] == first.title
    quick, slow = (
        json.dumps(each, default=np.ndarray.tolist, sort_keys=True) for each in (quick, slow)
    )
    assert quick == slow


def test_what_cannot_be_json_is_refused():
    with pytest.raises(TypeError, match="drawn must be a plotly Figure or panels, got dict"):
        as_json({})
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_json(Panel("A", [{"type": "scatter", "y": [float("nan")]}]))


def test_axes_of_one_title_zoom_together():
    figure = checked(grid(panels(0) + panels(1), WORDS, linked="xy"))
    matches = [figure.layout[f"{side}axis{n}"].matches for side in "xy" for n in ("", 2, 3, 4)]
    assert matches == [None, None, "x", "x2", None, None, "y", "y2"]


def test_a_legend_has_the_rows_that_it_needs():
    def height(names, width):
        x = np.arange(2)
        traces = [marks.curve(x, x, name=n, color="#000000", hover="") for n in names]
        return single(Panel("A", traces, {"title": "x"}, {"title": "y"}), width=width)

    one, four = height(["plan"], 340), height(["a long name of a curve", "b", "c", "d"], 340)
    assert four.layout.height == one.layout.height + 60
    assert one.layout.legend.entrywidth is None and four.layout.legend.entrywidth > 100
    wide = height(["a long name of a curve", "b", "c", "d"], 660)
    assert wide.layout.legend.entrywidth is None


def test_long_titles_are_wrapped():
    figure = single(Panel("a title that is far too long " * 4, []), width=340)
    assert figure.layout.title.text.count("<br>") > 2
