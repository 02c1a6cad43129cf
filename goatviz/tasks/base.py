"""What training and evaluation ask of a task."""

from __future__ import annotations

from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor


class Task(Protocol):
    """A seeded source of token sequences of one length; frozen dataclasses keep it.

    Attributes
    ----------
    name : str
        As on the command line and in checkpoints' cards.
    length : int
        Tokens of context; a sequence has one more, to be predicted.
    vocab_size : int
        Ids lie in [0, vocab_size).
    answer_length : int
        Predicted tokens, at the end of each sequence, whose accuracy counts; 0 if none.
    masked : int or None
        Targets of this id count for nothing.
    """

    name: ClassVar[str]
    masked: ClassVar[int | None]
    length: int
    vocab_size: int

    @property
    def answer_length(self) -> int: ...

    def at_length(self, length: int) -> Self:
        """The same task with another length of context."""
        ...

    def held_out(self) -> Self:
        """The task that measures: same length, sequences that training never draws."""
        ...

    def sample(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Draw `count` sequences, integers of shape (count, length + 1)."""
        ...

    def target_weights(self) -> Tensor | None:
        """Weight of each predicted token in the loss, shape (length,); None: all alike."""
        ...
