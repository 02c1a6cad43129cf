"""The plotly Figure that goatviz returns: how it is shown, saved and exported as an image.

It needs no network, its text turns light on a dark page, and an image of it has no menus. Other
modules decide what a figure contains.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from goatviz import checks
from goatviz.files import whole_file
from goatviz.plots import style

#: plotly.js options of every goatviz figure. Plotly's "Share chart" button would upload the data.
CONFIG = {"showSendToCloud": False, "displaylogo": False, "responsive": True}
#: Formats of images.
IMAGES = ("png", "jpg", "jpeg", "webp", "svg", "pdf")
#: Browsers that draw images, in the order in which they are looked for.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
#: Height of a row of menus in pixels.
MENU_HEIGHT = 40
_STYLE = f"<style>{style.ADAPTIVE_CSS}</style>"
_PAGE_STYLE = f"""<style>
:root.goatviz-page {{ color-scheme: light dark; background: {style.GROUND["light"]}; }}
@media (prefers-color-scheme: dark) {{
  :root.goatviz-page {{ background: {style.GROUND["dark"]}; }} }}
</style>"""


class Figure(go.Figure):
    """A plotly Figure that needs no network and sends nothing, wherever it is shown or saved."""

    def choose(self, *, layer: int | None = None, head: int | None = None) -> Figure:
        """The figure of one layer and head of its menus, without menus.

        Parameters
        ----------
        layer, head : int, optional
            Entries of the menus. Default: those on which the figure opens, or, if only the layer
            is given, the head on which the menu of that layer opens.

        Raises
        ------
        ValueError
            If the figure has no menu with such an entry; the message lists the entries.
        """
        plain = self.to_dict()
        menus = plain["layout"].pop("updatemenus", ())
        for what, number in (("layer", layer), ("head", head)):
            if number is None:
                continue
            menu = _menu_of(menus, what, layer)
            labels = [button["label"] for button in menu["buttons"]] if menu else []
            label = f"{what} {checks.integer(what, number, low=0)}"
            if label not in labels:
                listed = ", ".join(labels) or "none: this figure has no such menu"
                raise ValueError(f"{what} must be one of the menu's ({listed}), got {number}")
            _update(plain, *menu["buttons"][labels.index(label)]["args"])
        if menus:
            plain["layout"]["height"] -= MENU_HEIGHT
            plain["layout"]["margin"]["t"] -= MENU_HEIGHT
        return Figure(data=plain["data"], layout=plain["layout"], _validate=False)

    def as_image(
        self, *, layer: int | None = None, head: int | None = None, theme: str = "light"
    ) -> Figure:
        """The figure as an image shows it: one layer and head, no menus, an opaque ground.

        Parameters
        ----------
        layer, head : int, optional
            As in `choose`.
        theme : {"light", "dark"}
            Colours of text and ground.
        """
        checks.one_of("theme", theme, style.TEXT)
        image = self.choose(layer=layer, head=head)
        image.update_layout(paper_bgcolor=style.GROUND[theme], font_color=style.TEXT[theme])
        return image

    def to_image(
        self,
        format: str = "png",
        *,
        width: int | None = None,
        height: int | None = None,
        scale: float | None = None,
        layer: int | None = None,
        head: int | None = None,
        theme: str = "light",
    ) -> bytes:
        """The figure as an image, drawn by kaleido and a Chromium of this machine, offline.

        Parameters
        ----------
        format : str
            "png", "jpg", "jpeg", "webp", "svg" or "pdf".
        width, height : int, optional
            Size in pixels; default the figure's own, or 700 x 500.
        scale : float, optional
            Pixels of the image for each pixel of the figure; default 1.
        layer, head, theme
            As in `as_image`.

        Raises
        ------
        ImportError
            If kaleido is missing.
        RuntimeError
            If there is no Chromium or Chrome: see `image_options`.
        ValueError
            If `format` is unknown, or an argument does not fit.
        """
        checks.one_of("format", format, IMAGES)
        plain = self.as_image(layer=layer, head=head, theme=theme).to_dict()
        return _rendered(
            plain,
            {
                "format": format,
                "width": width or plain["layout"].get("width") or pio.defaults.default_width,
                "height": height or plain["layout"].get("height") or pio.defaults.default_height,
                "scale": scale or pio.defaults.default_scale,
            },
        )

    def write_image(self, file: Any, format: str | None = None, **options: Any) -> None:
        """Write `to_image` to a file, whole or not at all.

        Parameters
        ----------
        file : path-like or binary file
            Path in an existing folder that ends in .png, .jpg, .jpeg, .webp, .svg or .pdf; or an
            object with write(bytes).
        format : str, optional
            As in `to_image`; default the ending of the path, or "png".
        **options
            Options of `to_image`.

        Raises
        ------
        ImportError, RuntimeError, ValueError
            As in `to_image`, or if the path does not fit.
        """
        if hasattr(file, "write"):
            file.write(self.to_image(format or "png", **options))
            return
        path = checks.output_file("file", file, *(f".{name}" for name in IMAGES))
        image = self.to_image(format or path.suffix[1:], **options)
        with whole_file(path) as temporary:
            temporary.write_bytes(image)

    def show(self, *args: Any, **kwargs: Any) -> None:
        """As in plotly, without the cloud button."""
        pio.show(self, *args, **{"config": CONFIG, **kwargs})

    def to_html(self, *args: Any, **kwargs: Any) -> str:
        """As in plotly, without the cloud button and without MathJax from a CDN."""
        text = pio.to_html(self, *args, **{"config": CONFIG, "include_mathjax": False, **kwargs})
        head, separator, rest = text.partition("</head>")
        return f"{head}{_STYLE}{separator}{rest}" if separator else f"{_STYLE}{text}"

    def write_html(self, *args: Any, **kwargs: Any) -> None:
        """As in plotly, without the cloud button and without MathJax from a CDN."""
        pio.write_html(self, *args, **{"config": CONFIG, "include_mathjax": False, **kwargs})

    def _ipython_display_(self) -> None:
        if pio.renderers.render_on_display and pio.renderers.default:
            # plotly shows a figure as JSON, which cannot hold a style sheet.
            from IPython.display import HTML, display

            display(HTML(_STYLE))
            self.show()
        else:
            print(repr(self))

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super()._repr_mimebundle_(*args, **{"config": CONFIG, **kwargs})

    def _repr_html_(self) -> str:
        return self.to_html(full_html=False, include_plotlyjs=True)


def _rendered(figure: dict[str, Any], options: dict[str, Any]) -> bytes:
    """The image that kaleido makes of a figure, without MathJax from a CDN."""
    if importlib.util.find_spec("kaleido") is None:
        raise ImportError("an image needs kaleido: pip install 'goatviz[notebook]'")
    import kaleido

    browser = image_options()
    try:
        return kaleido.calc_fig_sync(figure, opts=options, kopts=dict(browser))
    except RuntimeError as error:
        if "path" in browser:
            raise
        raise RuntimeError(
            f"an image needs Chromium or Chrome, and none of {', '.join(BROWSERS)} is on PATH: "
            "install one (Debian, Ubuntu: apt-get install chromium; anywhere: plotly_get_chrome), "
            "or name it in the environment variable BROWSER_PATH"
        ) from error


def image_options() -> dict[str, Any]:
    """How kaleido is started: with the browser of BROWSER_PATH, or the first one of `BROWSERS`.

    Without either, kaleido looks where browsers are installed, and for one that it downloaded.

    Raises
    ------
    RuntimeError
        If BROWSER_PATH names nothing that can be run.
    """
    named = os.environ.get("BROWSER_PATH")
    if named and shutil.which(named) is None:
        raise RuntimeError(f"BROWSER_PATH must name a browser that can be run, got {named!r}")
    path = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    return {"mathjax": False} | ({} if path is None else {"path": path})


def _menu_of(
    menus: Sequence[dict[str, Any]], what: str, layer: int | None
) -> dict[str, Any] | None:
    """The menu of layers or of heads; if there are several menus of heads, that of the layer."""
    named = [menu for menu in menus if menu["buttons"][0]["label"].startswith(f"{what} ")]
    if what == "layer" or len(named) < 2:
        return named[0] if named else None
    layers = [button["label"] for button in menus[0]["buttons"]]
    return named[menus[0].get("active", 0) if layer is None else layers.index(f"layer {layer}")]


def _update(
    figure: dict[str, Any], data: dict[str, list[Any]], layout: dict[str, Any], traces: list[int]
) -> None:
    """Apply the update of a menu's button to a figure's plain data, as plotly.js does."""
    for name, values in data.items():
        for at, value in zip(traces, values, strict=True):
            _set(figure["data"][at], name, value)
    for name, value in layout.items():
        if not name.startswith("updatemenus"):
            _set(figure["layout"], name, value)


def _set(settings: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
    if value is None:
        settings.pop(last, None)
    else:
        settings[last] = value


def save_html(figure: go.Figure, path: str | os.PathLike) -> Path:
    """Write a figure as one HTML file that opens offline, whole or not at all.

    Parameters
    ----------
    figure : plotly.graph_objects.Figure
        Figure from any `plot_*` or `draw_*`.
    path : path-like
        File in an existing folder, ending in .html.

    Returns
    -------
    Path
        Path of the file (about 5 MB, since it contains plotly.js).

    Raises
    ------
    TypeError
        If `figure` is not a plotly Figure.
    ValueError
        If `path` does not end in .html or its folder does not exist.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_html(Figure(), Path(folder) / "empty.html").name
    'empty.html'
    """
    checks.instance("figure", figure, go.Figure, "a plotly Figure")
    path = checks.output_file("path", path, ".html")
    text = pio.to_html(figure, config=CONFIG, include_mathjax=False, include_plotlyjs=True)
    text = text.replace("<html>", '<html lang="en" class="goatviz-page">', 1)
    text = text.replace("</head>", f"{_STYLE}{_PAGE_STYLE}</head>", 1)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
