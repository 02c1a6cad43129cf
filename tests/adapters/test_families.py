"""The table of attention families says what is so: a fast subset of it is measured again."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "docs" / "families.py"
#: Decoders, encoders and both; grouped, latent and windowed heads; sinks; vision; and refusals.
FAMILIES = ("bert", "bloom", "deepseek_v3", "diffllama", "gemma2", "gpt2", "gpt_oss", "granite_swa")
FAMILIES += (
    "inkling2_text",
    "llama",
    "longformer",
    "mistral",
    "qwen3_next",
    "t5",
    "vit",
    "whisper",
)


def rows(text: str) -> dict[str, tuple[str, str, str]]:
    """Section, class and last column of each family."""
    found = {}
    for section in text.split("\n## ")[1:]:
        verdict = section.split(":")[0]
        for family, model, last in re.findall(r"^\| (.+?) \| (.*?) \| (.+) \|$", section, re.M)[2:]:
            found[family] = verdict, model, last
    return found


def test_the_table_of_families_is_that_of_the_models():
    command = [sys.executable, str(SCRIPT), *FAMILIES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, written = rows(done.stdout), rows(SCRIPT.with_suffix(".md").read_text(encoding="utf-8"))
    assert sorted(found) == sorted(FAMILIES)
    for family, (verdict, model, last) in found.items():
        assert (verdict, model) == written[family][:2]
        if verdict == "Captured":
            assert float(last) < 1e-5
        else:
            assert last == written[family][2]


def test_every_plan_of_the_table_is_the_models_own():
    written = rows(SCRIPT.with_suffix(".md").read_text(encoding="utf-8")).values()
    deviations = [float(last) for verdict, _, last in written if verdict == "Captured"]
    assert len(deviations) > 250 and max(deviations) < 1e-5
