"""One layer, head, query and key for all explorers that are shown together."""

from __future__ import annotations

import traitlets

#: Names of the shared values.
NAMES = ("layer", "head", "query", "key")


class Selection(traitlets.HasTraits):
    """The layer, head, query and key that are shown; explorers given the same one move together.

    An explorer follows the values that it has (a prior has no query) and that are in its range.

    Attributes
    ----------
    layer, head, query, key : int or None
        The chosen number; None until one is chosen.

    Examples
    --------
    >>> chosen = Selection()
    >>> chosen.observe(lambda change: print(change["name"], change["new"]))
    >>> chosen.head = 3
    head 3
    """

    layer = traitlets.Int(None, allow_none=True)
    head = traitlets.Int(None, allow_none=True)
    query = traitlets.Int(None, allow_none=True)
    key = traitlets.Int(None, allow_none=True)
