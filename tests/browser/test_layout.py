"""Every kind of figure, measured in a browser: no text overlaps, is cut off or hard to read."""

import pytest
import torch

from goatviz.explore import explore_plan, explore_sinks
from goatviz.training import load_pretrained
from tests.browser.layout import layout_problems, open_page, show_figure
from tests.factories import FIGURES, drawn

WIDTHS = (660, 900, 1280)
SUBJECTS = list(dict.fromkeys(name.partition(",")[0] for name in FIGURES))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_text_has_room_and_contrast(subject, tmp_path, offline_context, offline_page):
    """Every figure is drawn at each width; one is resized too, for which plotly waits 100 ms."""
    open_page(offline_page, tmp_path)
    figures = {name: drawn(name) for name in FIGURES if name.partition(",")[0] == subject}
    problems = []
    for width in WIDTHS:
        offline_page.set_viewport_size({"width": width, "height": 900})
        for name, figure in figures.items():
            show_figure(offline_page, figure)
            problems += [f"{name}, {each}" for each in layout_problems(offline_page, width)]
    for width in reversed(WIDTHS):
        problems += [f"resized, {each}" for each in layout_problems(offline_page, width)]
    assert problems == []
    offline_context.assert_quiet()


def test_problems_are_seen(tmp_path, offline_page):
    """A title too long, in ink too light, and two texts in one place."""
    figure = drawn("losses")
    figure.update_layout(
        title_text="A title " * 20, title_font={"color": "#999999", "family": "Arial"}
    )
    for text in ("one text", "another"):
        figure.add_annotation(text=text, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    open_page(offline_page, tmp_path)
    show_figure(offline_page, figure)
    problems = " ".join(layout_problems(offline_page, 660))
    for kind in ("cut off: 'A title", "contrast 2.85, light: 'A title", "overlap: 'one text'"):
        assert kind in problems, problems


#: Parts of an explorer that lie outside the window or over one another.
CROSSED = """() => {
    const box = element => element.getBoundingClientRect();
    const seen = element => box(element).width && box(element).height
        && getComputedStyle(element).visibility !== 'hidden';
    const named = element => element.className || element.outerHTML.slice(0, 60);
    const found = [];
    for (const parent of document.querySelectorAll(
        '.goatviz-explorer, .goatviz-explorer :is(div, label, span):not(.goatviz-figure-place *)'
    )) {
        if (parent.closest('.goatviz-passage-text, .goatviz-figure-place')) continue;
        const parts = [...parent.children].filter(seen);
        parts.forEach((one, at) => {
            const a = box(one);
            if (a.left < -1 || a.right > innerWidth + 1) found.push(`outside: ${named(one)}`);
            for (const other of parts.slice(at + 1)) {
                const b = box(other);
                if (a.left < b.right - 1 && b.left < a.right - 1
                    && a.top < b.bottom - 1 && b.top < a.bottom - 1)
                    found.push(`overlap: ${named(one)} and ${named(other)}`);
            }
        });
    }
    for (const text of document.querySelectorAll('.goatviz-figure .main-svg text')) {
        const [a, b] = [box(text), box(text.closest('.goatviz-figure-place'))];
        if (a.width && (a.left < b.left - 1 || a.right > b.right + 1))
            found.push(`cut off: ${text.textContent}`);
    }
    if (document.documentElement.scrollWidth > innerWidth) found.push('the page scrolls sideways');
    return found;
}"""
SIZED = """() => [...document.querySelectorAll('.goatviz-figure')].every(root => Math.abs(
    (root.querySelector('.js-plotly-plot')?._fullLayout?.width ?? 0) - root.clientWidth) <= 1)"""


@pytest.mark.parametrize("name", ["plan", "sinks"])
def test_explorers_have_room(name, tmp_path, offline_context, offline_page):
    """Nothing is cut off or lies over another part, from half a laptop's screen to a wide one."""
    ids = torch.randint(97, 123, (1, 64), generator=torch.Generator().manual_seed(0))
    model = load_pretrained("passkey-goat")
    tokens = [chr(each) for each in ids[0]]
    make = {"plan": explore_plan, "sinks": explore_sinks}[name]
    path = make(model, ids, tokens=tokens).save_html(tmp_path / "page.html", vary={"head": [1]})
    offline_page.goto(path.as_uri())
    problems = []
    for width in (660, 900, 1280, 1500):
        offline_page.set_viewport_size({"width": width, "height": 900})
        offline_page.wait_for_function(SIZED)
        problems += [f"{width} px: {each}" for each in offline_page.evaluate(CROSSED)]
    assert problems == []
    offline_context.assert_quiet()
