"""Tokens that look like markup, templates or one another, read in a browser as they are."""

import pytest
import torch

from goatviz.figures import plot_sinks
from goatviz.plots import save_html
from goatviz.training import load_pretrained

TOKENS = [
    "the",
    "the",
    "<s>",
    "</script>",
    "<b>",
    # "café" as the pieces of a byte-level tokenizer spell it.
    "cafÃ©",
    "Ġcaf",
    "Ã©",
    "日本",
    "🙂",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt;",
    "%{y}",
    "$x$",
    " the",
    "the",
]
#: Where on the screen key k of the curve, or cell (k, k) of the map, lies.
PLACE = """([k, curve]) => {
  const plot = document.querySelector('.js-plotly-plot');
  const {xaxis, yaxis} = plot._fullLayout;
  const trace = plot._fullData.find(t => t.visible === true && t.name === curve);
  const box = plot.getBoundingClientRect();
  return [
    box.left + xaxis._offset + xaxis.d2p(k),
    box.top + yaxis._offset + yaxis.d2p(trace ? trace.y[k] : k),
  ];
}"""
#: The first line of the hover text, once it tells of key k.
HOVERED = """k => {
  const lines = document.querySelectorAll('.hoverlayer .hovertext text.nums tspan.line');
  return lines.length > 1 && lines[0].textContent.includes(`key ${k} `) && lines[0].textContent;
}"""
HIDDEN = """name => document.querySelector('.js-plotly-plot')
  ._fullData.find(t => t.name === name).visible === 'legendonly'"""


@pytest.mark.parametrize("kind", ["profile", "logits", "probabilities"])
def test_tokens_are_read_as_they_are(tmp_path, offline_context, offline_page, kind):
    ids = torch.randint(32, (1, len(TOKENS)), generator=torch.Generator().manual_seed(0))
    model = load_pretrained("copy-mixture-1-goat")
    figure = plot_sinks(model, ids, kind=kind, tokens=TOKENS, min_observers=1)
    dialogs = []
    offline_page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    offline_page.goto(save_html(figure, tmp_path / "figure.html").as_uri())
    offline_page.wait_for_selector(".js-plotly-plot .main-svg")

    def texts(selector):
        return offline_page.eval_on_selector_all(selector, "all => all.map(n => n.textContent)")

    shown = [t if len(t) <= 12 else f"{t[:11]}…" for t in TOKENS]
    assert texts(".xtick text") == shown
    if kind == "profile":
        # Its points lie too near to those that are hovered.
        other = "uniform attention"
        offline_page.locator(f".legend .traces:has-text('{other}') .legendtoggle").click()
        offline_page.wait_for_function(HIDDEN, arg=other)
    else:
        assert texts(".ytick text") == shown
    for key, token in enumerate(TOKENS):
        x, y = offline_page.evaluate(PLACE, [key, "importance"])
        offline_page.mouse.move(x, y)
        line = offline_page.wait_for_function(HOVERED, arg=key).json_value()
        row = "" if kind == "profile" else f"query {key} “{token}”, "
        assert line == f"{row}key {key} “{token}”"
    born = ".js-plotly-plot script, svg script, b, s, img"
    assert offline_page.locator(born).count() == 0
    assert dialogs == []
    offline_context.assert_quiet()
