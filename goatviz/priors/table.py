"""Priors given as tables: one number for each lag, or one for each key.

This turns measured values into a prior that can be drawn like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from goatviz.priors.base import Prior
from goatviz.priors.sink import KeyPrior


class LagTablePrior(Prior):
    """kappa(lag) from a table; lags beyond either end take the value there.

    Parameters
    ----------
    kernel : Tensor
        Shape (heads, lags), nats, finite.
    first_lag : int
        The lag of the first column; below 0 for bidirectional attention.

    Raises
    ------
    TypeError
        If `kernel` is not a floating-point Tensor.
    ValueError
        If it does not have two dimensions, is empty or not finite.

    Examples
    --------
    >>> LagTablePrior(torch.tensor([[0.0, 2.0]])).log_prior(3, 3)[0, 2].tolist()
    [2.0, 2.0, 0.0]
    """

    name = "relative"
    kind = "relative"
    has_lanes = False

    def __init__(self, kernel: Tensor, *, first_lag: int = 0) -> None:
        super().__init__()
        self.register_buffer("kernel", _checked(kernel, "kernel"))
        self.num_heads = len(self.kernel)
        self.first_lag = int(first_lag)

    def _log_prior(self, query: Tensor, key: Tensor) -> Tensor:
        lag = (query[:, :1] - key[:, 0]).floor().long() - self.first_lag
        return self.kernel[:, lag.clamp(0, self.kernel.shape[1] - 1)]


class KeyTablePrior(KeyPrior):
    """u(j) from a table; keys beyond its end take the last value.

    Parameters
    ----------
    sink : Tensor
        Shape (heads, keys), nats, finite.

    Raises
    ------
    TypeError
        If `sink` is not a floating-point Tensor.
    ValueError
        If it does not have two dimensions, is empty or not finite.

    Examples
    --------
    >>> KeyTablePrior(torch.tensor([[3.0, 0.0]])).log_prior(1, 3)[0, 0].tolist()
    [3.0, 0.0, 0.0]
    """

    def __init__(self, sink: Tensor) -> None:
        super().__init__()
        self.register_buffer("sink", _checked(sink, "sink"))
        self.num_heads = len(self.sink)

    def key_bias(self, key_pos: Tensor) -> Tensor:
        return self.sink[:, key_pos[:, 0].long().clamp(0, self.sink.shape[1] - 1)]


def _checked(table: Tensor, name: str) -> Tensor:
    if not isinstance(table, Tensor) or not table.is_floating_point():
        came = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(f"{name} must be a floating-point Tensor, got {came}")
    if table.ndim != 2 or 0 in table.shape or not bool(torch.isfinite(table).all()):
        raise ValueError(
            f"{name} must be finite, of shape (heads, entries), got {tuple(table.shape)}"
        )
    return table.detach().clone()
