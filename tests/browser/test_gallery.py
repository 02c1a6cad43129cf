"""Saved figures and the gallery in a real browser: drawn, offline, readable, and with a menu."""

import itertools

import numpy as np
import pytest
import torch

from goatviz.analysis import prior_profile
from goatviz.figures import plot_plan, plot_prior
from goatviz.paper import gallery_page
from goatviz.plots import PRIOR_KINDS, save_html
from goatviz.priors import ALiBiPrior
from goatviz.training import load_pretrained
from goatviz.transport import solve_rows

# Text boxes of one figure, as drawn. Colour bars and legends are whole boxes elsewhere.
TEXT_BOXES = """() => {
  const seen = [];
  for (const plot of document.querySelectorAll('.js-plotly-plot')) {
    const boxes = [];
    for (const node of plot.querySelectorAll('text')) {
      const box = node.getBoundingClientRect();
      if (!node.textContent.trim() || box.width === 0 || node.closest('.updatemenu-item-text'))
        continue;
      if (getComputedStyle(node).visibility === 'hidden') continue;
      boxes.push([node.textContent, box.left, box.top, box.right, box.bottom]);
    }
    seen.push(boxes);
  }
  return seen;
}"""


def overlaps(boxes, tolerance=3.0):
    found = []
    for a, b in itertools.combinations(boxes, 2):
        wide = min(a[3], b[3]) - max(a[1], b[1])
        high = min(a[4], b[4]) - max(a[2], b[2])
        if wide > tolerance and high > tolerance:
            found.append((a[0], b[0]))
    return found


def open_page(page, path):
    page.goto(path.as_uri())
    page.wait_for_selector(".js-plotly-plot .main-svg")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.js-plotly-plot')].every(p => p._fullLayout)"
    )


@pytest.mark.parametrize("width", [900, 1280])
def test_the_gallery_draws_offline(exhibits, tmp_path, offline_context, offline_page, width):
    page = tmp_path / "index.html"
    page.write_text(gallery_page(exhibits), encoding="utf-8")
    offline_page.set_viewport_size({"width": width, "height": 900})
    open_page(offline_page, page)
    drawn = offline_page.locator(".js-plotly-plot:has(.main-svg)")
    assert drawn.count() == len(exhibits)
    for exhibit, boxes in zip(exhibits, offline_page.evaluate(TEXT_BOXES), strict=True):
        assert len(boxes) > 8, f"{exhibit.slug} is empty"
        assert overlaps(boxes) == [], exhibit.slug
    titles = offline_page.eval_on_selector_all(
        ".modebar-btn", "nodes => nodes.map(n => n.dataset.title || n.ariaLabel || '')"
    )
    assert titles and not [t for t in titles if "Share" in t or "cloud" in t.lower()]
    offline_context.assert_quiet()


FIGURES = {
    **{kind: lambda kind=kind: plot_prior(_model(), kind=kind) for kind in PRIOR_KINDS},
    "long": lambda: plot_prior(_model(), length=100_000),
    "one head": lambda: plot_prior(ALiBiPrior(1), length=3),
    "plan": lambda: plot_plan(solve_rows(np_scores())),
    "tokens": lambda: plot_plan(
        solve_rows(np_scores(10)), tokens=["the", "the", "<s>", "</script>", "<b>"] * 2
    ),
}


def _model():
    return load_pretrained("copy-mixture-4-goat")


def np_scores(n=50):
    return torch.randn(n, n, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FIGURES)
def test_saved_figures_draw_and_nothing_overlaps(tmp_path, offline_context, offline_page, name):
    path = save_html(FIGURES[name](), tmp_path / "figure.html")
    offline_page.set_viewport_size({"width": 1000, "height": 950})
    open_page(offline_page, path)
    (boxes,) = offline_page.evaluate(TEXT_BOXES)
    assert overlaps(boxes) == []
    if name == "tokens":
        texts = [box[0] for box in boxes]
        # All of them along the queries of three maps, and along keys as many as have room.
        assert texts.count("the") > 12 and texts.count("</script>") > 6
        assert texts.count("<b>") > 6
    offline_context.assert_quiet()


def test_the_menu_changes_what_is_drawn(tmp_path, offline_context, offline_page):
    checkpoint = _model()
    profile = prior_profile(checkpoint.model)
    path = save_html(plot_prior(checkpoint), tmp_path / "figure.html")
    offline_page.set_viewport_size({"width": 1000, "height": 950})
    open_page(offline_page, path)
    shown = """() => {
        const plot = document.querySelector('.js-plotly-plot');
        const trace = plot._fullData.find(t => t.visible === true && t.name === 'plan');
        return trace.z.map(row => Array.from(row));
    }"""
    for head in (0, 1, 0):
        offline_page.locator(".updatemenu-header").click()
        offline_page.locator(".updatemenu-dropdown-button").nth(head).click()
        offline_page.wait_for_function(
            "head => document.querySelector('.gtitle-subtitle').textContent.includes(head)",
            arg=f"head {head}",
        )
        z = np.array(offline_page.evaluate(shown), dtype=float)
        wanted = profile["probability"].sel(layer=0, head=head).values
        np.testing.assert_allclose(np.nan_to_num(z), np.nan_to_num(wanted), atol=1e-7)
    offline_context.assert_quiet()
