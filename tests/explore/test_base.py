"""What every explorer does: one picture for each change, errors said, long work beside, an end."""

import asyncio
import gc
import json
import threading
import weakref

import comm
import numpy as np
import pytest
import traitlets

from goatviz import checks
from goatviz.explore import Selection
from goatviz.explore.base import Explorer, Picture
from goatviz.explore.controls import Control
from goatviz.explore.page import FigureView, Page, Place, plotly_library
from goatviz.plots.base import Panel
from goatviz.plots.figure import Figure
from tests.factories import figure_text


class Counting(Explorer):
    """Draws its head and size; slow and failing on request."""

    shown = ("head", "size")
    panels = {"curve": 300}
    head = traitlets.Int(0).tag(sync=True)
    size = traitlets.Float(1.0).tag(sync=True)

    def __init__(self, *, heads=4, long=False, selection=None):
        super().__init__()
        self._count, self._long = heads, long
        self.drawn, self.gate = [], threading.Event()
        self._set_up(
            [
                Control("head", "Head", options=[(n, str(n)) for n in range(heads)]),
                Control("size", "Size", "slider", low=0.01, high=100, step=0.1, log=True),
                Control("again", "Again", "button"),
            ],
            label="Counting",
            selection=selection,
        )

    def _check(self, values):
        checks.index("head", values["head"], self._count)

    def _is_long(self, values):
        return self._long

    def _picture(self, values, task):
        if self._long:
            while not self.gate.wait(0.01):
                task(0.5)
        if values["size"] > 50:
            raise RuntimeError("too large <b>")
        self.drawn.append(dict(values))
        panel = Panel("Curve", [{"type": "scatter", "y": [values["head"], values["size"]]}])
        return Picture({"curve": panel}, f"head {values['head']} <b>")


def shown(explorer):
    packed = json.loads(figure_text(explorer, "curve"))["data"][0]["y"]
    return packed if isinstance(packed, list) else None


def test_a_change_asks_for_one_picture():
    explorer = Counting()
    assert len(explorer.drawn) == 1
    explorer.head = 2
    explorer.set(head=3, size=2.0)
    explorer.set(head=3)
    assert [(each["head"], each["size"]) for each in explorer.drawn] == [(0, 1), (2, 1), (3, 2)]
    assert shown(explorer) == [3, 2.0]
    assert explorer.summary == "head 3 <b>"


def test_page_and_kernel_set_the_same_values():
    explorer = Counting()
    explorer.set_state({"head": 1, "size": 3.0})
    assert (explorer.head, explorer.size) == (1, 3.0) and len(explorer.drawn) == 2
    explorer.size = 0.5
    assert explorer.values() == {"head": 1, "size": 0.5}


def test_errors_are_said_and_the_last_picture_stays():
    explorer = Counting()
    explorer.head = 9
    assert explorer.error == "ValueError: head must be an integer in 0 .. 3, got 9"
    assert shown(explorer) == [0, 1.0]
    explorer.set(head=1, size=80.0)
    assert explorer.error == "RuntimeError: too large <b>"
    explorer.size = 1.0
    assert explorer.error == "" and shown(explorer) == [1, 1.0]
    # A value of another kind, as a broken page might send it.
    explorer.set_state({"head": "first"})
    assert explorer.error.startswith("TraitError")


def test_draw_is_pure():
    explorer = Counting()
    figure = explorer.draw(head=2)
    assert list(figure.data[0].y) == [2, 1.0] and explorer.head == 0
    with pytest.raises(ValueError, match="values must be among head, size, got 'heads'"):
        explorer.draw(heads=2)
    with pytest.raises(ValueError, match="head must be an integer in 0 .. 3, got 7"):
        explorer.draw(head=7)


def test_the_newest_value_wins_and_cancel_keeps_the_picture():
    async def run():
        explorer = Counting(long=True)
        assert explorer.progress == 0.0
        explorer.head = 1
        explorer.head = 2
        explorer.gate.set()
        while explorer.progress >= 0:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        before = shown(explorer)
        explorer.gate.clear()
        explorer.head = 3
        await asyncio.sleep(0.05)
        assert explorer.progress >= 0
        explorer._received(None, {"kind": "cancel"}, [])
        assert explorer.progress == -1.0
        explorer.gate.set()
        await asyncio.sleep(0.1)
        return explorer, before

    explorer, before = asyncio.run(run())
    assert before == [2, 1.0] == shown(explorer)
    assert explorer.error == ""


def test_errors_of_long_work_are_said():
    async def run():
        explorer = Counting(long=True)
        explorer.gate.set()
        explorer.size = 90.0
        while explorer.progress >= 0:
            await asyncio.sleep(0.01)
        return explorer

    assert asyncio.run(run()).error == "RuntimeError: too large <b>"


def test_explorers_share_what_both_have():
    selection = Selection(head=2)
    one, few = Counting(selection=selection), Counting(heads=3, selection=selection)
    assert one.head == few.head == 2
    few.head = 1
    assert one.head == 1 and selection.head == 1
    one.head = 3
    assert (selection.head, few.head) == (3, 1) and few.error == ""
    few.close()
    one.head = 0
    assert few.head == 1


def test_closing_lets_go_of_everything():
    explorer = Counting()
    views = [weakref.ref(explorer), weakref.ref(explorer.parts["curve"])]
    explorer.close()
    assert explorer.comm is None
    del explorer
    gc.collect()
    assert [view() for view in views] == [None, None]


def test_widgets_share_one_library():
    one, other = Page({"a": Place(FigureView(Figure()))}, label="one"), Page({}, label="other")
    assert one.library is other.library is plotly_library()
    assert "Plotly" in one.library.source and one.label == "one" and other.label == "other"
    state = one.get_state()
    assert state["library"] == f"IPY_MODEL_{one.library.model_id}"
    assert len(json.dumps(state, default=str)) < 200_000
    sent = []
    one.send = sent.append
    one._received(one, {"kind": "plotly"}, [])
    assert sent == [{"kind": "plotly", "source": one.library.source}]
    one.library.close()
    assert plotly_library() is not other.library


def test_a_page_opens_with_all_that_it_shows_first(monkeypatch):
    # What follows in messages is lost where a browser takes two seconds to import the front end.
    opened = []

    def create_comm(**open_message):
        opened.append(open_message)
        return create(**open_message)

    create = comm.create_comm
    monkeypatch.setattr(comm, "create_comm", create_comm)
    explorer = Counting()
    (state,) = [each["data"]["state"] for each in opened if "label" in each["data"]["state"]]
    assert [place["name"] for place in state["place_specs"]] == list(explorer.parts)
    assert [control["name"] for control in state["control_specs"]] == list(explorer.controls)
    assert state["summary"] == explorer.summary != ""
    assert state["curve_figure"]["text"]


def test_a_click_is_told():
    view, told = FigureView(Figure()), []
    page = Page({"a": Place(view)})
    view.on_click(told.append)
    page._received(page, {"part": "a", "kind": "click", "trace": "a", "x": 1, "y": 2}, [])
    page._received(page, {"part": "a", "kind": "other"}, [])
    page._received(page, {"part": "b", "kind": "click"}, [])
    assert [each["x"] for each in told] == [1]
    view.on_click(lambda _: 1 / 0)
    page._received(page, {"part": "a", "kind": "click"}, [])
    assert page.error == "ZeroDivisionError: division by zero"


def test_arrays_reach_the_page_exactly():
    values = np.array([0.1, np.nan, 1e-300, np.pi])
    view = FigureView(Panel("Curve", [{"type": "scatter", "y": values}]))
    packed = json.loads(view.figure["text"])["data"][0]["y"]
    found = np.frombuffer(view.figure["buffers"][packed["bdata"]], packed["dtype"])
    np.testing.assert_array_equal(found, values)


def test_a_page_follows_its_parts():
    view = FigureView(label="first")
    page = Page({"last query": Place(view)})
    assert page.last_query_label == "first" and page.last_query_figure == {}
    view.show(Panel("Curve", [{"type": "scatter", "y": [1, 2]}]), view_of="it")
    assert page.last_query_figure == view.figure and page.last_query_view_of == "it"
    assert page.place_specs == [
        {"name": "last query", "kind": "figure", "least": 340, "wide": False}
    ]


def test_what_is_no_figure():
    with pytest.raises(TypeError, match="must be a plotly Figure or panels, got dict"):
        FigureView({})


def test_controls_say_what_the_page_needs():
    slider = Control("tau", "Temperature", "slider", low=0.01, high=100, step=0.05, log=True)
    select = Control("head", "Head", options=[(0, "first"), (1, "second")])
    slider, select = slider.spec(), select.spec()
    assert (slider["min"], slider["max"], slider["log"]) == (-2, 2, True)
    assert select["options"] == [[0, "first"], [1, "second"]]
    with pytest.raises(ValueError, match="kind must be one of select, slider.*got 'dial'"):
        Control("x", "X", "dial")
