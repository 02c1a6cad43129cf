"""The examples in the docstrings run, and say what they claim to say."""

import doctest
import importlib
import inspect
import warnings
from pathlib import Path

import pytest

import goatviz

PACKAGE = Path(goatviz.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


#: Their examples take as long as what they do, which other tests call too.
SLOW = {
    "goatviz.paper.gallery": pytest.mark.notebooks,
    "goatviz.examples": pytest.mark.notebooks,
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in MODULES])
def test_examples_run(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)  # an example that saves a file leaves it here
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("name", [name for name in goatviz.__all__ if name != "__version__"])
def test_every_public_function_has_an_example(name):
    value = getattr(goatviz, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value), f"{name} has no docstring"
    if inspect.isfunction(value):
        assert ">>>" in value.__doc__, f"the docstring of {name} has no example"
