"""Names of schemes, layers and tokens that look like markup, hovered and clicked: always text."""

import numpy as np
import pytest
import torch

from goatviz import explore_length, explore_plan, explore_sinks, load_shipped_result
from goatviz.plots import draw_length, draw_needle, draw_sinks, save_html
from tests.factories import sink_result, tiny_lm

NAMES = [
    "<img src=x onerror=alert(1)>",
    "%{y} <b>bold</b>",
    "@@script@@ </script>",
    "{{ x }} &lt;i&gt;",
    "$\\frac{1}{2}$ <a href='javascript:alert(1)'>go</a>",
]
#: A byte that no text decodes, as Python keeps it.
SURROGATE = "\ud800"


def schemes(name):
    result = load_shipped_result(name)
    return result.assign_coords(scheme=np.array(NAMES[: result.sizes["scheme"]], dtype=object))


def layers():
    return sink_result("toy").assign(layer_name=("layer", np.array(NAMES[:3], dtype=object)))


def plan():
    tokens = [*NAMES, SURROGATE, "the", "the"]
    return explore_plan(tiny_lm(), torch.arange(8)[None], tokens=tokens)


PAGES = {
    "length": lambda path: save_html(draw_length(schemes("needle-sweep")), path),
    "needle": lambda path: save_html(draw_needle(schemes("needle-grid")), path),
    "sinks": lambda path: save_html(draw_sinks(layers(), kind="profile"), path),
    "explore_length": lambda path: explore_length(
        schemes("needle-sweep"), grid=schemes("needle-grid")
    ).save_html(path),
    "explore_sinks": lambda path: explore_sinks(layers()).save_html(path),
    "explore_plan": lambda path: plan().save_html(path),
}
#: Hover and click the first point or cell of every visible trace.
TOUCH = """() => {
  const places = [];
  for (const plot of document.querySelectorAll('.js-plotly-plot')) {
    const {left, top} = plot.getBoundingClientRect();
    for (const trace of plot._fullData.filter(t => t.visible === true && t.x?.length)) {
      const x = plot._fullLayout['xaxis' + (trace.xaxis ?? 'x').slice(1)];
      const y = plot._fullLayout['yaxis' + (trace.yaxis ?? 'y').slice(1)];
      places.push([left + scrollX + x._offset + x.d2p(trace.x[0]),
                   top + scrollY + y._offset + y.d2p(trace.y[0])]);
    }
  }
  return places.filter(place => place.every(Number.isFinite));
}"""
#: Elements that only a name could have brought in.
BORN = "img, [href^=javascript], svg script, .js-plotly-plot script, .js-plotly-plot i"


@pytest.mark.parametrize("name", PAGES)
def test_names_are_text(name, tmp_path, offline_context, offline_page):
    page, dialogs = offline_page, []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.set_viewport_size({"width": 1000, "height": 3000})
    page.goto(PAGES[name](tmp_path / "page.html").as_uri())
    page.wait_for_selector(".js-plotly-plot .main-svg")
    places = page.evaluate(TOUCH)
    assert places
    for x, y in places:
        page.mouse.move(x, y)
        page.mouse.click(x, y)
    for element in page.locator("select:enabled:visible").all():
        for at in range(element.locator("option").count()):
            element.select_option(index=at)
    page.wait_for_timeout(300)
    assert dialogs == [] and page.locator(BORN).count() == 0
    # Of layers only the one that is looked at is named; tokens are cut or spelt by a canvas.
    texts = page.locator("body").evaluate("body => body.textContent")
    named = [text for text in NAMES if text in texts]
    assert "plan" in name or named and (named == NAMES or "sinks" in name or name == "needle")
    offline_context.assert_quiet()
