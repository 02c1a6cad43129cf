"""Exhibits of the loss on documents beyond the training length, for language and DNA."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from goatviz.analysis.perplexity import loss_difference
from goatviz.paper.evidence import Evidence
from goatviz.paper.exhibit import (
    Exhibit,
    Table,
    interval_cells,
    length_table,
    recipe_provenance,
    scale_text,
)
from goatviz.plots.perplexity import draw_perplexity

if TYPE_CHECKING:
    import xarray as xr

_LANGUAGE_CLAIM = (
    "The paper reports a perplexity that stays flat to 16 times the training length with GOAT, "
    "1.55 below ALiBi's, and rises with RoPE. Here losses are of bytes: perplexities cannot be "
    "compared; how they move with length can."
)


def exhibits(evidence: Evidence) -> list[Exhibit]:
    """All exhibits of this module."""
    return [draw(evidence) for draw in (novels, novels_by_position, wikipedia, dna)]


def novels(evidence: Evidence) -> Exhibit:
    sweep = evidence.result("text-eltec")
    return Exhibit(
        slug="novels",
        title="Language: loss on unseen novels against length",
        caption=(
            "English novels of 1840 to 1925 by authors that are not among the training books, cut "
            "into windows of every length: all lengths predict the same bytes, and longer windows "
            f"only give more context. {_loss_verdict(sweep)}"
        ),
        table=_loss_table(sweep),
        figure=draw_perplexity(sweep),
        scale=scale_text(evidence.checkpoint("text-goat")),
        paper_scale="c4",
        provenance=_documents_provenance("text", sweep),
        claim=_LANGUAGE_CLAIM,
    )


def novels_by_position(evidence: Evidence) -> Exhibit:
    sweep = evidence.result("text-eltec")
    ends = sweep["position"].values
    trained = int(sweep.attrs["training_length"])
    chosen = [trained, int(ends[-1])]
    rows = [
        [
            str(scheme),
            *interval_cells(sweep.sel(scheme=scheme, position=chosen), "mean_position_loss", ".3f"),
        ]
        for scheme in sweep["scheme"].values
    ]
    return Exhibit(
        slug="novels-position",
        title="Language: where in a window it goes wrong",
        caption=(
            f"Only the longest windows, {int(sweep['length'][-1]):,} bytes, by position: the mean "
            "over a window mixes early bytes, which have little context in any scheme, with late "
            "ones. A loss that stays flat or falls beyond the training length is extrapolation; "
            "one that rises is not."
        ),
        table=Table(["nats/token up to position", *(f"{n:,}" for n in chosen)], rows),
        figure=draw_perplexity(sweep, kind="position"),
        scale=scale_text(evidence.checkpoint("text-goat")),
        paper_scale="c4",
        provenance=_documents_provenance("text", sweep),
        claim=_LANGUAGE_CLAIM,
    )


def wikipedia(evidence: Evidence) -> Exhibit:
    sweep = evidence.result("text-wikitext2")
    return Exhibit(
        slug="wikitext2",
        title="Language: loss on WikiText-2 against length",
        caption=(
            "The test set of WikiText-2 (raw), which differs from the training books in period and "
            "kind: a familiar text for a zero-shot number, in nats per byte. "
            f"{_loss_verdict(sweep)}"
        ),
        table=_loss_table(sweep),
        figure=draw_perplexity(sweep),
        scale=scale_text(evidence.checkpoint("text-goat")),
        paper_scale="c4",
        provenance=_documents_provenance("text", sweep),
        claim=_LANGUAGE_CLAIM,
    )


def dna(evidence: Evidence) -> Exhibit:
    sweep, cost = evidence.result("dna-sweep"), evidence.result("dna-cost")
    return Exhibit(
        slug="dna",
        title="DNA: loss on unseen human sequence against length",
        caption=(
            "Bases of human chromosomes 20 and 21 that no model was trained on; N is never "
            "predicted. Four equal bases would cost ln 4 = 1.386 nats. "
            f"{_loss_verdict(sweep)}"
        ),
        table=_with_cost(_with_bits(_loss_table(sweep), sweep), sweep, cost),
        figure=draw_perplexity(sweep),
        scale=scale_text(evidence.checkpoint("dna-goat")),
        paper_scale="dna",
        provenance=[
            *_documents_provenance("dna", sweep),
            f"Cost of a training step of {cost.attrs['batch_size']} sequences, medians of "
            f"{cost.attrs['repeats']}: {cost.attrs['machine']}, {cost.attrs['precision']}; "
            f"{cost.attrs['command']}",
        ],
        claim=(
            "The paper trains on pieces of 6,000 and 12,000 bases of the human genome, from a "
            "uniform start, and reports a lower perplexity with GOAT than with RoPE, and 36 % less "
            "peak memory. Its other numbers are not known here."
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


def _loss_table(sweep: xr.Dataset) -> Table:
    table = length_table(sweep, "mean_loss", ".4f", what="nats/token")
    apart = loss_difference(sweep, "rope").sel(scheme="goat")
    paired = ["goat less rope, paired", *interval_cells(apart, "difference", "+.4f")]
    return Table(table.header, [*table.rows, paired])


def _with_bits(table: Table, sweep: xr.Dataset) -> Table:
    """The table, and the same in bits per base, the unit of the paper's table."""
    bits = sweep[["mean_loss", "mean_loss_low", "mean_loss_high"]] / np.log(2)
    rows = length_table(bits, "mean_loss", ".4f", what="").rows
    return Table(table.header, [*table.rows, *([f"{s}, bits per base", *n] for s, *n in rows)])


def _with_cost(table: Table, sweep: xr.Dataset, cost: xr.Dataset) -> Table:
    """The table, and what training costs at each of its lengths, where that was measured."""
    rows = []
    for field, what in (
        ("tokens_per_second", "training [tokens/s]"),
        ("attention_tokens_per_second", "attention alone [tokens/s]"),
        ("peak_memory", "peak memory of a training step [MiB]"),
    ):
        for scheme in cost["scheme"].values:
            values = cost[field].sel(scheme=scheme).reindex(length=sweep["length"].values).values
            cells = ["" if np.isnan(value) else f"{value:,.0f}" for value in values]
            rows.append([f"{scheme}, {what}", *cells])
    return Table(table.header, [*table.rows, *rows])


def _documents_provenance(task: str, sweep: xr.Dataset) -> list[str]:
    names = json.loads(sweep.attrs["documents"])
    each = [name if count == 1 else f"{name} ({count})" for name, count in Counter(names).items()]
    return [
        *recipe_provenance(task),
        f"Seeds 0 to {sweep.sizes['run'] - 1} of every scheme; {len(names)} pieces of "
        f"{int(sweep['length'][-1]):,} tokens: {', '.join(each)}; intervals: 95 % bootstrap over "
        "pieces, runs averaged, so they do not say how far other seeds may lie",
        f"Measure: {sweep.attrs['command']}",
    ]
