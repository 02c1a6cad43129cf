"""Explorers in JupyterLab, light and dark: axe finds no serious fault, and focus is seen."""

import pytest
from axe_playwright_python.sync_playwright import Axe

import goatviz

pytestmark = pytest.mark.browser

SETUP = """
import torch
from goatviz import (
    explore_generation, explore_length, explore_plan, explore_prior, explore_sinks,
    load_pretrained, load_shipped_result
)
ids = torch.randint(97, 123, (1, 64), generator=torch.Generator().manual_seed(0))
model = load_pretrained("passkey-goat")
sweep, grid = load_shipped_result("needle-sweep"), load_shipped_result("needle-grid")
class Letters:
    def __call__(self, text, return_tensors="pt"):
        return {"ids": torch.tensor([[ord(letter) for letter in text]])}
    def convert_ids_to_tokens(self, ids):
        return [chr(each) for each in ids]
"""
#: At least one cell for every `explore_...` there is.
CELLS = (
    "explore_generation(model, ids, tokenizer=Letters(), max_new_tokens=4)",
    "explore_length(sweep, grid=grid)",
    'explore_length(load_shipped_result("text-eltec"))',
    "explore_plan(model, ids, tokens=[chr(each) for each in ids[0]])",
    "explore_prior(model)",
    "explore_sinks(model, ids)",
)
SCOPE = ".goatviz-explorer"
STOP = """async ([scope, at]) => {
    const element = document.activeElement;
    const explorer = document.querySelectorAll(scope)[at];
    if (!explorer.contains(element) || window.goatvizStops.some(stop => stop.element === element))
        return false;
    // plotly fades the buttons of a figure in when one of them has the focus.
    const fading = document.getAnimations().filter(
        each => each instanceof CSSTransition && each.effect.target.contains(element));
    await Promise.allSettled(fading.map(each => each.finished));
    const style = getComputedStyle(element);
    let opacity = 1;
    for (let each = element; each; each = each.parentElement)
        opacity *= Number(getComputedStyle(each).opacity);
    const outlined = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 1;
    window.goatvizStops.push({ element, outlined, opacity });
    return true;
}"""
STOPS = """() => {
    axe.setup();
    const found = window.goatvizStops.map(({ element, ...stop }) => ({
        ...stop,
        what: element.outerHTML.slice(0, 160),
        name: axe.commons.text.accessibleText(element),
    }));
    axe.teardown();
    return found;
}"""


@pytest.fixture
def page(lab):
    page = lab.run(SETUP, *CELLS)
    for at in range(len(CELLS)):
        explorer = page.locator(SCOPE).nth(at)
        explorer.scroll_into_view_if_needed()
        explorer.locator(".js-plotly-plot .main-svg").first.wait_for()
    return page


def walk(page, at):
    """Tab through an explorer; what each stop is, is called, and how its focus looks."""
    for _ in range(3):
        stops = tab_through(page, at)
        if stops:
            break
        # JupyterLab has taken the focus, as it does while outputs settle.
        page.wait_for_timeout(1000)
    return stops


def tab_through(page, at):
    page.evaluate("() => { window.goatvizStops = []; }")
    explorer = page.locator(SCOPE).nth(at)
    explorer.locator(".goatviz-controls :is(select, input):enabled").first.focus()
    # Away and back: a browser shows the focus that a key has moved.
    page.keyboard.press("Shift+Tab")
    for _ in range(200):
        page.keyboard.press("Tab")
        if not page.evaluate(STOP, [SCOPE, at]):
            return page.evaluate(STOPS)
    raise AssertionError("the explorer lets nobody out")


def test_axe_is_awake(offline_page):
    offline_page.set_content(
        '<div class="goatviz-explorer"><select></select><p style="color:#aaa">pale</p></div>'
    )
    found = Axe().run(offline_page, context=SCOPE)
    assert {each["id"] for each in found.response["violations"]} >= {
        "select-name",
        "color-contrast",
    }


def test_every_explorer_is_looked_at():
    explorers = {name for name in goatviz.__all__ if name.startswith("explore_")}
    assert {cell.split("(")[0] for cell in CELLS} == explorers


def test_no_serious_fault_a_name_for_every_control_and_focus_is_seen(lab, page):
    for theme in ("Light", "Dark"):
        lab.show_in(theme)
        page.wait_for_timeout(300)
        found = Axe().run(page, context=SCOPE)
        serious = [
            each["id"]
            for each in found.response["violations"]
            if each["impact"] in ("serious", "critical")
        ]
        assert serious == [], f"{theme}: {found.generate_report()}"
    for at, cell in enumerate(CELLS):
        stops = walk(page, at)
        controls = page.locator(SCOPE).nth(at).locator(":is(select, input, button):enabled")
        hidden = sum(not each.is_visible() for each in controls.all())
        assert len(stops) >= controls.count() - hidden > 0, f"{cell}: not all are reached"
        for stop in stops:
            assert stop["name"].strip(), f"without a name: {cell}: {stop['what']}"
            assert stop["outlined"], f"focus without an outline: {cell}: {stop['what']}"
            assert stop["opacity"] > 0.5, f"focus on what nobody sees: {cell}: {stop['what']}"
