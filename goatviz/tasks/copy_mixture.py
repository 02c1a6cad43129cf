"""The copy mixture behind the paper's Figure 1: first token, earlier token, or noise.

The optimal predictor is known in closed form, so a trained model's loss can be read as a gap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class CopyMixture:
    r"""Each token copies the first, or the one `offset` places before it, or is noise.

    P(x_t = c | x_<t) = first [c = x_0] + previous [c = x_{t - offset}] + noise / vocab_size,
    independently for every t >= 1; where t < offset the second share is noise too. Predicting the
    next token, an offset of 1 is lag 0 in query coordinates: the copied token is the query's own.

    Attributes
    ----------
    length : int
        Tokens of context; a sequence has one more, to be predicted.
    vocab_size : int
        Symbols, all equally likely for the first token and for noise.
    offset : int
        How far back the second source lies, in tokens, at least 1.
    first, previous : float
        Shares of the two sources; the rest is noise.

    Examples
    --------
    >>> task = CopyMixture(length=8, vocab_size=4, first=0.0, previous=0.0)
    >>> math.isclose(task.bayes_loss(), math.log(4))
    True
    """

    length: int = 64
    vocab_size: int = 32
    offset: int = 1
    first: float = 0.45
    previous: float = 0.45

    name: ClassVar[str] = "copy-mixture"
    answer_length: ClassVar[int] = 0
    masked: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("vocab_size", 2), ("offset", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.offset > self.length:
            raise ValueError(
                f"offset must not exceed length={self.length}, got {self.offset}: "
                "nothing would ever be copied from there"
            )
        for name in ("first", "previous"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.first + self.previous > 1 + 1e-12:
            raise ValueError(
                f"first + previous must not exceed 1, got {self.first} + {self.previous}"
            )

    def at_length(self, length: int) -> Self:
        """The same task with another length of context, tokens."""
        return replace(self, length=length)

    def held_out(self) -> Self:
        """The task itself: another seed is another stream."""
        return self

    def target_weights(self) -> None:
        """All predicted tokens count alike."""
        return None

    def sample(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Draw `count` sequences, integers of shape (count, length + 1)."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        shape = (count, self.length + 1)
        ids = torch.randint(self.vocab_size, shape, generator=generator)
        source = torch.rand(shape, generator=generator)
        for t in range(1, self.length + 1):
            ids[:, t] = torch.where(source[:, t] < self.first, ids[:, 0], ids[:, t])
            if t >= self.offset:
                copies = (source[:, t] >= self.first) & (source[:, t] < self.first + self.previous)
                ids[:, t] = torch.where(copies, ids[:, t - self.offset], ids[:, t])
        return ids

    def optimal_probabilities(self, ids: Tensor) -> Tensor:
        """The exact predictive distribution of tokens 1 .. length given those before.

        Parameters
        ----------
        ids : Tensor
            From `sample`, shape (count, length + 1).

        Returns
        -------
        Tensor
            float64, shape (count, length, vocab_size).
        """
        count = len(ids)
        noise = torch.full((self.length,), 1 - self.first - self.previous, dtype=torch.float64)
        noise[: self.offset - 1] += self.previous
        out = (noise / self.vocab_size).view(1, -1, 1).repeat(count, 1, self.vocab_size)
        ones = torch.ones(count, self.length, 1, dtype=torch.float64)
        out.scatter_add_(2, ids[:, :1, None].expand(-1, self.length, -1), self.first * ones)
        back = ids[:, : self.length + 1 - self.offset, None]
        out[:, self.offset - 1 :].scatter_add_(
            2, back, self.previous * ones[:, : self.length + 1 - self.offset]
        )
        return out

    def bayes_loss(self) -> float:
        r"""The lowest expected loss any predictor can reach, in nats per predicted token.

        The predictive distribution depends only on whether x_0 = x_{t - offset}; that event's
        probability obeys e_t = first + previous e_{t - offset} + noise / V, with e_0 = 1.
        """
        size = self.vocab_size
        noise = 1 - self.first - self.previous
        equal = [1.0]
        total = 0.0
        for t in range(1, self.length + 1):
            if t < self.offset:
                spare = noise + self.previous
                equal.append(self.first + spare / size)
                total += _entropy([self.first], spare, size)
            else:
                same = equal[t - self.offset]
                equal.append(self.first + self.previous * same + noise / size)
                total += same * _entropy([self.first + self.previous], noise, size)
                total += (1 - same) * _entropy([self.first, self.previous], noise, size)
        return total / self.length


def _entropy(shares: list[float], noise: float, size: int) -> float:
    """Entropy of `shares` on distinct symbols plus `noise` spread over all of them, in nats."""
    floor = noise / size
    masses = [share + floor for share in shares] + [floor] * (size - len(shares))
    return -sum(p * math.log(p) for p in masses if p > 0)
