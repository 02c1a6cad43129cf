"""`info` tells what is installed and what runs here; it needs no extra, and no GPU."""

import dataclasses
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from goatviz.attention.backends import BACKENDS
from goatviz.cli import main
from goatviz.environment import DISTRIBUTIONS, info
from goatviz.training import list_pretrained


def installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def rows(text: str) -> dict[str, dict[str, str]]:
    """The sections of the text, each as a dict from its first column to its second."""
    sections = {}
    for section in text.strip().split("\n\n"):
        title, *lines = section.splitlines()
        table = sections[title] = {}
        for line in lines:
            if line[2] != " ":
                name = line.split("  ")[1].strip()
                table[name] = line[2:].removeprefix(name).strip()
            else:
                table[name] += " " + line.strip()
    return sections


def test_versions_are_those_installed():
    versions = rows(str(info()))["Versions"]
    assert versions.pop("Python").startswith(sys.version.split()[0])
    assert versions == {name: installed(name) for name in DISTRIBUTIONS}
    assert {"flash-attn", "triton", "transformers", "POT", "jupyterlab"} <= versions.keys()


def test_what_is_not_installed_is_told(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    versions = rows(str(info()))["Versions"]
    assert {versions[name] for name in DISTRIBUTIONS} == {"not installed"}


def test_each_backend_is_told_with_its_hindrance(monkeypatch):
    name = "reference"
    hindered = dataclasses.replace(BACKENDS[name], hindrance=lambda: "there is no compiler " * 6)
    monkeypatch.setitem(BACKENDS, name, hindered)
    sections = rows(str(info()))
    here = sections["Attention backends that run here"]
    not_here = sections["Attention backends that do not"]
    assert here.keys() | not_here.keys() == BACKENDS.keys()
    assert not_here[name] == hindered.hindrance().strip()
    for other, backend in BACKENDS.items():
        told = backend.summary if backend.hindrance() is None else backend.hindrance().strip()
        assert (here | not_here)[other] == told
        assert (other in here) == (backend.hindrance() is None)


def test_the_text_fits_80_columns():
    lines = [line for line in str(info()).splitlines() if "checkpoints" not in line]
    assert max(map(len, lines)) <= 80


def test_gpus_are_told_with_memory_and_capability(monkeypatch):
    assert rows(str(info()))["Devices"].keys() >= {"CPU"}
    gpu = SimpleNamespace(name="Some GPU", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    devices = rows(str(info()))["Devices"]
    assert devices["GPU 0"] == devices["GPU 1"] == "Some GPU, 80.0 GiB, compute capability 9.0"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert rows(str(info()))["Devices"]["GPU"].startswith("none that torch sees")


def test_the_folder_of_checkpoints_names_no_user(monkeypatch):
    found = info()
    folder = Path(found.checkpoints).expanduser()
    assert found.pretrained == len(list_pretrained()) == len(list(folder.glob("*.safetensors")))
    monkeypatch.setattr(Path, "home", lambda: folder.parent)
    assert info().checkpoints == str(Path("~") / folder.name)


def test_the_command_prints_text_or_json(capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out == f"{info()}\n"
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(info().to_dict()))


def test_help_lists_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "report of a bug" in capsys.readouterr().out


def test_no_extra_is_needed():
    extras = ["flash_attn", "triton", "transformers", "goat", "anywidget", "jupyterlab", "datasets"]
    code = (
        f"import sys\nfor name in {extras}: sys.modules[name] = None\n"
        "from goatviz.cli import main\nraise SystemExit(main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(rows(done.stdout)) >= {"Versions", "Devices", "Checkpoints"}
