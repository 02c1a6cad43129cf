"""Exhibits of sinks in language models: who has them, when, and what hiding them costs.

The text models trained here, which differ in their scheme and nothing else, beside SmolLM2-135M.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from goatviz.analysis.implied import implied_prior
from goatviz.paper.evidence import TEXT_SCHEMES, Evidence, text_pieces
from goatviz.paper.exhibit import (
    Exhibit,
    Table,
    interval_cells,
    recipe_provenance,
    scale_text,
)
from goatviz.plots.base import Panel, Words, grid, single
from goatviz.plots.prior import sink
from goatviz.plots.sink_curves import signal_panel
from goatviz.plots.sink_effect import effect_panel

if TYPE_CHECKING:
    import xarray as xr

_SMOLLM2 = "SmolLM2-135M"
_CHANGES = ("first key hidden", "sinks hidden")
_EXAMPLE = (
    "The text models read the first 32 pieces of 256 bytes of Alice in Wonderland "
    "(goatviz.example_text), their weights are of seed 0; SmolLM2-135M reads 16 pieces of 256 "
    "tokens of it. Intervals: 95 % bootstrap over pieces, none over seeds"
)


def exhibits(evidence: Evidence) -> list[Exhibit]:
    """All exhibits of this module."""
    return [signal(evidence), sink_term(evidence), hidden(evidence)]


def signal(evidence: Evidence) -> Exhibit:
    sinks = {name: evidence.sinks(f"text-{name}") for name in TEXT_SCHEMES}
    signals = {name: evidence.signal(f"text-{name}") for name in TEXT_SCHEMES}
    sinks[_SMOLLM2] = evidence.result("smollm2-last-layer-sinks")
    signals[_SMOLLM2] = evidence.result("smollm2-signal")
    last = {name: one.isel(layer=[-1]) for name, one in sinks.items()}
    panels = [_signal_of(name, one) for name, one in last.items()]
    rows = []
    for name, one in last.items():
        first = one.isel(layer=0, key=0)
        strongest = first.isel(head=[int(first["importance"].values.argmax())])
        by_head = signals[name]["correlation"].values
        rows.append(
            [
                name,
                *interval_cells(strongest, "importance", ".3f"),
                *interval_cells(signals[name], "mean_correlation", "+.3f"),
                f"{by_head.min():+.2f} to {by_head.max():+.2f}",
            ]
        )
    return _exhibit(
        evidence,
        slug="language-signal",
        title="Signal versus sink in language models",
        caption=(
            "Every query of the last layer, all heads: how much its scores differ over the keys "
            "that it sees, and its mass on the first key, its largest mass, and that on the last "
            "128 keys. Later queries see more keys, which alone widens their range and thins every "
            "mass, and heads differ: pooled curves may fall although no head sheds anything. The "
            "table compares queries of one head at one position. Below 0, the first key loses mass "
            "where there is signal."
        ),
        figure=grid(panels, Words("Signal against sink, last layer")),
        table=Table(
            [
                "model",
                "importance of key 0, strongest head",
                "correlation at one position, mean of heads",
                "heads",
            ],
            rows,
        ),
        claim=(
            "Figure 2 (c), last layer, 8 validation batches: the mass on token 0 falls as the "
            "content range grows. The figure draws it beside the largest mass and the mass on the "
            "last 128 keys."
        ),
    )


def sink_term(evidence: Evidence) -> Exhibit:
    learned = evidence.prior("text-goat").isel(layer=[-1])
    heads = {f"goat, head {at}": learned.isel(head=[at]) for at in range(learned.sizes["head"])}
    for name in TEXT_SCHEMES[1:]:
        model = evidence.checkpoint(f"text-{name}")
        layer = model.model.config.num_layers - 1
        implied = implied_prior(model, text_pieces(), layers=[layer], resolution=2)
        first = evidence.sinks(f"text-{name}")["importance"].isel(layer=-1, key=0).values
        strongest = int(first.argmax())
        heads[f"{name}, head {strongest} (implied)"] = implied.isel(head=[strongest])
    heads[f"{_SMOLLM2} (implied)"] = evidence.result("smollm2-last-layer-prior")
    rows = []
    for name, one in heads.items():
        u = one["sink"].values.squeeze()
        rows.append([name, *(f"{value:+.2f}" for value in (u[0], u[0] - u[1:9].max(), u[-1]))])
    return _exhibit(
        evidence,
        slug="language-sink-term",
        title="The key-only term u(j) of the last layer",
        caption=(
            "GOAT's u(j) is a part of its prior, in every head. The others have no such part: "
            "theirs is implied by their logits (the least-squares fit of a function of the lag and "
            "one of the key), in the head whose first key is the most important. A straight line "
            "in j can be traded for one in the lag; a spike cannot."
        ),
        figure=grid(
            [
                replace(sink(one.isel(layer=0, head=0)), title=name, height=170)
                for name, one in heads.items()
            ],
            Words("Key-only terms u(j) [nats]"),
        ),
        table=Table(["head", "u(0) [nats]", "lead over keys 1 to 8 [nats]", "u(255) [nats]"], rows),
        claim=(
            "In the last layer of the paper's language models the learned u(j) has a sharp spike "
            "at key 0 and a rise towards recent keys."
        ),
    )


def hidden(evidence: Evidence) -> Exhibit:
    import xarray as xr

    effects = {name: evidence.result(f"text-{name}-sink-effect") for name in TEXT_SCHEMES}
    effects[_SMOLLM2] = evidence.result("smollm2-sink-effect")
    fields = [f"mean_increase{end}" for end in ("", "_low", "_high")]
    parts, rows = [], []
    for name, effect in effects.items():
        part = effect[fields].sel(change=list(_CHANGES)).drop_vars("layer", errors="ignore")
        rows.append(
            [name, f"{float(effect['mean_loss']):.3f}", *interval_cells(part, fields[0], "+z.4f")]
        )
        parts.append(part.assign_coords(change=[f"{name}: {change}" for change in _CHANGES]))
    panel = effect_panel(xr.concat(parts, "change"))
    return _exhibit(
        evidence,
        slug="language-sinks-hidden",
        title="What happens to the loss when sinks are hidden",
        caption=(
            "The first key, or every key that gets more than 0.3 of a head's mass, is hidden in "
            "all layers, and the model predicts the same tokens. Where there is no sink, nothing "
            "is hidden."
        ),
        figure=single(replace(panel, title="Loss increase when keys are hidden")),
        table=Table(
            ["model", "loss as it is", *(f"{change} [nats/token]" for change in _CHANGES)], rows
        ),
        claim=(
            "The paper reads a sink as the mode of a prior, to which queries without signal "
            "return. It hides no keys, as far as it is known here, so there is no number to "
            "compare with."
        ),
        command="python docs/language_sinks.py and python docs/sink_effect.py",
    )


def _exhibit(evidence: Evidence, *, command: str = "goatviz reproduce", **parts) -> Exhibit:
    return Exhibit(
        scale=scale_text(evidence.checkpoint("text-goat")),
        paper_scale="c4",
        provenance=[*recipe_provenance("text"), _EXAMPLE, f"Measure: {command}"],
        **parts,
    )


def _signal_of(name: str, one: xr.Dataset) -> Panel:
    """Signal against sink in one layer of a model, all heads."""
    layer, heads = int(one["layer"][0]), int(one["present"].sum())
    note = f"layer {layer}, all {heads} heads, {one.attrs['n_inputs']} pieces"
    return replace(signal_panel(one, layer, None), title=name, note=note, height=210)
