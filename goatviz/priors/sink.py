"""GOAT's key-only terms: the learned sink u(j) and the recency slope m.

A key-only term shifts mass between keys in the same way for every query, and one lane carries it.
Relative terms live in `spectral`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from goatviz import checks
from goatviz.priors.base import (
    Factors,
    Prior,
    geometric_frequencies,
    grid_coordinates,
    key_factors,
)
from goatviz.priors.fixed import LinearPrior, checked_slopes


class KeyPrior(Prior):
    """A prior that is a function of the key alone: K_ij = u(j), from `key_bias`."""

    name = "sink"
    kind = "key"

    def key_bias(self, key_pos: Tensor) -> Tensor:
        """u(j) at positions as `as_positions` returns them, shape (heads, n_keys), nats."""
        raise NotImplementedError

    def _log_prior(self, query: Tensor, key: Tensor) -> Tensor:
        return self.key_bias(key).unsqueeze(1).expand(-1, len(query), -1)

    def _factors(self, query: Tensor, key: Tensor) -> Factors:
        return key_factors(query, self.key_bias(key))

    def _has_key_bias(self) -> bool:
        return True


class SinkPrior(KeyPrior):
    r"""u(j) = gain_h MLP([cos v_m j, sin v_m j]_m, j/T, log(1+j)/log(1+T)) + bump_h [j = 0].

    Parameters
    ----------
    num_heads : int
        Number of heads, each with its own gain and bump; they share the MLP.
    rank : int
        M, the number of absolute frequencies v_m = base^(-m/(M-1)); may be 0.
    training_length : int
        T in tokens, a constant of the module: with the current length in its place, cached
        decoding would disagree with a full pass.
    base : float
        The slowest frequency is 1/base radians per token.
    hidden : int
        Number of hidden units of the MLP (SiLU).
    axes : int
        0 for sequences; on a grid the axes share the frequencies as in `SpectralPrior`, and j is
        still the sequence index.
    init : str
        "seeded" (small random MLP) or "uniform" (zero output, still learnable).

    Attributes
    ----------
    gain, bump : Parameter
        Shape (heads,); bump in nats.

    Notes
    -----
    Source: Litman and Guo 2026 (arXiv 2601.15380). Positions and phases are float64, the MLP is
    evaluated in the precision of its parameters.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        rank: int,
        training_length: int,
        base: float = 10_000.0,
        hidden: int = 4,
        axes: int = 0,
        init: str = "seeded",
    ) -> None:
        super().__init__()
        checks.one_of("init", init, ("seeded", "uniform"))
        checks.positive_int("hidden", hidden)
        self.num_heads = checks.positive_int("num_heads", num_heads)
        self.training_length = checks.positive_int("training_length", training_length)
        self.rank = rank
        self.axes = axes
        self.register_buffer("frequencies", geometric_frequencies(rank, base))
        self.mlp = nn.Sequential(nn.Linear(2 * rank + 2, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.gain = nn.Parameter(torch.ones(num_heads))
        self.bump = nn.Parameter(torch.zeros(num_heads))
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=1e-3)
            nn.init.zeros_(layer.bias)
        if init == "uniform":
            nn.init.zeros_(self.mlp[2].weight)

    def key_bias(self, key_pos: Tensor) -> Tensor:
        key_pos = key_pos.to(self.gain.device)
        index = key_pos[:, 0]
        coordinates, present = grid_coordinates(key_pos, self.rank, self.axes)
        phase = coordinates * self.frequencies.double()
        length = float(self.training_length)
        inputs = torch.cat(
            [
                phase.cos() * present,
                phase.sin() * present,
                (index / length).unsqueeze(-1),
                (torch.log1p(index) / math.log1p(length)).unsqueeze(-1),
            ],
            dim=-1,
        )
        shared = self.mlp(inputs.to(self.gain.dtype)).squeeze(-1)
        first = (index == 0).to(self.gain.dtype)
        return self.gain.unsqueeze(-1) * shared + self.bump.unsqueeze(-1) * first

    def extra_repr(self) -> str:
        return f"rank={self.rank}, training_length={self.training_length}"


class RecencyPrior(LinearPrior):
    r"""K_ij = -m_h (i - j), m = softplus(raw) > 0, learned; for causal attention.

    `log_prior` is 0 at lag 0, so that no value grows with the position; the lane carries the
    key-only term m j, which is equal to it up to a constant of the row.

    Parameters
    ----------
    num_heads : int
        Number of heads, each with its own slope.
    slopes : sequence of float, optional
        Initial slopes, nats per token, at least 0; default ALiBi's.

    Notes
    -----
    Source: Litman and Guo 2026 (arXiv 2601.15380). A slope near 0 learns slowly, since its
    gradient passes through softplus: one that starts at 1e-3 still moves, at 1e-13 it never does.
    """

    def __init__(self, num_heads: int, *, slopes: Sequence[float] | None = None) -> None:
        super().__init__()
        target = torch.tensor(checked_slopes(num_heads, slopes), dtype=torch.float64)
        self.num_heads = num_heads
        # softplus^-1(m) = m + log(1 - e^-m); m = 0 has no finite preimage and becomes -inf.
        raw = target + torch.log(-torch.expm1(-target))
        self.raw_slope = nn.Parameter(raw.float())

    def slope(self) -> Tensor:
        return nn.functional.softplus(self.raw_slope)
