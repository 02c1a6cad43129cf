"""Measures in a browser whether a figure's text overlaps, is cut off or hard to read."""

from __future__ import annotations

import json
import re
from pathlib import Path

from playwright.sync_api import Page

from goatviz.plots import CONFIG, Figure, save_html
from goatviz.plots.style import GROUND

#: The least contrast of text with its ground (WCAG 2.2, level AA).
CONTRAST = 4.5
#: Texts of the page's figure with their boxes, and the figure's own box. Texts of traces lie in
#: their cells, on grounds of their own.
_BOXES = """() => {
  const root = document.querySelector('.js-plotly-plot');
  const box = element => {
    const {left, right, top, bottom} = element.getBoundingClientRect();
    return {left, right, top, bottom};
  };
  const texts = [];
  for (const text of root.querySelectorAll('.main-svg text')) {
    if (text.closest('.hoverlayer, .trace, .hm') || !text.textContent.trim()) continue;
    const style = getComputedStyle(text);
    if (style.visibility === 'hidden' || style.display === 'none') continue;
    const place = box(text);
    if (place.right === place.left || place.bottom === place.top) continue;
    texts.push({text: text.textContent, fill: style.fill, opacity: style.opacity, ...place});
  }
  const figure = box(root.querySelector('.main-svg'));
  return {texts, figure, page: document.documentElement.scrollWidth};
}"""
_SETTLED = """width => {
  const plot = document.querySelector('.js-plotly-plot');
  return innerWidth === width && plot?._fullLayout !== undefined && !plot._transitioning
    && plot._fullLayout.width === plot.parentElement.clientWidth;
}"""


def open_page(page: Page, folder: Path) -> None:
    """Open a page as `save_html` writes it, for `show_figure`."""
    page.goto(save_html(Figure(), folder / "figure.html").as_uri())
    page.wait_for_selector(".js-plotly-plot .main-svg", state="attached")


def show_figure(page: Page, figure: Figure) -> None:
    """Replace the open page's figure; like `save_html`, give its element the figure's height."""
    page.evaluate(
        """async ([figure, config]) => {
          const plot = document.querySelector('.js-plotly-plot');
          Plotly.purge(plot);
          plot.style.height = `${figure.layout.height}px`;
          await Plotly.newPlot(plot, figure.data, figure.layout, config);
        }""",
        [json.loads(figure.to_json()), CONFIG],
    )


def layout_problems(page: Page, width: int) -> list[str]:
    """What is wrong with the open figure at this width of the page in pixels, in words."""
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_function(_SETTLED, arg=width)
    problems = []
    for theme in GROUND:
        page.emulate_media(color_scheme=theme)
        boxes = page.evaluate(_BOXES)
        problems += [
            f"contrast {value:.2f}, {theme}: {text['text']!r}"
            for text in boxes["texts"]
            if (value := _contrast(text["fill"], GROUND[theme])) < CONTRAST
        ]
    if boxes["page"] > width:
        problems.append(f"the page is {boxes['page']} px wide")
    outer, texts = boxes["figure"], boxes["texts"]
    if not texts:
        problems.append("no text is seen")
    for at, one in enumerate(texts):
        if any(_beyond(one, outer, side) for side in ("left", "right", "top", "bottom")):
            problems.append(f"cut off: {one['text']!r}")
        for other in texts[at + 1 :]:
            across = min(one["right"], other["right"]) - max(one["left"], other["left"])
            upward = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
            if across > 2 and upward > 3:
                problems.append(f"overlap: {one['text']!r} and {other['text']!r}")
    return [f"{width} px: {problem}" for problem in problems]


def _beyond(box: dict, outer: dict, side: str) -> bool:
    sign = 1 if side in ("right", "bottom") else -1
    return sign * (box[side] - outer[side]) > 1


def _contrast(fill: str, ground: str) -> float:
    """Contrast of an opaque `rgb(r, g, b)` with a hex colour (WCAG 2.2)."""
    ink = [float(part) for part in re.findall(r"[\d.]+", fill)]
    assert fill.startswith("rgb(") and len(ink) == 3, f"not an opaque colour: {fill}"
    lights = sorted(map(_luminance, (ink, [int(ground[at : at + 2], 16) for at in (1, 3, 5)])))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def _luminance(colour: list[float]) -> float:
    parts = [part / 255 for part in colour]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
