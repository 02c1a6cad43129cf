"""Scaled components against the prior that really has them scaled, and against a dense one."""

import itertools

import numpy as np
import pytest
import torch
from goat import GoatAttention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from goatviz.analysis import PriorSource, prior_profile, prior_sources
from goatviz.analysis.prior_curves import COMPONENTS, component_names
from goatviz.analysis.prior_mix import PriorMixer, mix_summary
from goatviz.models import goat_prior
from goatviz.priors import (
    ALiBiPrior,
    BucketPrior,
    KeyTablePrior,
    LagTablePrior,
    Prior,
    SpectralPrior,
    UniformPrior,
)
from goatviz.priors.base import ScaledPrior, SumPrior
from goatviz.results import load_result, save_result
from goatviz.transport import collapse_bound, off_sink_bound, solve_rows


def lively(prior):
    torch.manual_seed(0)
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.7)
    return prior


def goat(heads=2):
    return lively(goat_prior(heads, rank=3, sink_rank=2, training_length=64))


PRIORS = {
    "goat": goat,
    "alibi": lambda: ALiBiPrior(2),
    "symmetric": lambda: ALiBiPrior(2, symmetric=True),
    "bucket": lambda: lively(BucketPrior(2)),
    "bucket and sink": lambda: (
        lively(BucketPrior(2)) + KeyTablePrior(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    ),
    "two relative parts": lambda: goat() + LagTablePrior(torch.tensor([[0.0, 2.0, -1.0]])),
    "scaled already": lambda: -0.5 * goat(),
    "shared": lambda: goat() + ALiBiPrior(1),
    "rank 0": lambda: SpectralPrior(2, rank=0),
    "uniform": lambda: UniformPrior(2),
    "goat-attention": lambda: unsettled(GoatAttention.for_gpt(48, 4, kv_num_heads=2)),
    "goat-attention, own scale": lambda: unsettled(
        GoatAttention(48, 2, pos_rank=3, abs_rank=2, training_seq_len=20), factor=0.5
    ),
}


def unsettled(module, factor=None):
    """The prior of one of the paper's own modules, away from its nearly flat start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    if factor is not None:
        module.set_goat_prior_scale(factor)
    return prior_sources(module, length=20)[0].prior


def source_of(prior, *, causal=True):
    return prior_sources(prior, causal=causal)[0]


def really_scaled(prior, scales):
    """The prior whose components are scaled: what a mix must agree with."""
    parts = [
        ScaledPrior(part, scales.get(COMPONENTS.get(part.kind), 1.0))
        for part in prior.components().values()
    ]
    return SumPrior(parts)


def dense(prior, length, *, causal=True):
    """The induced prior with a length x length array: the definition."""
    k = prior.double().log_prior(length, length).detach().double()
    allowed = torch.ones(length, length, dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    return k.masked_fill(~allowed, -torch.inf)


SCALES = [
    {},
    {"sink": 0.0},
    {"relative": 2.5, "recency": 0.3},
    {"sink": 3.0, "relative": 0.0},
    {"sink": 0.4, "relative": 0.7, "recency": 0.0},
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 33, 700])
@pytest.mark.parametrize("name", PRIORS)
def test_a_mix_is_the_profile_of_the_prior_that_is_really_scaled(name, length, causal):
    prior = PRIORS[name]()
    for head, scales in itertools.product(range(2), SCALES):
        mixer = PriorMixer(source_of(prior, causal=causal), head=head, length=length)
        mix = mixer.mix(**scales)
        wanted = prior_profile(
            really_scaled(prior, scales), length=length, causal=causal, points=512
        ).sel(layer=0, head=head)
        np.testing.assert_array_equal(mix["query"], wanted["query"])
        for field in (
            *("sink", "sink_low", "sink_high", "kernel", "kernel_low", "kernel_high"),
            *("margin", "top_mass", "prior_entropy"),
        ):
            np.testing.assert_allclose(
                mix[field].values, wanted[field].values, atol=1e-9, rtol=1e-9, err_msg=field
            )
        for field in ("key_stop", "lag_stop", "bin_stop", "allowed"):
            np.testing.assert_array_equal(mix[field].values, wanted[field].values)
        # A profile holds its matrices in single precision.
        np.testing.assert_allclose(mix["probability"], wanted["probability"], rtol=1e-6, atol=1e-9)
        told_apart = mix["margin"].values > 1e-9
        np.testing.assert_array_equal(
            mix["margin_key"].values[told_apart], wanted["margin_key"].values[told_apart]
        )
        if "frequency" in wanted and mix.sizes["rank"]:
            amplitude = wanted["amplitude"].values[wanted["frequency"].values > 0]
            np.testing.assert_allclose(mix["amplitude"].values, amplitude, atol=1e-9)


factors = st.floats(0, 3)


@settings(max_examples=40)
@given(factors, factors, factors, st.integers(1, 60), st.integers(0, 10_000), st.booleans())
def test_masses_are_those_of_the_dense_prior(sink, relative, recency, length, seed, causal):
    torch.manual_seed(seed)
    prior = goat_prior(2, rank=3, sink_rank=2, training_length=16)
    for parameter in prior.parameters():
        nn.init.normal_(parameter)
    scales = {"sink": sink, "relative": relative, "recency": recency}
    mixer = PriorMixer(source_of(prior, causal=causal), head=1, length=length)
    mix = mixer.mix(**scales)
    logits = dense(really_scaled(prior, scales), length, causal=causal)[1]
    induced = logits.softmax(-1).numpy()
    found = np.nan_to_num(mix["probability"].values)
    np.testing.assert_allclose(found, induced, atol=1e-9)
    np.testing.assert_allclose(mix["last"].values, induced[-1], atol=1e-9)
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1).numpy()
    np.testing.assert_allclose(mix["prior_entropy"].values, entropy, atol=1e-9)
    # The margin law: what the margin leaves to the others at most.
    off = off_sink_bound(mix["margin"].values[-1:], mix["seen"].values[-1:])
    assert 1 - mix["top_mass"].values[-1] <= off[0] + 1e-12


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", PRIORS)
def test_all_off_is_uniform_over_the_keys_a_query_may_see(name, causal):
    prior = PRIORS[name]()
    mixer = PriorMixer(source_of(prior, causal=causal), length=300)
    mix = mixer.mix(**dict.fromkeys(COMPONENTS.values(), 0.0))
    np.testing.assert_allclose(mix["top_mass"], 1 / mix["seen"], rtol=1e-14)
    np.testing.assert_allclose(mix["prior_entropy"], np.log(mix["seen"]), atol=1e-12)
    np.testing.assert_allclose(mix["last"], 1 / 300, rtol=1e-12)
    several = mix["seen"].values > 1
    assert np.all(mix["margin"].values[several] == 0.0)
    assert np.all(mix["amplitude"].values == 0.0)


@pytest.mark.parametrize("name", PRIORS)
def test_scales_of_one_are_the_learned_prior(name):
    prior = PRIORS[name]()
    mixer = PriorMixer(source_of(prior), length=90)
    changed = mixer.mix(sink=0.0, relative=2.0, recency=0.5)
    learned = mixer.mix()
    for field, of in (
        ("learned_sink", "sink"),
        ("learned_kernel", "kernel"),
        ("learned_margin", "margin"),
        ("learned_last", "last"),
        ("learned_amplitude", "amplitude"),
    ):
        np.testing.assert_array_equal(learned[field], learned[of])
        np.testing.assert_array_equal(changed[field], learned[of])
    assert learned.attrs["as_learned"] == 1
    assert changed.attrs["as_learned"] == int(not component_names(prior))


def test_the_order_of_questions_does_not_matter():
    asked = [
        {"sink": 0.5},
        {},
        {"sink": 0.5, "content_range": 2.0},
        {"relative": 0.0},
        {"sink": 0.5},
    ]
    mixer = PriorMixer(source_of(goat()), length=70)
    answers = [mixer.mix(**scales) for scales in asked]
    for scales, answer in zip(asked, answers, strict=True):
        assert answer.identical(PriorMixer(source_of(goat()), length=70).mix(**scales))


# --- what content can do ---


@pytest.mark.parametrize("length", [1, 2, 40, 900])
@pytest.mark.parametrize(("content_range", "temperature"), [(0.0, 1.0), (3.0, 0.5), (20.0, 0.01)])
def test_the_reach_of_content_is_attained_and_lies_inside_the_collapse_bound(
    length, content_range, temperature
):
    prior = goat()
    mixer = PriorMixer(source_of(prior), head=1, length=length)
    mix = mixer.mix(content_range=content_range, temperature=temperature, recency=0.2)
    row = dense(really_scaled(prior, {"recency": 0.2}), length)[1, -1:]
    bound = collapse_bound(row, content_range, temperature=temperature)
    width = (mix["last_stop"] - mix["last_key"]).values
    low, high = mix["last_low"].values * width, mix["last_high"].values * width
    starts = mix["last_key"].values
    assert np.all(low >= np.add.reduceat(bound.lower[0].numpy(), starts) - 1e-12)
    assert np.all(high <= np.add.reduceat(bound.upper[0].numpy(), starts) + 1e-12)
    top = int(row[0].argmax())
    mass = mix["top_mass"].values[-1]
    assert mix.attrs["top_low"] * (1 - 1e-12) <= mass <= mix.attrs["top_high"] * (1 + 1e-12)
    for at in {0, len(starts) // 2, len(starts) - 1}:
        for found, sign in ((low[at], -1.0), (high[at], 1.0)):
            scores = torch.zeros(1, length, dtype=torch.float64)
            scores[0, starts[at] : starts[at] + width[at]] = sign * content_range
            plan = solve_rows(scores, log_prior=row, temperature=temperature)
            mass = plan.weights[0, starts[at] : starts[at] + width[at]].sum().item()
            assert found == pytest.approx(mass, rel=1e-9, abs=1e-300)
    scores = torch.zeros(1, length, dtype=torch.float64)
    scores[0, top] = -content_range
    kept = solve_rows(scores, log_prior=row, temperature=temperature).weights[0, top].item()
    assert mix.attrs["top_low"] == pytest.approx(kept, rel=1e-9, abs=1e-300)


def test_the_temperature_leaves_the_prior_alone():
    mixer = PriorMixer(source_of(goat()), length=50)
    cold, hot = (mixer.mix(content_range=2.0, temperature=t) for t in (0.01, 100.0))
    for field in cold.variables:
        if field not in ("last_low", "last_high"):
            np.testing.assert_array_equal(cold[field], hot[field])
    # Without content there is nothing to weigh; at high temperature the prior is left.
    for mix in (mixer.mix(content_range=0.0, temperature=0.01), hot):
        np.testing.assert_allclose(mix["last_low"], mix["last"], rtol=0.03)
        np.testing.assert_allclose(mix["last_high"], mix["last"], rtol=0.03)


# --- length ---


@pytest.mark.parametrize("causal", [True, False])
def test_a_million_tokens(causal):
    length, scales = 1_000_000, {"sink": 0.5, "relative": 2.0, "recency": 1e-4}
    prior = goat()
    shares = []
    mixer = PriorMixer(
        source_of(prior, causal=causal), head=1, length=length, progress=shares.append
    )
    mix = mixer.mix(**scales, progress=shares.append)
    assert mix.sizes["query"] <= 40 and mix.sizes["key_bin"] == 128
    assert len(shares) > 40 and max(shares) == 1.0
    scaled = really_scaled(prior, scales).double()
    for at in (7, -1):
        query = int(mix["query"][at])
        keys = torch.arange(query + 1 if causal else length)
        with torch.no_grad():
            row = scaled.log_prior([query], keys)[1, 0]
        top = row.topk(2)
        assert float(mix["margin"][at]) == pytest.approx(float(top.values.diff().abs()), abs=1e-8)
        assert int(mix["margin_key"][at]) == int(top.indices[0])
        probability = row.softmax(-1).numpy()
        seen = mix["allowed"].values[at]
        pooled = np.add.reduceat(probability, mix["key_bin"].values[seen])
        np.testing.assert_allclose(mix["probability"].values[at][seen], pooled, atol=1e-9)
    pooled = np.add.reduceat(probability, mix["last_key"].values)
    width = (mix["last_stop"] - mix["last_key"]).values
    np.testing.assert_allclose(mix["last"], pooled / width, atol=1e-9)


def test_every_row_keeps_its_mass():
    for length in (5, 600, 70_000):
        mix = PriorMixer(source_of(goat()), length=length).mix(relative=1.5)
        total = np.nansum(mix["probability"].values, axis=-1)
        np.testing.assert_allclose(total, 1.0, rtol=1e-12)
        width = (mix["last_stop"] - mix["last_key"]).values
        assert float((mix["last"].values * width).sum()) == pytest.approx(1.0)
        # Evenly spaced, to the last.
        assert int(mix["query"][-1]) == length - 1
        assert len(set(np.diff(mix["query"].values))) == 1


def test_work_can_be_stopped():
    class Stop(Exception):
        pass

    def after(limit):
        def task(share):
            if share >= limit:
                raise Stop

        return task

    with pytest.raises(Stop):
        PriorMixer(source_of(goat()), length=200_000, progress=after(0.3))
    mixer = PriorMixer(source_of(goat()), length=200_000)
    with pytest.raises(Stop):
        mixer.mix(sink=0.0, progress=after(0.7))
    assert mixer.mix(sink=0.0).identical(
        PriorMixer(source_of(goat()), length=200_000).mix(sink=0.0)
    )


def test_a_mix_saves_and_loads(tmp_path):
    mix = PriorMixer(source_of(goat()), length=40).mix(sink=0.0, content_range=1.0)
    assert load_result(save_result(mix, tmp_path / "mix.nc")).identical(mix)


def test_a_mix_in_words():
    def mixer(prior, length):
        return PriorMixer(source_of(prior), length=length)

    source = mixer(
        KeyTablePrior(torch.tensor([[6.0, 0.0]])) + ALiBiPrior(1, slopes=[0.01]), length=99
    )
    text = mix_summary(source.mix(recency=0.0, sink=0.5, content_range=2.0, temperature=0.5))
    assert "99 tokens: sink × 0.5, recency off." in text
    assert "key 0 leads by 3 nats" in text and "up to 21 tokens (1 + e^margin)" in text
    assert "by at most 4 nats" in text and "can unseat it" in text
    assert "cannot unseat it" in mix_summary(source.mix(recency=0.0, content_range=2.0))
    off = mix_summary(source.mix(recency=0.0, sink=0.0))
    assert "no key leads" in off and "Entropy 4.6 of at most 4.6 nats (99 keys)" in off
    assert "as learned" in mix_summary(source.mix())
    assert "sees a single key" in mix_summary(mixer(goat(), length=1).mix())
    steep = mix_summary(mixer(KeyTablePrior(torch.tensor([[800.0, 0.0]])), length=40).mix())
    assert "any number of tokens" in steep and "100% of the prior" in steep
    long = mix_summary(mixer(goat(), length=3000).mix())
    assert "125 evenly spaced queries" in long and "125 bins of keys" in long
    with pytest.raises(TypeError, match="prior_mix.*NoneType"):
        mix_summary(None)


# --- refusals ---


class Crossed(Prior):
    """No sum of functions of the lag and of the key."""

    has_lanes = False

    def _log_prior(self, query, key):
        return torch.sin(query[:, :1] * key[:, 0]).unsqueeze(0)


def test_a_fitted_kernel_has_the_spectrum_of_its_waves_and_its_rotary_frequencies():
    lags = np.arange(60)
    kernel = 2 * np.cos(2 * np.pi * lags / 12) - 0.3 * lags + 5
    table = LagTablePrior(torch.from_numpy(kernel)[None])
    speeds = (1.0, 2 * np.pi / 12)
    source = PriorSource("fitted", table, True, fitted_length=60, rotary=speeds)
    mix = PriorMixer(source, length=60).mix(relative=-0.5)
    assert mix["rotary_frequency"].values.tolist() == list(speeds)
    at = int(mix["amplitude"].values.argmax())
    np.testing.assert_allclose(mix["frequency"][at], speeds[1])
    # A whole number of periods is nearly free of a line.
    np.testing.assert_allclose(mix["amplitude"][at], 1.0, rtol=0.02)
    np.testing.assert_allclose(mix["learned_amplitude"], 2 * mix["amplitude"])
    assert mix_summary(mix).startswith("Layer 0, head 0, 60 tokens: relative × -0.5.")
    unscaled = PriorMixer(source, length=3).mix()
    assert ": as fitted." in mix_summary(unscaled) and not unscaled["frequency"].size
    with pytest.raises(ValueError, match="length must be at most 60, got 61"):
        PriorMixer(source, length=61)


def test_refusals():
    with pytest.raises(ValueError, match="not a function of the lag plus one of the key"):
        PriorMixer(source_of(Crossed()), length=30)
    grid = SpectralPrior(2, rank=4, axes=2)
    with pytest.raises(ValueError, match="got one on a grid of 2 axes"):
        PriorMixer(PriorSource("vit", grid, False), length=16)
    broken = goat()
    with torch.no_grad():
        broken.parts[0].alpha[1, 0] = torch.nan
    assert PriorMixer(source_of(broken), head=0, length=8).mix()["margin"].notnull().all()
    with pytest.raises(ValueError, match="head 1: its relative is not finite at 8 of 8 positions"):
        PriorMixer(source_of(broken), head=1, length=8)
    with pytest.raises(ValueError, match=r"head must be an integer in 0 .. 1, got 2"):
        PriorMixer(source_of(goat()), head=2, length=8)
    with pytest.raises(ValueError, match="length must be an integer of at least 1, got 0"):
        PriorMixer(source_of(goat()), length=0)
    mixer = PriorMixer(source_of(goat()), length=8)
    for name, value in (
        ("sink", np.inf),
        ("recency", np.nan),
        ("content_range", -1.0),
        ("temperature", 0.0),
        ("temperature", np.inf),
    ):
        with pytest.raises(ValueError, match=f"{name} must be a finite number.*got {value}"):
            mixer.mix(**{name: value})
