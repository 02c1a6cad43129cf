"""Signal against sink at one position: Spearman's correlation, position by position."""

import numpy as np
import pytest
import torch
from scipy import stats

from goatviz import CausalLM, ModelConfig
from goatviz.adapters import capture
from goatviz.analysis.signal import signal_correlation


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=16, training_length=24, embed_dim=32, num_layers=2, num_heads=2, positions="rope"
    )
    return CausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(16, (11, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layer", [0, -1])
def test_it_is_spearmans_at_each_position(model, ids, layer):
    found = signal_correlation(model, ids, layer=layer, first_query=5)
    with capture(model, statistics=("key_mass", "content_range")) as record, torch.no_grad():
        model(ids)
    rows = record.calls[layer].rows
    mass, width = rows.key_mass[..., 0].numpy(), rows.content_range.numpy()
    for head in range(2):
        each = [
            stats.spearmanr(mass[:, head, at], width[:, head, at]).statistic for at in range(5, 24)
        ]
        assert float(found["correlation"][head]) == pytest.approx(np.mean(each), abs=1e-6)
    assert float(found["mean_correlation"]) == pytest.approx(float(found["correlation"].mean()))
    assert found["mean_correlation_low"] <= found["mean_correlation"]
    assert found["mean_correlation"] <= found["mean_correlation_high"]
    assert found.attrs["layer"] == layer % 2 and found.attrs["n_inputs"] == 11


def test_inputs_that_are_all_the_same_say_nothing(model, ids):
    found = signal_correlation(model, ids[:1].expand(4, -1))
    assert np.isnan(found["correlation"].values).all()


@pytest.mark.parametrize("shape", [(1, 24), (4, 16), (24,)])
def test_too_few_inputs_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"ids must have shape \(2 or more, more than 16\)"):
        signal_correlation(model, torch.zeros(shape, dtype=torch.long))
