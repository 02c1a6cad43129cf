"""Every kind of figure, measured in a browser: no text overlaps, is cut off or hard to read."""

import pytest

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
