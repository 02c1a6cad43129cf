"""What a run will take is known before it starts, and what does not fit is refused."""

import dataclasses

import pytest
import torch

from goatviz.models import IMAGE_SCHEMES, POSITION_SCHEMES, build_model
from goatviz.tasks import Passkey
from goatviz.training import Execution, train
from goatviz.training import memory as memory_module
from goatviz.training.evaluation import next_token_loss
from goatviz.training.memory import MemoryEstimate, check_memory, estimate_memory, free_memory
from goatviz.training.presets import PRESETS, preset

CONFIG = dataclasses.replace(
    preset("passkey"), task=Passkey(length=320, value_length=4), num_layers=4, batch_size=3
)


def kept_by(config, checkpoint=False):
    """What autograd keeps for the real batch."""
    model = build_model(config.model_config())
    model.checkpoint_activations = checkpoint
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    count = model.config.count_ids(config.task.length) + 1
    ids = torch.randint(config.task.vocab_size, (config.batch_size, count))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        next_token_loss(model, ids).sum()
    return sum(seen.values())


@pytest.mark.parametrize("positions", POSITION_SCHEMES)
def test_the_estimate_holds_what_autograd_keeps_and_little_more(positions):
    config = dataclasses.replace(CONFIG, positions=positions)
    if positions == "learned":
        config = dataclasses.replace(config, task=dataclasses.replace(config.task, length=256))
    kept = kept_by(config)
    estimate = estimate_memory(config).activations
    # Beside it: the gradients of one of four blocks, and logits; and a dense bias, which sequences
    # share, is counted for each of them.
    assert kept < estimate < (1.6 if positions == "bucket" else 1.5) * kept


@pytest.mark.parametrize("positions", IMAGE_SCHEMES)
def test_the_estimate_of_images_holds_it_too(positions):
    config = dataclasses.replace(preset("images"), positions=positions, batch_size=3)
    assert kept_by(config) < estimate_memory(config).activations < 1.5 * kept_by(config)


def test_checkpointing_and_parts_take_less():
    whole = estimate_memory(CONFIG)
    again = estimate_memory(CONFIG, checkpoint_activations=True)
    assert kept_by(CONFIG, checkpoint=True) < again.activations < 0.7 * whole.activations
    assert again.parameters == whole.parameters
    assert estimate_memory(CONFIG, parts=3).activations == pytest.approx(whole.activations / 3)


@pytest.mark.parametrize("task", PRESETS)
def test_parameters_are_counted_exactly(task):
    config = preset(task)
    count = sum(p.numel() for p in build_model(config.model_config()).parameters())
    assert estimate_memory(config).parameters == 16 * count


def test_long_presets_are_estimated_without_being_formed():
    # 374 GB at once: nothing of that size may be formed to find out.
    assert estimate_memory(preset("text", "paper")).total > 1e11


def test_there_is_memory():
    free = free_memory(torch.device("cpu"))
    assert 1e6 < free < 1e14


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    used.write_text("400000\n")
    paths = {"/sys/fs/cgroup/memory.max": limit, "/sys/fs/cgroup/memory.current": used}
    monkeypatch.setattr(memory_module, "Path", lambda name: paths[name])
    limit.write_text("1000000\n")
    assert free_memory(torch.device("cpu")) == 600_000
    limit.write_text("max\n")
    assert free_memory(torch.device("cpu")) > 1e6


def test_what_does_not_fit_is_refused_before_it_starts(monkeypatch):
    monkeypatch.setattr("goatviz.training.loop.free_memory", lambda device: 5e6)
    with pytest.raises(MemoryError, match=r"batch_size=3, length=320.*needs about 0\.\d\d GB"):
        train(CONFIG, progress=False, execution=Execution(device="cpu"))
    check_memory(MemoryEstimate(2.0, 3.0), 5.0, CONFIG)
    with pytest.raises(MemoryError, match="raise accumulation"):
        check_memory(MemoryEstimate(2.0, 3.5), 5.0, CONFIG)
