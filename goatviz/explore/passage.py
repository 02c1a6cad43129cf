"""The input as a passage to read: every token coloured by the mass that it gets, or gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import traitlets

from goatviz import checks
from goatviz.analysis.levels import PlanLevels
from goatviz.explore.page import Part

#: What the colours mean: the row of the chosen query, or the column of the chosen key.
DIRECTIONS = ("gives", "receives")
#: The longest passage that is shown.
MOST_TOKENS = 4096


@dataclass(frozen=True)
class ShownPassage:
    """What a passage shows.

    Parameters
    ----------
    levels : PlanLevels
        The plan of a head in which queries and keys are the same tokens.
    tokens : sequence of str
        One text for each.
    query, key : int
        The chosen query and the chosen key.
    sink : int
        The key that the scale of colours leaves out: the first that is no padding.
    """

    levels: PlanLevels
    tokens: Sequence[str]
    query: int
    key: int
    sink: int = 0


class Passage(Part):
    """The tokens of an input, coloured by one row or one column of a plan.

    Attributes
    ----------
    tokens : list of str
        Texts of the tokens.
    direction : {"gives", "receives"}
        Whether the colours are the mass that the chosen query gives to each key, or that which the
        chosen key receives from each query.
    at : int
        The chosen query, or the chosen key.
    weights : bytes
        The mass of each token, float32; NaN where the pair is forbidden.
    sink : int
        The token that the scale of colours leaves out.
    """

    kind = "passage"

    tokens = traitlets.List().tag(sync=True)
    direction = traitlets.Enum(DIRECTIONS).tag(sync=True)
    at = traitlets.Int(0).tag(sync=True)
    weights = traitlets.Bytes(b"").tag(sync=True)
    sink = traitlets.Int(0).tag(sync=True)

    def __init__(self, content: ShownPassage) -> None:
        super().__init__(direction="gives")
        self._shown = content
        self.observe(lambda _: self.show(self._shown), "direction")
        self.show(content)

    def state_of(self, content: ShownPassage) -> dict[str, Any]:
        """The traits that show a passage."""
        at = content.query if self.direction == "gives" else content.key
        return {
            "tokens": list(content.tokens),
            "at": at,
            "sink": content.sink,
            "weights": self._weights(content.levels, at),
        }

    def show(self, content: ShownPassage) -> None:
        self._shown = content
        super().show(content)

    def received(self, message: Mapping[str, Any]) -> None:
        """Answer which weights belong to a token that the reader points at."""
        if message.get("kind") != "weights":
            return
        try:
            at = checks.index("at", message.get("at"), len(self.tokens))
            weights = self._weights(self._shown.levels, at)
            self.send({"kind": "weighed", "at": at}, [weights])
        except Exception:
            # The page waits for an answer, whatever happens.
            self.send({"kind": "weighed"})
            raise

    def _weights(self, levels: PlanLevels, at: int) -> bytes:
        rows, columns = (0, levels.queries), (0, levels.keys)
        if self.direction == "gives":
            view = levels.view((at, at + 1), columns, rows=1, columns=levels.keys)
        else:
            view = levels.view(rows, (at, at + 1), rows=levels.queries, columns=1)
        return np.ascontiguousarray(view.weights, dtype=np.float32).tobytes()

    def close(self) -> None:
        self._shown = None
