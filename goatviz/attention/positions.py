"""The position schemes GOAT is compared with: rotary, interpolated rotary, sinusoidal, learned.

Rotary schemes rotate queries and keys inside the layer; the model adds embeddings to its tokens.
Priors (GOAT, ALiBi, T5 buckets) live in `goatviz.priors`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from goatviz import checks
from goatviz.priors.base import readable


class RotaryEmbedding(nn.Module):
    """Rotary positions (Su et al. 2021): pairs (x_i, x_{i + d/2}) rotate by pos base^(-2i/d).

    Parameters
    ----------
    dim : int
        Size of queries and keys; an odd last feature is not rotated.
    base : float
        The slowest pair rotates by about 1/base radians per token.

    Examples
    --------
    >>> x = torch.ones(1, 1, 1, 4)
    >>> torch.equal(RotaryEmbedding(4)(x, torch.zeros(1)), x)
    True
    """

    def __init__(self, dim: int, *, base: float = 10_000.0) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(f"dim must be at least 2, got {dim}")
        if not base > 1:
            raise ValueError(f"base must exceed 1, got {base}")
        self.dim = dim
        pairs = dim // 2
        exponents = torch.arange(pairs, dtype=torch.float64) / pairs
        self.register_buffer("frequencies", (float(base) ** -exponents).float())

    def scaled(self, index: Tensor, *, last: int | None = None) -> Tensor:
        """Positions as they enter the phase, in training tokens; `last` as in `forward`."""
        return index

    def speeds(self) -> Tensor:
        """Radians per token of each pair, float64, shape (dim // 2,)."""
        return self.frequencies.double()

    def forward(self, x: Tensor, index: Tensor, *, last: int | None = None) -> Tensor:
        """Rotate `x`, shape (..., length, dim), at sequence indices of shape (length,).

        `last` is the largest index, if known, so that it need not be read.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must have a last size of {self.dim}, got {x.shape[-1]}")
        index = self.scaled(index.to(device=x.device, dtype=torch.float64), last=last)
        phase = index.unsqueeze(-1) * self.frequencies.double()
        cosine, sine = phase.cos().to(x.dtype), phase.sin().to(x.dtype)
        half = self.dim // 2
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat(
            [first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1
        )


class InterpolatedRotaryEmbedding(RotaryEmbedding):
    """Rotary positions squeezed into the training length (position interpolation).

    The factor depends on the target length, not on the tokens seen so far: set `target_length`
    before a forward pass, so that cached decoding agrees with a full pass.

    Parameters
    ----------
    dim : int
        Size of queries and keys.
    training_length : int
        Tokens seen in training; positions of longer targets are scaled down to it.
    base : float
        As in `RotaryEmbedding`.

    Raises
    ------
    ValueError
        From `forward`, at a position beyond `target_length`.
    """

    def __init__(self, dim: int, *, training_length: int, base: float = 10_000.0) -> None:
        super().__init__(dim, base=base)
        if training_length < 1:
            raise ValueError(f"training_length must be at least 1, got {training_length}")
        self.training_length = training_length
        self.target_length = training_length

    def scaled(self, index: Tensor, *, last: int | None = None) -> Tensor:
        target = max(self.target_length, self.training_length)
        last = _last(index, last)
        if last >= target:
            raise ValueError(
                f"position {last} lies beyond target_length={self.target_length}; "
                "set target_length to the full length"
            )
        return index * (self.training_length / target)

    def speeds(self) -> Tensor:
        target = max(self.target_length, self.training_length)
        return self.frequencies.double() * (self.training_length / target)


class SinusoidalEmbedding(nn.Module):
    """Fixed sines and cosines added to the tokens (Vaswani et al. 2017), for any position.

    Parameters
    ----------
    dim : int
        Embedding size, even.
    """

    def __init__(self, dim: int, *, base: float = 10_000.0) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even and at least 2, got {dim}")
        exponents = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)
        self.register_buffer("frequencies", (float(base) ** -exponents).float())

    def forward(self, index: Tensor, *, last: int | None = None) -> Tensor:
        """Embeddings at sequence indices of shape (length,); `last` is not needed."""
        phase = index.to(self.frequencies.device).double().unsqueeze(-1)
        phase = phase * self.frequencies.double()
        return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(-2).float()


class LearnedEmbedding(nn.Module):
    """One learned vector for each position below a maximum length.

    Parameters
    ----------
    dim : int
        Embedding size.
    max_length : int
        Number of positions.

    Raises
    ------
    ValueError
        From `forward`, at a position that was never trained.
    """

    def __init__(self, dim: int, *, max_length: int) -> None:
        super().__init__()
        if dim < 1 or max_length < 1:
            raise ValueError(f"dim and max_length must be at least 1, got {dim}, {max_length}")
        self.max_length = max_length
        self.table = nn.Embedding(max_length, dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, index: Tensor, *, last: int | None = None) -> Tensor:
        """Embeddings at sequence indices of shape (length,): shape (length, dim).

        `last` is the largest index, if known, so that it need not be read.
        """
        last = _last(index, last)
        if last >= self.max_length:
            raise ValueError(f"position {last} was never learned: max_length is {self.max_length}")
        return self.table(index.to(self.table.weight.device).long())


class LearnedGridEmbedding(nn.Module):
    """One learned vector for each place of a square grid, interpolated to grids of other sizes.

    Parameters
    ----------
    dim : int
        Embedding size.
    side : int
        Places along each axis of the grid that is learned.
    """

    def __init__(self, dim: int, *, side: int) -> None:
        super().__init__()
        checks.positive_int("dim", dim)
        self.side = checks.positive_int("side", side)
        self.table = nn.Parameter(torch.empty(side, side, dim))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, side: int) -> Tensor:
        """Embeddings of a grid of `side` x `side` places in rows: shape (side^2, dim)."""
        if side == self.side:
            return self.table.flatten(0, 1)
        resized = nn.functional.interpolate(
            self.table.permute(2, 0, 1)[None], size=(side, side), mode="bicubic"
        )
        return resized[0].flatten(1).mT


def _last(index: Tensor, last: int | None) -> int:
    """The largest index, read only if it is not given; -1 while compiling."""
    if last is None:
        return int(index.max()) if readable() and index.numel() else -1
    return last
