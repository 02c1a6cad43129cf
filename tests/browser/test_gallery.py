"""Saved figures and the gallery in a real browser: drawn, offline, readable, and with a menu."""

import csv
import io
import itertools
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from goatviz.analysis import prior_profile
from goatviz.figures import plot_plan, plot_prior
from goatviz.paper import gallery_page
from goatviz.plots import PRIOR_KINDS, save_html
from goatviz.priors import ALiBiPrior
from goatviz.results import load_shipped_result
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


@pytest.fixture
def written(exhibits, judged, tmp_path):
    """The whole gallery as a file."""
    path = tmp_path / "index.html"
    path.write_text(gallery_page(exhibits, judged), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [660, 900, 1280])
def test_the_gallery_draws_offline(exhibits, written, offline_context, offline_page, width):
    offline_page.set_viewport_size({"width": width, "height": 900})
    open_page(offline_page, written)
    drawn = offline_page.locator(".js-plotly-plot:has(.main-svg)")
    assert drawn.count() == len(exhibits)
    for exhibit, boxes in zip(exhibits, offline_page.evaluate(TEXT_BOXES), strict=True):
        assert len(boxes) > 8, f"{exhibit.slug} is empty"
        assert overlaps(boxes) == [], exhibit.slug
    whole = "plots => plots.every(plot => plot.scrollWidth <= plot.clientWidth)"
    assert offline_page.eval_on_selector_all(".plot", whole), "a figure is cut off"
    titles = offline_page.eval_on_selector_all(
        ".modebar-btn", "nodes => nodes.map(n => n.dataset.title || n.ariaLabel || '')"
    )
    assert titles and not [t for t in titles if "Share" in t or "cloud" in t.lower()]
    offline_context.assert_quiet()


def test_the_page_begins_with_a_verdict_for_every_claim(judged, written, offline_page):
    open_page(offline_page, written)
    for width in (1280, 480):
        offline_page.set_viewport_size({"width": width, "height": 900})
        for one in judged:
            row = offline_page.locator(f"#claim-{one.claim.slug}")
            assert row.locator(".verdict").inner_text() == one.verdict
            text = " ".join(row.inner_text().split())
            for number in one.numbers():
                for words in (number.limit, number.value, *number.intervals, number.outcome):
                    assert words in text
        # Nothing is cut off at the right.
        assert offline_page.evaluate("document.documentElement.scrollWidth") <= width
    links = offline_page.eval_on_selector_all(
        ".claims a", "nodes => nodes.map(n => document.querySelector(n.hash) !== null)"
    )
    assert links and all(links)


def downloaded(page, slug, action):
    with page.expect_download() as download:
        page.locator(f'#{slug} button[data-action="{action}"]').click()
    assert download.value.suggested_filename == f"{slug}.{action}"
    return Path(download.value.path()).read_text(encoding="utf-8")


def test_figures_leave_the_page_as_svg_and_csv(written, offline_context, offline_page):
    open_page(offline_page, written)
    sweep = load_shipped_result("passkey-sweep")
    rows = list(csv.DictReader(io.StringIO(downloaded(offline_page, "passkey", "csv"))))
    goat = [row for row in rows if row["trace"] == "goat"]
    for name, field in (("y", "mean_strict"), ("below", "mean_strict_low")):
        values = np.array([float(row[name]) for row in goat])
        wanted = sweep[field].sel(scheme="goat").values
        if name == "below":
            wanted = sweep["mean_strict"].sel(scheme="goat").values - wanted
        np.testing.assert_allclose(values, wanted, atol=1e-9)
    # A map: one row for each cell.
    rows = csv.DictReader(io.StringIO(downloaded(offline_page, "needle-depth", "csv")))
    cells = [float(row["z"]) for row in rows if row["z"]]
    grid = load_shipped_result("needle-grid")
    np.testing.assert_allclose(sorted(cells), sorted(grid["token"].values.ravel()), atol=1e-6)
    # The figure with a menu is drawn without it, on white.
    svg = downloaded(offline_page, "decomposition-4", "svg")
    assert svg.startswith("<svg") and "updatemenu-header" not in svg
    assert ElementTree.fromstring(svg).tag.endswith("svg") and "Sink u(j)" in svg
    offline_context.assert_quiet()


def test_tables_can_be_copied(exhibits, written, offline_context, offline_page):
    offline_context.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_page(offline_page, written)
    (novels,) = [each for each in exhibits if each.slug == "novels"]
    button = offline_page.locator('#novels button[data-action="copy"]')
    button.click()
    offline_page.wait_for_function(
        "button => button.textContent !== 'Copy table'", arg=button.element_handle()
    )
    if button.inner_text() == "Copied":
        text = offline_page.evaluate("navigator.clipboard.readText()")
    else:
        text = offline_page.evaluate("getSelection().toString()")
    rows = [line.split("\t") for line in text.strip().splitlines()]
    assert rows == [list(novels.table.header), *map(list, novels.table.rows)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_print_is_light_whole_and_without_controls(
    written, offline_context, offline_page, scheme
):
    offline_page.emulate_media(color_scheme=scheme)
    open_page(offline_page, written)
    pdf = offline_page.pdf(prefer_css_page_size=True, print_background=True)
    assert pdf.startswith(b"%PDF")
    offline_page.emulate_media(media="print", color_scheme=scheme)
    colours = offline_page.evaluate(
        "(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))"
    )
    assert colours == ["rgb(255, 255, 255)", "rgb(35, 39, 46)"]
    for selector in ("nav", ".buttons", ".modebar-container", ".updatemenu-container"):
        shown = offline_page.locator(selector)
        assert shown.count() and not any(each.is_visible() for each in shown.all())
    breaks = offline_page.eval_on_selector_all(
        "section[id]", "nodes => nodes.map(n => getComputedStyle(n).breakBefore)"
    )
    assert set(breaks) == {"page"}
    # While it is printed, figures are as wide as the paper; afterwards, as the page again.
    offline_page.emulate_media(media="screen")
    width = "() => document.querySelector('.js-plotly-plot')._fullLayout.width"
    before = offline_page.evaluate(width)
    offline_page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert offline_page.evaluate(width) == 906 != before
    offline_page.evaluate("dispatchEvent(new Event('afterprint'))")
    offline_page.wait_for_function(f"wanted => ({width})() === wanted", arg=before)
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
