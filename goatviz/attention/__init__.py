"""Attention with a prior: the function, the layer, and the position schemes it is compared with.

`functional.prior_attention` computes attention, `layer.Attention` adds projections and a cache.
Priors are defined in `goatviz.priors`.
"""

from goatviz.attention.backends import BACKENDS, Backend
from goatviz.attention.functional import attention_plan, prior_attention
from goatviz.attention.layer import Attention, LayerCache
from goatviz.attention.positions import (
    InterpolatedRotaryEmbedding,
    LearnedEmbedding,
    RotaryEmbedding,
    SinusoidalEmbedding,
)
from goatviz.transport.call import AttentionCall

__all__ = [
    "BACKENDS",
    "Attention",
    "AttentionCall",
    "Backend",
    "InterpolatedRotaryEmbedding",
    "LayerCache",
    "LearnedEmbedding",
    "RotaryEmbedding",
    "SinusoidalEmbedding",
    "attention_plan",
    "prior_attention",
]
