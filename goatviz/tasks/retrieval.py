"""Passkey and needle in a haystack: find one value in a long text and repeat it at the end.

Tokens are ASCII characters, so that `decode` shows what a model was asked.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from goatviz import checks
from goatviz.tasks.base import Task

_PAIR, _EQUALS, _END = "#", "=", "."
_NAME_LENGTH = 2
_RESERVED = frozenset(_PAIR + _EQUALS)


@dataclass(frozen=True)
class _Retrieval(Task):
    """What `Passkey` and `Needle` share."""

    length: int = 1024
    value_length: int = 8
    alphabet: str = string.digits
    depths: tuple[float, float] = (0.0, 0.8)
    distractors: int = 0
    haystack: str | None = None

    #: Weights of the mean loss over all tokens, and of the mean loss over the answer.
    language_weight: ClassVar[float]
    answer_weight: ClassVar[float]
    vocab_size: ClassVar[int] = 128

    def __post_init__(self) -> None:
        checks.integer_fields(self, length=1, value_length=1, distractors=0)
        if self.distractors >= len(string.ascii_uppercase) ** _NAME_LENGTH:
            raise ValueError(f"distractors must leave names to choose, got {self.distractors}")
        letters = self.alphabet
        if len(letters) < 2 or len(set(letters)) < len(letters) or not letters.isascii():
            raise ValueError(f"alphabet must hold distinct ASCII characters, got {letters!r}")
        object.__setattr__(self, "depths", tuple(float(depth) for depth in self.depths))
        if len(self.depths) != 2 or not 0 <= self.depths[0] <= self.depths[1] <= 1:
            raise ValueError(
                f"depths must be two numbers, 0 <= first <= last <= 1, got {self.depths}"
            )
        for name in ("alphabet", "haystack"):
            text = getattr(self, name)
            if text is not None and (not text or not text.isascii() or _RESERVED & set(text)):
                raise ValueError(
                    f"{name} must be ASCII text without {_PAIR!r} and {_EQUALS!r}, got {text!r}"
                )
        if self.length < self.shortest:
            pairs = f"{self.distractors + 1} pairs" if self.distractors else "the pair"
            raise ValueError(
                f"length must be at least {self.shortest} tokens, to hold {pairs}, the question "
                f"and the answer, got {self.length}"
            )

    @property
    def _name_length(self) -> int:
        return _NAME_LENGTH if self.distractors else 0

    @property
    def _question_length(self) -> int:
        return len(_PAIR) + self._name_length + len(_EQUALS)

    @property
    def _pair_length(self) -> int:
        return self._question_length + self.value_length + len(_END)

    @property
    def shortest(self) -> int:
        """The fewest tokens of context that hold every pair and the question, without filler."""
        pairs = (self.distractors + 1) * self._pair_length
        return pairs + self._question_length + self.value_length - 1

    @property
    def answer_length(self) -> int:
        """Number of tokens in the answer, which ends each sequence."""
        return self.value_length

    @property
    def chance(self) -> float:
        """Probability of guessing one token of the answer."""
        return 1 / len(self.alphabet)

    @property
    def strict_chance(self) -> float:
        """Probability of guessing the whole answer."""
        return self.chance**self.value_length

    def target_weights(self) -> Tensor:
        """Weight of each predicted token in the loss, shape (length,); they sum to 1."""
        total = self.language_weight + self.answer_weight
        weights = torch.full((self.length,), self.language_weight / total / self.length)
        weights[-self.answer_length :] += self.answer_weight / total / self.answer_length
        return weights

    def sample(
        self, count: int, *, generator: torch.Generator, depth: float | None = None
    ) -> Tensor:
        """Draw `count` sequences, character codes of shape (count, length + 1).

        Parameters
        ----------
        count : int
            Number of sequences, at least 1.
        generator : torch.Generator
            A generator on the CPU.
        depth : float, optional
            Position of the pair in the filler: 0 is the beginning, 1 just before the question.
            Default: uniform within `depths`.
        """
        checks.positive_int("count", count)
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depth must lie in [0, 1], got {depth}")
        pairs = self.distractors + 1
        filler = self.length - self.shortest
        low, high = self.depths if depth is None else (depth, depth)
        drawn = torch.rand(count, pairs, generator=generator, dtype=torch.float64)
        place = low + (high - low) * drawn[:, :1]
        # Number of filler characters before each pair; distractors may stand anywhere.
        before = torch.cat([place, drawn[:, 1:]], dim=1).mul(filler).round().long()
        letters = _codes(self.alphabet)
        value = letters[_choose(len(letters), (count, pairs, self.value_length), generator)]
        names = self._names(count, pairs, generator)
        sign = torch.tensor(ord(_PAIR)).expand(count, pairs, 1)
        equals = torch.tensor(ord(_EQUALS)).expand(count, pairs, 1)
        end = torch.tensor(ord(_END)).expand(count, pairs, 1)
        question = torch.cat([sign, names, equals], dim=-1)
        pair = torch.cat([question, value, end], dim=-1)
        body = self._filler(count, filler, generator)
        # Each character of filler is pushed right by the pairs that stand before it.
        order = before.argsort(dim=1, stable=True)
        rank = order.argsort(dim=1)
        start = before + rank * self._pair_length
        ids = torch.empty(count, filler + pairs * self._pair_length, dtype=torch.long)
        free = torch.ones_like(ids, dtype=torch.bool)
        at = start[..., None] + torch.arange(self._pair_length)
        ids.scatter_(1, at.flatten(1), pair.flatten(1))
        free.scatter_(1, at.flatten(1), False)
        ids[free] = body.flatten()
        return torch.cat([ids, question[:, 0], value[:, 0]], dim=1)

    def answer_keys(self, ids: Tensor) -> Tensor:
        """Positions of the answer's tokens in each text, shape (count, value_length).

        Parameters
        ----------
        ids : Tensor
            From `sample`, shape (count, length + 1).

        Raises
        ------
        ValueError
            If a sequence has another length, or does not contain the pair it asks for.
        """
        if ids.ndim != 2 or ids.shape[1] != self.length + 1:
            raise ValueError(
                f"ids must have shape (count, {self.length + 1}), got {tuple(ids.shape)}"
            )
        asked = self._question_length
        text, question = ids[:, : -asked - self.value_length], ids[:, -asked - self.value_length :]
        same = (text.unfold(1, asked, 1) == question[:, None, :asked]).all(dim=-1)
        if not bool(same.any(dim=-1).all()):
            raise ValueError(f"ids must hold the {self.name} that they ask for; some do not")
        first = same.long().argmax(dim=-1) + asked
        return first[:, None] + torch.arange(self.value_length, device=ids.device)

    @staticmethod
    def decode(ids: Tensor) -> list[str]:
        """Sequences of shape (count, length) as text."""
        return ["".join(map(chr, row)) for row in ids.tolist()]

    def _names(self, count: int, pairs: int, generator: torch.Generator) -> Tensor:
        """Distinct names for the pairs of each sequence, shape (count, pairs, letters)."""
        if not self._name_length:
            return torch.empty(count, pairs, 0, dtype=torch.long)
        letters = _codes(string.ascii_uppercase)
        size = len(letters)
        names = torch.rand(count, size**_NAME_LENGTH, generator=generator).argsort(-1)[:, :pairs]
        return letters[torch.stack([names // size, names % size], dim=-1)]

    def _filler(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        if self.haystack is None:
            letters = _codes(string.ascii_lowercase)
            return letters[_choose(len(letters), (count, length), generator)]
        text = _codes(self.haystack)
        first = _choose(len(text), (count, 1), generator)
        return text[(first + torch.arange(length)) % len(text)]


@dataclass(frozen=True)
class Passkey(_Retrieval):
    r"""Repeat the number that is hidden in a text of random letters.

    A sequence is filler, `#=12345678.`, filler, `#=`, and the answer 12345678. The loss is
    (language modelling + 10 answer) / 11, as in the public protocol of Litman and Guo 2026. A
    `haystack` gives the protocol of Mohtashami and Jaggi 2023 (Landmark Attention), `distractors`
    give the multi-key protocol of Hsieh et al. 2024 (RULER).

    Attributes
    ----------
    length : int
        Tokens of context; a sequence has one more, to be predicted.
    value_length : int
        Digits of the number.
    alphabet : str
        Characters that values are drawn from.
    depths : tuple of two floats
        The pair stands uniformly between these fractions of the filler.
    distractors : int
        Number of other pairs. If there are any, every pair has a name of two capitals, and the
        question asks for one by name.
    haystack : str, optional
        Text that replaces the random letters, repeated from a random character on.

    Raises
    ------
    TypeError, ValueError
        For values out of range, or a length that cannot hold the pairs and the question.

    Examples
    --------
    >>> task = Passkey(length=40, value_length=4)
    >>> text = task.decode(task.sample(1, generator=torch.Generator().manual_seed(0)))[0]
    >>> text[-4:] in text[:-6], len(text)
    (True, 41)
    """

    name: ClassVar[str] = "passkey"
    language_weight: ClassVar[float] = 1.0
    answer_weight: ClassVar[float] = 10.0


@dataclass(frozen=True)
class Needle(_Retrieval):
    r"""Repeat a needle, 12 letters out of "abcd", that is hidden in random letters.

    Like `Passkey`, but the loss counts the answer alone (the needle test of Litman and Guo 2026).
    A guess is right for one token in four.

    Attributes
    ----------
    length, value_length, alphabet, depths, distractors, haystack
        As in `Passkey`.

    Examples
    --------
    >>> Needle(length=64).chance
    0.25
    """

    length: int = 256
    value_length: int = 12
    alphabet: str = "abcd"

    name: ClassVar[str] = "needle"
    language_weight: ClassVar[float] = 0.0
    answer_weight: ClassVar[float] = 1.0


def _codes(text: str) -> Tensor:
    return torch.tensor([ord(character) for character in text])


def _choose(size: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(size, shape, generator=generator)
