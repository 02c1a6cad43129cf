"""Controls and figures in JupyterLab: keys, names, themes; and their functions without a kernel."""

import json

import pytest

from goatviz.plots import base
from goatviz.plots.base import Panel, as_json

pytestmark = pytest.mark.browser

SETUP = """
import traitlets
from goatviz.explore.base import Explorer, Picture
from goatviz.explore.controls import Control

class Empty(Explorer):
    shown = ("head", "tau", "length", "sink")
    head = traitlets.Int(1).tag(sync=True)
    tau = traitlets.Float(1.0).tag(sync=True)
    length = traitlets.Int(64).tag(sync=True)
    sink = traitlets.Bool(True).tag(sync=True)

    def __init__(self):
        super().__init__()
        self.pressed = []
        controls = [
            Control("head", "Head", options=[(0, "<b>first"), (1, "second"), (2, "third")]),
            Control("tau", "Temperature", "slider", low=0.01, high=100, step=0.05, log=True),
            Control("length", "Length", "number", low=1, high=1_000_000, whole=True),
            Control("sink", "Sink", "toggle", hint="on or off"),
            Control("reset", "Reset", "button"),
        ]
        self._set_up(controls, label="Test controls")

    def _check(self, values):
        pass

    def _pressed(self, button):
        self.pressed.append(button)

    def _picture(self, values, job):
        return Picture({}, "nothing")

panel = Empty()
"""


@pytest.fixture
def page(lab):
    page = lab.run(SETUP, "panel")
    page.locator(".goatviz-controls").wait_for()
    return page


def test_every_control_has_a_name_and_answers_keys(lab, page):
    page.get_by_role("combobox", name="Head").focus()
    page.keyboard.press("ArrowDown")
    slider = page.get_by_role("slider", name="Temperature")
    slider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "10"
    number = page.get_by_role("spinbutton", name="Length")
    number.fill("5000000")
    number.press("Tab")
    page.get_by_role("checkbox", name="Sink: on or off").press("Space")
    page.get_by_role("button", name="Reset").press("Enter")
    page.wait_for_timeout(500)
    values = lab.ask("panel.values()")
    assert values == {"head": 2, "tau": 10.0, "length": 1_000_000, "sink": False}
    assert lab.ask("panel.pressed") == ["reset"]
    # Lab kept its hands off: the cell is not in edit mode, nothing was inserted.
    cells = "() => window.jupyterapp.shell.currentWidget.content.widgets.length"
    assert page.evaluate(cells) == 2
    assert page.get_by_role("combobox", name="Head").locator("option").first.inner_text() == (
        "<b>first"
    )


def test_the_kernel_moves_controls_too(lab, page):
    lab.ask("panel.set(head=0, tau=0.1)")
    page.wait_for_function("() => document.querySelector('[name=tau]').value === '-1'")
    assert page.get_by_role("combobox", name="Head").input_value() == "0"
    lab.ask("setattr(panel, 'error', 'ValueError: <b>no</b>')")
    page.wait_for_function(
        "() => document.querySelector('.goatviz-controls .goatviz-error')"
        ".textContent.includes('<b>no</b>')"
    )
    lab.ask("setattr(panel, 'progress', 0.25)")
    page.get_by_role("progressbar", name="Progress").wait_for(state="visible")
    assert page.get_by_role("button", name="Cancel").is_visible()


def test_places_on_a_slider(front):
    found = front(
        """[
            it.toSlider(100, { log: true }), it.fromSlider('-0.3', { log: true }),
            it.fromSlider('0.30000000000000004', {}), it.toSlider(5, {}),
            it.fromSlider('2', { choices: [1, 4, 9] }), it.toSlider(5, { choices: [1, 4, 9] }),
        ]""",
    )
    assert found == pytest.approx([2, 10**-0.3, 0.3, 5, 9, 1])
    assert found[2] == 0.3
    said = front(
        """[it.reading(12345, { whole: true }), it.reading(0.123456, {})]""",
    )
    assert said == ["12,345", "0.123"]


def test_a_figure_takes_the_colours_of_its_page(front):
    found = front(
        """it.themed({ font: { size: 12 }, xaxis: { title: 'x' }, title: 'kept',
            template: { layout: { yaxis: { gridcolor: 'red' } } } }, 'black', 'grey')""",
    )
    assert found["font"] == {"size": 12, "color": "black"} and found["title"] == "kept"
    assert found["xaxis"]["title"] == "x"
    assert found["xaxis"]["gridcolor"] == found["yaxis"]["gridcolor"] == "grey"


@pytest.mark.parametrize("width", [300, 415, 660, 1200])
def test_a_wider_place_sets_the_text_as_the_kernel_would(front, monkeypatch, width):
    sentence = "a sentence with its <b>hostile</b> & long words, " * 3 + "x" * 90
    curve = {"type": "scatter", "mode": "lines", "x": [0, 1], "y": [0, 1]}
    names = ["plan", "the prior of the same head", "score / \u03c4", "potential", "POT"]
    panels = [
        Panel(
            sentence,
            [{**curve, "name": name} for name in names],
            {"title": "key [tokens]"},
            {"title": "weight"},
            note=sentence,
            caption=[sentence, "Short."],
        ),
        Panel("Below", [{**curve, "name": "plan"}], {"title": "lag", "nticks": 7}),
        Panel("Alone", [curve]),
    ]
    for drawn in (panels, panels[1:], panels[2]):
        given = json.loads(as_json(drawn))
        with monkeypatch.context() as wider:
            wider.setattr(base, "NARROW", width)
            wanted = json.loads(as_json(drawn))["layout"]
        data, layout = json.dumps(given["data"]), json.dumps(given["layout"])
        found = front(f"it.fitted({layout}, {data}, {width})")
        assert found.pop("meta")["width"] == 340
        assert wanted.pop("meta")["width"] == width
        assert found == wanted


def test_the_pages_own_plotly_keeps_its_name(front):
    code = json.dumps("module.exports = { version: 'ours' }; globalThis.Plotly = module.exports;")
    found = front(
        f"""await (async () => {{
            globalThis.Plotly = 'theirs';
            const ours = await it.loadLibrary(async () => {code});
            const again = await it.loadLibrary(async () => 'throw new Error()');
            return [ours.version, again === ours, globalThis.Plotly];
        }})()""",
    )
    assert found == ["ours", True, "theirs"]


def test_a_place_says_what_it_waits_for(front):
    said = front(
        """(async () => {
            const state = { figure: {}, label: "Sinks: rate", height: 300, doing: "Profiling" };
            const acts = [];
            const model = { get: name => state[name], on: (_, act) => acts.push(act), off() {} };
            const el = document.createElement("div");
            el.className = "goatviz-explorer";
            document.body.append(el);
            const tellOf = async changes => {
                Object.assign(state, changes);
                for (const act of acts) act();
                await null;
                return el.querySelector(".goatviz-figure-coming").textContent;
            };
            state.progress = -1;
            const loading = new Promise(() => {});
            const stop = it.renderFigure({ model, el, plotly: loading, host: model });
            const told = [await tellOf({}), await tellOf({ progress: 0.345 })];
            const waiting = el.firstElementChild.dataset.waiting;
            const text = '{"data": []}';
            const shown = await tellOf({ progress: 0.9, figure: { text } });
            const after = el.firstElementChild.dataset.waiting;
            stop();
            return [...told, waiting, shown, after, el.childElementCount];
        })()"""
    )
    assert said == [
        *("Sinks: rate.", "Sinks: rate. Profiling, 35 %", "yes"),
        *("Sinks: rate. Profiling, 35 %", "no", 0),
    ]


@pytest.mark.parametrize("gate", ["open", "shut"])
def test_messages_that_anywidget_drops_are_taken_by_the_page(front, gate):
    # As anywidget's model class stands over that of ipywidgets, whose method it overrides.
    found = front(
        f"""{{
            const taken = [], sent = [];
            const base = {{
                async _handle_comm_msg(message) {{ taken.push([this.name, message]); }},
            }};
            const gated = Object.create(base);
            gated._handle_comm_msg = async function (message) {{
                if ("{gate}" === "shut") throw new Error("Failed to initialize model.");
                return base._handle_comm_msg.call(this, message);
            }};
            const own = Object.assign(Object.create(gated), {{
                name: "own", comm_live: true, callbacks: () => "callbacks",
                comm: {{ on_msg(act) {{ this.act = act; }}, send: (...all) => sent.push(all) }},
            }});
            own.comm.on_msg(gated._handle_comm_msg.bind(own));
            const asked = [];
            const widget_manager = {{ get_model: async id => {{ asked.push(id); return own; }} }};
            await it.reconnect({{ widget_manager, get: name => `the ${{name}}` }});
            taken.length = 0;
            await own.comm.act("update").catch(() => {{}});
            return {{ asked, taken, sent }};
        }}"""
    )
    assert found["asked"] == ["the own_id"] and found["taken"] == [["own", "update"]]
    assert found["sent"] == ([[{"method": "request_state"}, "callbacks"]] if gate == "shut" else [])


@pytest.mark.parametrize(
    "model",
    [
        "{ get: () => '' }",
        "{ get: () => '', widget_manager: { get_model: async () => { throw new Error('no'); } } }",
        "{ get: () => '', widget_manager: { get_model: async () => ({ comm_live: false }) } }",
    ],
    ids=["marimo", "unknown", "no kernel"],
)
def test_a_page_without_such_a_model_stays_as_it_is(front, model):
    assert front(f"(await it.reconnect({model})) === undefined")
