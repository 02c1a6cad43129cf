"""The numbers that decide claims, measured from shipped results and weights.

Each function takes the evidence and returns one number for each criterion of its claim, in order.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from goatviz.analysis.contrasts import Contrast, loss_contrast, share_contrast
from goatviz.analysis.plan import plan_slice
from goatviz.analysis.prior import prior_profile, prior_sources
from goatviz.attention.functional import prior_attention
from goatviz.paper.evidence import COPY_MODELS, Evidence, text_pieces
from goatviz.paper.verdicts import Measured
from goatviz.transport.bounds import off_sink_bound
from goatviz.transport.rows import solve_rows
from goatviz.transport.solvers import cross_check

if TYPE_CHECKING:
    import xarray as xr

#: Multiples of the training length at which answers are asked for.
MULTIPLES = (2, 4, 8, 16)
#: Queries and keys of the problems that POT solves again, and tokens of a precision check.
_SIZE, _TOKENS = 64, 1024
#: Losses of BlaGPT's public ledger of ablations (github.com/erogol/BlaGPT), typed from there: with
#: the sink scalar per head and without; with the spectral prior, R = 8, and the best at that time.
BLAGPT_SINK, BLAGPT_SPECTRAL = (3.2352, 3.2354), (3.2257, 3.2230)


def exact(value: float, seeds: int = 0) -> Measured:
    """A number that no sampling stands behind."""
    return Measured(float(value), seeds=seeds, exact=True)


def _sampled(contrast: Contrast, unit: str) -> Measured:
    value, low, high, seed_low, seed_high, examples, seeds = contrast
    over = f"{examples:,} {unit}"
    return Measured(value, low, high, over, seed_low, seed_high, seeds)


# --- theory ---


def transport(evidence: Evidence) -> list[Measured]:
    """Largest differences of weights from POT's, semi-relaxed and balanced, and KKT residual."""
    generator = torch.Generator().manual_seed(0)
    prior = prior_sources(evidence.checkpoint("text-goat").model)[-1].prior
    heads = prior.num_heads
    scores = torch.randn(heads, _SIZE, _SIZE, dtype=torch.float64, generator=generator)
    mask = torch.ones(_SIZE, _SIZE, dtype=torch.bool).tril()
    with torch.no_grad():
        plan = solve_rows(scores, log_prior=prior.log_prior(_SIZE, _SIZE).double(), mask=mask)
    check = cross_check(plan, tolerance=1.0)
    differences = [check[solver].largest_difference for solver in ("semi_relaxed", "balanced")]
    return [exact(value) for value in (*differences, float(plan.kkt_residual.max()))]


def collapse(evidence: Evidence) -> list[Measured]:
    """Largest excess of |ln p - ln pi| over the content range, in every head of a text model."""
    ids, worst = text_pieces()[:1], -math.inf
    model = evidence.checkpoint("text-goat").model
    for layer in range(model.config.num_layers):
        for head in range(model.config.num_heads):
            one = plan_slice(model, ids, layer=layer, head=head, check=False)
            with np.errstate(divide="ignore", invalid="ignore"):
                moved = np.abs(np.log(one["weights"].values) - np.log(one["prior"].values))
            moved[~np.isfinite(moved)] = -math.inf
            worst = max(worst, float((moved.max(axis=1) - one["content_range"].values).max()))
    return [exact(worst, seeds=1)]


def margin(evidence: Evidence) -> list[Measured]:
    """Largest excess of the prior's mass off its top key over the margin law's bound."""
    worst = -math.inf
    for name in ("copy-mixture-1-goat", "copy-mixture-4-goat", "passkey-goat", "text-goat"):
        model = evidence.checkpoint(name).model
        for profile in (evidence.prior(name), prior_profile(model, length=4096)):
            bound = off_sink_bound(profile["margin"].values, profile["query"].values + 1.0)
            worst = max(worst, float((1 - profile["top_mass"].values - bound).max()))
    return [exact(worst, seeds=1)]


def flash(evidence: Evidence) -> list[Measured]:
    """Relative output errors of the flash kernel in float32 and bfloat16; channels more."""
    model = evidence.checkpoint("text-goat").model
    prior, size = prior_sources(model)[-1].prior, model.config.content_dim
    double = copy.deepcopy(prior).double()
    generator = torch.Generator().manual_seed(0)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = torch.randn(3, 1, prior.num_heads, _TOKENS, size, generator=generator).to(dtype)
        with torch.no_grad():
            wanted = prior_attention(
                q.double(), k.double(), v.double(), prior=double, impl="reference"
            )
            # No other kernel may answer.
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                fused = prior_attention(q, k, v, prior=prior)
        found.append(exact(float((fused - wanted).norm() / wanted.norm()), seeds=1))
    return [*found, exact((size + prior.num_lanes(torch.float32)) / size, seeds=1)]


# --- what priors learned ---


def four_panels(evidence: Evidence) -> list[Measured]:
    """For both offsets: lead of u(0), prior mass on key 0, and where the other kernel peaks."""
    found = []
    for offset in (1, 4):
        profile = evidence.prior(f"copy-mixture-{offset}-goat").squeeze("layer")
        sink, other = sink_and_other(profile)
        u = sink["sink"].values
        peak = int(other["lag"].values[other["kernel"].values.argmax()])
        mass = float(sink["probability"].isel(query=-1, key_bin=0))
        found += [u[0] - u[1:].max(), mass, abs(peak - (offset - 1))]
    return [exact(value, seeds=1) for value in found]


def sink_and_other(profile: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset]:
    """The head of one layer whose prior gives key 0 most, and the other with the widest kernel."""
    first = profile["probability"].isel(query=-1, key_bin=0).values
    at = int(first.argmax())
    span = (profile["kernel"].max("lag") - profile["kernel"].min("lag")).values.copy()
    span[at] = -math.inf
    return profile.isel(head=at), profile.isel(head=int(span.argmax()))


def sink_cost(evidence: Evidence) -> list[Measured]:
    """The prior's own mass on key 0 in the sink head, and the loss less that of the twin."""
    found = []
    for offset in (1, 4):
        goat, twin = (evidence.checkpoint(COPY_MODELS[offset, k]) for k in ("goat", "uniform"))
        sink, _ = sink_and_other(evidence.prior(goat.name).squeeze("layer"))
        found.append(exact(float(sink["probability"].isel(query=-1, key_bin=0)), seeds=1))
        ours, theirs = (each.card["losses"] for each in (goat, twin))
        half = 1.96 * math.hypot(ours["held_out_standard_error"], theirs["held_out_standard_error"])
        apart = ours["held_out"] - theirs["held_out"]
        over = f"{ours['held_out_sequences']:,} sequences"
        found.append(Measured(apart, apart - half, apart + half, over))
    return found


def sink_term(evidence: Evidence) -> list[Measured]:
    """Largest lead of u(0) over the next keys, and smallest rise of u over the last half."""
    u = evidence.prior("text-goat")["sink"].isel(layer=-1).values
    spike = (u[:, 0] - u[:, 1:9].max(axis=1)).max()
    rise = (u[:, -1] - u[:, u.shape[1] // 2]).min()
    return [exact(spike, seeds=1), exact(rise, seeds=1)]


def shedding(evidence: Evidence) -> list[Measured]:
    """Correlation of content range and sink mass, and importance of the strongest first key."""
    return _shed(evidence.signal("text-goat"), evidence.sinks("text-goat"))


def shedding_smollm2(evidence: Evidence) -> list[Measured]:
    """The same of the last layer of SmolLM2-135M, which has no prior but its content."""
    return _shed(evidence.result("smollm2-signal"), evidence.result("smollm2-last-layer-sinks"))


def _shed(signal: xr.Dataset, sinks: xr.Dataset) -> list[Measured]:
    over = f"{signal.attrs['n_inputs']} pieces"
    ends = [float(signal[f"mean_correlation{end}"]) for end in ("", "_low", "_high")]
    first = sinks.isel(layer=-1, key=0)
    at = int(first["importance"].values.argmax())
    most = [float(first[f"importance{end}"][at]) for end in ("", "_low", "_high")]
    return [Measured(*ends, over), Measured(*most, over)]


# --- answers ---


def passkey_answers(evidence: Evidence) -> list[Measured]:
    return _answers(evidence.result("passkey-sweep"), "strict")


def passkey_8_answers(evidence: Evidence) -> list[Measured]:
    """The same with a number of eight digits."""
    return _answers(evidence.result("passkey-8-sweep"), "strict")


def needle_letters(evidence: Evidence) -> list[Measured]:
    return _answers(evidence.result("needle-sweep"), "token")


def _answers(sweep: xr.Dataset, measure: str) -> list[Measured]:
    return [
        _sampled(share_contrast(sweep, "goat", length, measure=measure), "questions")
        for length in _lengths(sweep)
    ]


def passkey_lead(evidence: Evidence) -> list[Measured]:
    """GOAT less RoPE beyond the training length."""
    return _lead(evidence.result("passkey-sweep"), "rope", MULTIPLES)


def passkey_alibi_near(evidence: Evidence) -> list[Measured]:
    """GOAT less ALiBi up to four times the training length."""
    return _lead(evidence.result("passkey-sweep"), "alibi", MULTIPLES[:2])


def passkey_alibi_far(evidence: Evidence) -> list[Measured]:
    """GOAT less ALiBi from eight times the training length on."""
    return _lead(evidence.result("passkey-sweep"), "alibi", MULTIPLES[2:])


def _lead(sweep: xr.Dataset, other: str, multiples: tuple[int, ...]) -> list[Measured]:
    return [
        _sampled(share_contrast(sweep, "goat", length, less=other), "questions")
        for length in _lengths(sweep, multiples)
    ]


def _lengths(sweep: xr.Dataset, multiples: tuple[int, ...] = MULTIPLES) -> list[int]:
    trained = int(sweep.attrs["training_length"])
    return [multiple * trained for multiple in multiples]


# --- losses ---


def goat_flat(evidence: Evidence) -> list[Measured]:
    """Change of GOAT's loss from the training length to 16 times that, on both texts."""
    return _changes(evidence, "goat")


def rope_rises(evidence: Evidence) -> list[Measured]:
    return _changes(evidence, "rope")


def _changes(evidence: Evidence, scheme: str) -> list[Measured]:
    found = []
    for name in ("text-eltec", "text-wikitext2"):
        sweep = evidence.result(name)
        trained = int(sweep.attrs["training_length"])
        found.append(_sampled(loss_contrast(sweep, scheme, 16 * trained, at=trained), "pieces"))
    return found


def below_alibi(evidence: Evidence) -> list[Measured]:
    """GOAT's loss less ALiBi's at the training length and at 16 times that, on both texts."""
    return [
        _against(evidence, name, "alibi", multiple)
        for name in ("text-eltec", "text-wikitext2")
        for multiple in (1, 16)
    ]


def language_rope(evidence: Evidence) -> list[Measured]:
    """GOAT's loss less RoPE's at the training length, on both texts."""
    return [_against(evidence, name, "rope", 1) for name in ("text-eltec", "text-wikitext2")]


def dna_rope(evidence: Evidence) -> list[Measured]:
    return [_against(evidence, "dna-sweep", "rope", 1)]


def dna_rope_far(evidence: Evidence) -> list[Measured]:
    """The same at 16 and 32 times the training length."""
    return [_against(evidence, "dna-sweep", "rope", multiple) for multiple in (16, 32)]


def dna_memory(evidence: Evidence) -> list[Measured]:
    """Peak memory of a training step, GOAT's over RoPE's, at the shortest and longest length.

    Between the smallest of the one over the largest of the other, and the reverse.
    """
    cost = evidence.result("dna-cost")
    over = f"{cost.attrs['peaks']} measurements"
    found = []
    for at in (0, -1):
        (least, median, most), (rope_least, rope_median, rope_most) = (
            [
                float(cost[f"peak_memory{end}"].sel(scheme=scheme)[at])
                for end in ("_low", "", "_high")
            ]
            for scheme in ("goat", "rope")
        )
        found.append(Measured(median / rope_median, least / rope_most, most / rope_least, over))
    return found


def _against(evidence: Evidence, name: str, other: str, multiple: int) -> Measured:
    sweep = evidence.result(name)
    length = multiple * int(sweep.attrs["training_length"])
    return _sampled(loss_contrast(sweep, "goat", length, less=other), "pieces")


# --- other evidence ---


def blagpt_sink(_: Evidence) -> list[Measured]:
    return [Measured(BLAGPT_SINK[0] - BLAGPT_SINK[1], seeds=0)]


def blagpt_spectral(_: Evidence) -> list[Measured]:
    return [Measured(BLAGPT_SPECTRAL[0] - BLAGPT_SPECTRAL[1], seeds=0)]


def anisotropy(_: Evidence) -> list[Measured]:
    """How much the fastest wave along x changes over 14 patches, by arithmetic.

    The public package gives y the first half of its frequencies and x the second.
    """
    rank, base, patches = 16, 1e4, 14
    fastest = base ** (-(rank // 2) / (rank - 1))
    return [exact(1 - np.cos(fastest * patches))]
