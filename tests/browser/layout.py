"""Measures in a browser whether the text of a plotly figure overlaps or is cut off."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from goatviz.plots import save_html

#: Texts of the page's figure with their boxes, and the figure's own box.
_BOXES = """() => {
  const root = document.querySelector('.js-plotly-plot');
  const outer = root.getBoundingClientRect();
  const texts = [];
  for (const text of root.querySelectorAll('.main-svg text')) {
    if (text.closest('.hoverlayer') || !text.textContent.trim()) continue;
    const style = getComputedStyle(text);
    if (style.visibility === 'hidden' || style.display === 'none') continue;
    const box = text.getBoundingClientRect();
    if (!box.width || !box.height) continue;
    texts.push({text: text.textContent, left: box.left, right: box.right, top: box.top,
                bottom: box.bottom, fill: style.fill});
  }
  const inner = {left: outer.left, right: outer.right, top: outer.top, bottom: outer.bottom};
  return {texts, outer: inner};
}"""


def layout_problems(page, figure: go.Figure, folder: Path, width: int) -> list[str]:
    """Texts of the figure that overlap or leave it at this width of the page, in words.

    Parameters
    ----------
    page : playwright page
        Its viewport is changed.
    figure : plotly.graph_objects.Figure
        Saved into `folder` and opened from there.
    width : int
        Of the page, pixels.
    """
    path = save_html(figure, folder / "figure.html")
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(path.as_uri())
    page.wait_for_selector(".js-plotly-plot .main-svg text", state="attached")
    page.wait_for_function("document.querySelector('.js-plotly-plot')._fullLayout !== undefined")
    page.wait_for_timeout(250)
    boxes = page.evaluate(_BOXES)
    outer, texts, problems = boxes["outer"], boxes["texts"], []
    for box in texts:
        if (
            box["left"] < outer["left"] - 1
            or box["right"] > outer["right"] + 1
            or box["top"] < outer["top"] - 1
            or box["bottom"] > outer["bottom"] + 1
        ):
            problems.append(f"cut off: {box['text']!r}")
    for at, one in enumerate(texts):
        for other in texts[at + 1 :]:
            across = min(one["right"], other["right"]) - max(one["left"], other["left"])
            upward = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
            if across > 2 and upward > 3:
                problems.append(f"overlap: {one['text']!r} and {other['text']!r}")
    return problems
