"""explore_generation in JupyterLab: steps, heads, text and figures agree with the kernel."""

import pytest

pytestmark = pytest.mark.browser

SETUP = """
import numpy as np
import torch
from goatviz import explore_generation, load_pretrained
class Letters:
    def __call__(self, text, return_tensors="pt"):
        return {"ids": torch.tensor([[ord(letter) for letter in text]])}
    def convert_ids_to_tokens(self, ids):
        return [chr(each) for each in ids]
explorer = explore_generation(
    load_pretrained("passkey-goat"), "the key is 12345 and", tokenizer=Letters(), max_new_tokens=6
)
def listed(values):
    return [None if v != v else float(v) for v in np.ravel(np.asarray(values, dtype=float))]
def numbers():
    drawn = {trace.name: trace for trace in explorer.draw().data}
    passage = np.frombuffer(explorer.parts["passage"].weights, dtype=np.float32)
    return [
        listed(drawn["weights"].z), listed(drawn["row"].y), listed(drawn["largest weights"].x),
        listed(passage),
    ]
"""
#: The map, the row and the bars as the page draws them.
IN_PAGE = """() => {
    const found = {};
    for (const graph of document.querySelectorAll('.js-plotly-plot'))
        for (const trace of graph._fullData ?? []) found[trace.name] = trace;
    const listed = values => [...values].map(value => Number.isFinite(value) ? value : null);
    const map = found['weights'], row = found['row'], bars = found['largest weights'];
    return map && row && bars
        ? [listed([...map.z].flatMap(line => [...line])), listed(row.y), listed(bars.x)] : null;
}"""
#: How strong each token's colour is, from 0 to 1, and whether it is greyed.
COLOURS = """() => [...document.querySelectorAll('.goatviz-passage-text [data-at]')].map(span => [
    Number(span.style.getPropertyValue('--goatviz-share')),
    span.classList.contains('goatviz-forbidden'),
])"""


@pytest.fixture
def page(lab):
    page = lab.run(SETUP, "explorer")
    page.locator(".js-plotly-plot .main-svg").nth(1).wait_for()
    return page


def says(page, text):
    page.wait_for_function(
        "text => document.querySelector('.goatviz-summary').textContent.includes(text)", arg=text
    )


def agree(lab, page):
    """Wait until map, row and bars are the kernel's to the bit, and the text has its colours."""
    *wanted, passage = lab.ask("numbers()")
    page.wait_for_function(
        f"wanted => JSON.stringify(({IN_PAGE})()) === JSON.stringify(wanted)", arg=wanted
    )
    most = max(weight for weight in passage[1:] if weight is not None)
    for weight, (share, grey) in zip(passage, page.evaluate(COLOURS), strict=True):
        assert grey == (weight is None)
        expected = min(1.0, ((weight or 0.0) / most) ** 0.5)
        assert share == pytest.approx(expected, abs=1e-3)


def test_the_slider_steps_through_the_text(lab, page):
    says(page, "Step 1 of 6: query 19")
    agree(lab, page)
    page.get_by_role("slider", name="Query").focus()
    for step in (2, 3):
        page.keyboard.press("ArrowRight")
        says(page, f"Step {step} of 6")
    agree(lab, page)
    assert lab.ask("explorer.query") == 21
    page.get_by_role("combobox", name="Layer").select_option(index=1)
    page.get_by_role("combobox", name="Head").select_option(index=2)
    says(page, "Layer 1, head 2")
    agree(lab, page)


def test_a_picture_a_cell_and_a_token_choose(lab, page):
    says(page, "Step 1 of 6")
    page.locator(".goatviz-heads canvas").focus()
    layer, head = lab.ask("[explorer.layer, explorer.head]")
    key, other = ("ArrowRight", head + 1) if head < 3 else ("ArrowLeft", head - 1)
    page.keyboard.press(key)
    says(page, f"Layer {layer}, head {other}")
    agree(lab, page)
    cells = page.locator(".js-plotly-plot").nth(0).locator(".nsewdrag")
    cells.scroll_into_view_if_needed()
    box = cells.bounding_box()
    # The fourth of six queries, the third of 25 keys.
    page.mouse.click(box["x"] + box["width"] * 2.5 / 25, box["y"] + box["height"] * 3.5 / 6)
    says(page, "Step 4 of 6")
    assert lab.ask("[explorer.query, explorer.key]") == [22, 2]
    agree(lab, page)
    page.locator(".goatviz-passage-text [data-at='23']").click()
    says(page, "Step 5 of 6")
    agree(lab, page)
    # A token of the prompt has no row.
    page.locator(".goatviz-passage-text [data-at='5']").hover()
    page.wait_for_function(
        "() => document.querySelector('.goatviz-passage').textContent"
        ".includes('no weights of query 5')"
    )
    page.locator(".goatviz-passage-text [data-at='5']").click()
    alert = page.locator(".goatviz-controls .goatviz-error")
    page.wait_for_function(
        "() => document.querySelector('.goatviz-controls .goatviz-error').textContent !== ''"
    )
    assert "query must be an integer in 19 .. 24, got 5" in alert.inner_text()
