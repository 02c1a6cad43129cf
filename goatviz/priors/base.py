"""The interface of every prior, positions, sums, and the splitting of lanes.

`Prior.log_prior` defines a prior; everything else here is an exact but faster or smaller form of
the same function. The concrete priors live in `fixed`, `spectral`, `sink` and `table`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from goatviz import checks

PositionsLike = int | Sequence[int] | Sequence[float] | Tensor

#: Number of low-precision pieces that carry one value, and the constant on the query side of a
#: key-only lane (a power of two, so that it is exact; without it fp16 would overflow at 65,504).
_PIECES = {torch.float64: 1, torch.float32: 1, torch.bfloat16: 3, torch.float16: 3}
_QUERY_UNIT = {torch.float16: 256.0}


def readable() -> bool:
    """Whether a check may read the values of tensors: not while a graph is being captured."""
    return not torch.compiler.is_compiling()


def as_positions(positions: PositionsLike, name: str = "positions") -> Tensor:
    """Validate positions and return them as float64, shape (length, 1 + axes).

    Parameters
    ----------
    positions : int, sequence or Tensor
        A length n (meaning 0 .. n - 1), indices of shape (length,), or shape (length, 1 + axes):
        the sequence index first, then one coordinate for each axis of a grid. A row whose
        coordinates are NaN has an index but no place on the grid (a class token).
    name : str
        Name of the argument, for error messages.

    Returns
    -------
    Tensor
        float64; column 0 is the sequence index, in tokens.

    Raises
    ------
    TypeError
        If `positions` is not numeric.
    ValueError
        If it is empty, negative, infinite, has a NaN index, or has the wrong number of dimensions.

    Examples
    --------
    >>> as_positions(3).flatten().tolist()
    [0.0, 1.0, 2.0]
    """
    if isinstance(positions, bool) or isinstance(positions, str):
        raise TypeError(f"{name} must be a length, a sequence or a tensor, got {positions!r}")
    if isinstance(positions, int):
        if positions < 1:
            raise ValueError(f"{name} must name at least one position, got a length of {positions}")
        return torch.arange(positions, dtype=torch.float64).unsqueeze(-1)
    try:
        points = torch.as_tensor(positions)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a length, a sequence of numbers or a tensor, "
            f"got {type(positions).__name__}"
        ) from error
    if points.dtype == torch.bool or points.is_complex():
        raise TypeError(f"{name} must hold integers or floats, got dtype {points.dtype}")
    points = points.to(torch.float64)
    if points.ndim == 1:
        points = points.unsqueeze(-1)
    if points.ndim != 2 or points.shape[1] == 0:
        raise ValueError(
            f"{name} must have shape (length,) or (length, 1 + axes), got {tuple(points.shape)}"
        )
    if points.shape[0] == 0:
        raise ValueError(f"{name} must name at least one position, got an empty one")
    if readable() and not points.is_meta:
        _check_positions(points, name)
    return points


def default_positions(
    n_queries: int,
    n_keys: int,
    query_pos: PositionsLike | None = None,
    key_pos: PositionsLike | None = None,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys, as given or by default.

    By default keys stand at 0 .. n_keys - 1, and the queries are the last n_queries of the keys,
    causal or not.

    Parameters
    ----------
    n_queries, n_keys : int
        Numbers of queries and keys.
    query_pos, key_pos : int, sequence or Tensor, optional
        Positions given by the caller; see `as_positions`.
    causal : bool
        Whether queries see no later key. If there are more queries than keys, a causal call, and
        one with `key_pos`, must give `query_pos`; in others the queries stand at
        0 .. n_queries - 1.

    Returns
    -------
    query_points, key_points : Tensor
        float64, shapes (n_queries, 1 + axes) and (n_keys, 1 + axes).

    Raises
    ------
    ValueError
        If positions differ in number from queries or keys, or `query_pos` is needed and missing.

    Examples
    --------
    >>> [points.flatten().tolist() for points in default_positions(2, 3, causal=False)]
    [[1.0, 2.0], [0.0, 1.0, 2.0]]
    """
    key_points = as_positions(n_keys if key_pos is None else key_pos, "key_pos")
    if len(key_points) != n_keys:
        raise ValueError(f"key_pos must hold {n_keys} positions, got {len(key_points)}")
    if query_pos is not None:
        query_points = as_positions(query_pos, "query_pos")
        if len(query_points) != n_queries:
            raise ValueError(f"query_pos must hold {n_queries} positions, got {len(query_points)}")
        return query_points, key_points
    if n_queries <= n_keys:
        return key_points[n_keys - n_queries :], key_points
    if causal or key_pos is not None:
        where = "at given positions" if key_pos is not None else "under a causal mask"
        raise ValueError(
            f"query_pos must be given for {n_queries} queries over {n_keys} keys {where}, got None"
        )
    return as_positions(n_queries, "query_pos"), key_points


def _check_positions(points: Tensor, name: str) -> None:
    if not bool(torch.isfinite(points[:, 0]).all()) or bool(torch.isinf(points).any()):
        raise ValueError(f"{name} must be finite (only grid coordinates may be NaN)")
    lowest = torch.where(points.isnan(), 0.0, points).min()
    if float(lowest) < 0:
        raise ValueError(f"{name} must not be negative, got {float(lowest):g}")


def grid_positions(height: int, width: int, *, class_token: bool = False) -> Tensor:
    """Positions of a row-major grid, shape (tokens, 3): index, row, column.

    Parameters
    ----------
    height, width : int
        Patches along each axis.
    class_token : bool
        Put a token without coordinates in front (Litman and Guo 2026, vision section).

    Examples
    --------
    >>> grid_positions(1, 2, class_token=True).tolist()
    [[0.0, nan, nan], [1.0, 0.0, 0.0], [2.0, 0.0, 1.0]]
    """
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} x {width}")
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
        indexing="ij",
    )
    points = torch.stack([rows.flatten(), columns.flatten()], dim=-1)
    if class_token:
        points = torch.cat([points.new_full((1, 2), math.nan), points])
    index = torch.arange(points.shape[0], dtype=torch.float64).unsqueeze(-1)
    return torch.cat([index, points], dim=-1)


def geometric_frequencies(rank: int, base: float) -> Tensor:
    """w_r = base^(-r/(R-1)), r = 0 .. R - 1, radians per token, float32 of shape (R,).

    Raises
    ------
    TypeError, ValueError
        If `rank` is not an integer of at least 0, or `base` does not exceed 1.
    """
    checks.integer("rank", rank, low=0)
    if not base > 1:
        raise ValueError(f"base must exceed 1, got {base}")
    steps = torch.arange(rank, dtype=torch.float64) / max(rank - 1, 1)
    return (float(base) ** -steps).float()


def frequency_axis(rank: int, axes: int, device: torch.device | None = None) -> Tensor:
    """The grid axis of each of `rank` frequencies, in order of the axes: shape (R,)."""
    each, left = divmod(rank, max(axes, 1))
    frequency = torch.arange(rank, device=device)
    return torch.maximum(frequency // (each + 1), (frequency - left) // max(each, 1))


def grid_coordinates(positions: Tensor, rank: int, axes: int) -> tuple[Tensor, Tensor]:
    """The coordinate that each frequency multiplies, and whether the token has one.

    Parameters
    ----------
    positions : Tensor
        As `as_positions` returns them.
    rank, axes : int
        Frequencies, shared between the axes of a grid (the first axis takes the first and
        largest share); axes = 0 means the sequence index.

    Returns
    -------
    coordinates, present : Tensor
        Shape (length, rank); 0 and False where a token has no place on the grid.
    """
    if axes:
        coordinates = positions[:, 1 + frequency_axis(rank, axes, positions.device)]
    else:
        coordinates = positions[:, :1].expand(-1, rank)
    present = ~coordinates.isnan()
    return torch.where(present, coordinates, 0.0), present


class Lanes(NamedTuple):
    """Query and key lanes: `scale * query @ key.mT` is the log-prior up to a constant per row.

    Attributes
    ----------
    query : Tensor
        Shape (heads, n_queries, lanes).
    key : Tensor
        Shape (heads, n_keys, lanes).
    """

    query: Tensor
    key: Tensor


@dataclass(frozen=True)
class Factors:
    """A prior's exact finite factorisation: `query @ key.mT + key_bias`, up to row constants.

    Attributes
    ----------
    query, key : Tensor
        Shapes (heads, n_queries, rank) and (heads, n_keys, rank); rank may be 0.
    key_bias : Tensor
        Sum of all key-only terms, shape (heads, n_keys).
    """

    query: Tensor
    key: Tensor
    key_bias: Tensor


def key_factors(query: Tensor, key_bias: Tensor) -> Factors:
    """The factorisation of a key-only term, of shape (heads, n_keys): its rank is 0."""
    heads, keys = key_bias.shape
    return Factors(query.new_zeros(heads, len(query), 0), query.new_zeros(heads, keys, 0), key_bias)


class Prior(nn.Module):
    r"""A log-prior over keys: log pi(j | i) = K_ij, any K, normalised or not.

    A constant of a row changes no attention weight, so two priors that differ by a function of the
    query alone are the same prior. `log_prior` fixes one gauge (recency is 0 on the diagonal).

    Attributes
    ----------
    name : str
        Name of the part in `components()`.
    kind : str
        "uniform", "relative" (a function of the lag), "recency" (linear in the lag), "key" (a
        function of the key), or "sum".
    num_heads : int
        Number of parameter sets: 1 (shared), or one for each key-value head.
    axes : int
        0 for sequences; the number of grid axes otherwise.
    has_lanes : bool
        Whether the prior has a finite factorisation, so that a fused kernel can compute it.
    """

    name: ClassVar[str] = "prior"
    kind: ClassVar[str] = "relative"
    num_heads: int = 1
    axes: int = 0
    has_lanes: bool = True

    def log_prior(self, query_pos: PositionsLike, key_pos: PositionsLike) -> Tensor:
        """K_ij on any window of positions, without a causal mask: this defines the prior.

        Parameters
        ----------
        query_pos, key_pos : int, sequence or Tensor
            See `as_positions`.

        Returns
        -------
        Tensor
            Shape (heads, n_queries, n_keys), in nats.
        """
        query, key = self._positions(query_pos, key_pos)
        return self._log_prior(query, key)

    def lanes(
        self,
        query_pos: PositionsLike,
        key_pos: PositionsLike,
        *,
        dtype: torch.dtype | None = None,
        scale: float = 1.0,
    ) -> Lanes:
        r"""Lanes phi_i, psi_j with scale * <phi_i, psi_j> = K_ij + a constant of row i.

        In bfloat16 and float16 several lanes carry every value (its high part, the remainder, and
        so on), because a single bfloat16 lane of u(j) + m j would be wrong by up to m j / 256.

        Parameters
        ----------
        query_pos, key_pos : int, sequence or Tensor
            See `as_positions`.
        dtype : torch.dtype, optional
            float64, float32, bfloat16 or float16; default: the parameters' own.
        scale : float
            Factor by which the attention kernel multiplies inner products; divided out here.

        Raises
        ------
        TypeError
            If `dtype` is not one of the four.
        ValueError
            If the prior has no finite factorisation (`has_lanes` is False).
        """
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be positive and finite, got {scale}")
        return self._lanes(*self._positions(query_pos, key_pos), dtype or self._dtype(), scale)

    def _lanes(
        self, query: Tensor, key: Tensor, dtype: torch.dtype, scale: float, *, centred: bool = False
    ) -> Lanes:
        """`lanes` at checked positions; `centred` shifts the key-only terms to be around 0.

        That is allowed where one call sees all of these keys. A slope times a position of a
        million has no decimals left in float32, but differences of such values do.
        """
        self._check_lanes()
        if dtype not in _PIECES:
            raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
        factors = self._factors(query, key)
        pieces = _PIECES[dtype]
        query_lanes, key_lanes = _split_product(
            factors.query.double() / scale, factors.key.double(), dtype, pieces
        )
        if self._has_key_bias():
            unit, bias = _QUERY_UNIT.get(dtype, 1.0), factors.key_bias.double()
            if centred:
                bias = bias - (bias.amax(-1, keepdim=True) + bias.amin(-1, keepdim=True)) / 2
            bias = _split(bias / (scale * unit), dtype, pieces)
            ones = bias[0].new_full((*factors.query.shape[:2], len(bias)), unit)
            query_lanes.append(ones)
            key_lanes.append(torch.stack(bias, dim=-1))
        return Lanes(torch.cat(query_lanes, dim=-1), torch.cat(key_lanes, dim=-1))

    def factors(self, query_pos: PositionsLike, key_pos: PositionsLike) -> Factors:
        """The exact factorisation in the precision of the parameters (phases in float64).

        Raises
        ------
        ValueError
            If the prior has no finite factorisation.
        """
        self._check_lanes()
        return self._factors(*self._positions(query_pos, key_pos))

    def num_lanes(self, dtype: torch.dtype | None = None) -> int:
        """Number of lanes that `lanes(dtype=dtype)` appends to every query and key."""
        point = torch.zeros(1, 1 + self.axes, dtype=torch.float64)
        return self.lanes(point, point, dtype=dtype).key.shape[-1]

    def components(self) -> dict[str, Prior]:
        """The named parts, whose log-priors add up to this one."""
        return {self.name: self}

    def __add__(self, other: Prior) -> Prior:
        if not isinstance(other, Prior):
            return NotImplemented
        return SumPrior([self, other])

    def __mul__(self, factor: float) -> Prior:
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        return ScaledPrior(self, float(factor))

    __rmul__ = __mul__

    def _check_lanes(self) -> None:
        if not self.has_lanes:
            raise ValueError(
                f"{type(self).__name__} has no finite factorisation into lanes; "
                "use impl='reference' or impl='sdpa_bias'"
            )

    def _positions(self, query: PositionsLike, key: PositionsLike) -> tuple[Tensor, Tensor]:
        return self._placed(as_positions(query, "query_pos"), as_positions(key, "key_pos"))

    def _placed(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        for points, name in ((query, "query_pos"), (key, "key_pos")):
            if self.axes and points.shape[1] != 1 + self.axes:
                raise ValueError(
                    f"{name} must have shape (length, {1 + self.axes}) for a prior on "
                    f"{self.axes} axes, got {tuple(points.shape)}; see grid_positions"
                )
        anchor = self._anchor()
        device = query.device if anchor is None else anchor.device
        return query.to(device), key.to(device)

    def _log_prior(self, query: Tensor, key: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define its log-prior")

    def _factors(self, query: Tensor, key: Tensor) -> Factors:
        raise TypeError(f"{type(self).__name__} does not define its factors")

    def _has_key_bias(self) -> bool:
        return False

    def _anchor(self) -> Tensor | None:
        floats = (b for b in self.buffers() if b.is_floating_point())
        return next(iter(self.parameters()), next(floats, None))

    def _dtype(self) -> torch.dtype:
        reference = self._anchor()
        return torch.float32 if reference is None else reference.dtype


class SumPrior(Prior):
    """The sum of log-priors: pi = normalise(pi_1 pi_2 ...).

    Parameters
    ----------
    parts : iterable of Prior
        Parts of the sum; sums among them are flattened. Head counts must be equal or 1.

    Raises
    ------
    TypeError
        If a part is not a Prior.
    ValueError
        If their head counts or axes do not agree.
    """

    name = "total"
    kind = "sum"

    def __init__(self, parts: Iterable[Prior]) -> None:
        super().__init__()
        flat: list[Prior] = []
        for part in parts:
            if not isinstance(part, Prior):
                raise TypeError(f"parts must be priors, got {type(part).__name__}")
            flat.extend(part.parts if isinstance(part, SumPrior) else [part])
        if not flat:
            raise ValueError("parts must hold at least one prior, got none")
        heads = {part.num_heads for part in flat} - {1}
        axes = {part.axes for part in flat} - {0}
        if len(heads) > 1:
            raise ValueError(f"parts must have equal head counts (or 1), got {sorted(heads)}")
        if len(axes) > 1:
            raise ValueError(f"parts must live on the same grid axes, got {sorted(axes)}")
        self.parts = nn.ModuleList(flat)
        self.num_heads = heads.pop() if heads else 1
        self.axes = axes.pop() if axes else 0
        self.has_lanes = all(part.has_lanes for part in flat)

    def components(self) -> dict[str, Prior]:
        named: dict[str, Prior] = {}
        # A part may itself be a scaled sum; only its parts have a kind.
        for part in (p for each in self.parts for p in each.components().values()):
            name, number = part.name, 2
            while name in named:
                name, number = f"{part.name}_{number}", number + 1
            named[name] = part
        return named

    def _log_prior(self, query: Tensor, key: Tensor) -> Tensor:
        total = sum(part._log_prior(query, key) for part in self.parts)
        return total.expand(self.num_heads, -1, -1)

    def _factors(self, query: Tensor, key: Tensor) -> Factors:
        each = [part._factors(query, key) for part in self.parts]
        heads = self.num_heads
        return Factors(
            torch.cat([f.query.expand(heads, -1, -1) for f in each], dim=-1),
            torch.cat([f.key.expand(heads, -1, -1) for f in each], dim=-1),
            sum(f.key_bias.expand(heads, -1) for f in each),
        )

    def _has_key_bias(self) -> bool:
        return any(part._has_key_bias() for part in self.parts)


class ScaledPrior(Prior):
    """A tempered prior: log pi^c = c log pi, for any real c.

    Parameters
    ----------
    prior : Prior
        Prior to be scaled; its parts keep their names.
    factor : float
        c; 0 gives the uniform prior, a negative factor inverts preferences.
    """

    def __init__(self, prior: Prior, factor: float) -> None:
        super().__init__()
        if not math.isfinite(factor):
            raise ValueError(f"factor must be finite, got {factor}")
        self.prior = prior
        self.factor = factor
        self.num_heads = prior.num_heads
        self.axes = prior.axes
        self.has_lanes = prior.has_lanes
        self.name = prior.name
        self.kind = prior.kind

    def components(self) -> dict[str, Prior]:
        parts = self.prior.components()
        if list(parts.values()) == [self.prior]:
            return {self.name: self}
        return {name: ScaledPrior(part, self.factor) for name, part in parts.items()}

    def extra_repr(self) -> str:
        return f"factor={self.factor:g}"

    def _log_prior(self, query: Tensor, key: Tensor) -> Tensor:
        return self.factor * self.prior._log_prior(query, key)

    def _factors(self, query: Tensor, key: Tensor) -> Factors:
        inner = self.prior._factors(query, key)
        return Factors(self.factor * inner.query, inner.key, self.factor * inner.key_bias)

    def _has_key_bias(self) -> bool:
        return self.prior._has_key_bias()


def _split(value: Tensor, dtype: torch.dtype, pieces: int) -> list[Tensor]:
    """Numbers of `dtype` that sum to `value`; only the first passes on the gradient."""
    parts: list[Tensor] = []
    rest = value
    for _ in range(pieces):
        part = rest.to(dtype)
        parts.append(part)
        rest = rest - part.to(value.dtype)
    return parts


def _split_product(
    query: Tensor, key: Tensor, dtype: torch.dtype, pieces: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Lanes whose inner product is `query @ key.mT`, to twice the precision of `dtype`."""
    if pieces == 1:
        return [query.to(dtype)], [key.to(dtype)]
    query_high, query_low = _split(query, dtype, 2)
    key_high, key_low = _split(key, dtype, 2)
    return [query_high, query_low, query_high], [key_high, key_high, key_low]
