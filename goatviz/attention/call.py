"""One attention call as it was seen: queries, keys, scale, and what each query may use.

Watchers of other people's models make these; diagnostics read them. How a model is watched lives
in `goatviz.adapters`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from goatviz.priors.base import Prior
from goatviz.transport.visibility import Visibility


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Everything that decides the weights of one call of one layer.

    logits_ij = softcap(scale <q_i, k_j>) + K_ij + bias_ij over the keys that query i may use, and
    over one further column `sink` if there is one.

    Attributes
    ----------
    q : Tensor
        Shape (batch, query heads, n_queries, d), rotations included, detached.
    k : Tensor
        Shape (batch, key-value heads, n_keys, d).
    scale : float
        What inner products are multiplied by.
    visibility : Visibility
        The allowed pairs.
    v : Tensor, optional
        Shape (batch, key-value heads, n_keys, d_v).
    prior : Prior, optional
        K; 1 or key-value heads.
    query_pos, key_pos : Tensor, optional
        Positions as `goatviz.priors.as_positions` returns them; default: keys count from 0,
        queries are the last of them.
    bias : Tensor, optional
        An additive term, shape (batch or 1, query heads or 1, n_queries, n_keys), nats.
    sink : Tensor, optional
        Logits of a column that takes mass and has no value, shape (query heads,), nats.
    softcap : float, optional
        c of c tanh(x / c), applied to the scaled inner products.
    query_mask : Tensor of bool, optional
        Shape (batch or 1, n_queries), False at padding.
    """

    q: Tensor
    k: Tensor
    scale: float
    visibility: Visibility
    v: Tensor | None = None
    prior: Prior | None = None
    query_pos: Tensor | None = None
    key_pos: Tensor | None = None
    bias: Tensor | None = None
    sink: Tensor | None = None
    softcap: float | None = None
    query_mask: Tensor | None = None
