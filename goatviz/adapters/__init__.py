"""Attention modules of other libraries, read into goatviz objects without importing the libraries.

An adapter recognises a module by the name and package of its class and reads its parameters.
`capture` watches the attention calls of all of them. Nothing here changes the modules permanently.
"""

from goatviz.adapters.capture import (
    CAPTURE_STATISTICS,
    CapturedCall,
    Record,
    capture,
    find_attention,
)
from goatviz.adapters.goat_attention import (
    GoatAttentionRecord,
    convert,
    find_goat_attention,
    is_goat_attention,
    read_goat_attention,
)
from goatviz.adapters.intervene import intervene

__all__ = [
    "CAPTURE_STATISTICS",
    "CapturedCall",
    "GoatAttentionRecord",
    "Record",
    "capture",
    "convert",
    "find_attention",
    "find_goat_attention",
    "intervene",
    "is_goat_attention",
    "read_goat_attention",
]
