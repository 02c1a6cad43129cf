"""Controls as data: the front end makes native elements of them, which keyboards reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
