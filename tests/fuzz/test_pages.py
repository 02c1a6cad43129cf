"""Random text as tokens, titles and labels of pages: it comes back as it was, and ends no script.

A slice of seconds; `make fuzz MINUTES=10` tries it for ten minutes.
"""

import json
from html.parser import HTMLParser
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from goatviz.explore import export
from goatviz.explore.base import Explorer, Picture
from goatviz.explore.controls import Control
from goatviz.pages import json_text
from goatviz.plots import style
from goatviz.plots.base import Panel
from tests.fuzz.minutes import fuzzed

#: What ends or begins a script, a comment, a template's part or an attribute.
PIECES = ["</script>", "<script>", "<!--", "-->", "]]>", "{{ x }}", "{% raw %}", "@@data@@", '"']
PIECES += [
    "'",
    "\\",
    "&lt;",
    "%{y}",
    "<b>",
    "<img src=x onerror=alert(1)>",
    "\u2028",
    "\ud800",
    "\0",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=6).map("".join)
#: As a file can hold it: a lone surrogate has no bytes.
WRITTEN = TEXTS.map(lambda text: text.encode("utf-8", "replace").decode())


class Reader(HTMLParser):
    """Elements of a page, and the content of its scripts by id."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.scripts, self.inside = [], {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = dict(attributes).get("id", f"script {len(self.tags)}")
        if tag == "script":
            self.scripts[self.inside] = ""

    def handle_data(self, data):
        if self.inside in self.scripts:
            self.scripts[self.inside] += data

    def handle_endtag(self, tag):
        self.inside = None


class Words(Explorer):
    """A picture of given words."""

    shown, panels = (), {"words": 300}

    def __init__(self, title, token, label):
        super().__init__()
        self._words = title, token
        self._set_up([Control("again", "Again", "button")], label=label)

    def _check(self, values):
        pass

    def _picture(self, values, task):
        title, token = self._words
        trace = {"type": "scatter", "x": [0], "y": [1], "text": [token], "name": token}
        return Picture({"words": Panel(title, [trace])}, f"{title}, {token}")


@fuzzed(300)
@given(text=TEXTS)
def test_text_in_a_script_is_the_text(text):
    inside = Reader(f'<script id="data">{json_text({"text": text})}</script><p>')
    assert inside.tags == ["script", "p"]
    assert json.loads(inside.scripts["data"]) == {"text": text}


def read(title, token, label):
    """What a browser finds in an exported page of these words."""
    explorer = Words(title, token, label)
    with mock.patch.object(export, "get_plotlyjs", lambda: ""):
        return Reader(export.page(explorer, {})), explorer


@fuzzed(40)
@given(title=TEXTS, token=TEXTS, label=WRITTEN)
def test_words_on_an_exported_page(title, token, label):
    plain, _ = read("title", "token", "label")
    inside, explorer = read(title, token, label)
    assert inside.tags == plain.tags
    data = json.loads(inside.scripts["data"])
    assert data["model"]["label"] == explorer.label == label
    kept = json.dumps(data["states"]) + json.dumps(data["shared"])
    # plotly reads markup in names and titles, so that they are escaped for it too.
    for text in (title, token):
        assert json.dumps(text)[1:-1] in kept or json.dumps(style.escape(text))[1:-1] in kept
