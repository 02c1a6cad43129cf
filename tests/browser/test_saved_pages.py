"""Explorers saved as pages: offline, their controls still work and say what the kernel said."""

from pathlib import Path

import numpy as np
import pytest
import torch
from plotly.offline import get_plotlyjs

from goatviz import (
    explore_generation,
    explore_length,
    explore_plan,
    explore_prior,
    explore_sinks,
    load_pretrained,
    load_shipped_result,
)
from goatviz.plots.base import as_figure

pytestmark = pytest.mark.browser

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
HOSTILE = ["<img src=x onerror=alert(1)>", "</script>", "%{y}", "&lt;b&gt;", "🙂", "the", "the"]
HOSTILE += ["@@script@@", "@@data@@", "{{ x }}", "{% raw %}", "<!--", "<script>"]


def ids(length=48):
    return torch.randint(32, (1, length), generator=torch.Generator().manual_seed(0))


def plan():
    tokens = [*HOSTILE, *[f"t{n}" for n in range(48 - len(HOSTILE))]]
    return explore_plan(load_pretrained("copy-mixture-4-goat"), ids(), tokens=tokens)


def lengths():
    return explore_length(
        load_shipped_result("needle-sweep"), grid=load_shipped_result("needle-grid")
    )


class Names:
    """A tokenizer whose tokens must arrive as text."""

    def __call__(self, text, return_tensors="pt"):
        return {"ids": torch.tensor([[ord(letter) % 32 for letter in text]])}

    def convert_ids_to_tokens(self, ids):
        return [HOSTILE[each % len(HOSTILE)] for each in ids]


def written():
    model = load_pretrained("copy-mixture-4-goat")
    return explore_generation(model, "a text of letters", tokenizer=Names(), max_new_tokens=5)


EXPLORERS = {
    "generation": written,
    "plan": plan,
    "prior": lambda: explore_prior(load_pretrained("copy-mixture-4-goat")),
    "sinks": lambda: explore_sinks(load_pretrained("copy-mixture-4-goat"), ids()),
    "length": lengths,
    "losses": lambda: explore_length(load_shipped_result("dna-sweep")),
}
#: The values of every trace of every figure, NaN as text.
SHOWN = """() => [...document.querySelectorAll('.goatviz-figure')].map(root => {
    const graph = root.querySelector('.js-plotly-plot');
    return graph._fullData.map(trace => [...(trace.z ?? trace.y ?? [])].flatMap(
        row => row !== null && row.length !== undefined && typeof row !== 'string'
            ? [...row] : [row]).map(String));
})"""
DRAWN = """() => [...document.querySelectorAll('.goatviz-figure')].every(
    root => Number(root.dataset.drawn ?? 0) > 0)"""


def numbers(values):
    bad = ("null", "undefined", "NaN")
    return np.array([np.nan if v in bad else float(v) for v in values], dtype=float)


def compare(page, explorer, values):
    """The page's figures are the kernel's for these values."""
    figures = {name: as_figure(it) for name, it in explorer.picture(values).figures.items()}
    shown = page.evaluate(SHOWN)
    assert len(shown) == len(figures)
    for traces, (panel, figure) in zip(shown, figures.items(), strict=True):
        assert len(traces) == len(figure.data), panel
        for found, trace in zip(traces, figure.data, strict=True):
            wanted = trace.z if trace.type == "heatmap" else trace.y
            wanted = np.asarray([] if wanted is None else wanted, dtype=float).ravel()
            np.testing.assert_allclose(
                numbers(found), wanted, rtol=1e-6, err_msg=f"{panel}: {trace.name}"
            )


@pytest.mark.parametrize("name", EXPLORERS)
def test_a_saved_page_answers(tmp_path, offline_context, offline_page, name):
    explorer = EXPLORERS[name]()
    path = explorer.save_html(tmp_path / "page.html")
    assert path.stat().st_size - len(get_plotlyjs()) < 6_000_000
    page, dialogs = offline_page, []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(path.as_uri())
    page.wait_for_function(DRAWN)
    held = page.evaluate("() => JSON.parse(document.getElementById('data').textContent)")
    start = held["values"]
    compare(page, explorer, start)
    moved = dict(start)
    for option, choices in zip(held["names"], held["choices"], strict=True):
        control = explorer.controls[option]
        target = choices[(choices.index(start[option]) + 1) % len(choices)]
        element = page.locator(f"[name='{option}']")
        if control.kind == "select":
            element.select_option(index=choices.index(target))
        elif control.kind == "toggle":
            if target != start[option]:
                element.click()
        elif len(choices) > 1:
            element.focus()
            for _ in range(len(choices)):
                page.keyboard.press("ArrowLeft")
            for _ in range(choices.index(target)):
                page.keyboard.press("ArrowRight")
        moved[option] = target
    wanted = explorer.picture(moved).summary
    page.wait_for_function(
        "wanted => document.querySelector('.goatviz-summary').textContent === wanted", arg=wanted
    )
    page.wait_for_timeout(600)
    compare(page, explorer, moved)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(500)
        page.screenshot(path=SCREENSHOTS / f"page-{name}-{scheme}.png", full_page=True)
    assert dialogs == [] and page.locator("main img").count() == 0
    offline_context.assert_quiet()


def test_the_map_of_a_saved_page_is_the_plan(tmp_path, offline_context, offline_page):
    explorer = plan()
    path = explorer.save_html(tmp_path / "page.html", vary={"head": [0, 1]})
    offline_page.goto(path.as_uri())
    offline_page.wait_for_function(DRAWN)
    # There is no kernel to ask for other cells.
    assert offline_page.get_by_text("Weight of a cell").is_hidden()
    for head in (1, 0):
        offline_page.locator("[name='head']").select_option(index=head)
        offline_page.wait_for_function(
            "head => document.querySelector('.goatviz-map-rule').textContent.includes(head)",
            arg=f"head {head}",
        )
        canvas = offline_page.locator(".goatviz-map-canvas")
        red, green, blue = canvas.evaluate(
            """canvas => [...canvas.getContext('2d').getImageData(
                92 + 0.5 * (canvas.clientWidth - 104) / 48, 12, 1, 1).data]"""
        )[:3]
        assert red > 200 and green > 200 and blue < 100  # the first query's whole mass: yellow
        canvas.focus()
        offline_page.keyboard.press("Home")
        explorer.head = head
        weights = explorer.map.levels.view((0, 48), (0, 48)).weights
        for _ in range(9):
            offline_page.keyboard.press("ArrowDown")
        for _ in range(4):
            offline_page.keyboard.press("ArrowRight")
        said = offline_page.locator(".goatviz-map-status").inner_text()
        # Without a kernel a cell is known to its colour's 254 steps.
        value = float(said.rsplit("about ", 1)[1])
        step = np.nanmax(weights) / 254
        query, key = (
            int(part.split()[0]) for part in said.replace("key ", "query ").split("query ")[1:3]
        )
        assert abs(value - weights[query, key]) <= step
    offline_context.assert_quiet()


def test_a_pair_of_a_saved_map_opens_the_nearest_query(tmp_path, offline_context, offline_page):
    explorer = plan()
    vary = {"head": [0, 1], "query": [5, 20, 40]}
    offline_page.goto(explorer.save_html(tmp_path / "page.html", vary=vary).as_uri())
    offline_page.wait_for_function(DRAWN)
    bounds = offline_page.locator(".goatviz-map-canvas").bounding_box()
    for query, nearest in ((27, 20), (33, 40), (8, 5)):
        y = bounds["y"] + 10 + (bounds["height"] - 94) * (query + 0.5) / 48
        offline_page.mouse.click(bounds["x"] + 100, y)
        offline_page.wait_for_function(
            "query => document.querySelector('.goatviz-summary').textContent.startsWith(query)",
            arg=f"Query {nearest} ",
        )
        assert offline_page.locator("[name='query']").input_value() == str(
            [5, 20, 40].index(nearest)
        )
    compare(offline_page, explorer, {"head": 0, "query": 5})
    offline_context.assert_quiet()
