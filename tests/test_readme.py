"""README.md tells the truth: its code runs, its tree and its links exist.

The tree is the fenced block in which a line begins with ``goatviz/``. Its paths are written from
the root of the repository, one level of indentation a folder, each followed by what lives there.
"""

import re
from pathlib import Path

import plotly.io
import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)[^)]*\)|(?:src|href)=\"(?P<attribute>[^\"]+)\"")
# Further names on a line of the tree: "base.py  fixed.py (uniform)   spectral.py".
FURTHER = re.compile(r"\s{2,}(?=[\w.-]+(?:/|\.\w+)(?:\s|$))")


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(text: str) -> list[str]:
    """Return the python blocks, each at its own line number, so that errors point into README."""
    return [
        "\n" * text[: match.start("body")].count("\n") + match["body"]
        for match in FENCE.finditer(text)
        if match["language"] == "python"
    ]


def tree_paths(text: str) -> list[str]:
    """Return the paths that the tree lists; folders end in a slash."""
    for match in FENCE.finditer(text):
        lines = [re.sub("[│├└─]", " ", line) for line in match["body"].splitlines()]
        if not any(line.startswith("goatviz/") for line in lines):
            continue
        paths, folders = [], []
        for line in filter(str.strip, lines):
            indent = len(line) - len(line.lstrip())
            while folders and indent <= folders[-1][0]:
                folders.pop()
            parent = folders[-1][1] if folders else ""
            for index, entry in enumerate(FURTHER.split(line.strip())):
                path = parent + entry.split()[0]
                paths.append(path)
                if index == 0 and path.endswith("/"):
                    folders.append((indent, path))
        return paths
    return []


def test_code_runs(tmp_path, monkeypatch):
    blocks = code_blocks(readme())
    assert blocks, "README.md has no python block"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plotly.io.renderers, "default", "json")  # show() opens no browser here
    namespace = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_tree_lists_every_top_level_module():
    listed = set(tree_paths(readme()))
    assert listed, "README.md has no tree: no fenced block in which a line begins with goatviz/"
    package = ROOT / "goatviz"
    present = {f"goatviz/{path.name}" for path in package.glob("*.py")}
    present |= {
        f"goatviz/{path.name}/"
        for path in package.iterdir()
        if path.is_dir() and path.name != "__pycache__"
    }
    assert present - listed == set()


def test_tree_lists_only_what_exists():
    for path in tree_paths(readme()):
        found = ROOT / path
        assert found.is_dir() if path.endswith("/") else found.is_file(), f"{path} does not exist"


def test_links_exist():
    for match in LINK.finditer(FENCE.sub("", readme())):
        target = match["target"] or match["attribute"]
        if not re.match(r"[a-z]+:|#", target):
            assert (ROOT / target.split("#")[0]).exists(), f"{target} does not exist"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^\.PHONY:(.*)$", makefile, re.MULTILINE)[0].split())
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", readme(), re.MULTILINE))
    assert named, "README.md names no make target"
    assert named <= targets


# --- the readers of README.md, on small texts ---

TREE = """\
Text.

```
goatviz/
  __init__.py   the façade
  priors/       log pi as an object
    base.py  fixed.py (uniform, ALiBi)   spectral.py
  checkpoints/  data only: *.safetensors + README.md
notebooks/  tests/ (mirrors the package)
LICENSE
.ci/run         what a machine runs
```
"""


def test_tree_is_read():
    assert tree_paths(TREE) == [
        "goatviz/",
        "goatviz/__init__.py",
        "goatviz/priors/",
        "goatviz/priors/base.py",
        "goatviz/priors/fixed.py",
        "goatviz/priors/spectral.py",
        "goatviz/checkpoints/",
        "notebooks/",
        "tests/",
        "LICENSE",
        ".ci/run",
    ]


def test_drawn_tree_is_read():
    drawn = "```text\ngoatviz/\n├── priors/  a\n│   └── base.py  b\n└── cli.py  c\n```\n"
    assert tree_paths(drawn) == [
        "goatviz/",
        "goatviz/priors/",
        "goatviz/priors/base.py",
        "goatviz/cli.py",
    ]


def test_text_without_tree_gives_none():
    assert tree_paths("```\nmake test\n```\n") == []


def test_code_is_read_with_its_line_numbers():
    blocks = code_blocks("a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\n1 / 0\n```\n")
    assert len(blocks) == 2
    with pytest.raises(ZeroDivisionError) as caught:
        exec(compile(blocks[1], "README.md", "exec"))
    assert caught.traceback[-1].lineno == 8  # counted from nought
