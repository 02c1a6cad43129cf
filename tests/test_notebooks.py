"""Every notebook runs from top to bottom, without exception or warning, and is committed clean."""

import ast
import json
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CELL_TIMEOUT_S = 300
PLOTLY_MIME = "application/vnd.plotly.v1+json"
PLOTLY_LIMIT_BYTES = 2_000_000

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def asserts_something(source: str) -> bool:
    return any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source)))


def faults_of_outputs(notebook: NotebookNode) -> list[str]:
    """Return what is wrong with the outputs of an executed notebook, one line a fault.

    Anything on standard error counts: that is where warnings and failed callbacks are told, and
    a reader should see neither.
    """
    faults = []
    for index, cell in enumerate(code_cells(notebook)):
        for output in cell.outputs:
            if output.output_type == "error":
                faults.append(f"code cell {index} raised {output.ename}: {output.evalue}")
            elif output.output_type == "stream" and output.name == "stderr":
                faults.append(f"code cell {index} wrote to stderr: {output.text}")
            elif PLOTLY_MIME in output.get("data", {}):
                size = len(json.dumps(output.data[PLOTLY_MIME]).encode())
                if size >= PLOTLY_LIMIT_BYTES:
                    faults.append(f"code cell {index} shows a figure of {size} bytes")
    return faults


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make "python3" mean this very Python, whatever a user has installed or configured."""
    for variable in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    # The folders named here are searched before all others.
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Run every cell in ``folder``; a cell that raises raises here."""
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT_S,
        resources={"metadata": {"path": str(folder)}},
        # Widget state repeats plotly.js for each figure and is read by nobody here.
        store_widget_state=False,
    )
    return client.execute()


def test_there_are_notebooks():
    assert NOTEBOOKS, f"no notebook in {FOLDER}"


@every_notebook
def test_notebook_runs(kernel, path, tmp_path):
    folder = tmp_path / "notebooks"
    shutil.copytree(FOLDER, folder)
    notebook = execute(nbformat.read(folder / path.name, as_version=4), folder)
    assert faults_of_outputs(notebook) == []


@every_notebook
def test_notebook_ends_in_asserts(path):
    last = code_cells(nbformat.read(path, as_version=4))[-1]
    assert asserts_something(last.source), "the last code cell asserts nothing"


@every_notebook
def test_notebook_is_committed_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None


# --- the readers above, on small notebooks ---


def notebook_of(*sources: str) -> NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in sources])


def test_runner_uses_this_python_and_sees_warnings(kernel, tmp_path):
    notebook = notebook_of(
        "import sys\nprint(sys.executable)", "import warnings\nwarnings.warn('careful')"
    )
    execute(notebook, tmp_path)
    assert notebook.cells[0].outputs[0].text.strip() == sys.executable
    (fault,) = faults_of_outputs(notebook)
    assert "code cell 1" in fault
    assert "careful" in fault


def test_outputs_that_are_faults():
    notebook = notebook_of("a", "b", "c")
    notebook.cells[0].outputs = [nbformat.v4.new_output("error", ename="E", evalue="v")]
    for cell, size in zip(notebook.cells[1:], (PLOTLY_LIMIT_BYTES, 10), strict=True):
        data = {PLOTLY_MIME: {"data": "x" * size}}
        cell.outputs = [nbformat.v4.new_output("display_data", data=data)]
    raised, large = faults_of_outputs(notebook)
    assert raised == "code cell 0 raised E: v"
    assert large.startswith("code cell 1 shows a figure of 2000")


@pytest.mark.parametrize(
    ("source", "expected"), [("assert x", True), ("x = 'assert'", False), ("# assert", False)]
)
def test_what_asserts(source, expected):
    assert asserts_something(source) is expected
