"""GOAT's relative term: a trigonometric polynomial in the lag, on sequences or grids.

A finite dot-product factorisation, translation equivariance and boundedness allow no other form
(Litman and Guo 2026). Key-only terms live in `sink`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from goatviz import checks
from goatviz.priors.base import Factors, Prior, geometric_frequencies, grid_coordinates


class SpectralPrior(Prior):
    r"""K_ij = sum_r alpha_r cos(w_r (i - j)) + beta_r sin(w_r (i - j)), w_r = base^(-r/(R-1)).

    Parameters
    ----------
    num_heads : int
        Number of heads, each with its own alpha and beta (key-value heads under grouped queries).
    rank : int
        R, the number of frequencies; 0 gives a flat kernel.
    base : float
        The slowest frequency is 1/base radians per token.
    axes : int
        0: the lag is that of sequence indices. a >= 1: positions carry a grid coordinate for each
        axis. The first axis takes the first and largest share of the frequencies, and the
        relative features of a token without coordinates (NaN) are zero.
    init : str
        "seeded" (alpha normal with standard deviation 0.01) or "uniform" (all zero).

    Attributes
    ----------
    alpha, beta : Parameter
        Shape (heads, R), nats; both signs are allowed, so that a prior can repel.
    frequencies : Tensor
        Shape (R,), radians per token.

    Notes
    -----
    Source: Litman and Guo 2026 (arXiv 2601.15380). With lanes [a cos(w i) + b sin(w i),
    a sin(w i) - b cos(w i)] and [cos(w j), sin(w j)] the inner product is K. Phases are formed in
    float64: at position 10^6 a float32 phase is wrong by several hundredths of a radian.

    Examples
    --------
    >>> prior = SpectralPrior(1, rank=2, init="uniform")
    >>> with torch.no_grad(): _ = prior.alpha.fill_(1.0)
    >>> prior.log_prior([5], [5]).item()
    2.0
    """

    name = "relative"
    kind = "relative"

    def __init__(
        self,
        num_heads: int,
        *,
        rank: int,
        base: float = 10_000.0,
        axes: int = 0,
        init: str = "seeded",
    ) -> None:
        super().__init__()
        checks.one_of("init", init, ("seeded", "uniform"))
        self.num_heads = checks.positive_int("num_heads", num_heads)
        self.axes = checks.integer("axes", axes, low=0)
        self.rank = rank
        self.register_buffer("frequencies", geometric_frequencies(rank, base))
        self.alpha = nn.Parameter(torch.zeros(num_heads, rank))
        self.beta = nn.Parameter(torch.zeros(num_heads, rank))
        if init == "seeded":
            nn.init.normal_(self.alpha, std=1e-2)

    def kernel(self, lag: Tensor) -> Tensor:
        """kappa(lag) of a sequence prior, shape (heads, *lag.shape), nats.

        Raises
        ------
        ValueError
            If the prior is on a grid, where the lag is a vector.
        """
        if self.axes:
            raise ValueError(f"a kernel over one lag needs axes=0, got axes={self.axes}")
        frequencies = self.frequencies.double()
        phase = lag.to(frequencies.device).double().unsqueeze(-1) * frequencies
        cosine, sine = phase.cos().to(self.alpha.dtype), phase.sin().to(self.alpha.dtype)
        flat = self.alpha @ cosine.reshape(lag.numel(), self.rank).mT
        flat = flat + self.beta @ sine.reshape(lag.numel(), self.rank).mT
        return flat.reshape(self.num_heads, *lag.shape)

    def _features(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        coordinates, present = grid_coordinates(positions, self.rank, self.axes)
        phase = coordinates * self.frequencies.double()
        dtype = self.alpha.dtype
        return (phase.cos() * present).to(dtype), (phase.sin() * present).to(dtype)

    def _log_prior(self, query: Tensor, key: Tensor) -> Tensor:
        if not self.axes:
            return self.kernel(query[:, :1] - key[:, 0])
        total = self.alpha.new_zeros(self.num_heads, len(query), len(key))
        at_query, in_query = grid_coordinates(query, self.rank, self.axes)
        at_key, in_key = grid_coordinates(key, self.rank, self.axes)
        for r in range(self.rank):
            phase = (at_query[:, r : r + 1] - at_key[:, r]) * self.frequencies[r].double()
            present = in_query[:, r : r + 1] & in_key[:, r]
            cosine, sine = (phase.cos() * present), (phase.sin() * present)
            total = total + self.alpha[:, r, None, None] * cosine.to(total.dtype)
            total = total + self.beta[:, r, None, None] * sine.to(total.dtype)
        return total

    def _factors(self, query: Tensor, key: Tensor) -> Factors:
        cosine, sine = self._features(query)
        alpha, beta = self.alpha.unsqueeze(1), self.beta.unsqueeze(1)
        query_lanes = torch.cat(
            [alpha * cosine + beta * sine, alpha * sine - beta * cosine], dim=-1
        )
        key_lanes = torch.cat(self._features(key), dim=-1)
        return Factors(
            query_lanes,
            key_lanes.expand(self.num_heads, -1, -1),
            key.new_zeros(self.num_heads, len(key)),
        )
