"""The import law: modules of goatviz know only what lies below them.

::

    checks, bins, files <- results <- priors <- transport <- attention <- models, tasks, adapters
          <- training <- analysis <- figures, explore, paper <- cli
    results <- plots <- figures, explore, paper

One direction, no cycle, absolute imports, and no import inside a function except in cli.py, in the
façade ``goatviz/__init__.py``, and of the modules in `DEFERRED`. The law is read from the source,
so an import that never runs counts too. The second half of this file breaks each rule on purpose.
"""

import ast
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = Path(__file__).parents[1] / "goatviz"

# From the ground up. Subjects on one row may import each other, as long as no cycle results.
ROWS = (
    ("checks", "bins", "files", "pages"),
    ("results",),
    ("priors",),
    ("transport",),
    ("attention",),
    ("models", "tasks", "adapters"),
    ("training",),
    ("analysis",),
    ("figures", "explore", "paper"),
    ("cli",),
)
ALLOWED = {
    subject: {below for row in ROWS[: height + 1] for below in row}
    for height, row in enumerate(ROWS)
    for subject in row
}
ALLOWED["plots"] = {"checks", "bins", "files", "results", "plots"}
ALLOWED["__main__"] = {"cli"}
for _subject in ("figures", "explore", "paper", "cli"):
    ALLOWED[_subject] |= {"plots"}

# The packages a top-level import may name; the optional extras are in DEFERRED.
CORE = {
    "torch",
    "numpy",
    "xarray",
    "h5netcdf",
    "plotly",
    "jinja2",
    "ot",
    "safetensors",
    "tqdm",
    "tyro",
    "accelerate",
    "psutil",
}
# Drawing and its data work on a machine without torch; computing works without plotly.
THIRD_PARTY = {
    "checks": set(),
    "bins": {"numpy"},
    "files": set(),
    "pages": {"jinja2"},
    "results": {"numpy", "xarray", "h5netcdf"},
    "plots": {"numpy", "xarray", "plotly"},
    "figures": CORE,
    "explore": CORE | {"ipywidgets", "anywidget", "traitlets"},
    "paper": CORE,
    "cli": CORE,
}
COMPUTING = CORE - {"plotly"}

# May be imported inside a function: optional extras, which may be imported nowhere else, and POT
# and accelerate, which take a second to import and may be imported either way.
DEFERRED = {
    "transformers",
    "tokenizers",
    "goat",
    "accelerate",
    "datasets",
    "flash_attn",
    "torch.utils.tensorboard",
    "tensorboard",
    "ot",
}
# Distributions whose modules go by another name.
IMPORT_NAMES = {"pot": "ot", "goat-attention": "goat"}
FACADE = "goatviz"
IMPORT_ANYWHERE = {FACADE, "goatviz.cli"}


@dataclass(frozen=True)
class Import:
    """One imported module as written in the source."""

    target: str
    names: tuple[str, ...]
    line: int
    inside_function: bool
    relative: bool = False


class _Imports(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: list[Import] = []
        self._functions = 0

    def _enter(self, node: ast.AST) -> None:
        self._functions += 1
        self.generic_visit(node)
        self._functions -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _enter

    def _add(self, node: ast.AST, target: str, names: tuple[str, ...] = (), level: int = 0) -> None:
        self.found.append(Import(target, names, node.lineno, self._functions > 0, level > 0))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        names = tuple(alias.name for alias in node.names)
        self._add(node, node.module or "", names, node.level)

    def visit_Call(self, node: ast.Call) -> None:
        # import_module("x") and __import__("x") are imports by another spelling.
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if name in {"import_module", "__import__"}:
            literal = node.args[0] if node.args else None
            if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                self._add(node, literal.value)
            else:
                self._add(node, "<a name computed at run time>")
        self.generic_visit(node)


def imports_of(source: str) -> list[Import]:
    """Return every import of a module's source, in order of appearance."""
    visitor = _Imports()
    visitor.visit(ast.parse(source))
    return sorted(visitor.found, key=lambda found: found.line)


def subject_of(module: str) -> str:
    """Return the part of the package a module belongs to: ``goatviz.priors.base`` -> ``priors``."""
    return module.split(".")[1]


def targets(found: Import, modules: Mapping[str, str]) -> list[str]:
    """Return the modules an import reaches: ``from a import b`` reaches ``a.b`` if that is one."""
    if not found.names:
        return [found.target]
    full = [f"{found.target}.{name}" for name in found.names]
    return [name if name in modules or name in DEFERRED else found.target for name in full]


def _under(name: str, roots: set[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _faults_of_import(module: str, found: Import, modules: Mapping[str, str]) -> Iterator[str]:
    if found.relative:
        yield "relative import"
        return
    subject = subject_of(module)
    for target in dict.fromkeys(targets(found, modules)):
        root = target.split(".")[0]
        deferred = _under(target, DEFERRED)
        if found.inside_function and not deferred and module not in IMPORT_ANYWHERE:
            yield f"{target} is imported inside a function"
        if root == "goatviz":
            if target == FACADE:
                if set(found.names) != {"__version__"} and module not in IMPORT_ANYWHERE:
                    yield "imports the façade; name the module that defines it"
            elif target not in modules:
                yield f"{target} does not exist"
            elif subject_of(target) not in ALLOWED[subject]:
                yield f"{target} does not lie below {subject}"
        elif root in sys.stdlib_module_names:
            continue
        elif deferred and subject not in {"results", "plots"}:
            if not found.inside_function and not _under(target, CORE & DEFERRED):
                yield f"{target} is optional: import it inside the function that needs it"
        elif root not in THIRD_PARTY.get(subject, COMPUTING):
            yield f"{subject} may not use {target}"


def violations(modules: Mapping[str, str]) -> list[str]:
    """Return one line for each breach of the law in ``{module name: source}``."""
    lines = []
    graph: dict[str, set[str]] = {}
    for module, source in sorted(modules.items()):
        # The façade stands outside the order: it names everything, lazily (see test_facade.py).
        if module == FACADE:
            continue
        if subject_of(module) not in ALLOWED:
            lines.append(f"{module}: {subject_of(module)} has no place in the order of layers")
            continue
        for found in imports_of(source):
            lines += [
                f"{module}:{found.line}: {fault}"
                for fault in _faults_of_import(module, found, modules)
            ]
            graph.setdefault(module, set()).update(
                target for target in targets(found, modules) if target in modules
            )
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        lines.append("import cycle: " + " -> ".join(reversed(error.args[1])))
    return lines


def sources_of(package: Path) -> dict[str, str]:
    """Return ``{module name: source}`` of a package on disk."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


def test_package_keeps_the_law():
    modules = sources_of(PACKAGE)
    assert {FACADE, "goatviz.results", "goatviz.cli"} <= modules.keys()
    assert violations(modules) == []


def test_every_package_named_here_is_declared():
    declared = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    project = declared["project"]

    def roots(requirements: list[str]) -> set[str]:
        names = {canonicalize_name(Requirement(line).name) for line in requirements}
        return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}

    core = roots(project["dependencies"])
    extras = {name: roots(lines) for name, lines in project["optional-dependencies"].items()}
    assert core >= CORE
    assert core | extras["notebook"] >= THIRD_PARTY["explore"]
    everything = core.union(*extras.values())
    assert everything >= {name.split(".")[0] for name in DEFERRED}


# --- the checker: it lets lawful sources pass and catches every kind of breach ---

LAWFUL = {
    "goatviz": "def __getattr__(name):\n    import importlib\n",
    "goatviz.results": "import json\nimport numpy as np\nimport xarray as xr\n",
    "goatviz.transport": "from goatviz.transport.rows import solve_rows\n",
    "goatviz.transport.rows": "import torch\n",
    "goatviz.transport.bounds": "import ot\n",
    "goatviz.transport.solvers": "def check():\n    import ot\n    from ot.utils import dist\n",
    "goatviz.priors": "",
    "goatviz.priors.base": "import torch\nfrom torch import nn\n",
    "goatviz.attention.functional": "from goatviz.priors.base import Prior\n",
    "goatviz.models": "from goatviz.attention import functional\nfrom goatviz import __version__\n",
    "goatviz.tasks": "import torch\n",
    "goatviz.adapters.huggingface": "def load():\n    from transformers import AutoModel\n",
    "goatviz.training.loop": (
        "from goatviz.models import CausalLM\n"
        "def log():\n    from torch.utils.tensorboard import SummaryWriter\n"
        "def log_too():\n    from torch.utils import tensorboard\n"
    ),
    "goatviz.analysis.prior": "import xarray\nfrom goatviz.models import CausalLM\n",
    "goatviz.plots.prior": "import plotly.graph_objects as go\nimport goatviz.results\n",
    "goatviz.figures": "from goatviz.analysis.prior import x\nfrom goatviz.plots.prior import y\n",
    "goatviz.explore.base": "import ipywidgets\nfrom goatviz.plots.prior import y\n",
    "goatviz.paper": "from goatviz.figures import plot_prior\n",
    "goatviz.cli": "import tyro\ndef main():\n    from goatviz.paper import reproduce\n",
}


def test_lawful_sources_pass():
    assert violations(LAWFUL) == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("goatviz.results", "import torch", "results may not use torch"),
        ("goatviz.results", "import goatviz.tasks", "goatviz.tasks does not lie below results"),
        ("goatviz.priors.base", "from goatviz.transport import rows", "does not lie below"),
        ("goatviz.priors.base", "import goatviz.attention.functional", "does not lie below"),
        ("goatviz.models", "from goatviz.training.loop import fit", "does not lie below models"),
        ("goatviz.analysis.prior", "from goatviz.plots.prior import y", "does not lie below"),
        ("goatviz.analysis.prior", "import plotly.graph_objects", "analysis may not use plotly"),
        ("goatviz.analysis.prior", "from goatviz.figures import p", "does not lie below analysis"),
        ("goatviz.plots.prior", "import torch", "plots may not use torch"),
        ("goatviz.plots.prior", "def f():\n    import torch", "plots may not use torch"),
        ("goatviz.plots.prior", "def f():\n    import ot", "plots may not use ot"),
        ("goatviz.plots.prior", "from goatviz.priors.base import P", "does not lie below plots"),
        ("goatviz.figures", "from goatviz.cli import main", "does not lie below figures"),
        ("goatviz.figures", "import ipywidgets", "figures may not use ipywidgets"),
        ("goatviz.tasks", "import pandas", "tasks may not use pandas"),
        ("goatviz.tasks", "import transformers", "import it inside the function"),
        ("goatviz.tasks", "from torch.utils import tensorboard", "import it inside the function"),
        ("goatviz.tasks", "try:\n    import goat\nexcept ImportError:\n    goat = None", "inside"),
        ("goatviz.tasks", "from goat import GOATAttention", "import it inside the function"),
        ("goatviz.results", "import ot", "results may not use ot"),
        ("goatviz.tasks", "def f():\n    import json", "json is imported inside a function"),
        ("goatviz.tasks", "def f():\n    import torch", "torch is imported inside a function"),
        (
            "goatviz.tasks",
            "class A:\n    def f(self):\n        from goatviz.priors.base import P",
            "goatviz.priors.base is imported inside a function",
        ),
        ("goatviz.tasks", "async def f():\n    import json", "inside a function"),
        (
            "goatviz.tasks",
            "import importlib\nx = lambda: importlib.import_module('goatviz.results')",
            "goatviz.results is imported inside a function",
        ),
        ("goatviz.tasks", "x = __import__('goatviz.cli')", "goatviz.cli does not lie below tasks"),
        ("goatviz.tasks", "x = __import__(name)", "may not use <a name computed at run time>"),
        ("goatviz.tasks", "from . import results", "relative import"),
        ("goatviz.tasks", "from .results import save", "relative import"),
        ("goatviz.tasks", "import goatviz", "imports the façade"),
        ("goatviz.tasks", "from goatviz import plot_prior", "imports the façade"),
        ("goatviz.tasks", "from goatviz import results, __version__, y", "imports the façade"),
        ("goatviz.tasks", "import goatviz.nowhere", "goatviz.nowhere does not exist"),
        ("goatviz.tasks", "if False:\n    import goatviz.cli", "does not lie below tasks"),
        ("goatviz.utils", "", "utils has no place in the order of layers"),
    ],
)
def test_breach_is_caught(module, source, fault):
    found = violations(LAWFUL | {module: source})
    # An import upwards may close a cycle as well, which is told in a line of its own.
    own = [line for line in found if not line.startswith("import cycle")]
    assert any(fault in line for line in own), found
    assert all(line.startswith(f"{module}:") for line in own)


@pytest.mark.parametrize(
    "sources",
    [
        {"goatviz.models": "import goatviz.tasks", "goatviz.tasks": "import goatviz.models"},
        {"goatviz.transport.rows": "from goatviz.transport import solve_rows"},
    ],
)
def test_cycle_is_caught(sources):
    found = violations(LAWFUL | sources)
    assert len(found) == 1
    assert found[0].startswith("import cycle: goatviz.")
