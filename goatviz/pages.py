"""HTML pages from the templates of this package: one jinja2 environment for all of them.

Everything that a template writes is escaped, unless the template marks it `safe`: only the style
sheets and scripts of this package, plotly.js and plotly's own markup may be. Data go through
`json_text`.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps

_TEMPLATES = Environment(
    loader=PackageLoader("goatviz", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page_text(template: str, **values: Any) -> str:
    """A filled template.

    Parameters
    ----------
    template : str
        Path within the package, such as "paper/gallery.html.j2".
    **values
        Values of the names in the template.

    Raises
    ------
    jinja2.UndefinedError
        If a value that the template names is missing.
    """
    return _TEMPLATES.get_template(template).render(values)


def json_text(value: Any) -> str:
    """A value as JSON that is safe in a script element: no character of it can end the script.

    Raises
    ------
    ValueError
        If the value holds NaN or an infinity, which JSON cannot express.

    Examples
    --------
    >>> str(json_text({"token": "</script>"}))
    '{"token":"\\\\u003c/script\\\\u003e"}'
    """
    return htmlsafe_json_dumps(value, separators=(",", ":"), allow_nan=False)
