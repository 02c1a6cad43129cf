"""What one call of attention is asked: tensors, a prior, and which pairs are allowed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from goatviz.attention.kept import KeptLanes
from goatviz.priors.base import Lanes, Prior, readable


@dataclass(frozen=True, eq=False, repr=False)
class AttentionInputs:
    r"""The checked arguments of `prior_attention`, as its backends read them.

    Attributes
    ----------
    q, k, v : Tensor
        Shapes (batch, query heads, n_queries, d), (batch, key-value heads, n_keys, d) and
        (batch, key-value heads, n_keys, d_v).
    prior : Prior
        1 head, or one for each key-value head.
    query_points, key_points : Tensor
        Positions as `as_positions` returns them.
    consecutive : bool
        Keys are at 0, 1, ... and the queries are the last of them, so that a kernel's causal flag
        can replace a mask.
    causal : bool
        Forbid keys whose index exceeds the query's.
    padding_mask : Tensor or None
        Boolean, shape (batch, n_keys), True at real keys.
    temperature : float
        tau; scales the scores, not the prior.
    window : int or None
        Only keys less than so many tokens from the query, in index, are allowed.
    softcap : float or None
        c of c tanh(x / c), applied to the scaled scores before the prior is added.
    log_prior : Tensor or None
        K itself where it is known already, shape (heads, n_queries, n_keys), up to row constants.
    kept : KeptLanes or None
        Lanes of an earlier call of as many keys at 0, 1, ...
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prior: Prior
    query_points: Tensor
    key_points: Tensor
    consecutive: bool
    causal: bool
    padding_mask: Tensor | None = None
    temperature: float = 1.0
    window: int | None = None
    softcap: float | None = None
    log_prior: Tensor | None = None
    kept: KeptLanes | None = None

    @property
    def scale(self) -> float:
        """1 / (tau sqrt d), by which inner products are multiplied."""
        return 1.0 / (math.sqrt(self.q.shape[-1]) * self.temperature)

    @property
    def is_grouped(self) -> bool:
        """Whether several query heads share keys and values."""
        return self.q.shape[1] != self.k.shape[1]

    def padding(self) -> Tensor | None:
        """The padding mask on the device of the keys, checked.

        Raises
        ------
        TypeError, ValueError
            If it is not boolean, or not of shape (batch, n_keys).
        """
        mask = self.padding_mask
        if mask is None:
            return None
        if mask.dtype != torch.bool:
            raise TypeError(f"padding_mask must be boolean (True at real keys), got {mask.dtype}")
        if mask.shape != (self.k.shape[0], self.k.shape[2]):
            raise ValueError(
                f"padding_mask must have shape {(self.k.shape[0], self.k.shape[2])} "
                f"(batch, n_keys), got {tuple(mask.shape)}"
            )
        return mask.to(self.k.device)

    def near(self) -> Tensor | None:
        """Pairs that `causal` and `window` allow, shape (n_queries, n_keys); None: all."""
        lag = self.query_points[:, :1] - self.key_points[:, 0]
        if self.causal:
            allowed = lag >= 0
            return allowed if self.window is None else allowed & (lag < self.window)
        return None if self.window is None else lag.abs() < self.window

    def mask(self) -> Tensor | None:
        """All allowed pairs, broadcastable to (batch, 1, n_queries, n_keys); None: every pair.

        Raises
        ------
        ValueError
            If a query has no allowed key; not checked while a graph is captured.
        """
        keep = self.padding()
        near = self.near()
        if near is not None:
            near = near.to(self.q.device)[None, None]
        if keep is None and near is None:
            return None
        if keep is None:
            mask = near
        else:
            keep = keep[:, None, None, :].to(self.q.device)
            mask = keep.expand(-1, -1, self.q.shape[2], -1) if near is None else near & keep
        self.check_rows()
        return mask

    def check_rows(self) -> None:
        """Raise a ValueError if a query has no allowed key; not while a graph is captured."""
        keep = self.padding()
        if not readable() or (keep is None and self.consecutive) or self.q.is_meta:
            return
        queries, keys = self.query_points[:, 0].contiguous(), self.key_points[:, 0]
        for entry in range(1 if keep is None else len(keep)):
            chosen = keys if keep is None else keys[keep[entry].to(keys.device)]
            chosen = chosen.sort().values
            first = queries - math.inf if self.window is None else queries - self.window
            last = queries if self.causal else -first + 2 * queries
            below = torch.searchsorted(chosen, first, right=True)
            empty = torch.searchsorted(chosen, last, right=self.causal) <= below
            if bool(empty.any()):
                raise ValueError(
                    f"query {int(empty.nonzero()[0])} (batch entry {entry}) has no allowed key: "
                    "padding_mask, causal and window leave it nothing to attend to"
                )

    def kernel_mask(self) -> tuple[Tensor | None, bool]:
        """The mask that a kernel with a causal flag needs, or None, and the flag."""
        if self.padding_mask is None and self.window is None:
            if not self.causal:
                return None, False
            if self.consecutive and self.q.shape[2] == self.k.shape[2]:
                return None, True
            if self.consecutive and self.q.shape[2] == 1:
                return None, False
        return self.mask(), False

    def dense_log_prior(self) -> Tensor:
        """K in the precision of the prior, shape (1, query heads, n_queries, n_keys)."""
        table = self.log_prior
        if table is None:
            table = self.prior._log_prior(*self.prior._placed(self.query_points, self.key_points))
        return self.to_query_heads(table, "prior", head_dim=0).to(self.q.device).unsqueeze(0)

    def lanes(self) -> Lanes:
        """The prior's lanes for queries and keys of this dtype and scale."""

        def make() -> Lanes:
            points = self.prior._placed(self.query_points, self.key_points)
            return self.prior._lanes(*points, self.q.dtype, self.scale, centred=True)

        length = self.q.shape[2]
        if self.kept is None or not self.consecutive or length != self.k.shape[2]:
            return make()
        return self.kept.get(self.prior, (length, self.q.dtype, self.scale), make)

    def to_query_heads(self, tensor: Tensor, name: str, *, head_dim: int) -> Tensor:
        """Repeat heads over the query heads that share them."""
        heads, own = self.q.shape[1], tensor.shape[head_dim]
        if heads % own:
            raise ValueError(f"{name} must have a divisor of {heads} heads, got {own}")
        return tensor if own == heads else tensor.repeat_interleave(heads // own, dim=head_dim)
