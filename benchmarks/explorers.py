"""From a key press to the picture: explorers in JupyterLab, in a real browser.

Run with ``python benchmarks/explorers.py`` (needs a Chromium). Milliseconds are medians over key
presses, measured in the page until the last panel in the window is painted; those outside it wait
for a pause. Bytes are what the kernel sends for one update. Beside them a plain plotly FigureWidget
with a heatmap of the same size, and the size of the pages that BertViz and CircuitsVis make of the
same weights, where they are installed
(``pip install --no-deps bertviz circuitsvis "importlib_metadata<9" zipp``).
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _browser import CLOCK, driver, median, press, presses, session
from _report import Column, Report, arguments

SETUP = """
import json, time
import numpy as np, psutil, torch
import plotly.graph_objects as go, ipywidgets
from ipykernel.comm.comm import BaseComm
from goatviz import explore_plan, explore_prior, load_pretrained
model = load_pretrained("passkey-goat")
sent = [0]
inner = BaseComm.publish_msg
def counted(self, msg_type, data=None, metadata=None, buffers=None, **keys):
    sent[0] += len(json.dumps(data, default=str)) + sum(len(memoryview(b)) for b in buffers or ())
    return inner(self, msg_type, data=data, metadata=metadata, buffers=buffers, **keys)
BaseComm.publish_msg = counted
def ids(n):
    return torch.randint(97, 123, (1, n), generator=torch.Generator().manual_seed(0))
"""
PLAIN = """
weights = [np.asarray(torch.rand({n}, {n}, generator=torch.Generator().manual_seed(h)).tril())
           for h in range(2)]
widget = go.FigureWidget(go.Heatmap(z=weights[0]))
slider = ipywidgets.IntSlider(min=0, max=1)
slider.observe(lambda change: setattr(widget.data[0], 'z', weights[change['new']]), 'value')
display(slider, widget)
ended = time.time()
"""
REAL = """
from goatviz import example_text, load_example
model, tokenizer = load_example()
ids = tokenizer(example_text(), return_tensors="pt")["input_ids"][:, :{n}]
with torch.no_grad():
    model(ids)
    began = time.time()
    model(ids)
forward = time.time() - began
began = time.time()
explorer = explore_plan(model, {{"input_ids": ids}}, tokenizer=tokenizer)
made = time.time() - began
display(explorer)
ended = time.time()
"""
#: When something is painted for the first time, in the page's wall clock.
FIRST = """
window.goatvizFirst = null;
new MutationObserver(() => {
    if (window.goatvizFirst === null && document.querySelector(
            '[data-drawn], [data-painted], .js-plotly-plot .main-svg'))
        setTimeout(() => { window.goatvizFirst ??= Date.now(); }, 0);
}).observe(document, { subtree: true, childList: true, attributes: true });
"""
MIB = 2**20
COLUMNS = (
    Column("median", "ms", ",.0f"),
    Column("worst", "ms", ",.0f"),
    Column("sent", "kB", ",.0f"),
    Column("target", "ms", ",.0f"),
)


class Bench:
    """One notebook, run cell by cell, and what is measured in it."""

    def __init__(self, lab: Any, context: Any, count: int, report: Report) -> None:
        self.lab, self.context, self.count, self.report = lab, context, count, report
        self.page: Any = None
        self.table = report.table(
            "updates in the page", COLUMNS, lengths=False, ratio=False, width=54
        )
        context.add_init_script(FIRST)

    def open(self, *cells: str) -> float:
        """Run cells in a fresh notebook; milliseconds from their end to the first picture."""
        if self.page is not None:
            self.page.close()
        self.page = self.context.new_page()
        name = self.lab.write(f"{len(list(self.lab.root.iterdir()))}.ipynb", SETUP, *cells)
        self.notebook = driver().Lab(self.lab, self.page)
        self.notebook.open(name)
        self.notebook.run_all(timeout_ms=600_000)
        self.page.wait_for_function("() => window.goatvizFirst !== null")
        shown = self.page.evaluate("() => window.goatvizFirst")
        self.page.wait_for_timeout(2500)
        self.page.evaluate(CLOCK)
        return max(0.0, shown - 1000 * self.ask("ended"))

    def ask(self, expression: str) -> Any:
        return self.notebook.ask(expression)

    def focus(self, role: str, name: str) -> None:
        self.page.get_by_role(role, name=name).first.focus()

    def measure(
        self,
        label: str,
        keys: tuple[str, ...],
        target: float | None = None,
        of: str = "painted",
    ) -> float:
        """Press keys in turn; note the median beside what was sent."""
        count, before = self.count, self.ask("sent[0]")
        taken = presses(self.page, keys, count, of=of)
        share = (self.ask("sent[0]") - before) / (count + 1)
        self.say(label, median(taken), share, target, max(taken))
        self.report.target(f"{label}: MB sent for an update", share / 1e6, 1.0)
        return median(taken)

    def say(
        self,
        label: str,
        value: float,
        share: float | None = None,
        target: float | None = None,
        most: float | None = None,
    ) -> None:
        self.table.add(label, value, most, None if share is None else share / 1e3, target)
        if target is not None:
            self.report.target(f"{label}, ms", value, target)

    def heap(self) -> tuple[float, float]:
        """MiB of the page's JavaScript after a collection, and of the kernel's resident memory."""
        cdp = self.page.context.new_cdp_session(self.page)
        cdp.send("HeapProfiler.collectGarbage")
        used = cdp.send("Runtime.getHeapUsage")["usedSize"] / MIB
        cdp.detach()
        code = "(__import__('gc').collect(), psutil.Process().memory_info().rss)[1]"
        return used, self.ask(code) / MIB


def bench_maps(bench: Bench, sizes: list[int]) -> None:
    for size in sizes:
        target = 80 if size <= 1024 else 150
        first = bench.open(
            f"explorer = explore_plan(model, ids({size}))\ndisplay(explorer)\nended = time.time()"
        )
        bench.say(f"plan {size}: cell's end to first picture", first, None, 2000)
        bench.focus("combobox", "Head")
        arrows = ("ArrowDown", "ArrowUp")
        bench.measure(f"plan {size}: another head, its map", arrows, target, of="map")
        bench.measure(f"plan {size}: another head, map and row", arrows, of="seen")
        bench.focus("spinbutton", "Query")
        bench.measure(f"plan {size}: another query, its row", arrows, 60, of="seen")
        bench.page.locator(".goatviz-map-canvas").focus()
        bench.measure(f"plan {size}: zoom in and out", ("+", "-"), target, of="seen")


def bench_plain(bench: Bench, sizes: list[int]) -> None:
    for size in sizes:
        first = bench.open(PLAIN.format(n=size))
        bench.say(f"plain FigureWidget {size}: cell's end to first picture", first)
        bench.page.evaluate(
            "() => window.goatvizClock.watch(document.querySelector('.js-plotly-plot'))"
        )
        bench.page.locator(".noUi-handle").first.focus()
        count = bench.count if size <= 512 else min(bench.count, 4)
        before = bench.ask("sent[0]")
        taken = presses(bench.page, ("ArrowRight", "ArrowLeft"), count)
        share = (bench.ask("sent[0]") - before) / (count + 1)
        bench.say(
            f"plain FigureWidget {size}: another heatmap", median(taken), share, most=max(taken)
        )


def bench_prior(bench: Bench, lengths: list[int]) -> None:
    for length in lengths:
        first = bench.open(
            f"explorer = explore_prior(model, length={length})\n"
            "display(explorer)\nended = time.time()"
        )
        bench.say(f"prior {length}: cell's end to first picture", first, None, 2000)
        bench.focus("slider", "Relative ×")
        keys = ("ArrowRight", "ArrowLeft")
        target = 100 if length <= 1024 else None
        bench.measure(f"prior {length}: a slider, panels in view", keys, target, of="seen")
        bench.measure(f"prior {length}: a slider, all panels", keys)


def bench_real(bench: Bench, length: int) -> None:
    """All heads of SmolLM2: its explorer beside one forward pass."""
    first = bench.open(REAL.format(n=length))
    forward, made = (1000 * bench.ask(name) for name in ("forward", "made"))
    bench.say(f"SmolLM2 {length}: one forward pass", forward)
    target = 1.5 * forward + 2000
    bench.say(f"SmolLM2 {length}: explorer with 270 thumbnails", made, None, target)
    bench.say(f"SmolLM2 {length}: cell's end to first picture", first, None, 2000)
    bench.focus("spinbutton", "Query")
    # The row stands below thumbnails and passage.
    bench.page.evaluate(
        "() => document.querySelector('.goatviz-figure').scrollIntoView({ block: 'center' })"
    )
    bench.page.wait_for_timeout(1000)
    arrows = ("ArrowDown", "ArrowUp")
    bench.measure(f"SmolLM2 {length}: another query, row and why", arrows, 60, of="seen")


def bench_long(bench: Bench, length: int, steps: int) -> None:
    code = (
        'model = load_pretrained("copy-mixture-4-goat")\n'
        f"explorer = explore_plan(model, torch.randint(32, (1, {length})))\n"
        "display(explorer)\nended = time.time()"
    )
    first = bench.open(code)
    bench.say(f"plan {length}: cell's end to first picture", first, None, 2000)
    bench.page.wait_for_function(
        "() => document.querySelector('.goatviz-map-work').dataset.busy === 'no'",
        timeout=120_000,
    )
    bench.page.locator(".goatviz-map-canvas").focus()
    before = bench.ask("sent[0]")
    taken = [press(bench.page, "+") for _ in range(steps)]
    share = (bench.ask("sent[0]") - before) / steps
    bench.say(f"plan {length}: zoom in, {steps} steps", median(taken), share, most=max(taken))
    shift = "Shift+ArrowLeft"
    taken = [press(bench.page, shift) for _ in range(steps)]
    bench.say(f"plan {length}: pan by keys, queries known", median(taken), most=max(taken))


def bench_memory(bench: Bench, updates: int) -> None:
    bench.open("explorer = explore_plan(model, ids(1024))\ndisplay(explorer)\nended = time.time()")
    bench.focus("combobox", "Head")
    presses(bench.page, ("ArrowDown", "ArrowUp"), 5, quiet_ms=50)
    page_before, kernel_before = bench.heap()
    presses(bench.page, ("ArrowDown", "ArrowUp"), updates, quiet_ms=20)
    page_after, kernel_after = bench.heap()
    for name, growth in (
        ("page", page_after - page_before),
        ("kernel", kernel_after - kernel_before),
    ):
        bench.report.target(f"memory of the {name} after {updates} updates, MiB", growth, 10.0)


def peers(length: int, heads: int, report: Report) -> None:
    """Sizes of the pages that other viewers make of one layer's weights, beside ours."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from goatviz import explore_plan, load_pretrained

    weights = torch.rand(1, heads, length, length).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    tokens = [f"t{number}" for number in range(length)]
    table = report.table(
        f"pages of {heads} heads at {length} tokens, without plotly.js",
        [Column("page", "MB", ".1f")],
        lengths=False,
        ratio=False,
    )
    bertviz = circuitsvis = None
    if importlib.util.find_spec("bertviz"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from bertviz import head_view

            shown = head_view((weights,), tokens, html_action="return")
        bertviz = len(shown.data) / 1e6
    if importlib.util.find_spec("circuitsvis"):
        from circuitsvis.attention import attention_heads

        shown = str(attention_heads(attention=np.asarray(weights[0]), tokens=tokens))
        circuitsvis = len(shown) / 1e6
    model = load_pretrained("passkey-goat")
    ids = torch.randint(97, 123, (1, length))
    explorer = explore_plan(model, ids, tokens=tokens)
    with TemporaryDirectory() as folder:
        from plotly.offline import get_plotlyjs

        own = [name for name, _ in explorer.controls["head"].options]
        path = explorer.save_html(Path(folder) / "plan.html", vary={"head": own})
        size = path.stat().st_size - len(get_plotlyjs())
    # None where a viewer is not installed.
    table.add("BertViz head_view", bertviz)
    table.add("CircuitsVis", circuitsvis)
    table.add("goatviz save_html", size / 1e6)
    report.note(f"goatviz's page holds {len(own)} heads, maps and rows")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--plain-sizes", type=int, nargs="*", default=[128, 256])
    parser.add_argument("--prior-lengths", type=int, nargs="*", default=[1024, 16_384])
    parser.add_argument("--long", type=int, default=131_072)
    parser.add_argument("--real", type=int, default=600)
    parser.add_argument("--presses", type=int, default=30)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--peer-length", type=int, default=256)
    quick = {
        "sizes": [40],
        "plain_sizes": [],
        "prior_lengths": [],
        "long": 300,
        "real": 40,
        "presses": 1,
        "updates": 2,
        "steps": 1,
        "peer_length": 16,
    }
    options = arguments(parser, argv, quick=quick)
    about = f"Explorers in JupyterLab: medians over {options.presses} key presses"
    report = Report("explorers", about, options, ("jupyterlab", "anywidget"))
    with session() as (lab, context):
        bench = Bench(lab, context, options.presses, report)
        bench_maps(bench, options.sizes)
        bench_prior(bench, options.prior_lengths)
        bench_plain(bench, options.plain_sizes)
        if options.real:
            bench_real(bench, options.real)
        bench_long(bench, options.long, options.steps)
        bench_memory(bench, options.updates)
    peers(options.peer_length, 4, report)
    report.finish()


if __name__ == "__main__":
    main()
