"""Exhibits of retrieval beyond the training length: passkey and needle."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from goatviz import checks
from goatviz.analysis.mass import mass_sweep
from goatviz.models import interpolate_positions
from goatviz.paper.evidence import Evidence
from goatviz.paper.exhibit import (
    Exhibit,
    Table,
    card_provenance,
    length_table,
    recipe_provenance,
    scale_text,
    task_of,
)
from goatviz.plots.length import draw_length, draw_needle
from goatviz.plots.mass import draw_mass

if TYPE_CHECKING:
    import xarray as xr

#: Lengths and number of sequences at which the masses behind an answer are measured.
MASS_LENGTHS = (64, 128, 256, 512, 1024)
MASS_EXAMPLES = 16

_PASSKEY_SCHEMES = ("goat", "rope", "alibi", "sinusoidal")
_NEEDLE_CLAIM = (
    "Token accuracy over depths 10 to 90 % and lengths to 64 times that of training: the paper "
    "reports near-perfect retrieval far beyond the training length with GOAT. Its numbers are not "
    "known here."
)


def exhibits(evidence: Evidence) -> list[Exhibit]:
    """All exhibits of this module."""
    return [
        passkey(evidence),
        passkey(evidence, "8"),
        passkey_mass(evidence),
        needle(evidence),
        needle_depth(evidence),
    ]


def passkey(evidence: Evidence, digits: str = "") -> Exhibit:
    name = f"passkey-{digits}" if digits else "passkey"
    sweep = evidence.result(f"{name}-sweep")
    count = json.loads(sweep.attrs["task_options"])["value_length"]
    provenance = _sweep_provenance("passkey", sweep)
    if digits:
        # The recipe of four digits but for their number.
        provenance = [
            line.replace("value_length=4", f"value_length={count}").replace(
                "--preset tiny --out runs/passkey",
                f"--preset tiny --value-length {count} --out runs/passkey{count}",
            )
            for line in provenance
        ]
    return Exhibit(
        slug=name,
        title=f"Passkey of {count} digits: answers beyond the training length",
        caption=(
            f"A number of {count} digits is hidden in random letters and asked for at the end. All "
            f"models were trained at {sweep.attrs['training_length']} tokens on the same sequences "
            "in the same order, and are asked the same questions; small marks are single runs. "
            f"{_verdict(sweep, 'strict')}"
        ),
        table=_sweep_table(sweep, "strict"),
        figure=draw_length(sweep),
        scale=scale_text(evidence.checkpoint("passkey-goat")),
        paper_scale="passkey",
        provenance=provenance,
        claim=(
            "The paper reports near-perfect retrieval far beyond the training length with GOAT, "
            "against RoPE, ALiBi, sinusoidal and interpolated positions. Its numbers are not known "
            "here."
        ),
    )


def passkey_mass(evidence: Evidence) -> Exhibit:
    checkpoints = {name: evidence.checkpoint(f"passkey-{name}") for name in _PASSKEY_SCHEMES}
    models = {name: checkpoint.model for name, checkpoint in checkpoints.items()}
    models["rope-interpolated"] = interpolate_positions(models["rope"])
    task = task_of(checkpoints["goat"])
    sweep = mass_sweep(models, task, lengths=MASS_LENGTHS, examples=MASS_EXAMPLES)
    rows = []
    for scheme in models:
        one = sweep.sel(scheme=scheme, run=0)
        rows.append([scheme, "answer tokens right", *_cells(one["token"].values)])
        for group, where in (("answer", "the answer"), ("recent", "recent keys")):
            layer, head = int(one[f"{group}_layer"]), int(one[f"{group}_head"])
            what = f"mass on {where}, layer {layer}, head {head}"
            rows.append([scheme, what, *_cells(one[f"run_{group}_mass"].values)])
    sink = float(sweep["first_mass"].max())
    goat = checkpoints["goat"]
    return Exhibit(
        slug="passkey-mass",
        title="Passkey: what the answer rests on",
        caption=(
            "Attention mass of the queries that must give the answer, in the head that finds it "
            "best at the training length, and in the head that looks back the least. Where the "
            "mass on the answer falls with length, the answer is lost. Mass that stays is needed "
            "but not enough (rope-interpolated at twice the training length). Open marks are the "
            "prior alone: where they lie on the line, as in the local heads of GOAT and ALiBi, "
            "recency does the work, and length changes nothing. The largest mass of any head on "
            f"the first key is {sink:.2f}: sinks play no part in this task."
        ),
        table=Table(["scheme", "share at", *(f"{n:,}" for n in MASS_LENGTHS)], rows),
        figure=draw_mass(sweep),
        scale=scale_text(goat),
        paper_scale="passkey",
        provenance=[
            *card_provenance(goat),
            f"Weights of seed 0 of {', '.join(models)}; {MASS_EXAMPLES} sequences a length, seed "
            f"{sweep.attrs['seed']}; intervals: 95 % (masses: bootstrap over sequences; shares: "
            "Wilson)",
            "Measured by goatviz reproduce itself, with goatviz.mass_sweep",
        ],
        claim=(
            "The paper explains extrapolation by the learned prior: recency and sink are functions "
            "of lag and key that hold at any length, and content only has to find the key. It has "
            "no figure of this kind for the passkey, so there is no number to compare with."
        ),
    )


def needle(evidence: Evidence) -> Exhibit:
    sweep = evidence.result("needle-sweep")
    return Exhibit(
        slug="needle",
        title="Needle: letters found beyond the training length",
        caption=(
            "Like the passkey, but with a needle of four letters from an alphabet of four, and a "
            "loss that counts the answer alone. A guess is right for one letter in four. "
            f"{_verdict(sweep, 'token')}"
        ),
        table=_sweep_table(sweep, "token"),
        figure=draw_length(sweep, measure="token"),
        scale=scale_text(evidence.checkpoint("needle-goat")),
        paper_scale="needle",
        provenance=_sweep_provenance("needle", sweep),
        claim=_NEEDLE_CLAIM,
    )


def needle_depth(evidence: Evidence) -> Exhibit:
    grid = evidence.result("needle-grid")
    worst = grid["token"].isel(length=-1)
    return Exhibit(
        slug="needle-depth",
        title="Needle: accuracy by depth",
        caption=(
            "The same models and task by the depth of the needle, all runs of a scheme together, "
            "all on one scale with chance marked in it. In training the needle lay at depths up to "
            "80 %: the last row was never seen, and sinusoidal positions miss it even at the "
            "training length."
        ),
        table=Table(
            [
                f"letters right at {int(grid['length'][-1]):,} tokens, depth",
                *(f"{100 * depth:g} %" for depth in grid["depth"].values),
            ],
            [[str(s), *_cells(worst.sel(scheme=s).values)] for s in grid["scheme"].values],
        ),
        figure=draw_needle(grid),
        scale=scale_text(evidence.checkpoint("needle-goat")),
        paper_scale="needle",
        provenance=_sweep_provenance("needle", grid, runs=evidence.result("needle-sweep")),
        claim=_NEEDLE_CLAIM,
    )


def _cells(values: np.ndarray) -> list[str]:
    return [f"{value:.2f}" for value in values]


def _verdict(sweep: xr.Dataset, measure: str) -> str:
    """The best scheme at each length, whether intervals overlap, and how much seeds differ."""
    lengths = [n for n in sweep["length"].values if str(n) != sweep.attrs["training_length"]]
    leaders = []
    for length in lengths:
        order = sweep.sel(length=length).sortby(f"mean_{measure}", ascending=False)
        first, second = (order.isel(scheme=at) for at in (0, 1))
        apart = float(first[f"mean_{measure}_low"]) > float(second[f"mean_{measure}_high"])
        names = [each["scheme"].item() for each in (first, second)]
        shares = [f"{float(each[f'mean_{measure}']):.1%}" for each in (first, second)]
        if shares[0] == shares[1]:
            leaders.append(f"at {length:,} {names[0]} and {names[1]} are equal at {shares[0]}")
        else:
            overlap = "" if apart else " (intervals overlap)"
            leaders.append(
                f"at {length:,} {names[0]} {shares[0]} before {names[1]} {shares[1]}{overlap}"
            )
    spread = (sweep[measure].max("run") - sweep[measure].min("run")).max("length")
    most = spread.isel(scheme=int(spread.argmax("scheme")))
    return (
        f"Who leads: {'; '.join(leaders)}. Seeds of one scheme differ by up to "
        f"{100 * float(most):.0f} points ({most['scheme'].item()}), more than the whiskers: "
        f"{checks.count_text(sweep.sizes['run'], 'run')} are few."
    )


def _sweep_table(sweep: xr.Dataset, measure: str) -> Table:
    what = {"strict": "whole answers right", "token": "letters right"}[measure]
    return length_table(sweep, f"mean_{measure}", ".3f", what=what)


def _sweep_provenance(
    task: str, result: xr.Dataset, *, runs: xr.Dataset | None = None
) -> list[str]:
    """`runs` tells the seeds of a result in which they are pooled."""
    last = (result if runs is None else runs).sizes["run"] - 1
    return [
        *recipe_provenance(task),
        f"Seeds 0 to {last} of every scheme; rope-interpolated has the weights of rope and "
        f"squeezed positions; questions from seed {result.attrs['seed']}; intervals: 95 % "
        "(Wilson), over the questions of all runs together, so they do not say how far other seeds "
        "may lie",
        f"Measure: {result.attrs['command']}",
    ]
