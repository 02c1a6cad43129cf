"""Lanes are kept between passes, and never when anything that makes them has changed."""

import copy
import pickle

import pytest
import torch
from torch import nn

from goatviz.attention import Attention
from goatviz.attention import kept as module
from goatviz.models import goat_prior
from goatviz.priors import Lanes, Prior, ScaledPrior
from tests.factories import lively

TOKENS = 24


def layer(prior=None):
    torch.manual_seed(0)
    if prior is None:
        prior = lively(goat_prior(2, rank=2, sink_rank=2, training_length=TOKENS))
    return Attention(32, 2, content_dim=8, prior=prior).eval()


def x(length=TOKENS, seed=1):
    return torch.randn(1, length, 32, generator=torch.Generator().manual_seed(seed))


def fresh(of, given):
    """What a layer answers that has kept nothing."""
    with torch.no_grad():
        return copy.deepcopy(of)(given)


@pytest.fixture
def made(monkeypatch):
    """How often lanes were made."""
    calls = []
    real = Prior._lanes

    def counted(self, *given, **options):
        calls.append(type(self))
        return real(self, *given, **options)

    monkeypatch.setattr(Prior, "_lanes", counted)
    return calls


@torch.no_grad()
def test_a_second_pass_makes_none_and_is_the_same(made):
    attention = layer()
    first = attention(x())
    assert len(made) == 1
    assert torch.equal(attention(x()), first) and len(made) == 1
    other = attention(x(seed=2))
    assert len(made) == 1 and torch.equal(other, fresh(attention, x(seed=2)))


def data_write(attention):
    next(attention.prior.parameters()).data.add_(0.5)


def buffer_write(attention):
    (name, buffer), *_ = attention.prior.named_buffers()
    assert buffer.is_floating_point(), name
    buffer.data.mul_(1.5)


def loaded_state(attention):
    state = attention.state_dict()
    attention.load_state_dict({name: value + 0.25 for name, value in state.items()})


def other_prior(attention):
    attention.prior = ScaledPrior(attention.prior, 3.0)


def other_setting(attention):
    attention.prior = ScaledPrior(attention.prior, 1.0)
    attention(x())
    attention.prior.factor = 2.0


@pytest.mark.parametrize(
    "change", [data_write, buffer_write, loaded_state, other_prior, other_setting]
)
@torch.no_grad()
def test_whatever_changes_the_prior_changes_the_lanes(change):
    attention = layer()
    before = attention(x())
    change(attention)
    after = attention(x())
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(attention, x()))


@torch.no_grad()
def test_other_calls_have_lanes_of_their_own(made):
    attention = layer()
    attention(x())
    for given, options in (
        (x(TOKENS + 1), {}),
        (x(TOKENS), {"positions": torch.arange(3, TOKENS + 3)}),
        (x(TOKENS), {"positions": torch.arange(TOKENS).flip(0)}),
    ):
        made.clear()
        with torch.no_grad():
            wanted = copy.deepcopy(attention)(given, **options)
        assert torch.equal(attention(given, **options), wanted) and len(made) == 2
    double = copy.deepcopy(attention).double()
    made.clear()
    assert torch.equal(double(x().double()), fresh(double, x().double())) and len(made) == 2


def test_gradients_are_never_those_of_another_pass(made):
    attention = layer()
    for _ in range(2):
        attention.zero_grad()
        attention(x()).sum().backward()
        assert all(p.grad is not None for p in attention.prior.parameters())
    assert len(made) == 2
    with torch.no_grad():
        attention(x())
    attention(x()).sum().backward()
    assert len(made) == 4


class Own(Prior):
    """A prior whose state nobody else knows."""

    num_heads, has_lanes = 1, True

    def __init__(self):
        super().__init__()
        self.hidden = [1.0]

    def _lanes(self, query, key, dtype, scale, *, centred=False):
        ones = torch.ones(1, len(query), 1, dtype=dtype)
        return Lanes(ones, self.hidden[0] * key[None, :, :1].to(dtype) / scale)

    def _factors(self, query, key):
        raise NotImplementedError


@torch.no_grad()
def test_nothing_is_kept_of_what_may_hide_more():
    own = layer(Own())
    before = own(x())
    own.prior.hidden[0] = -1.0
    assert not torch.equal(own(x()), before)

    hooked = layer()
    before = hooked(x())
    sinks = [m for m in hooked.prior.modules() if isinstance(m, nn.Linear)]
    sinks[-1].register_forward_hook(
        lambda _module, _given, out: out + torch.arange(len(out))[:, None]
    )
    assert not torch.equal(hooked(x()), before)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@torch.no_grad()
def test_torch_func_has_values_of_its_own():
    attention = layer()
    given = x()
    base = attention(given)
    weights = {name: torch.stack([p, 2 * p]) for name, p in attention.named_parameters()}

    def call(parameters):
        return torch.func.functional_call(attention, parameters, (given,))

    both = torch.func.vmap(call)(weights)
    torch.testing.assert_close(both[0], base)
    doubled = copy.deepcopy(attention)
    for parameter in doubled.parameters():
        parameter.mul_(2)
    torch.testing.assert_close(both[1], doubled(x()))
    assert torch.equal(attention(x()), base)


@torch.no_grad()
def test_copies_begin_empty_and_long_passes_keep_nothing(made, monkeypatch):
    attention = layer()
    wanted = attention(x())
    with torch.inference_mode():
        attention(x())
    for twin in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        made.clear()
        assert torch.equal(twin(x()), wanted) and len(made) == 1
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    made.clear()
    twin = copy.deepcopy(attention)
    twin(x()), twin(x())
    assert len(made) == 2
