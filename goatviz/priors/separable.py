"""Separable priors: K_ij = kappa(i - j) + u(j), a function of the lag plus one of the key.

On a sequence every term of GOAT, ALiBi and T5's buckets is one or the other. Two tables of one
number for each lag and each key then hold the whole prior, in full precision and in any gauge.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from goatviz.priors.base import Prior

_LAG_KINDS = frozenset({"relative", "recency"})
_KINDS = _LAG_KINDS | {"key", "uniform"}


def is_separable(prior: Prior) -> bool:
    """Whether every part is a function of the lag or of the key, by its `kind`, on sequences.

    Examples
    --------
    >>> from goatviz.priors import ALiBiPrior
    >>> is_separable(ALiBiPrior(2))
    True
    """
    return all(part.kind in _KINDS and not part.axes for part in prior.components().values())


def lag_table(prior: Prior, lags: Tensor) -> Tensor:
    """kappa, the sum of the terms that are functions of lag = query - key.

    Parameters
    ----------
    prior : Prior
        A separable one.
    lags : Tensor
        float64, shape (n,), tokens; negative ones are keys after the query.

    Returns
    -------
    Tensor
        float64, shape (heads, n), nats.

    Examples
    --------
    >>> import torch
    >>> from goatviz.priors import ALiBiPrior
    >>> lag_table(ALiBiPrior(1, slopes=[0.5]), torch.arange(3.0).double()).tolist()
    [[0.0, -0.5, -1.0]]
    """
    # Only differences of positions enter: with the key at 0, the lag is the query's position.
    query, key = prior._placed(lags.unsqueeze(-1), lags.new_zeros(1, 1))
    return _total(prior, query, key, _LAG_KINDS)[:, :, 0]


def key_table(prior: Prior, keys: Tensor) -> Tensor:
    """u, the sum of the terms that are functions of the key alone.

    Parameters
    ----------
    prior : Prior
        A separable one.
    keys : Tensor
        float64, shape (n,): sequence indices.

    Returns
    -------
    Tensor
        float64, shape (heads, n), nats.

    Examples
    --------
    >>> import torch
    >>> from goatviz.priors import KeyTablePrior
    >>> key_table(KeyTablePrior(torch.tensor([[3.0, 0.0]])), torch.arange(2.0).double()).tolist()
    [[3.0, 0.0]]
    """
    query, key = prior._placed(keys.new_zeros(1, 1), keys.unsqueeze(-1))
    return _total(prior, query, key, {"key"})[:, 0]


def _total(prior: Prior, query: Tensor, key: Tensor, kinds: Collection[str]) -> Tensor:
    """The sum of the parts of these kinds, float64, shape (heads, queries, keys)."""
    total = query.new_zeros(prior.num_heads, len(query), len(key))
    for part in prior.components().values():
        if part.kind in kinds:
            total = total + part._log_prior(query, key)
    return total
