"""An explorer as one offline page: the same controls and figures, for values computed beforehand.

The page holds the widgets' own JavaScript, plotly.js, and one state for every combination of the
values that vary. Whatever several states share is written once.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from plotly.offline import get_plotlyjs

from goatviz import checks
from goatviz.explore.controls import Control
from goatviz.explore.page import front_file, front_script
from goatviz.files import whole_file
from goatviz.pages import json_text, page_text

#: The most that a page may hold in addition to plotly.js.
LIMIT_BYTES = 6_000_000
#: Values whose JSON is shorter than this are written in place.
_LEAST_SHARED = 48


class Exported(Protocol):
    """The part of an `Explorer` that a page needs."""

    @property
    def label(self) -> str: ...

    @property
    def controls(self) -> Mapping[str, Control]: ...

    def values(self) -> Mapping[str, Any]: ...

    def get_state(self) -> Mapping[str, Any]: ...

    def state_of(self, values: Mapping[str, Any]) -> Mapping[str, Any]: ...

    def report_progress(self, doing: str, share: float) -> None: ...


def write_page(explorer: Exported, path: Path, vary: Mapping[str, Sequence[Any]]) -> Path:
    """Compute every state and write the page, whole or not at all; see `Explorer.save_html`."""
    checks.output_file("path", path, ".html")
    text = page(explorer, vary)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def page(explorer: Exported, vary: Mapping[str, Sequence[Any]]) -> str:
    """The page's text.

    Raises
    ------
    ValueError
        If the states together exceed 6 MB, or a value has no picture.
    """
    names = list(vary)
    shared = _Shared()
    states, total = [], math.prod(map(len, vary.values()))
    for number, chosen in enumerate(itertools.product(*vary.values())):
        explorer.report_progress("Exporting", number / total)
        try:
            states.append(_state(explorer, dict(zip(names, chosen, strict=True)), shared))
        finally:
            explorer.report_progress("", -1.0)
        if shared.size > LIMIT_BYTES:
            raise ValueError(
                f"vary asks for {total:,} states ({_product(vary)}), and the first {number + 1:,} "
                f"exceed {LIMIT_BYTES / 1e6:g} MB: name fewer values"
            )
    fixed = [
        f"{control.label} {_text_of(control, getattr(explorer, name))}"
        for name, control in explorer.controls.items()
        if control.kind != "button" and name not in vary
    ]
    chosen = {name: _nearest(vary[name], getattr(explorer, name)) for name in names}
    own = {n: v for n, v in explorer.get_state().items() if not n.startswith("_")}
    content = {
        "names": names,
        "choices": [list(options) for options in vary.values()],
        "values": chosen,
        "held": sorted({*explorer.values()} - {*names}),
        "model": {
            **{name: shared.keep(_plain(own[name])) for name in sorted({*own} - _UNSAVED)},
            **chosen,
            "label": explorer.label,
            "control_specs": [_control(explorer.controls[n], vary[n]).spec() for n in names],
            "progress": -1.0,
            "doing": "",
            "error": "",
        },
        "fixed": "; ".join(fixed),
        "shared": shared.values,
        "states": states,
    }
    data = json_text(content)
    if len(data) > LIMIT_BYTES:
        raise ValueError(
            f"vary asks for {total:,} states ({_product(vary)}), {len(data) / 1e6:.1f} MB; "
            f"{LIMIT_BYTES / 1e6:g} MB is the most: name fewer values"
        )
    return page_text(
        "explore/front/saved.html.j2",
        title=explorer.label,
        css=front_file("explorer.css") + front_file("saved.css"),
        plotly=get_plotlyjs(),
        data=data,
        script=f"{front_script()}\n{front_file('saved.js')}",
    )


def sizes(explorer: Exported, states: Sequence[Mapping[str, Any]]) -> list[int]:
    """Bytes that each of these states, which are computed now, adds to those before it."""
    shared, grown = _Shared(), [0]
    for values in states:
        _state(explorer, values, shared)
        grown.append(shared.size)
    return np.diff(grown).tolist()


#: Traits that a page without a kernel has no use for.
_UNSAVED = {"library", "own_id", "layout", "tabbable", "tooltip"}


def _state(explorer: Exported, values: Mapping[str, Any], shared: _Shared) -> dict[str, Any]:
    return {name: shared.keep(_plain(each)) for name, each in explorer.state_of(values).items()}


def _plain(value: Any) -> Any:
    """The value for JSON: bytes as text, and a figure opened, so that figures can share parts."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, dict):
        if value.keys() == {"text", "buffers"}:
            value = {"spec": json.loads(value["text"]), "buffers": value["buffers"]}
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value


class _Shared:
    """Values by content: equal ones are stored once, and referred to by number."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.size = 0
        self._numbers: dict[str, int] = {}

    def keep(self, value: Any) -> Any:
        """The value with its long parts replaced by references {"$": number}."""
        if isinstance(value, dict):
            value = {name: self.keep(each) for name, each in value.items()}
        elif isinstance(value, list):
            value = [self.keep(each) for each in value]
        text = json.dumps(value, separators=(",", ":"))
        if len(text) < _LEAST_SHARED:
            return value
        if text not in self._numbers:
            self._numbers[text] = len(self.values)
            self.values.append(value)
            self.size += len(text)
        return {"$": self._numbers[text]}


def _control(control: Control, options: Sequence[Any]) -> Control:
    """The same control for the values that the page holds."""
    options = list(options)
    if control.kind == "select":
        names = dict(control.options)
        return replace(control, options=[(o, names.get(o, str(o))) for o in options])
    if control.kind == "toggle":
        return control if len(options) > 1 else replace(control, disabled=True)
    return replace(control, kind="slider", log=False, choices=options)


def _nearest(options: Sequence[Any], value: Any) -> Any:
    """The value that the page starts with: the widget's own, if it is an option."""
    options = list(options)
    return value if value in options else options[0]


def _text_of(control: Control, value: Any) -> str:
    if control.kind == "select":
        return dict(control.options).get(value, str(value))
    if control.kind == "toggle":
        return "on" if value else "off"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _product(vary: Mapping[str, Sequence[Any]]) -> str:
    return " x ".join(f"{len(options)} {name}" for name, options in vary.items())
