"""Exported pages: every state is there once, nothing outside is asked for, limits are kept."""

import html
import json
import re

import numpy as np
import pytest
import traitlets

from goatviz import checks
from goatviz.explore.base import Explorer, Picture
from goatviz.explore.controls import Control
from goatviz.explore.export import LIMIT_BYTES, _Shared
from goatviz.plots.base import Panel, as_json

#: Text that would end a script, begin a comment in one, or stand for a part of a template.
MARKUP = [
    "@@script@@",
    "@@data@@",
    "{{ x }}",
    "{% raw %}",
    "</script>",
    "<!-- <script>",
    "a\u2028b",
]


class Waves(Explorer):
    """A picture that costs nothing: sines of a frequency, as a curve and as a map."""

    shown = ("wave", "size", "dark")
    panels = {"curve": 300, "map": 300}
    wave = traitlets.Int(1).tag(sync=True)
    size = traitlets.Float(1.0).tag(sync=True)
    dark = traitlets.Bool(False).tag(sync=True)

    def __init__(self, points=50, label="Waves <b>&"):
        super().__init__()
        self._points = points
        self._set_up(
            [
                Control("wave", "Wave", options=[(n, f"wave {n}") for n in range(4)]),
                Control("size", "Size", "slider", low=0.1, high=10, step=0.1, log=True),
                Control("dark", "Dark", "toggle"),
                Control("reset", "Reset", "button"),
            ],
            label=label,
        )

    def _check(self, values):
        checks.index("wave", values["wave"], 4)

    def _picture(self, values, task):
        y = values["size"] * np.sin(values["wave"] * np.linspace(0, 6, self._points))
        curve = Panel("Curve", [{"type": "scatter", "y": y, "name": self.label}])
        map_ = Panel("Map", [{"type": "heatmap", "z": np.outer(y, y)}])
        return Picture({"curve": curve, "map": map_}, f"wave {values['wave']}, </script>")

    def _default_vary(self):
        return {"wave": [0, 1, 2]}


def content(path):
    text = path.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(data), text


def resolved(value, shared):
    if isinstance(value, dict):
        if set(value) == {"$"}:
            return resolved(shared[value["$"]], shared)
        return {name: resolved(each, shared) for name, each in value.items()}
    if isinstance(value, list):
        return [resolved(each, shared) for each in value]
    return value


def opened(figure):
    """The figure of a page's state, arrays as base64."""

    def packed(value):
        if isinstance(value.get("bdata"), int):
            value["bdata"] = figure["buffers"][value["bdata"]]["base64"]
        return value

    return json.loads(json.dumps(figure["spec"]), object_hook=packed)


def test_a_page_holds_every_state(tmp_path):
    explorer = Waves()
    found, text = content(
        explorer.save_html(tmp_path / "waves.html", vary={"wave": [2, 0], "size": [1.0, 3.0]})
    )
    assert len(found["states"]) == 4 and found["names"] == ["wave", "size"]
    assert found["values"] == {"wave": 2, "size": 1.0}  # the widget's 1 is not among them
    number = 0
    for wave in (2, 0):
        for size in (1.0, 3.0):
            state = found["states"][number]
            wanted = explorer.picture({"wave": wave, "size": size})
            for name, figure in wanted.figures.items():
                shown = opened(resolved(state[f"{name}_figure"], found["shared"]))
                assert shown == json.loads(as_json(figure))
            number += 1
    assert found["fixed"] == "Dark off"
    assert "<title>Waves &lt;b&gt;&amp;</title>" in text
    assert not re.findall(r"""(?:src|href)=["']https?:""", text.split("<script>")[0])


@pytest.mark.parametrize("text", MARKUP)
def test_text_that_looks_like_markup_stays_text(tmp_path, text):
    path = Waves(label=text).save_html(tmp_path / "waves.html", vary={"wave": [0, 1]})
    held, page = content(path)
    assert held["model"]["label"] == text
    names = [
        opened(resolved(state["curve_figure"], held["shared"]))["data"][0]["name"]
        for state in held["states"]
    ]
    assert names == [text, text]
    _, harmless = content(Waves(label="waves").save_html(tmp_path / "plain.html"))
    assert page.count("<script") == harmless.count("<script")
    assert f"<title>{html.escape(text)}</title>" in page


def test_what_states_share_is_written_once(tmp_path):
    explorer = Waves(points=200)
    one, _ = content(explorer.save_html(tmp_path / "one.html", vary={"dark": [False]}))
    two, _ = content(explorer.save_html(tmp_path / "two.html", vary={"dark": [False, True]}))
    sizes = [len(json.dumps(each["shared"])) for each in (one, two)]
    assert sizes[0] == sizes[1]
    shared = _Shared()
    assert shared.keep("x" * 100) == shared.keep("x" * 100) == {"$": 0}
    assert shared.keep([1, 2]) == [1, 2]


def test_controls_of_the_page_are_those_that_vary(tmp_path):
    found, _ = content(Waves().save_html(tmp_path / "waves.html", vary={"size": [0.5, 2.0]}))
    (control,) = found["model"]["control_specs"]
    assert control["kind"] == "slider" and control["choices"] == [0.5, 2.0]
    assert (control["min"], control["max"], control["step"]) == (0, 1, 1)
    found, _ = content(Waves().save_html(tmp_path / "waves.html"))
    (control,) = found["model"]["control_specs"]
    assert control["options"] == [[0, "wave 0"], [1, "wave 1"], [2, "wave 2"]]


@pytest.mark.parametrize(
    ("name", "vary", "says"),
    [
        ("waves.txt", None, "path must end in .html"),
        ("none/waves.html", None, "path must lie in an existing folder"),
        ("waves.html", {"waves": [1]}, "vary must name wave, size, dark, got 'waves'"),
        ("waves.html", {"wave": []}, r"vary\['wave'\] must hold at least one value"),
        ("waves.html", {"wave": [1, 9]}, "wave must be an integer in 0 .. 3, got 9"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, name, vary, says):
    with pytest.raises(ValueError, match=says):
        Waves().save_html(tmp_path / name, vary=vary)
    assert list(tmp_path.iterdir()) == []


def test_too_much_is_refused_with_its_size(tmp_path):
    explorer = Waves(points=500)
    sizes = [float(size) for size in range(1, 100)]
    with pytest.raises(ValueError, match=r"vary asks for 99 states \(99 size\).*name fewer"):
        explorer.save_html(tmp_path / "waves.html", vary={"size": sizes})
    assert list(tmp_path.iterdir()) == []
    path = explorer.save_html(tmp_path / "waves.html", vary={"size": sizes[:2]})
    found, _ = content(path)
    assert len(json.dumps(found)) < LIMIT_BYTES


def test_an_image_is_of_a_panel_or_all(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        "goatviz.plots.figure.Figure.write_image",
        lambda figure, path, **options: written.append((len(figure.data), path, options)),
    )
    explorer = Waves()
    path = tmp_path / "waves.png"
    assert explorer.save_image(path, theme="dark") == path
    explorer.save_image(path, panel="curve")
    assert written == [(2, path, {"theme": "dark"}), (1, path, {})]
    with pytest.raises(ValueError, match="panel must be one of curve, map; got 'row'"):
        explorer.save_image(path, panel="row")
