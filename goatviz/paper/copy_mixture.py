"""Exhibits of the copy-mixture models: priors and their parts, a plan, a sink."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from goatviz.analysis.plan import plan_slice
from goatviz.analysis.prior import prior_profile, prior_summary
from goatviz.analysis.sinks import sink_profile
from goatviz.figures import plot_prior
from goatviz.paper.evidence import COPY_MODELS, Evidence
from goatviz.paper.exhibit import (
    Exhibit,
    Table,
    card_provenance,
    interval_cells,
    scale_text,
    task_of,
)
from goatviz.plots.plan import draw_plan
from goatviz.plots.prior import draw_prior
from goatviz.plots.sinks import draw_sinks
from goatviz.plots.training import draw_losses
from goatviz.training.checkpoint import Checkpoint
from goatviz.training.evaluation import HELD_OUT_STREAM

if TYPE_CHECKING:
    import xarray as xr

#: Number of tokens in the plan: so many have room for their text.
PLAN_TOKENS = 16
#: Number of held-out sequences behind the sink figures.
SINK_INPUTS = 64


def exhibits(evidence: Evidence) -> list[Exhibit]:
    """All exhibits of this module."""
    checkpoints = {key: evidence.checkpoint(name) for key, name in COPY_MODELS.items()}
    return [
        *(decomposition(checkpoints[offset, "goat"], offset) for offset in (1, 4)),
        kernel(checkpoints[4, "goat"]),
        losses(checkpoints),
        plan(checkpoints[1, "goat"]),
        learned_sink(checkpoints[4, "goat"], checkpoints[4, "uniform"]),
        beyond(checkpoints[1, "goat"]),
    ]


def decomposition(checkpoint: Checkpoint, offset: int) -> Exhibit:
    profile = prior_profile(checkpoint.model)
    task = task_of(checkpoint)
    where = "the previous token" if offset == 1 else f"the token {offset} places before it"
    return Exhibit(
        slug=f"decomposition-{offset}",
        title=f"Anatomy of a learned prior: copying from {offset} back",
        caption=(
            f"Each token copies the first one ({task.first:.0%}), {where} "
            f"({task.previous:.0%}), or is noise. For the query that predicts the next token, the "
            f"token to copy is at lag {offset - 1}. The prior alone, without any content, holds "
            "both sources: the sink of one head is largest at key 0, and the kernel of another "
            "peaks at that lag. Choose the head in the menu."
        ),
        summary=prior_summary(profile),
        figure=draw_prior(profile),
        scale=scale_text(checkpoint),
        paper_scale="copy",
        provenance=card_provenance(checkpoint),
        claim=(
            "Figure 1 shows the same four panels for a small causal language model on a copy "
            "mixture (first token, previous token, noise): key-only term, relative kernel, "
            "row-centred log-prior, induced causal prior. Its sink term spikes at key 0. "
            "The paper's values for this toy are not known here."
        ),
    )


def kernel(checkpoint: Checkpoint) -> Exhibit:
    profile = prior_profile(checkpoint.model)
    return Exhibit(
        slug="kernel-4",
        title="The kernel and its spectrum",
        caption=(
            "The relative term is a finite trigonometric polynomial in the lag: four frequencies "
            "suffice to put a peak at lag 3. Recency adds a straight line."
        ),
        summary=prior_summary(profile),
        figure=draw_prior(profile, kind="kernel"),
        scale=scale_text(checkpoint),
        paper_scale="theory",
        provenance=card_provenance(checkpoint),
        claim=(
            "The paper derives this form: a finite dot-product factorisation, translation "
            "equivariance and boundedness leave no other. Its language models use R = 4 "
            "frequencies, as here."
        ),
    )


def losses(checkpoints: dict[tuple[int, str], Checkpoint]) -> Exhibit:
    rows = [
        (
            f"offset {offset}",
            kind,
            checkpoint.card["losses"]["held_out"],
            checkpoint.card["losses"]["held_out_standard_error"],
            checkpoint.card["losses"]["bayes_optimal"],
        )
        for (offset, kind), checkpoint in checkpoints.items()
    ]
    return Exhibit(
        slug="losses",
        title="What the prior buys: held-out loss against the optimum",
        caption=(
            "The same model, data order and steps with a learned prior and with a uniform one, "
            "which knows no positions. The optimum is exact: the entropy of the task. Points are "
            "means over held-out sequences, whiskers two standard errors; one seed each."
        ),
        table=Table(
            ["task", "prior", "held-out loss ± standard error", "optimum [nats/token]"],
            [
                [group, name, f"{loss:.4f} ± {error:.4f}", f"{bayes:.4f}"]
                for group, name, loss, error, bayes in rows
            ],
        ),
        figure=draw_losses(rows),
        scale=scale_text(checkpoints[1, "goat"]),
        paper_scale="c4",
        provenance=[
            line for checkpoint in checkpoints.values() for line in card_provenance(checkpoint)[:2]
        ],
        claim=(
            "On C4, with a 125 M parameter GPT and 4 B tokens, GOAT's perplexity is 1.55 below "
            "ALiBi's (from a published summary). The comparison here is of another kind: a toy, "
            "against no positions."
        ),
    )


def plan(checkpoint: Checkpoint) -> Exhibit:
    ids = _held_out(checkpoint, 1)[:, :PLAN_TOKENS]
    head = _sink_head(checkpoint)
    tokens = [str(int(token)) for token in ids[0]]
    slice_ = plan_slice(checkpoint.model, ids, head=head, tokens=tokens)
    return Exhibit(
        slug="plan",
        title="Attention as a transport plan, checked by an independent solver",
        caption=(
            f"The first {PLAN_TOKENS} tokens of a held-out sequence, sink head {head}. Every row "
            "ships its mass to the keys at least cost: softmax(scores/τ + log prior) is optimal, "
            "as the KKT residual certifies and POT confirms. The sink is the key whose incoming "
            "mass is far above uniform."
        ),
        summary=[
            f"POT's verdict: {slice_.attrs['verdict']}",
            slice_.attrs["check"],
            f"incoming mass of key 0: {float(slice_['incoming_mass'][0]):.3f} "
            f"(uniform would be {1 / PLAN_TOKENS:.3f})",
        ],
        figure=draw_plan(slice_),
        scale=scale_text(checkpoint),
        paper_scale="theory",
        provenance=card_provenance(checkpoint),
        claim=(
            "The paper reads attention as one-sided entropic optimal transport: the source "
            "marginal is fixed, the target free, and standard attention is the case of a uniform "
            "prior."
        ),
    )


def learned_sink(goat: Checkpoint, uniform: Checkpoint) -> Exhibit:
    profile, twin = (_held_out_sinks(each) for each in (goat, uniform))
    head = _sink_head(goat)
    return Exhibit(
        slug="learned-sink",
        title="The learned sink, measured",
        caption=(
            f"Importance of every key (mean weight over the queries that see it) on {SINK_INPUTS} "
            f"held-out sequences. Head {head} sends nearly all of its mass to key 0, where its "
            "prior puts it. The twin with a uniform prior knows no positions and stays near "
            "uniform attention (dashed). Choose the head in the menu."
        ),
        summary=prior_summary(prior_profile(goat.model)),
        table=Table(
            ["model", "head", "importance of key 0", "mean content range"],
            [*_sink_rows(profile, "GOAT"), *_sink_rows(twin, "uniform prior")],
        ),
        figure=draw_sinks(
            profile.sel(head=[head, *(h for h in profile["head"].values if h != head)]),
            kind="profile",
        ),
        scale=scale_text(goat),
        paper_scale="copy",
        provenance=[*card_provenance(goat), _sample_line(goat, profile)],
        claim=(
            "Standard attention must emulate a sink inside its content scores; GOAT has a lane for "
            "it. Here it is a toy of one layer, and a sink is what its task asks for."
        ),
    )


def beyond(checkpoint: Checkpoint) -> Exhibit:
    length = 16_384
    trained, profile = (prior_profile(checkpoint.model, length=n) for n in (None, length))
    head = _sink_head(checkpoint)

    def sink_mass(of: xr.Dataset) -> float:
        row = of.sel(layer=0, head=head).isel(query=-1)
        window = prior_profile(
            checkpoint.model,
            length=of.attrs["length"],
            heads=head,
            queries=slice(int(row["query"]), int(row["query"]) + 1),
            keys=slice(0, 1),
        )
        return float(window["probability"].squeeze())

    return Exhibit(
        slug="beyond",
        title=f"The same prior at {length:,} tokens",
        caption=(
            f"Trained at {checkpoint.model.config.training_length} tokens and evaluated at "
            f"{length:,}, in bins, never as a whole matrix. Beyond its training length the sink's "
            "network extrapolates: it was never trained there. At this length the "
            f"sink head has {sink_mass(profile):.1%} of the last query's prior mass on key 0; at "
            f"the training length it was {sink_mass(trained):.1%}."
        ),
        summary=prior_summary(profile),
        figure=plot_prior(checkpoint, length=length),
        scale=scale_text(checkpoint),
        paper_scale="c4",
        provenance=card_provenance(checkpoint),
        claim=(
            "The paper reports priors that extrapolate: on C4, trained at 2,048 tokens, "
            "perplexity stays flat to 16 times that length. This toy shows a prior; it does not "
            "test that claim."
        ),
    )


def _held_out(checkpoint: Checkpoint, count: int) -> Tensor:
    """Sequences that a checkpoint was not trained on, shape (count, length + 1)."""
    generator = torch.Generator().manual_seed(checkpoint.card["seed"] + HELD_OUT_STREAM)
    return task_of(checkpoint).sample(count, generator=generator)


def _held_out_sinks(checkpoint: Checkpoint) -> xr.Dataset:
    return sink_profile(checkpoint, _held_out(checkpoint, SINK_INPUTS)[:, :-1])


def _sink_rows(profile: xr.Dataset, name: str) -> list[list[str]]:
    rows = []
    for head in profile["head"].values:
        one = profile.sel(layer=0, head=[head])
        (cell,) = interval_cells(one.isel(key=0), "importance", ".3f")
        rows.append([name, str(head), cell, f"{float(one['content_range'][0]):.2f}"])
    return rows


def _sample_line(checkpoint: Checkpoint, profile: xr.Dataset) -> str:
    return (
        f"{profile.attrs['n_inputs']} held-out sequences of {profile.attrs['length']} tokens, seed "
        f"{checkpoint.card['seed'] + HELD_OUT_STREAM}; intervals: 95 % bootstrap over them"
    )


def _sink_head(checkpoint: Checkpoint) -> int:
    """The head whose induced prior gives key 0 the most mass at the last query."""
    profile = prior_profile(checkpoint.model)
    first = profile["probability"].isel(layer=0, query=-1, key_bin=0)
    return int(first["head"].values[first.values.argmax()])
