"""Other people's attention modules, read in our words without importing their libraries.

An adapter recognises a module by its class's name and home, reads its parameters, and returns
goatviz objects. Nothing here changes the module it is given.
"""

from goatviz.adapters.goat_attention import (
    GoatAttentionRecord,
    convert,
    find_goat_attention,
    is_goat_attention,
    read_goat_attention,
)

__all__ = [
    "GoatAttentionRecord",
    "convert",
    "find_goat_attention",
    "is_goat_attention",
    "read_goat_attention",
]
