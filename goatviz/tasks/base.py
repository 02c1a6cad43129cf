"""What training and evaluation ask of a task."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor


class Task(Protocol):
    """A seeded source of token sequences of one length; a frozen dataclass.

    Attributes
    ----------
    name : str
        The task's name on the command line and in the cards of checkpoints.
    length : int
        Tokens of context. A sequence has an id for each and one more, to be predicted; in one of
        `Images` a token is a patch, whose pixels are an id each.
    vocab_size : int
        Ids lie in [0, vocab_size).
    answer_length : int
        Number of predicted tokens, at the end of each sequence, whose accuracy counts; 0 if none.
    masked : int or None
        Targets with this id are left out of the loss.
    patch, channels : int or None, int
        See `ModelConfig`: None and 1 but for images.
    """

    name: ClassVar[str]
    masked: ClassVar[int | None] = None
    patch: ClassVar[int | None] = None
    channels: ClassVar[int] = 1
    length: int
    vocab_size: int

    @property
    def answer_length(self) -> int:
        return 0

    @property
    def predicted(self) -> int:
        """Number of ids at the end of a sequence that are predicted."""
        return self.length

    def at_length(self, length: int) -> Self:
        """The same task with another length of context, in tokens."""
        return replace(self, length=length)

    def held_out(self) -> Self:
        """The task to evaluate on: the same length, sequences that training never draws.

        By default it is the task itself: another seed gives other sequences.
        """
        return self

    def sample(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Draw `count` sequences, integers of shape (count, ids + 1), see `length`."""
        ...

    def target_weights(self) -> Tensor | None:
        """Weight of each predicted id in the loss, shape (predicted,); None: equal weights."""
        return None
