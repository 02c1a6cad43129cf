"""The attention layer: projections, a prior or a rotary scheme, grouped heads and a cache.

The computation itself is `backends.attend`; the layer owns weights and shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from goatviz import checks
from goatviz.attention.backends import BACKENDS, IMPLEMENTATIONS, attend, default_impl
from goatviz.attention.inputs import AttentionInputs
from goatviz.attention.kept import KeptLanes
from goatviz.attention.positions import RotaryEmbedding
from goatviz.priors.base import PositionsLike, Prior, as_positions
from goatviz.priors.fixed import UniformPrior
from goatviz.priors.separable import is_separable, key_table, lag_table


@dataclass
class LayerCache:
    """Keys and values that one layer has seen so far.

    Attributes
    ----------
    k, v : Tensor or None
        Shapes (batch, key-value heads, length, content_dim) and (..., head_dim). Keys are stored
        without lanes, which are recomputed from `positions`.
    positions : Tensor or None
        As `as_positions` returns them, shape (length, 1 + axes).
    padding_mask : Tensor or None
        Boolean, shape (batch, length).
    end : int
        Default position of the next token: one after the largest index.
    consecutive : bool
        Whether the tokens held are at 0, 1, ...
    """

    k: Tensor | None = None
    v: Tensor | None = None
    positions: Tensor | None = None
    padding_mask: Tensor | None = None
    end: int = field(default=0, init=False)
    consecutive: bool = field(default=True, init=False)
    _rooms: dict[str, tuple[Tensor, int]] = field(default_factory=dict, init=False, repr=False)
    _tables: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.positions is not None:
            self._read(self.positions, 0)

    @property
    def length(self) -> int:
        """Tokens held."""
        return 0 if self.k is None else self.k.shape[2]

    def append(
        self,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        padding_mask: Tensor | None,
        *,
        following: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Add the newest keys and values; return everything held.

        Without gradients they are written into room that doubles when it is full, so that a
        token of decoding copies one row. `following` says that they are at `end`, `end` + 1, ...,
        so that no value need be read.
        """
        if self.k is not None and k.shape[0] != self.k.shape[0]:
            raise ValueError(f"cache holds a batch of {self.k.shape[0]}, got {k.shape[0]}")
        if self.k is not None and k.dtype != self.k.dtype:
            raise TypeError(f"cache holds keys of {self.k.dtype}, got {k.dtype}")
        if following:
            self.end += len(positions)
        else:
            self._read(positions, self.length)
        if self.k is None:
            self.k, self.v, self.positions, self.padding_mask = k, v, positions, padding_mask
            return k, v, positions, padding_mask
        if padding_mask is not None or self.padding_mask is not None:
            before, now = self.padding_mask, padding_mask
            if before is None:
                before = self.k.new_ones(self.k.shape[0], self.length, dtype=torch.bool)
            if now is None:
                now = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool)
            self.padding_mask = torch.cat([before, now], dim=1)
        self.k, self.v = self._joined("k", self.k, k), self._joined("v", self.v, v)
        self.positions = torch.cat([self.positions, positions])
        return self.k, self.v, self.positions, self.padding_mask

    def row_of(self, prior: Prior, q: Tensor) -> Tensor | None:
        """K of the newest token over all keys, shape (heads, 1, length), from tables that grow.

        None unless there is one query without gradients, at the end of keys 0, 1, ..., and the
        prior is separable. The parameters must not change while the cache is in use, as for the
        keys themselves.
        """
        if q.shape[2] != 1 or not self.consecutive or not _in_place() or q.is_meta:
            return None
        if isinstance(prior, UniformPrior) or not is_separable(prior):
            return None
        if self._tables is None or self._tables[0].shape[1] < self.length:
            index = torch.arange(2 * self.length, dtype=torch.float64, device=q.device)
            # Lags from large to small: keys in their order, as they are seen from the last one.
            self._tables = lag_table(prior, index.flip(0)), key_table(prior, index)
        by_lag, by_key = self._tables
        return (by_lag[:, -self.length :] + by_key[:, : self.length]).unsqueeze(1)

    def _joined(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        """`held` with `new` behind it, in place where there is room."""
        if not _in_place() or held.is_meta:
            return torch.cat([held, new], dim=2)
        length, total = held.shape[2], held.shape[2] + new.shape[2]
        room, filled = self._rooms.get(name, (held, 0))
        # What was handed out is never written over, so that copies of a cache may go separate ways
        # and a cache may go back; what inference mode made cannot be written into outside it.
        if (
            filled != length
            or room.shape[2] < total
            or room.data_ptr() != held.data_ptr()
            or room.is_inference() != torch.is_inference_mode_enabled()
        ):
            room = held.new_empty(*held.shape[:2], 2 * total, held.shape[3])
            room[:, :, :length] = held
        room[:, :, length:total] = new
        self._rooms[name] = room, total
        return room[:, :, :total]

    def _read(self, positions: Tensor, start: int) -> None:
        index = positions[:, 0]
        counted = torch.arange(start, start + len(index), dtype=index.dtype, device=index.device)
        self.consecutive = self.consecutive and torch.equal(index, counted)
        self.end = max(self.end, int(index.max()) + 1)


def _in_place() -> bool:
    """Whether tensors may be written into: no gradient is recorded, and no graph."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Attention(nn.Module):
    """Multi-head self-attention with a `Prior`.

    Parameters
    ----------
    embed_dim : int
        Size of the tokens.
    num_heads : int
        Query heads.
    num_kv_heads : int, optional
        Key-value heads, a divisor of `num_heads`; default the same.
    head_dim : int, optional
        Size of values for each head; default embed_dim / num_heads.
    content_dim : int, optional
        Size of content queries and keys. Default: head_dim minus the prior's lanes, which then
        stand inside the head, and the fused call is as wide as without a prior (Litman and Guo
        2026, d_c = d - 2R - 1). With head_dim they stand beside the content: it keeps its size,
        and the call is as wide as both, to a multiple of 8.
    prior : Prior, optional
        1 or `num_kv_heads` heads; default uniform.
    rotary : RotaryEmbedding, optional
        Rotates content queries and keys; its dim must be `content_dim`.
    causal : bool
        Forbid keys after the query.
    bias : bool
        Give the projections biases.
    impl : str, optional
        A backend, as in `prior_attention`; default "sdpa", or "sdpa_bias" for a prior without
        lanes.

    Raises
    ------
    ValueError
        If sizes or head counts do not divide or fit, or the lanes leave no content.

    Attributes
    ----------
    observer : callable, optional
        Called with the arguments of `AttentionCall.from_tensors` in every forward pass; set and
        cleared by `goatviz.capture`.

    Examples
    --------
    >>> from goatviz.priors import SpectralPrior
    >>> layer = Attention(16, 2, prior=SpectralPrior(2, rank=2))
    >>> layer(torch.zeros(1, 5, 16)).shape
    torch.Size([1, 5, 16])
    """

    observer: Callable[..., Callable[[Tensor], Tensor | None] | None] | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        content_dim: int | None = None,
        prior: Prior | None = None,
        rotary: RotaryEmbedding | None = None,
        causal: bool = True,
        bias: bool = True,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        checks.positive_int("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        checks.positive_int("num_kv_heads", num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
            )
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
                )
            head_dim = embed_dim // num_heads
        prior = UniformPrior() if prior is None else prior
        checks.instance("prior", prior, Prior, "a goatviz Prior")
        if prior.num_heads not in (1, num_kv_heads):
            raise ValueError(
                f"prior must have 1 or {num_kv_heads} heads (num_kv_heads), got {prior.num_heads}"
            )
        if content_dim is None:
            lanes = prior.num_lanes(torch.float32) if prior.has_lanes else 0
            content_dim = head_dim - lanes
            if content_dim < 1:
                raise ValueError(
                    f"the prior's {lanes} lanes leave no content in head_dim={head_dim}; "
                    "lower its rank or pass content_dim"
                )
        if content_dim < 1 or head_dim < 1:
            raise ValueError(
                f"content_dim and head_dim must be positive, got {content_dim}, {head_dim}"
            )
        if rotary is not None and rotary.dim != content_dim:
            raise ValueError(f"rotary.dim must be content_dim={content_dim}, got {rotary.dim}")
        if impl is None:
            impl = default_impl(prior)
        checks.one_of("impl", impl, IMPLEMENTATIONS)
        if BACKENDS[impl].needs_lanes and not prior.has_lanes:
            raise ValueError(f"impl={impl!r} needs lanes, but {type(prior).__name__} has none")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.content_dim = content_dim
        self.prior = prior
        self.rotary = rotary
        self.causal = checks.flag("causal", causal)
        self.impl = impl
        self._kept = KeptLanes()
        self.q_proj = nn.Linear(embed_dim, num_heads * content_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * content_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias)

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"content_dim={self.content_dim}, causal={self.causal}, impl={self.impl!r}"
        )

    def project(
        self, x: Tensor, *, positions: PositionsLike | None = None, start: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Content queries, keys, values and positions of `x`, before the prior enters.

        Parameters
        ----------
        x : Tensor
            Shape (batch, length, embed_dim).
        positions : int, sequence or Tensor, optional
            See `as_positions`; default start, start + 1, ...
        start : int
            First index when `positions` is not given.

        Returns
        -------
        q, k, v, positions
            Shapes (batch, heads, length, content_dim), (batch, kv heads, length, content_dim),
            (batch, kv heads, length, head_dim), (length, 1 + axes).
        """
        if x.ndim != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"x must have shape (batch, length, {self.embed_dim}), got {tuple(x.shape)}"
            )
        batch, length, _ = x.shape
        if length == 0 or batch == 0:
            raise ValueError(f"x must not be empty, got {tuple(x.shape)}")
        last = None
        if positions is None:
            last = start + length - 1
            points = torch.arange(start, last + 1, dtype=torch.float64, device=x.device)
            points = points.unsqueeze(-1)
        else:
            points = as_positions(positions).to(x.device)
            if len(points) != length:
                raise ValueError(f"positions must hold {length} positions, got {len(points)}")
        q = self.q_proj(x).view(batch, length, self.num_heads, self.content_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.num_kv_heads, self.content_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if self.rotary is not None:
            q, k = (self.rotary(each, points[:, 0], last=last) for each in (q, k))
        return q, k, v, points

    def _rotary_frequencies(self) -> Tensor:
        """Rotation of each channel of queries and keys in radians per token, shape (d,)."""
        speeds = torch.zeros(self.content_dim, dtype=torch.float64)
        if self.rotary is not None:
            each = self.rotary.speeds().cpu()
            speeds[: 2 * len(each)] = torch.cat([each, each])
        return speeds

    def forward(
        self,
        x: Tensor,
        *,
        positions: PositionsLike | None = None,
        padding_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend within `x`, or from `x` to everything cached and itself.

        Parameters
        ----------
        x : Tensor
            Shape (batch, length, embed_dim).
        positions : int, sequence or Tensor, optional
            See `as_positions`; default consecutive, after what is cached.
        padding_mask : Tensor, optional
            Boolean, shape (batch, length), True at real tokens of `x`.
        cache : LayerCache, optional
            Extended in place; only for causal layers.

        Returns
        -------
        Tensor
            Shape (batch, length, embed_dim).
        """
        if cache is not None and not self.causal:
            raise ValueError("cache needs a causal layer, but this one is bidirectional")
        start = 0 if cache is None else cache.end
        q, k, v, points = self.project(x, positions=positions, start=start)
        if padding_mask is not None and padding_mask.shape != x.shape[:2]:
            raise ValueError(
                f"padding_mask must have shape {tuple(x.shape[:2])} (batch, length), "
                f"got {tuple(padding_mask.shape)}"
            )
        key_points, consecutive = points, positions is None
        if cache is not None:
            k, v, key_points, padding_mask = cache.append(
                k, v, points, padding_mask, following=consecutive
            )
            consecutive = consecutive and cache.consecutive
        answer = None
        if self.observer is not None:
            answer = self.observer(
                q,
                k,
                v=v,
                prior=self.prior,
                causal=self.causal,
                mask=padding_mask,
                query_pos=points.cpu(),
                key_pos=key_points.cpu(),
                query_mask=None if padding_mask is None else padding_mask[:, -q.shape[2] :],
                rotary=self._rotary_frequencies(),
            )
        # The definition keeps to the prior itself.
        known = cache is not None and self.impl != "reference"
        row = cache.row_of(self.prior, q) if known else None
        inputs = AttentionInputs(
            q,
            k,
            v,
            prior=self.prior,
            query_points=points,
            key_points=key_points,
            consecutive=consecutive,
            causal=self.causal,
            padding_mask=padding_mask,
            log_prior=row,
            kept=self._kept,
        )
        out = attend(inputs, self.impl)
        if answer is not None and (changed := answer(out)) is not None:
            out = changed
        return self.out_proj(out.transpose(1, 2).flatten(2))
