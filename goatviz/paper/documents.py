"""Exhibits of the loss on documents beyond the training length, for language and DNA."""

from __future__ import annotations

import json

import xarray as xr

from goatviz.analysis.perplexity import loss_difference
from goatviz.paper.exhibit import Exhibit, by_length, recipe_provenance
from goatviz.plots.perplexity import draw_perplexity
from goatviz.results import load_shipped_result

_LANGUAGE_CLAIM = (
    "125 M parameters trained on 4 B tokens of C4 at 2,048 tokens, R = M = 4: the paper reports a "
    "perplexity that stays flat to 16 times the training length with GOAT, and rises with RoPE. "
    "Here 0.66 M parameters read 6 million bytes, at 256: losses are per byte, and perplexities "
    "cannot be compared; how they move with length can."
)


def exhibits() -> list[Exhibit]:
    """All exhibits of this module, from shipped tables."""
    return [novels(), novels_by_position(), wikipedia(), dna()]


def novels() -> Exhibit:
    sweep = load_shipped_result("text-eltec")
    return Exhibit(
        slug="novels",
        title="Language: loss on unseen novels against length",
        caption=(
            "English novels of 1840 to 1925 by authors that are not among the training books, cut "
            "into windows of every length: all lengths predict the same bytes, and longer windows "
            f"only give more context. {_loss_verdict(sweep)}"
        ),
        summary=_loss_lines(sweep),
        figure=draw_perplexity(sweep),
        provenance=_documents_provenance("text", sweep),
        claim=_LANGUAGE_CLAIM,
    )


def novels_by_position() -> Exhibit:
    sweep = load_shipped_result("text-eltec")
    ends = sweep["position"].values
    trained = int(sweep.attrs["training_length"])
    lines = []
    for scheme in sweep["scheme"].values:
        loss = sweep["mean_position_loss"].sel(scheme=scheme)
        lines.append(
            f"{scheme}: {float(loss.sel(position=trained)):.3f} nats up to position {trained:,}, "
            f"{float(loss[-1]):.3f} up to {ends[-1]:,}"
        )
    return Exhibit(
        slug="novels-position",
        title="Language: where in a window it goes wrong",
        caption=(
            f"Only the longest windows, {int(sweep['length'][-1]):,} bytes, by position: the mean "
            "over a window mixes early bytes, which have little context in any scheme, with late "
            "ones. A loss that stays flat or falls beyond the training length is extrapolation; "
            "one that rises is not."
        ),
        summary=lines,
        figure=draw_perplexity(sweep, kind="position"),
        provenance=_documents_provenance("text", sweep),
        claim=_LANGUAGE_CLAIM,
    )


def wikipedia() -> Exhibit:
    sweep = load_shipped_result("text-wikitext2")
    return Exhibit(
        slug="wikitext2",
        title="Language: loss on WikiText-2 against length",
        caption=(
            "The test set of WikiText-2 (raw), which differs from the training books in period and "
            "kind: a familiar text for a zero-shot number, in nats per byte. "
            f"{_loss_verdict(sweep)}"
        ),
        summary=_loss_lines(sweep),
        figure=draw_perplexity(sweep),
        provenance=_documents_provenance("text", sweep),
        claim=_LANGUAGE_CLAIM,
    )


def dna() -> Exhibit:
    sweep = load_shipped_result("dna-sweep")
    return Exhibit(
        slug="dna",
        title="DNA: loss on unseen human sequence against length",
        caption=(
            "Bases of human chromosomes 20 and 21 that no model was trained on; N is never "
            "predicted. Four equal bases would cost ln 4 = 1.386 nats. "
            f"{_loss_verdict(sweep)}"
        ),
        summary=_loss_lines(sweep),
        figure=draw_perplexity(sweep),
        provenance=_documents_provenance("dna", sweep),
        claim=(
            "The paper trains on pieces of 6,000 and 12,000 bases of the human genome with R = 2, "
            "M = 8 and a uniform start, and reports a lower perplexity with GOAT than with RoPE. "
            "Its numbers are not known here. These models see 512 bases and are far smaller."
        ),
    )


def _loss_verdict(sweep: xr.Dataset) -> str:
    """Which scheme has the lowest loss, by paired differences, and how GOAT's moves with length."""
    trained = int(sweep.attrs["training_length"])
    clauses = []
    for length in (n for n in (trained, int(sweep["length"][-1])) if n in sweep["length"].values):
        # Up to the training length interpolated positions equal plain ones: the same model twice.
        rivals = [
            scheme
            for scheme in sweep["scheme"].values
            if length > trained or scheme != "rope-interpolated"
        ]
        order = sweep.sel(length=length, scheme=rivals).sortby("mean_loss")["scheme"].values
        apart = loss_difference(sweep, str(order[0])).sel(scheme=order[1], length=length)
        close = float(apart["difference_low"]) <= 0
        clauses.append(
            f"at {length:,} {order[0]} is best, before {order[1]} by "
            f"{float(apart['difference']):.4f} nats [{float(apart['difference_low']):.4f}, "
            f"{float(apart['difference_high']):.4f}]{' (not told apart)' if close else ''}"
        )
    goat = sweep["mean_loss"].sel(scheme="goat")
    change = float(goat[-1] - goat.sel(length=trained))
    return (
        f"Paired over the same pieces, {'; '.join(clauses)}. From {trained:,} to "
        f"{int(sweep['length'][-1]):,} GOAT's loss moves by {change:+.4f} nats."
    )


def _loss_lines(sweep: xr.Dataset) -> list[str]:
    lines = [
        f"{scheme}, nats: {by_length(sweep.sel(scheme=scheme), 'mean_loss', '.4f')}"
        for scheme in sweep["scheme"].values
    ]
    if "rope" in sweep["scheme"].values:
        apart = loss_difference(sweep, "rope").sel(scheme="goat")
        lines.append(f"goat less rope, paired: {by_length(apart, 'difference', '+.4f')}")
    return lines


def _documents_provenance(task: str, sweep: xr.Dataset) -> list[str]:
    names = json.loads(sweep.attrs["documents"])
    return [
        *recipe_provenance(task),
        f"Seeds 0, 1 and 2 of every scheme; {len(names)} pieces of "
        f"{int(sweep['length'][-1]):,} tokens: {', '.join(names)}; intervals: 95 % bootstrap over "
        "pieces, runs averaged, so they do not say how far other seeds may lie",
        f"Measure: {sweep.attrs['command']}",
    ]
