"""What every explorer does: one picture for each change, errors said, long work beside, an end."""

import asyncio
import gc
import json
import threading
import weakref

import numpy as np
import plotly.graph_objects as go
import pytest
import traitlets

from goatviz import checks
from goatviz.explore import Selection
from goatviz.explore.base import Explorer, Picture
from goatviz.explore.controls import Control, ControlPanel
from goatviz.explore.figure_view import FigureView, plotly_library
from goatviz.plots.base import Panel
from goatviz.plots.figure import Figure


class Counting(Explorer):
    """Draws its head and size; slow and failing on request."""

    shown = ("head", "size")
    panels = {"curve": 300}
    head = traitlets.Int(0)
    size = traitlets.Float(1.0)

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
    packed = json.loads(explorer._views["curve"].figure)["data"][0]["y"]
    return packed if isinstance(packed, list) else None


def test_a_change_asks_for_one_picture():
    explorer = Counting()
    assert len(explorer.drawn) == 1
    explorer.head = 2
    explorer.set(head=3, size=2.0)
    explorer.set(head=3)
    assert [(each["head"], each["size"]) for each in explorer.drawn] == [(0, 1), (2, 1), (3, 2)]
    assert shown(explorer) == [3, 2.0]
    assert "head 3 &lt;b&gt;" in explorer._summary.value and "aria-live" in explorer._summary.value


def test_page_and_kernel_set_the_same_values():
    explorer = Counting()
    panel = explorer._controls
    panel.values = {**panel.values, "head": 1, "size": 3.0}
    assert (explorer.head, explorer.size) == (1, 3.0) and len(explorer.drawn) == 2
    explorer.size = 0.5
    assert panel.values == {"head": 1, "size": 0.5}


def test_errors_are_said_and_the_last_picture_stays():
    explorer = Counting()
    explorer.head = 9
    assert explorer._controls.error == "ValueError: head must be an integer in 0 .. 3, got 9"
    assert shown(explorer) == [0, 1.0]
    explorer.set(head=1, size=80.0)
    assert explorer._controls.error == "RuntimeError: too large <b>"
    explorer.size = 1.0
    assert explorer._controls.error == "" and shown(explorer) == [1, 1.0]
    # A value of another kind, as a broken page might send it.
    panel = explorer._controls
    panel.values = {**panel.values, "head": "first"}
    assert panel.error.startswith("TraitError")


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
        assert explorer._controls.progress == 0.0
        explorer.head = 1
        explorer.head = 2
        explorer.gate.set()
        while explorer._controls.progress >= 0:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        before = shown(explorer)
        explorer.gate.clear()
        explorer.head = 3
        await asyncio.sleep(0.05)
        assert explorer._controls.progress >= 0
        explorer._controls._received(None, {"kind": "cancel"}, [])
        assert explorer._controls.progress == -1.0
        explorer.gate.set()
        await asyncio.sleep(0.1)
        return explorer, before

    explorer, before = asyncio.run(run())
    assert before == [2, 1.0] == shown(explorer)
    assert explorer._controls.error == ""


def test_errors_of_long_work_are_said():
    async def run():
        explorer = Counting(long=True)
        explorer.gate.set()
        explorer.size = 90.0
        while explorer._controls.progress >= 0:
            await asyncio.sleep(0.01)
        return explorer

    assert asyncio.run(run())._controls.error == "RuntimeError: too large <b>"


def test_explorers_share_what_both_have():
    selection = Selection(head=2)
    one, few = Counting(selection=selection), Counting(heads=3, selection=selection)
    assert one.head == few.head == 2
    few.head = 1
    assert one.head == 1 and selection.head == 1
    one.head = 3
    assert (selection.head, few.head) == (3, 1) and few._controls.error == ""
    few.close()
    one.head = 0
    assert few.head == 1


def test_closing_lets_go_of_everything():
    explorer = Counting()
    views = [weakref.ref(explorer), weakref.ref(explorer._views["curve"])]
    explorer.close()
    assert explorer.comm is None and explorer._controls.comm is None
    del explorer
    gc.collect()
    assert [view() for view in views] == [None, None]


def test_figures_share_one_library():
    one, other = FigureView(Figure(), label="one"), FigureView(label="other")
    assert one.library is other.library is plotly_library()
    assert "Plotly" in one.library.source and one.label == "one" and other.label == "other"
    state = one.get_state()
    assert state["library"] == f"IPY_MODEL_{one.library.model_id}"
    assert len(json.dumps(state, default=str)) < 100_000
    one.library.close()
    assert plotly_library() is not other.library


def test_a_click_is_told():
    view, told = FigureView(Figure()), []
    view.on_click(told.append)
    view._received(None, {"kind": "click", "trace": "a", "x": 1, "y": 2, "index": [2, 1]}, [])
    view._received(None, {"kind": "other"}, [])
    assert [each["index"] for each in told] == [[2, 1]]


def test_arrays_reach_the_page_exactly():
    values = np.array([0.1, np.nan, 1e-300, np.pi])
    view = FigureView(Figure(data=[go.Scatter(y=values)]))
    packed = json.loads(view.figure)["data"][0]["y"]
    import base64

    found = np.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"])
    np.testing.assert_array_equal(found, values)


def test_what_is_no_figure():
    with pytest.raises(TypeError, match="must be a plotly Figure or panels, got dict"):
        FigureView({})


def test_controls_say_what_the_page_needs():
    panel = ControlPanel(
        [
            Control("tau", "Temperature", "slider", low=0.01, high=100, step=0.05, log=True),
            Control("head", "Head", options=[(0, "first"), (1, "second")]),
        ],
        {"tau": 1.0, "head": 0},
        label="Both",
    )
    slider, select = panel.controls
    assert (slider["min"], slider["max"], slider["log"]) == (-2, 2, True)
    assert select["options"] == [[0, "first"], [1, "second"]]
    panel.change("head", options=[(0, "only")])
    assert panel.controls[1]["options"] == [[0, "only"]] and panel["head"].options == [(0, "only")]
    pressed = []
    panel.on_press("reset", lambda: pressed.append(1))
    panel._received(None, {"kind": "press", "name": "reset"}, [])
    panel._received(None, {"kind": "press", "name": "unknown"}, [])
    panel._received(None, {"kind": "cancel"}, [])
    assert pressed == [1]
    with pytest.raises(ValueError, match="kind must be one of select, slider.*got 'dial'"):
        Control("x", "X", "dial")
