"""The table of attention families says what is so: a fast subset of it is measured again."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

SCRIPT = Path(__file__).parents[2] / "docs" / "families.py"
TABLE = SCRIPT.with_suffix(".md")
#: Decoders, encoders and both; grouped, latent and windowed heads; sinks, biases and gates; vision;
#: and refusals.
FAMILIES = ("bert", "bloom", "deepseek_v3", "diffllama", "gemma2", "gpt2", "gpt_oss", "granite_swa")
FAMILIES += (
    "deberta-v2",
    "inkling2_text",
    "llama",
    "longformer",
    "mamba",
    "mistral",
    "qwen3_next",
    "step3p7",
    "swin",
    "swinv2",
    "t5",
    "vit",
    "whisper",
)


def rows(text: str) -> dict[str, tuple[str, str, str]]:
    """Section, class (with the reading of what is captured) and last column of each family."""
    found = {}
    for section in text.split("\n## ")[1:]:
        verdict = section.split(":")[0]
        for family, model, last in re.findall(r"^\| (.+?) \| (.*?) \| (.+) \|$", section, re.M)[2:]:
            read, _, last = last.rpartition(" | ") if verdict == "Captured" else ("", "", last)
            found[family] = verdict, f"{model} {read}".strip(), last
    return found


def measured(families):
    """The rows of some families, measured now, and as they are written."""
    command = [sys.executable, str(SCRIPT), *families]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, written = rows(done.stdout), rows(TABLE.read_text(encoding="utf-8"))
    assert sorted(found) == sorted(families)
    for family, (verdict, model, last) in found.items():
        assert (verdict, model) == written[family][:2], f"{family}: {last}"
        assert float(last) < 1e-5 if verdict == "Captured" else last == written[family][2], family


def test_every_family_of_transformers_has_its_row():
    assert sorted(rows(TABLE.read_text(encoding="utf-8"))) == sorted(MODEL_MAPPING_NAMES)


def test_the_table_of_families_is_that_of_the_models():
    measured(FAMILIES)


@pytest.mark.notebooks
def test_the_whole_table_is_that_of_the_models():
    measured(sorted(MODEL_MAPPING_NAMES))
