"""One layer, head, query and key for all explorers that are shown together."""

from __future__ import annotations

import traitlets

#: What can be selected, and is shared.
NAMES = ("layer", "head", "query", "key")


class Selection(traitlets.HasTraits):
    """What is looked at; hand the same one to several explorers, and they move together.

    An explorer follows what it has (a prior has no query) and what is in its range.

    Attributes
    ----------
    layer, head, query, key : int or None
        None as long as nobody chose.

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
