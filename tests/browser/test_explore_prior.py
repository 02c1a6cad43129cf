"""explore_prior in JupyterLab: sliders, switches and figures agree with the kernel."""

import pytest

pytestmark = pytest.mark.browser

SETUP = """
import numpy as np
from goatviz import explore_prior, load_pretrained
explorer = explore_prior(load_pretrained("copy-mixture-1-goat"))
explorer.set(layer=0, head=0)
def numbers(name):
    (trace,) = [trace for trace in explorer.draw().data if trace.name == name]
    drawn = trace.z if trace.type == "heatmap" else trace.y
    return [float(v) if v == v else None for v in np.ravel(drawn)]
"""
#: A rotary model without an explicit prior.
IMPLIED = SETUP.replace(
    'explore_prior(load_pretrained("copy-mixture-1-goat"))',
    'explore_prior(load_pretrained("passkey-rope"), texts)',
).replace(
    "import numpy as np",
    "import numpy as np\nimport torch\ntexts = [torch.arange(40)[None] + n for n in range(3)]",
)
#: The numbers of the curve of that name, wherever it is in the page.
IN_PAGE = """name => {
    for (const graph of document.querySelectorAll('.js-plotly-plot')) {
        const trace = (graph._fullData ?? []).find(each => each.name === name);
        if (!trace) continue;
        const rows = trace.z ? [...trace.z].map(row => [...row]).flat() : [...trace.y];
        return rows.map(value => Number.isFinite(value) ? value : null);
    }
    return [];
}"""
NAMES = ("u(j)", "κ(lag)", "plan", "π", "margin", "amplitude")


@pytest.fixture
def page(lab):
    page = lab.run(SETUP, "explorer")
    page.locator(".js-plotly-plot .main-svg").nth(5).wait_for()
    return page


def says(page, text):
    page.wait_for_function(
        "text => document.querySelector('.goatviz-summary').textContent.includes(text)", arg=text
    )


def agree(lab, page):
    """Wait until what the page draws is what the kernel draws, to the last bit of a float32."""
    for name in NAMES:
        wanted = lab.ask(f"numbers({name!r})")
        page.wait_for_function(
            f"""([name, wanted]) => {{
                const found = ({IN_PAGE})(name);
                return found.length === wanted.length && found.every((value, at) =>
                    value === wanted[at]
                    || Math.abs(value - wanted[at]) <= 1e-6 * Math.abs(wanted[at]));
            }}""",
            arg=[name, wanted],
            timeout=10_000,
        )


def test_keys_on_sliders_and_switches_move_every_panel(lab, page):
    agree(lab, page)
    page.get_by_role("slider", name="Sink ×").focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    says(page, "sink × 0.5")
    agree(lab, page)
    page.get_by_role("checkbox", name="Relative").focus()
    page.keyboard.press("Space")
    says(page, "relative off")
    page.get_by_role("slider", name="Content temperature").focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    says(page, "at temperature 2")
    page.get_by_role("combobox", name="Head").select_option(index=1)
    says(page, "head 1")
    agree(lab, page)
    assert lab.ask("[explorer.head, explorer.relative, explorer.sink_scale]") == [
        1,
        False,
        0.5,
    ]
    page.get_by_role("button", name="Reset to learned").press("Enter")
    says(page, "as learned")
    agree(lab, page)
    assert page.get_by_role("checkbox", name="Relative").is_checked()
    assert lab.ask("[explorer.relative, explorer.sink_scale, explorer.temperature]") == [
        True,
        1.0,
        1.0,
    ]


def test_a_picture_of_a_head_opens_it(lab, page):
    says(page, "head 0")
    canvas = page.locator(".goatviz-heads canvas")
    box = canvas.bounding_box()
    # One layer of two heads: they stand from left to right.
    page.mouse.click(box["x"] + 44 + 56 * 1.5, box["y"] + 4 + 28)
    says(page, "head 1")
    assert lab.ask("explorer.head") == 1
    agree(lab, page)
    canvas.focus()
    page.keyboard.press("ArrowLeft")
    says(page, "head 0")
    agree(lab, page)


def test_an_implied_prior_ends_where_inputs_ended(lab):
    page = lab.run(IMPLIED, "explorer")
    page.locator(".js-plotly-plot .main-svg").first.wait_for()
    says(page, "known to 40 tokens")
    agree(lab, page)
    length = page.get_by_role("spinbutton", name="Length")
    assert length.get_attribute("max") == "40"
    length.fill("30")
    length.press("Enter")
    says(page, "30 tokens: as fitted")
    page.get_by_role("slider", name="Sink ×").focus()
    page.keyboard.press("Home")
    says(page, "sink off")
    agree(lab, page)


def test_a_million_tokens_and_an_error(lab, page):
    length = page.get_by_role("spinbutton", name="Length")
    length.fill("1000000")
    length.press("Enter")
    says(page, "1,000,000 tokens")
    agree(lab, page)
    lab.ask("setattr(explorer, 'head', 9)")
    error = page.locator(".goatviz-controls .goatviz-error")
    page.wait_for_function(
        "() => document.querySelector('.goatviz-controls .goatviz-error').textContent !== ''"
    )
    assert "head must be one of 0, 1; got 9" in error.inner_text()
    lab.ask("setattr(explorer, 'head', 1)")
    says(page, "head 1, 1,000,000 tokens")
    assert error.inner_text() == ""


def test_figures_are_legible_in_both_themes(lab, page):
    """Text takes the page's colour, also where a theme's style sheet comes after its name."""
    for theme in ("Dark", "Light", "Dark"):
        lab.show_in(theme)
        page.wait_for_function(
            """dark => [...document.querySelectorAll('.js-plotly-plot')].every(graph => {
                const [red] = graph._fullLayout.font.color.match(/\\d+/).map(Number);
                return dark ? red > 128 : red < 128;
            })""",
            arg=theme == "Dark",
        )


def test_nothing_overlaps_or_is_cut_in_a_narrow_page(lab, page):
    page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
    for width in (700, 1280):
        page.set_viewport_size({"width": width, "height": 1000})
        page.wait_for_function(
            """() => [...document.querySelectorAll('.goatviz-figure')].every(root => {
                const graph = root.querySelector('.js-plotly-plot');
                return Math.abs(graph._fullLayout.width - root.clientWidth) <= 1
                    && root.clientWidth >= 300;
            })"""
        )
        crossing = page.evaluate(
            """() => {
                const found = [];
                for (const graph of document.querySelectorAll('.js-plotly-plot')) {
                    const parts = ['.gtitle', '.g-xtitle', '.g-ytitle', '.legend', '.bglayer']
                        .map(name => graph.querySelector(name)).filter(Boolean);
                    const boxes = parts.map(part => part.getBoundingClientRect())
                        .filter(box => box.width && box.height);
                    boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
                        if (a.left < b.right - 2 && b.left < a.right - 2
                            && a.top < b.bottom - 2 && b.top < a.bottom - 2)
                            found.push(graph.layout.title.text);
                    }));
                }
                return found;
            }"""
        )
        assert crossing == [], width
