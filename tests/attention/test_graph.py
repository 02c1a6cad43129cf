"""A model of any scheme is one graph: nothing in its pass is read back from a tensor."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from goatviz.attention import Attention, LayerCache
from goatviz.models import POSITION_SCHEMES, CausalLM, ModelConfig
from goatviz.priors import SinkPrior, SpectralPrior, grid_positions

SIZES = {"vocab_size": 16, "training_length": 24, "embed_dim": 32, "num_layers": 2}
SIZES |= {"num_heads": 2, "prior_rank": 2, "sink_rank": 2}

every_scheme = pytest.mark.parametrize("scheme", POSITION_SCHEMES)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_and_ids(scheme, length=12):
    torch.manual_seed(0)
    return CausalLM(ModelConfig(**SIZES, positions=scheme)), torch.randint(16, (3, length))


def loss_of(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@every_scheme
def test_a_forward_pass_is_one_graph(scheme):
    model, ids = model_and_ids(scheme)
    seen = torch._dynamo.explain(model)(ids)
    assert (seen.graph_count, seen.graph_break_count) == (1, 0), seen.break_reasons


@every_scheme
def test_a_training_step_in_one_graph_is_the_eager_step(scheme):
    model, ids = model_and_ids(scheme)
    loss_of(model(ids), ids).backward()
    wanted = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_of(compiled(ids), ids).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, wanted[name], msg=name)


@every_scheme
def test_another_length_is_the_same_graph(scheme):
    model, _ = model_and_ids(scheme)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 8), (2, 13), (3, 24)):
            ids = torch.randint(16, (batch, length))
            assert torch.equal(compiled(ids), model(ids))
    assert counter.frame_count == 1


@pytest.mark.parametrize("scheme", ["goat", "bucket"])
def test_a_padded_batch_is_one_graph(scheme):
    model, ids = model_and_ids(scheme)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[12], [7], [1]])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids, padding_mask=mask), model(ids, padding_mask=mask))


def test_a_cached_decode_adds_no_graph_with_length():
    model, ids = model_and_ids("rope")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    cache, parts, graphs = model.new_cache(), [], []
    with torch.no_grad():
        for part in ids.split([5, *[1] * 7], dim=1):
            parts.append(compiled(part, cache=cache))
            graphs.append(counter.frame_count)
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids))
    assert graphs[2:] == [3] * 6


@every_scheme
def test_eager_layers_read_no_values(scheme):
    # Tensors on the device "meta" have none.
    blocks = model_and_ids(scheme)[0].to("meta").blocks
    x = torch.empty(3, 12, 32, device="meta")
    for block in blocks:
        cache = LayerCache()
        for part in (x[:, :5], x[:, 5:8], x[:, 8:9]):
            block(part, cache=cache)
        x = block(x)
    assert cache.end == 9 and cache.consecutive


def test_a_compiled_model_refuses_the_same_positions():
    model, _ = model_and_ids("learned")
    with pytest.raises(ValueError, match="position 24 was never learned"):
        torch.compile(model, backend="eager")(torch.zeros(1, 25, dtype=torch.long))


def test_checkpointed_activations_stay_in_the_graph():
    model, ids = model_and_ids("goat")
    model.checkpoint_activations = True
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_of(compiled(ids), ids).backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_given_positions_stay_in_the_graph():
    prior = SpectralPrior(2, rank=4, axes=2) + SinkPrior(2, rank=2, training_length=9, axes=2)
    layer = Attention(32, 2, prior=prior, causal=False)
    x, positions = torch.randn(1, 9, 32), grid_positions(3, 3)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, positions=positions), layer(x, positions=positions))
