"""A JupyterLab and a Chromium for benchmarks: those of the browser tests, with clocks in the page.

Times are taken in the page, from the key press to the first moment after the last paint that it
caused, so that nothing of what drives the browser counts.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

_PLACE = Path(__file__).parents[1] / "tests" / "browser" / "conftest.py"

#: Key presses and paints in milliseconds: our widgets count theirs, plotly has an event.
CLOCK = """() => {
    const clock = { pressed: null, painted: null, map: null, seen: null };
    window.goatvizClock = clock;
    document.addEventListener('keydown', () => {
        clock.pressed = performance.now();
        clock.painted = clock.map = clock.seen = null;
    }, true);
    const inView = ({ target }) => {
        const { top, bottom } = target.getBoundingClientRect();
        return bottom > 0 && top < window.innerHeight;
    };
    const paint = records => setTimeout(() => {
        clock.painted = performance.now();
        if (!records || records.some(inView)) clock.seen = clock.painted;
        if (records && records.some(record => record.attributeName === 'data-painted'))
            clock.map = clock.painted;
    }, 0);
    // No map still waits for cells that it has asked for.
    clock.rests = () => [...document.querySelectorAll('.goatviz-map')].every(
        map => Number(map.dataset.painted) < 0 || map.dataset.painted === map.dataset.asked);
    new MutationObserver(paint).observe(document.body, {
        subtree: true, attributes: true, attributeFilter: ['data-drawn', 'data-painted'],
    });
    clock.watch = graph => graph.on('plotly_afterplot', () => paint());
}"""


def driver() -> ModuleType:
    """What the browser tests drive JupyterLab with."""
    if "goatviz_browser_driver" not in sys.modules:
        spec = importlib.util.spec_from_file_location("goatviz_browser_driver", _PLACE)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return sys.modules["goatviz_browser_driver"]


@contextmanager
def session() -> Iterator[tuple[Any, Any]]:
    """A JupyterLab, and the context of a browser that cannot leave this machine."""
    kit = driver()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with kit.jupyterlab(home / "lab") as server:
            shared = kit.SharedBrowser()
            try:
                yield server, shared.context().context
            finally:
                shared.close()


def press(
    page: Any, key: str, *, quiet_ms: int = 400, most_ms: int = 60_000, of: str = "painted"
) -> float:
    """Milliseconds from this key press to the last paint that it caused.

    With `of="map"`, to the last one of a map; with `of="seen"`, to the last one in the window:
    figures outside it wait for a pause.
    """
    page.keyboard.press(key)
    page.wait_for_function(
        f"""() => {{
            const clock = window.goatvizClock;
            return clock.painted !== null && clock.rests()
                && performance.now() - clock.painted > {quiet_ms};
        }}""",
        timeout=most_ms,
    )
    return page.evaluate(f"() => window.goatvizClock.{of} - window.goatvizClock.pressed")


def presses(page: Any, keys: tuple[str, ...], count: int, **options: Any) -> list[float]:
    """As `press`, so many times, the keys in turn; one more before that does not count."""
    taken = [press(page, keys[at % len(keys)], **options) for at in range(count + 1)]
    return taken[1:]


def median(values: list[float]) -> float:
    return statistics.median(values)
