"""Numbers of an explorer's figures: those that its page has drawn, and those of its picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from playwright.sync_api import Locator

from goatviz.explore.base import Explorer
from goatviz.plots.base import as_figure

DRAWN = """explorer => {
    const number = value => (Number.isNaN(value) ? null : value ?? null);
    const listed = values => [...(values ?? [])].flatMap(
        value => (typeof value === 'object' && value?.length !== undefined
            ? listed(value) : [number(value)]));
    return [...explorer.querySelectorAll('.goatviz-figure .js-plotly-plot')].map(graph =>
        (graph._fullData ?? []).map(trace =>
            trace.type === 'heatmap' ? listed(trace.z) : [...listed(trace.x), ...listed(trace.y)]));
}"""


def expected(explorer: Explorer, **values: Any) -> tuple[list, str]:
    """Numbers of every trace of every figure, and the sentence, as this process computes them."""
    picture = explorer.picture(values)
    figures = [as_figure(drawn).data for drawn in picture.figures.values()]
    return [[_numbers(trace) for trace in traces] for traces in figures], picture.summary


def drawn(explorer: Locator) -> tuple[list, str]:
    """The same, as the page shows them."""
    return explorer.evaluate(DRAWN), explorer.locator(".goatviz-summary").inner_text()


def agree(explorer: Locator, wanted: tuple[list, str]) -> None:
    """Wait until the page shows exactly these numbers and this sentence."""
    # A busy machine takes long to start a kernel and import torch.
    explorer.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=180_000)
    for _ in range(200):
        if drawn(explorer) == wanted:
            break
        explorer.page.wait_for_timeout(50)
    numbers, summary = drawn(explorer)
    assert summary == wanted[1]
    assert numbers == wanted[0]


def _numbers(trace: Any) -> list:
    if trace.type == "heatmap":
        return _listed(trace.z)
    return _listed(trace.x) + _listed(trace.y)


def _listed(values: Any) -> list:
    """NaN as None; integers as they are, which are floats on a page."""
    found = np.ravel([] if values is None else values).tolist()
    return [None if value != value else value for value in found]
