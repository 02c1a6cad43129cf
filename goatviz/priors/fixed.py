"""Priors without a learned form: uniform, linear in the lag (ALiBi), T5 buckets.

They are the baselines that GOAT is compared with. Learned spectra live in `spectral`, the learned
sink and recency in `sink`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from goatviz import checks
from goatviz.priors.base import Factors, Prior, key_factors


class UniformPrior(Prior):
    """The uniform prior, K = 0: standard attention (Litman 2025, arXiv 2508.08369).

    Examples
    --------
    >>> UniformPrior().log_prior(1, 3).tolist()
    [[[0.0, 0.0, 0.0]]]
    """

    name = "uniform"
    kind = "uniform"

    def __init__(self, num_heads: int = 1) -> None:
        super().__init__()
        self.num_heads = checks.positive_int("num_heads", num_heads)

    def _log_prior(self, query: Tensor, key: Tensor) -> Tensor:
        return query.new_zeros(self.num_heads, len(query), len(key), dtype=self._dtype())

    def _factors(self, query: Tensor, key: Tensor) -> Factors:
        return key_factors(query, key.new_zeros(self.num_heads, len(key)))


class LinearPrior(Prior):
    """What ALiBi and the learned recency share: K_ij = -m_h (i - j), one slope m for each head.

    In a lane it is the key-only term m j, which differs from K_ij by a constant of row i.
    """

    name = "recency"
    kind = "recency"

    def slope(self) -> Tensor:
        """Slopes m, shape (heads,), nats per token."""
        raise NotImplementedError

    def _log_prior(self, query: Tensor, key: Tensor) -> Tensor:
        lag = query[:, :1] - key[:, 0]
        return -(self.slope().double().view(-1, 1, 1) * lag).to(self._dtype())

    def _factors(self, query: Tensor, key: Tensor) -> Factors:
        return key_factors(query, self.slope().double().unsqueeze(-1) * key[:, 0])

    def _has_key_bias(self) -> bool:
        return True


class ALiBiPrior(LinearPrior):
    r"""ALiBi, K_ij = -m_h (i - j): the maximum-entropy prior under a fixed mean lag.

    Parameters
    ----------
    num_heads : int
        Number of heads; head h of n has slope 2^(-8 h / n) when n is a power of two (Press et al.
        2022).
    slopes : sequence of float, optional
        Slopes to use instead, in nats per token, positive.
    symmetric : bool
        Use |i - j|, for bidirectional attention. It has no finite factorisation.

    Raises
    ------
    ValueError
        If `slopes` does not hold one positive number for each head.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        slopes: Sequence[float] | None = None,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        values = checked_slopes(num_heads, slopes, positive=True)
        self.num_heads = num_heads
        self.register_buffer("slopes", torch.tensor(values, dtype=torch.float32))
        self.symmetric = bool(symmetric)
        self.has_lanes = not self.symmetric
        if self.symmetric:
            self.kind = "relative"

    def slope(self) -> Tensor:
        return self.slopes

    def _log_prior(self, query: Tensor, key: Tensor) -> Tensor:
        values = super()._log_prior(query, key)
        return -values.abs() if self.symmetric else values


class BucketPrior(Prior):
    """T5's relative bias: one learned number for each bucket of lags (Raffel et al. 2020).

    Half of the buckets hold one lag each; the others grow logarithmically up to `max_distance`,
    and all larger lags share the last one. It has no finite factorisation.

    Parameters
    ----------
    num_heads : int
        Number of heads, each with its own table.
    num_buckets : int
        Number of buckets: at least 2, or an even number of at least 4 when `bidirectional` (half
        for each direction).
    max_distance : int
        Lag, in tokens, from which on all lags share the last bucket.
    bidirectional : bool
        Whether future keys have buckets of their own; otherwise they share bucket 0.
    """

    name = "relative"
    kind = "relative"
    has_lanes = False

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = checks.positive_int("num_heads", num_heads)
        directions = 2 if bidirectional else 1
        if num_buckets % directions or num_buckets < 2 * directions:
            raise ValueError(
                f"num_buckets must be a multiple of {directions} and at least {2 * directions}, "
                f"got {num_buckets}"
            )
        exact = num_buckets // directions // 2
        if max_distance <= exact:
            raise ValueError(
                f"max_distance must exceed the {exact} lags that have buckets of their own, "
                f"got {max_distance}"
            )
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bool(bidirectional)
        self.table = nn.Parameter(torch.zeros(num_heads, num_buckets))

    def buckets(self, lag: Tensor) -> Tensor:
        """The bucket of every lag = query - key, an integer tensor of the same shape."""
        count = self.num_buckets
        offset = torch.zeros_like(lag, dtype=torch.long)
        if self.bidirectional:
            count //= 2
            offset = (lag < 0).long() * count
            distance = lag.abs()
        else:
            distance = lag.clamp(min=0)
        exact = count // 2
        growth = torch.log(distance.clamp(min=1) / exact) / math.log(self.max_distance / exact)
        large = (exact + (growth * (count - exact)).floor()).clamp(max=count - 1)
        return offset + torch.where(distance < exact, distance, large).long()

    def _log_prior(self, query: Tensor, key: Tensor) -> Tensor:
        lag = query[:, :1] - key[:, 0]
        return self.table[:, self.buckets(lag)]


def alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi's slopes, nats per token: geometric from 2^(-8/n) for n a power of two.

    Other counts take the slopes of the next lower power of two, then every second slope of twice
    that power (Press et al. 2022).

    Examples
    --------
    >>> alibi_slopes(2)
    [0.0625, 0.00390625]
    """
    checks.positive_int("num_heads", num_heads)
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    if power < num_heads:
        finer = [2.0 ** (-8 * (h + 1) / (2 * power)) for h in range(2 * power)]
        slopes += finer[::2][: num_heads - power]
    return slopes


def checked_slopes(
    num_heads: int, slopes: Sequence[float] | None, *, positive: bool = False
) -> list[float]:
    """One finite slope for each head, at least 0 or positive; by default ALiBi's."""
    checks.positive_int("num_heads", num_heads)
    values = alibi_slopes(num_heads) if slopes is None else list(slopes)
    if len(values) != num_heads:
        raise ValueError(f"slopes must hold {num_heads} numbers, got {len(values)}")
    if not all(math.isfinite(v) and (v > 0 if positive else v >= 0) for v in values):
        wanted = "positive" if positive else "at least 0"
        raise ValueError(f"slopes must be {wanted} and finite, got {values}")
    return values
