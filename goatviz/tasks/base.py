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
        Tokens of context; a sequence has one more, to be predicted.
    vocab_size : int
        Ids lie in [0, vocab_size).
    answer_length : int
        Number of predicted tokens, at the end of each sequence, whose accuracy counts; 0 if none.
    masked : int or None
        Targets with this id are left out of the loss.
    answers_only : bool
        Whether the answer is all that is predicted, so that a model need not have logits for what
        comes before it.
    """

    name: ClassVar[str]
    masked: ClassVar[int | None] = None
    answers_only: ClassVar[bool] = False
    length: int
    vocab_size: int

    @property
    def answer_length(self) -> int:
        return 0

    def at_length(self, length: int) -> Self:
        """The same task with another length of context, in tokens."""
        return replace(self, length=length)

    def held_out(self) -> Self:
        """The task to evaluate on: the same length, sequences that training never draws.

        By default it is the task itself: another seed gives other sequences.
        """
        return self

    def sample(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Draw `count` sequences, integers of shape (count, length + 1)."""
        ...

    def target_weights(self) -> Tensor | None:
        """Weight of each predicted token in the loss, shape (length,); None: equal weights."""
        return None
