"""Kernels with a log-normaliser: what CUDA would run obeys the same contract, here on a CPU."""

import functools
import inspect
import math

import pytest
import torch

from goatviz.models import goat_prior
from goatviz.transport import CHEAP_STATISTICS, incoming_mass, kernels, row_statistics

# The dense evaluation of flex_attention says that it is dense.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default


def efficient_attention(
    query,
    key,
    value,
    attn_bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    *,
    scale=None,
):
    """What the CUDA operator documents: LSE in nats, padded to a multiple of 32 queries."""
    assert attn_bias is None and compute_log_sumexp and dropout_p == 0.0
    assert query.shape[-1] == key.shape[-1] and query.shape[-1] % 4 == 0
    assert all(x.is_contiguous() for x in (query, key, value))
    scores = scale * query @ key.mT
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -math.inf)
    lse = scores.logsumexp(-1)
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
    return scores.softmax(-1) @ value, lse, torch.tensor(0), torch.tensor(0)


KERNELS = {
    "flex_attention": functools.partial(kernels.by_flex_attention, compiled=False),
    "efficient": functools.partial(kernels.by_efficient_operator, efficient_attention),
    "cpu": kernels.kernel_for("cpu").attend,
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", KERNELS)
def test_output_and_normaliser_are_those_of_softmax(name, causal):
    torch.manual_seed(0)
    # Neither length nor width suits a kernel: two blocks of the mask, and lanes of a prior.
    for length, width, value_width in ((200, 73, 73), (130, 9, 1), (3, 17, 40)):
        q, k = (torch.randn(2, 2, length, width) for _ in range(2))
        v = torch.randn(2, 2, length, value_width)
        out, lse = KERNELS[name](q, k, v, causal)
        scores = q.double() @ k.double().mT
        if causal:
            scores.masked_fill_(torch.ones(length, length).triu(1).bool(), -math.inf)
        assert out.shape == (2, 2, length, value_width) and lse.shape == (2, 2, length)
        tolerance = {"rtol": 1e-5, "atol": 2e-5}
        torch.testing.assert_close(out.double(), scores.softmax(-1) @ v.double(), **tolerance)
        # In nats: a wrong base would be off by a factor of ln 2.
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), **tolerance)


@pytest.mark.parametrize("name", ["flex_attention", "efficient"])
@pytest.mark.parametrize("n_queries", [150, 20])
def test_statistics_by_the_kernels_of_cuda_are_the_definition(name, n_queries, monkeypatch):
    used = kernels.Kernel(name, KERNELS[name])
    monkeypatch.setattr(kernels, "kernel_for", lambda device: used)
    torch.manual_seed(1)
    q, k = torch.randn(1, 4, n_queries, 16), torch.randn(1, 2, 150, 16)
    prior = goat_prior(2, rank=3, sink_rank=2, training_length=64).requires_grad_(False)
    options = {"prior": prior, "sink": torch.randn(4)}
    rows = {"keys": (0, 7), "statistics": CHEAP_STATISTICS}
    found = row_statistics(q, k, impl="fused", **rows, **options)
    wanted = row_statistics(q.double(), k.double(), impl="reference", **rows, **options)
    for statistic, value in found.asked().items():
        exact = getattr(wanted, statistic)
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=2e-5, msg=statistic)
    found = incoming_mass(q, k, impl="fused", **options).mass
    wanted = incoming_mass(q.double(), k.double(), impl="reference", **options).mass
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=2e-5)


def test_the_stand_in_has_the_signature_of_the_operator():
    names = [argument.name for argument in EFFICIENT._schema.arguments]
    assert names == list(inspect.signature(efficient_attention).parameters)
    assert len(EFFICIENT._schema.returns) == 4


@pytest.fixture
def detect_anew():
    kernels.kernel_for.cache_clear()
    yield
    kernels.kernel_for.cache_clear()


@pytest.mark.usefixtures("detect_anew")
def test_the_public_function_comes_first_where_it_serves(monkeypatch):
    def cuda(triton):
        kernels.kernel_for.cache_clear()
        monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: triton)
        return kernels.kernel_for("cuda").name

    assert cuda(triton=object()) == "flex_attention"
    assert cuda(triton=None) == kernels.CUDA_OPERATOR
    monkeypatch.delattr(kernels.flex, "AuxRequest")
    assert cuda(triton=object()) == kernels.CUDA_OPERATOR
    assert kernels.kernel_for("mps") == "anything on a device of type mps"


@pytest.mark.usefixtures("detect_anew")
@pytest.mark.parametrize("other", ["_no_such_operator", "_scaled_dot_product_flash_attention"])
def test_an_operator_that_is_missing_or_another_is_said_so(other, monkeypatch):
    monkeypatch.setattr(kernels, "CPU_OPERATOR", other)
    q = k = torch.randn(1, 1, 4, 8)
    message = f"impl='fused' cannot do anything here: torch .* has no aten::{other} of the known"
    with pytest.raises(ValueError, match=message):
        row_statistics(q, k, statistics=["entropy"], impl="fused")
    with pytest.raises(ValueError, match=message):
        incoming_mass(q, k, impl="fused")
    far = torch.randn(1, 1, 2048, 8)
    assert row_statistics(far, far, statistics=["entropy"]).impl == "blockwise"


def test_the_causal_mask_of_a_kernel_is_made_of_blocks():
    length = 20_000
    mask = kernels.causal_blocks(length, torch.device("cpu"))
    assert mask.shape[-2:] == (length, length)
    tensors = [x for x in mask.as_tuple() if isinstance(x, torch.Tensor)]
    assert sum(x.numel() for x in tensors) < 10 * (length / 128 + 1) ** 2
