"""The copy mixture behind the paper's Figure 1: first token, earlier token, or noise.

The optimal predictor is known in closed form, so a trained model's loss can be read as a gap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from goatviz import checks
from goatviz.tasks.base import Task


@dataclass(frozen=True)
class CopyMixture(Task):
    r"""Each token copies the first one, or the one `offset` places before it, or is noise.

    P(x_t = c | x_<t) = first [c = x_0] + previous [c = x_{t - offset}] + noise / vocab_size,
    independently for every t >= 1; where t < offset the second share is noise too. An offset of 1
    is lag 0 for the query that predicts the next token: the token to copy is the query's own.

    Attributes
    ----------
    length : int
        Tokens of context; a sequence has one more, to be predicted.
    vocab_size : int
        Symbols, all equally likely for the first token and for noise.
    offset : int
        Distance of the second source in tokens, at least 1.
    first, previous : float
        Probabilities of copying from the two sources; the rest is noise.

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

    def __post_init__(self) -> None:
        checks.integer_fields(self, length=1, vocab_size=2, offset=1)
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

    def sample(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Draw `count` sequences, integers of shape (count, length + 1)."""
        checks.positive_int("count", count)
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
        """The exact distribution of tokens 1 .. length given the tokens before each.

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
        r"""The lowest expected loss that any predictor can reach, in nats per predicted token.

        The predictive distribution depends only on whether x_0 = x_{t - offset}. The probability
        of that event obeys e_t = first + previous e_{t - offset} + noise / V, with e_0 = 1.
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
