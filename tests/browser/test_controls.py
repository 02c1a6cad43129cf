"""Controls and figures in JupyterLab: keys, names, themes; and their functions without a kernel."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

FOLDER = Path(__file__).parents[2] / "goatviz" / "explore"
SETUP = """
from goatviz.explore.controls import Control, ControlPanel
panel = ControlPanel(
    [
        Control("head", "Head", options=[(0, "<b>first"), (1, "second"), (2, "third")]),
        Control("tau", "Temperature", "slider", low=0.01, high=100, step=0.05, log=True),
        Control("length", "Length", "number", low=1, high=1_000_000, whole=True),
        Control("sink", "Sink", "toggle", hint="on or off"),
        Control("reset", "Reset", "button"),
    ],
    {"head": 1, "tau": 1.0, "length": 64, "sink": True},
    label="Test controls",
)
pressed = []
panel.on_press("reset", lambda: pressed.append(1))
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
    values = lab.ask("panel.values")
    assert values == {"head": 2, "tau": 10.0, "length": 1_000_000, "sink": False}
    assert lab.ask("pressed") == [1]
    # Lab kept its hands off: the cell is not in edit mode, nothing was inserted.
    cells = "() => window.jupyterapp.shell.currentWidget.content.widgets.length"
    assert page.evaluate(cells) == 2
    assert page.get_by_role("combobox", name="Head").locator("option").first.inner_text() == (
        "<b>first"
    )


def test_the_kernel_moves_controls_too(lab, page):
    lab.ask("setattr(panel, 'values', {**panel.values, 'head': 0, 'tau': 0.1})")
    page.wait_for_function("() => document.querySelector('[name=tau]').value === '-1'")
    assert page.get_by_role("combobox", name="Head").input_value() == "0"
    lab.ask("setattr(panel, 'error', 'ValueError: <b>no</b>')")
    page.wait_for_function(
        "() => document.querySelector('.goatviz-controls-error').textContent.includes('<b>no</b>')"
    )
    lab.ask("setattr(panel, 'progress', 0.25)")
    page.get_by_role("progressbar", name="Progress").wait_for(state="visible")
    assert page.get_by_role("button", name="Cancel").is_visible()


@pytest.fixture
def functions(offline_page):
    """What a script of the explorers exports, in a page without a kernel."""

    def of(file, expression):
        source = json.dumps((FOLDER / file).read_text(encoding="utf-8"))
        offline_page.goto("about:blank")
        return offline_page.evaluate(
            f"""async () => {{
                const blob = new Blob([{source}], {{ type: 'text/javascript' }});
                const url = URL.createObjectURL(blob);
                const it = await import(url);
                return {expression};
            }}"""
        )

    return of


def test_places_on_a_slider(functions):
    found = functions(
        "controls.js",
        """[
            it.toSlider(100, { log: true }), it.fromSlider('-0.3', { log: true }),
            it.fromSlider('0.30000000000000004', {}), it.toSlider(5, {}),
            it.fromSlider('2', { choices: [1, 4, 9] }), it.toSlider(5, { choices: [1, 4, 9] }),
        ]""",
    )
    assert found == pytest.approx([2, 10**-0.3, 0.3, 5, 9, 1])
    assert found[2] == 0.3
    said = functions(
        "controls.js",
        """[it.reading(12345, { whole: true }), it.reading(0.123456, {})]""",
    )
    assert said == ["12,345", "0.123"]


def test_a_figure_takes_the_colours_of_its_page(functions):
    found = functions(
        "figure_view.js",
        """it.themed({ font: { size: 12 }, xaxis: { title: 'x' }, title: 'kept',
            template: { layout: { yaxis: { gridcolor: 'red' } } } }, 'black', 'grey')""",
    )
    assert found["font"] == {"size": 12, "color": "black"} and found["title"] == "kept"
    assert found["xaxis"]["title"] == "x"
    assert found["xaxis"]["gridcolor"] == found["yaxis"]["gridcolor"] == "grey"


def test_the_pages_own_plotly_keeps_its_name(functions):
    code = json.dumps("module.exports = { version: 'ours' }; globalThis.Plotly = module.exports;")
    found = functions(
        "figure_view.js",
        f"""await (async () => {{
            globalThis.Plotly = 'theirs';
            const ours = await it.loadLibrary({code});
            const again = await it.loadLibrary('throw new Error()');
            return [ours.version, again === ours, globalThis.Plotly];
        }})()""",
    )
    assert found == ["ours", True, "theirs"]
