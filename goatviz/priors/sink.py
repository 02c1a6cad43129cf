"""GOAT's key-only terms: the learned sink u(j) and the recency slope m.

A key-only term shifts mass between keys whatever the query: one lane carries it. Relative terms
live in `spectral`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from goatviz.priors.base import Factors, Prior, geometric_frequencies, grid_coordinates
from goatviz.priors.fixed import alibi_slopes, check_heads, linear_key_factors


class SinkPrior(Prior):
    r"""u(j) = gain_h MLP([cos v_m j, sin v_m j]_m, j/T, log(1+j)/log(1+T)) + bump_h [j = 0].

    Parameters
    ----------
    num_heads : int
        Heads with their own gain and bump; the MLP is shared.
    rank : int
        M, the number of absolute frequencies v_m = base^(-m/(M-1)); may be 0.
    training_length : int
        T in tokens, a constant of the module: dividing by the current length instead would make
        a cached decode disagree with a full pass.
    base : float
        The slowest frequency is 1/base radians per token.
    hidden : int
        Hidden units of the MLP (SiLU).
    axes : int
        0 for sequences; on a grid the frequencies are shared between the axes as in
        `SpectralPrior`, while j stays the sequence index.
    init : str
        "seeded" (small random MLP) or "uniform" (zero output, still learnable).
    init_scale : float
        Standard deviation of the MLP's initial weights.

    Attributes
    ----------
    gain, bump : Parameter
        Shape (heads,); bump in nats.

    Notes
    -----
    Source: Litman and Guo 2026 (arXiv 2601.15380). The MLP is evaluated in float64 positions and
    its parameters' precision.
    """

    name = "sink"
    kind = "key"

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
        init_scale: float = 1e-3,
    ) -> None:
        super().__init__()
        self.num_heads = check_heads(num_heads)
        if isinstance(training_length, bool) or not isinstance(training_length, int):
            raise TypeError(
                f"training_length must be an integer, got {type(training_length).__name__}"
            )
        if training_length < 1:
            raise ValueError(f"training_length must be at least 1, got {training_length}")
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        if init not in ("seeded", "uniform"):
            raise ValueError(f"init must be 'seeded' or 'uniform', got {init!r}")
        self.rank = rank
        self.axes = axes
        self.training_length = training_length
        self.register_buffer("frequencies", geometric_frequencies(rank, base))
        self.mlp = nn.Sequential(nn.Linear(2 * rank + 2, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.gain = nn.Parameter(torch.ones(num_heads))
        self.bump = nn.Parameter(torch.zeros(num_heads))
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=init_scale)
            nn.init.zeros_(layer.bias)
        if init == "uniform":
            nn.init.zeros_(self.mlp[2].weight)

    def key_bias(self, key_pos: Tensor) -> Tensor:
        """u(j) at positions as `as_positions` returns them, shape (heads, n_keys), nats."""
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

    def _log_prior(self, query: Tensor, key: Tensor) -> Tensor:
        return self.key_bias(key).unsqueeze(1).expand(-1, len(query), -1)

    def _factors(self, query: Tensor, key: Tensor) -> Factors:
        return Factors(
            query.new_zeros(self.num_heads, len(query), 0),
            key.new_zeros(self.num_heads, len(key), 0),
            self.key_bias(key),
        )

    def _has_key_bias(self) -> bool:
        return True


class RecencyPrior(Prior):
    r"""K_ij = -m_h (i - j), m = softplus(raw) > 0, learned; for causal attention.

    As a lane it is the key-only term m j, equal up to a constant of the row. `log_prior` returns
    the gauge relative to the diagonal (0 at lag 0), in which nothing appears to grow with
    position.

    Parameters
    ----------
    num_heads : int
        Heads with their own slope.
    slopes : sequence of float, optional
        Initial slopes, nats per token, at least 0; default ALiBi's.

    Notes
    -----
    Source: Litman and Guo 2026 (arXiv 2601.15380). A slope near 0 learns slowly, since the
    gradient passes through softplus: a start of 1e-3 still moves, one of 1e-13 never does.
    """

    name = "recency"
    kind = "recency"

    def __init__(self, num_heads: int, *, slopes: Sequence[float] | None = None) -> None:
        super().__init__()
        self.num_heads = check_heads(num_heads)
        values = list(slopes) if slopes is not None else alibi_slopes(num_heads)
        if len(values) != num_heads:
            raise ValueError(f"slopes must hold {num_heads} numbers, got {len(values)}")
        if not all(math.isfinite(v) and v >= 0 for v in values):
            raise ValueError(f"slopes must be at least 0 and finite, got {values}")
        target = torch.tensor(values, dtype=torch.float64)
        # softplus^-1(m) = m + log(1 - e^-m); m = 0 has no finite preimage and becomes -inf.
        raw = target + torch.log(-torch.expm1(-target))
        self.raw_slope = nn.Parameter(raw.float())

    def slope(self) -> Tensor:
        """Slopes m, shape (heads,), nats per token."""
        return nn.functional.softplus(self.raw_slope)

    def _log_prior(self, query: Tensor, key: Tensor) -> Tensor:
        lag = query[:, :1] - key[:, 0]
        return -(self.slope().double().view(-1, 1, 1) * lag).to(self.raw_slope.dtype)

    def _factors(self, query: Tensor, key: Tensor) -> Factors:
        return linear_key_factors(self.slope(), query, key)

    def _has_key_bias(self) -> bool:
        return True
