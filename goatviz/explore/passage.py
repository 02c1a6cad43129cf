"""The input as a passage to read: every token coloured by the mass that it gets, or gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import traitlets

from goatviz import checks
from goatviz.analysis.levels import PlanLevels
from goatviz.explore.page import Part

#: What the colours mean: the row of the chosen query, or the column of the chosen key.
DIRECTIONS = ("gives", "receives")
#: The longest passage that is shown.
MOST_TOKENS = 4096


class Weighed(Protocol):
    """What a passage shows: tokens that are queries and keys, and the mass between them.

    Attributes
    ----------
    tokens : sequence of str
        One text for each.
    query, key : int
        The chosen query and the chosen key.
    sink : int
        The key that the scale of colours leaves out.
    """

    @property
    def tokens(self) -> Sequence[str]: ...

    @property
    def query(self) -> int: ...

    @property
    def key(self) -> int: ...

    @property
    def sink(self) -> int: ...

    def weights(self, direction: str, at: int) -> np.ndarray:
        """The mass that query `at` gives to each token, or that key `at` receives from each.

        NaN where the pair is forbidden or unknown; shape (tokens,).
        """
        ...


@dataclass(frozen=True)
class ShownPassage:
    """The plan of a head as a passage shows it; see `Weighed`.

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

    def weights(self, direction: str, at: int) -> np.ndarray:
        levels = self.levels
        rows, columns = (0, levels.queries), (0, levels.keys)
        if direction == "gives":
            view = levels.view((at, at + 1), columns, rows=1, columns=levels.keys)
        else:
            view = levels.view(rows, (at, at + 1), rows=levels.queries, columns=1)
        return view.weights.ravel()


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

    def __init__(self, content: Weighed) -> None:
        super().__init__(direction="gives")
        self._shown = content
        self.observe(lambda _: self.show(self._shown), "direction")
        self.show(content)

    def state_of(self, content: Weighed) -> dict[str, Any]:
        """The traits that show a passage."""
        at = content.query if self.direction == "gives" else content.key
        return {
            "tokens": list(content.tokens),
            "at": at,
            "sink": content.sink,
            "weights": self._weights(content, at),
        }

    def show(self, content: Weighed) -> None:
        self._shown = content
        super().show(content)

    def received(self, message: Mapping[str, Any]) -> None:
        """Answer which weights belong to a token that the reader points at."""
        if message.get("kind") != "weights":
            return
        try:
            at = checks.index("at", message.get("at"), len(self.tokens))
            weights = self._weights(self._shown, at)
            self.send({"kind": "weighed", "at": at}, [weights])
        except Exception:
            # The page waits for an answer, whatever happens.
            self.send({"kind": "weighed"})
            raise

    def _weights(self, content: Weighed, at: int) -> bytes:
        weights = content.weights(self.direction, at)
        return np.ascontiguousarray(weights, dtype=np.float32).tobytes()

    def close(self) -> None:
        self._shown = None
