"""Named controls as one widget: native elements, which work with keyboards and screen readers.

A `Control` holds a control's name and range, one dict the values of all. The line below them shows
progress, a Cancel button, and errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anywidget
import traitlets

from goatviz.explore.scripts import widget_file, widget_script

KINDS = ("select", "slider", "number", "toggle", "button")


@dataclass(frozen=True)
class Control:
    """One control.

    Parameters
    ----------
    name : str
        Name of the value, and of the explorer's trait.
    label : str
        Text before the control.
    kind : {"select", "slider", "number", "toggle", "button"}
        A button has no value.
    options : sequence of (value, text)
        Choices of a select.
    low, high, step : float
        Range and step of a slider or number; with `log`, the step of the exponent of ten.
    log : bool
        A slider that moves in powers of ten.
    whole : bool
        Integers only.
    hint : str
        Text shown on hover, and read out by screen readers.
    disabled : bool
        Whether the control is shown but cannot be used.
    choices : sequence of float
        The only values of a slider.
    """

    name: str
    label: str
    kind: str = "select"
    options: Sequence[tuple[Any, str]] = ()
    low: float = 0.0
    high: float = 1.0
    step: float = 1.0
    log: bool = False
    whole: bool = False
    hint: str = ""
    disabled: bool = False
    choices: Sequence[float] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")

    def spec(self) -> dict[str, Any]:
        """The control as the page needs it: the ends of a logarithmic slider are exponents."""
        low, high, step = self.low, self.high, self.step
        if len(self.choices):
            low, high, step = 0, len(self.choices) - 1, 1
        elif self.log:
            low, high = math.log10(low), math.log10(high)
        return {
            "name": self.name,
            "label": self.label,
            "kind": self.kind,
            "options": [list(option) for option in self.options],
            "min": low,
            "max": high,
            "step": step,
            "choices": list(self.choices),
            "log": self.log,
            "whole": self.whole,
            "hint": self.hint,
            "disabled": self.disabled,
        }


class ControlPanel(anywidget.AnyWidget):
    """Controls in a row that wraps, with a line for progress and errors.

    Parameters
    ----------
    controls : sequence of Control
        The controls, in order.
    values : mapping
        Their values by name; buttons have none.
    label : str
        Name of the whole group, for screen readers.

    Attributes
    ----------
    values : dict
        Values by name, set by the page and by the kernel alike.
    progress : float
        Share of the work that is done; -1 while nothing is being done.
    doing, error : str
        Name of the work that is being done, and the last error.
    """

    _esm = widget_script("controls")
    _css = widget_file("controls.css")

    controls = traitlets.List().tag(sync=True)
    values = traitlets.Dict().tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)
    progress = traitlets.Float(-1.0).tag(sync=True)
    doing = traitlets.Unicode().tag(sync=True)
    error = traitlets.Unicode().tag(sync=True)

    def __init__(
        self, controls: Sequence[Control], values: Mapping[str, Any], *, label: str
    ) -> None:
        self._controls = {control.name: control for control in controls}
        super().__init__(
            controls=[control.spec() for control in controls], values=dict(values), label=label
        )
        self._on_press: dict[str, Callable[[], None]] = {}
        self._on_cancel: Callable[[], None] | None = None
        self.on_msg(self._received)

    def __getitem__(self, name: str) -> Control:
        return self._controls[name]

    def items(self) -> list[tuple[str, Control]]:
        """Names and controls, in order."""
        return list(self._controls.items())

    def change(self, name: str, **changes: Any) -> None:
        """Change some fields of a control, such as its options or range."""
        changed = replace(self._controls[name], **changes)
        if changed != self._controls[name]:
            self._controls[name] = changed
            self.controls = [control.spec() for control in self._controls.values()]

    def on_press(self, name: str, act: Callable[[], None]) -> None:
        """Call `act` when the button of that name is pressed."""
        self._on_press[name] = act

    def on_cancel(self, act: Callable[[], None]) -> None:
        """Call `act` when Cancel is pressed."""
        self._on_cancel = act

    def _received(self, _widget: Any, message: dict[str, Any], _buffers: list[Any]) -> None:
        if message.get("kind") == "press" and message.get("name") in self._on_press:
            self._on_press[message["name"]]()
        elif message.get("kind") == "cancel" and self._on_cancel is not None:
            self._on_cancel()
