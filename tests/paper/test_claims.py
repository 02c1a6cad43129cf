"""The claims: each has a rule or a reason, and its verdict follows the results that it reads."""

from pathlib import Path

import numpy as np
import pytest

from goatviz.analysis import loss_difference
from goatviz.analysis.sink_effect import next_token_losses
from goatviz.paper import CLAIMS, claim_named, claims_text, judge_claims
from goatviz.paper.evidence import TEXT_SCHEMES, text_pieces
from goatviz.paper.exhibit import PAPER_SCALES
from goatviz.paper.judging import counts_text
from goatviz.paper.measures import BLAGPT_SINK, BLAGPT_SPECTRAL
from goatviz.results import list_results, load_shipped_result
from goatviz.training import list_pretrained, load_pretrained


def verdict_of(slug, **results):
    given = {name.replace("_", "-"): result for name, result in results.items()}
    return judge_claims(given, [claim_named(slug)])[0]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.slug)
def test_a_claim_has_a_rule_or_a_reason(claim):
    assert claim.words and claim.place and claim.paper_scale in PAPER_SCALES
    assert bool(claim.rule) == bool(claim.measure)
    assert claim.measure or claim.note.startswith("Not tested")
    known = {*list_results(), *list_pretrained()}
    assert set(claim.reads) <= known
    assert not claim.reads or claim.reads[0] in list_pretrained()


def test_slugs_are_distinct_and_unknown_ones_are_named():
    assert len({claim.slug for claim in CLAIMS}) == len(CLAIMS)
    with pytest.raises(KeyError, match="slug must be one of four-panels, .* got 'colour'"):
        claim_named("colour")


def test_every_claim_is_judged_by_finite_numbers(judged):
    assert [one.claim for one in judged] == list(CLAIMS)
    for one in judged:
        assert len(one.measured) == len(one.claim.rule)
        assert (one.verdict == "not tested") == (not one.measured)
        for measured in one.measured:
            assert np.isfinite(measured.value)
            for low, high in measured.intervals:
                assert low <= measured.value <= high, one.claim.slug


def test_each_number_is_told_with_its_limit_and_intervals(judged):
    (passkey,) = [one for one in judged if one.claim.slug == "passkey"]
    sweep = load_shipped_result("passkey-sweep").sel(scheme="goat", length=1024)
    last = passkey.numbers()[-1]
    assert last.limit == "whole answers right at 16 x: at least 0.95"
    assert last.value == f"{float(sweep['mean_strict']):.3f}"
    examples, seeds = last.intervals
    low, high = (float(sweep[f"mean_strict_{end}"]) for end in ("low", "high"))
    assert examples == f"examples [{low:.3f}, {high:.3f}]" and seeds.startswith("seeds [")
    assert last.count == "1,280 questions; 5 seeds"


def test_losses_are_those_of_the_shipped_results(judged):
    by_slug = {one.claim.slug: one.measured for one in judged}
    for slug, name in (("language-rope", "text-eltec"), ("dna-rope", "dna-sweep")):
        paired = loss_difference(load_shipped_result(name), "rope")
        wanted = paired.sel(scheme="goat").isel(length=0)
        first = by_slug[slug][0]
        assert first.value == pytest.approx(float(wanted["difference"]))
        assert first.low == pytest.approx(float(wanted["difference_low"]))
        assert first.high == pytest.approx(float(wanted["difference_high"]))


def test_answers_changed_by_hand_change_the_verdict():
    sweep = load_shipped_result("passkey-sweep")
    names = [name for name in sweep.data_vars if name.removeprefix("mean_").startswith("strict")]
    perfect, useless = sweep.copy(deep=True), sweep.copy(deep=True)
    for name in names:
        perfect[name].loc[{"scheme": "goat"}] = 1.0
        useless[name].loc[{"scheme": "goat"}] = 0.0
    assert verdict_of("passkey").verdict == "partly"
    assert verdict_of("passkey", passkey_sweep=perfect).verdict == "reproduced"
    assert verdict_of("passkey", passkey_sweep=useless).verdict == "not reproduced"


@pytest.mark.parametrize(
    ("slug", "scheme", "shift", "before", "after"),
    [
        ("dna-rope", "goat", -0.1, "not reproduced", "reproduced"),
        ("dna-rope-far", "goat", 0.1, "reproduced", "not reproduced"),
        ("below-alibi", "alibi", -1.0, "reproduced", "not reproduced"),
        ("language-rope", "rope", 1.0, "not reproduced", "reproduced"),
    ],
)
def test_losses_changed_by_hand_change_the_verdict(slug, scheme, shift, before, after):
    changed = {}
    for name in ("text-eltec", "text-wikitext2", "dna-sweep"):
        changed[name] = load_shipped_result(name).copy(deep=True)
        if scheme in changed[name]["scheme"]:
            for field in ("loss", "run_loss"):
                changed[name][field].loc[{"scheme": scheme}] += shift
    assert verdict_of(slug).verdict == before
    assert judge_claims(changed, [claim_named(slug)])[0].verdict == after


def test_a_loss_that_rises_is_not_flat():
    changed = load_shipped_result("text-eltec").copy(deep=True)
    for field in ("loss", "run_loss"):
        changed[field].loc[{"scheme": "goat", "length": 4096}] += 0.1
    assert verdict_of("goat-flat").verdict == "reproduced"
    assert verdict_of("goat-flat", text_eltec=changed).verdict == "partly"


def test_a_sink_that_is_put_in_by_hand_reproduces_the_figure():
    claim = claim_named("smollm2")
    signal = load_shipped_result("smollm2-signal").copy(deep=True)
    for end in ("", "_low", "_high"):
        signal[f"mean_correlation{end}"] = signal[f"mean_correlation{end}"] * 0 - 0.5
    assert judge_claims(None, [claim])[0].verdict == "partly"
    assert judge_claims({"smollm2-signal": signal}, [claim])[0].verdict == "reproduced"


@pytest.mark.parametrize("scheme", TEXT_SCHEMES)
def test_shipped_effects_are_of_the_weights_and_text_of_the_page(scheme):
    effect = load_shipped_result(f"text-{scheme}-sink-effect")
    losses = next_token_losses(load_pretrained(f"text-{scheme}").model, text_pieces())
    np.testing.assert_allclose(effect["loss"].values, losses.mean(axis=-1), rtol=1e-5)
    assert {"first key hidden", "sinks hidden"} <= set(effect["change"].values)


def test_what_others_found_is_typed_and_has_no_interval(judged):
    by_slug = {one.claim.slug: one for one in judged}
    for slug, (with_it, without) in (
        ("blagpt-sink", BLAGPT_SINK),
        ("blagpt-spectral", BLAGPT_SPECTRAL),
    ):
        one = by_slug[slug]
        assert str(with_it) in one.claim.paper_value and str(without) in one.claim.paper_value
        assert one.numbers()[0].count == "no interval is known"
        assert one.outcomes == ("open",)


def test_seeds_are_those_of_results_and_one_where_weights_are_read(judged):
    seeds = {one.claim.slug: {m.seeds for m in one.measured} for one in judged}
    for slug in ("passkey", "passkey-8", "needle", "goat-flat", "dna-rope"):
        assert seeds[slug] == {5}
    assert seeds["four-panels"] == seeds["signal-sheds-sink"] == {1}
    for one in judged:
        assert all(len(m.intervals) == 2 for m in one.measured if m.seeds > 1)


def test_the_readme_counts_the_verdicts(judged):
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text("utf-8").split())
    assert counts_text([one for one in judged if not one.claim.beside]) in readme


def test_the_verdicts_are_told_in_lines(judged):
    lines = claims_text(judged).splitlines()
    assert len(lines) == len(CLAIMS)
    for line, one in zip(lines, judged, strict=True):
        assert line.startswith(one.verdict) and line.endswith(one.claim.words)
