"""The paper's figures, from checkpoints trained for goatviz, in one page that opens offline.

Every exhibit says its own scale and provenance, from the checkpoint's card, beside what the paper
states. Where the paper's number is not known here, the claim stands in words and no number is
invented.
"""

from __future__ import annotations

import html
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.io as pio
import torch
import xarray as xr
from plotly.offline import get_plotlyjs

from goatviz.analysis.plan import plan_slice
from goatviz.analysis.prior import prior_profile, prior_summary
from goatviz.analysis.sinks import sink_profile, sink_table
from goatviz.figures import plot_prior
from goatviz.files import whole_file
from goatviz.plots.figure import CONFIG, Figure
from goatviz.plots.length import draw_extrapolation, draw_needle
from goatviz.plots.losses import draw_losses
from goatviz.plots.plan import draw_plan
from goatviz.plots.prior import draw_prior
from goatviz.plots.sinks import draw_sinks
from goatviz.results import load_shipped_result, save_result
from goatviz.training.checkpoint import Checkpoint, load_pretrained
from goatviz.training.config import TrainConfig
from goatviz.training.evaluation import HELD_OUT_STREAM

PAPER = "Litman and Guo, You Need Better Attention Priors, ICML 2026 (arXiv 2601.15380)"

#: Tokens of the plan on show: as many as have room for their text.
PLAN_TOKENS = 16
#: Held-out sequences behind the sink figures.
SINK_INPUTS = 64


@dataclass(frozen=True)
class Exhibit:
    """One figure of the gallery.

    Attributes
    ----------
    slug : str
        Its anchor in the page.
    title, caption : str
        Ours.
    summary : list of str
        The figure in words, computed from what it draws.
    figure : Figure
        What is drawn.
    provenance : list of str
        Where the numbers come from.
    claim : str
        What the paper shows or states, and at which scale.
    """

    slug: str
    title: str
    caption: str
    summary: list[str]
    figure: Figure
    provenance: list[str]
    claim: str


def reproduce(out: str | os.PathLike = "figures") -> Path:
    """Draw every exhibit and write index.html, with the profiles behind it as netCDF.

    Parameters
    ----------
    out : path-like
        A folder; made if it is not there. The page is replaced whole.

    Returns
    -------
    Path
        Of index.html: one file with plotly.js inside, which asks the network for nothing.

    Raises
    ------
    ValueError
        If `out` is a file, or a shipped checkpoint is damaged.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     reproduce(folder).name
    'index.html'
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {out}")
    exhibits = make_exhibits()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("copy-mixture-1-goat", "copy-mixture-4-goat"):
        save_result(prior_profile(load_pretrained(name).model), out / f"{name}.nc")
    page = out / "index.html"
    with whole_file(page) as temporary:
        temporary.write_text(gallery_page(exhibits), encoding="utf-8")
    return page


def make_exhibits() -> list[Exhibit]:
    """Every figure of the paper that goatviz has so far, computed now."""
    checkpoints = {
        (offset, kind): load_pretrained(f"copy-mixture-{offset}-{kind}")
        for offset in (1, 4)
        for kind in ("goat", "uniform")
    }
    exhibits = [_decomposition(checkpoints[offset, "goat"], offset) for offset in (1, 4)]
    exhibits.append(_kernel(checkpoints[4, "goat"]))
    exhibits.append(_losses(checkpoints))
    exhibits.append(_plan(checkpoints[1, "goat"]))
    exhibits.append(_learned_sink(checkpoints[4, "goat"], checkpoints[4, "uniform"]))
    exhibits.append(_signal(checkpoints[1, "goat"], checkpoints[1, "uniform"]))
    exhibits.append(_beyond(checkpoints[1, "goat"]))
    exhibits.append(_passkey())
    exhibits.append(_needle())
    exhibits.append(_needle_depth())
    return exhibits


def _decomposition(checkpoint: Checkpoint, offset: int) -> Exhibit:
    profile = prior_profile(checkpoint.model)
    task = TrainConfig.from_dict(checkpoint.card["config"]).task
    where = "the previous token" if offset == 1 else f"the token {offset} places before it"
    return Exhibit(
        slug=f"decomposition-{offset}",
        title=f"Anatomy of a learned prior: copying from {offset} back",
        caption=(
            f"Each token copies the first one ({task.first:.0%}), {where} "
            f"({task.previous:.0%}), or is noise. To predict the next token, the copied one lies "
            f"at lag {offset - 1} of the query. The prior alone, without any content, holds both "
            "sources: one head's sink leads at key 0, one head's kernel peaks at that lag. "
            "Choose the head in the menu."
        ),
        summary=prior_summary(profile),
        figure=draw_prior(profile),
        provenance=_provenance(checkpoint),
        claim=(
            "Figure 1 shows the same four panels for a small causal language model on a copy "
            "mixture (first token, previous token, noise): key-only term, relative kernel, "
            "row-centred log-prior, induced causal prior. Its sink term spikes at key 0. "
            "The paper's values for this toy are not known here."
        ),
    )


def _kernel(checkpoint: Checkpoint) -> Exhibit:
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
        provenance=_provenance(checkpoint),
        claim=(
            "The paper derives this form: a finite dot-product factorisation, translation "
            "equivariance and boundedness leave no other. Its language models use R = 4 "
            "frequencies, as here."
        ),
    )


def _losses(checkpoints: dict[tuple[int, str], Checkpoint]) -> Exhibit:
    rows = [
        (
            f"offset {offset}",
            "GOAT" if kind == "goat" else "uniform prior",
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
            "The same model, data order and steps with a learned prior and with a uniform one "
            "(which knows no positions at all). The optimum is exact: the task's entropy. Points "
            "are means over held-out sequences, whiskers two standard errors; one seed each."
        ),
        summary=[
            f"{group}, {name}: {loss:.4f} ± {error:.4f}, optimum {bayes:.4f} nats per token"
            for group, name, loss, error, bayes in rows
        ],
        figure=draw_losses(rows),
        provenance=[
            line for checkpoint in checkpoints.values() for line in _provenance(checkpoint)[:2]
        ],
        claim=(
            "On C4, with a 125 M parameter GPT and 4 B tokens, GOAT's perplexity is 1.55 below "
            "ALiBi's (from a published summary). The comparison here is of another kind: a toy, "
            "against no positions."
        ),
    )


def _plan(checkpoint: Checkpoint) -> Exhibit:
    task = TrainConfig.from_dict(checkpoint.card["config"]).task
    generator = torch.Generator().manual_seed(checkpoint.card["seed"] + HELD_OUT_STREAM)
    ids = task.sample(1, generator=generator)[:, :PLAN_TOKENS]
    head = _sink_head(checkpoint)
    tokens = [str(int(token)) for token in ids[0]]
    slice_ = plan_slice(checkpoint.model, ids, head=head, tokens=tokens)
    return Exhibit(
        slug="plan",
        title="Attention as a transport plan, checked by an independent solver",
        caption=(
            f"The first {PLAN_TOKENS} tokens of a held-out sequence, sink head {head}. Every row "
            "ships its mass to the keys at least cost: softmax(scores/τ + log prior) is the "
            "optimum, which the KKT residual certifies and POT confirms. The sink is the key whose "
            "incoming mass stands far above uniform."
        ),
        summary=[
            f"POT's verdict: {slice_.attrs['verdict']}",
            slice_.attrs["check"],
            f"incoming mass of key 0: {float(slice_['incoming_mass'][0]):.3f} "
            f"(uniform would be {1 / PLAN_TOKENS:.3f})",
        ],
        figure=draw_plan(slice_),
        provenance=_provenance(checkpoint),
        claim=(
            "The paper reads attention as one-sided entropic optimal transport: the source "
            "marginal is fixed, the target free, and standard attention is the case of a uniform "
            "prior."
        ),
    )


def _learned_sink(goat: Checkpoint, uniform: Checkpoint) -> Exhibit:
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
        summary=[
            *_sink_lines(profile, "GOAT"),
            *_sink_lines(twin, "uniform prior"),
            *prior_summary(prior_profile(goat.model)),
        ],
        figure=draw_sinks(
            profile.sel(head=[head, *(h for h in profile["head"].values if h != head)]),
            kind="profile",
        ),
        provenance=[*_provenance(goat), _sample_line(goat, profile)],
        claim=(
            "In the last layer of the paper's language models the learned key-only term has a "
            "sharp spike at key 0 and a rise towards recent keys. Here it is a toy of one layer, "
            "and the spike is what its task asks for."
        ),
    )


def _signal(goat: Checkpoint, uniform: Checkpoint) -> Exhibit:
    profile, twin = (_held_out_sinks(each) for each in (goat, uniform))
    head = _sink_head(goat)
    correlations = {
        name: sink_table(each)["rank_correlation"].values[0]
        for name, each in (("GOAT", profile), ("uniform prior", twin))
    }
    return Exhibit(
        slug="signal-sink",
        title="Signal versus sink",
        caption=(
            "Every query by its content range (how much its scores differ over the keys that it "
            "sees) and the mass that it leaves on key 0. Between the envelopes lies everything "
            "that the theory allows: a query without content range gets its prior back. Choose a "
            f"head in the menu: head {head} is a sink by its prior and stays one at every range "
            "seen; the other head never is. The fall of the mean over all heads is the difference "
            "of the two, not the behaviour of one."
        ),
        summary=[
            f"{name}, head {number}: rank correlation of content range and sink mass "
            + (f"{value:+.2f}" if value == value else "undefined (one bin of mass)")
            for name, values in correlations.items()
            for number, value in enumerate(values)
        ]
        + _sink_lines(profile, "GOAT"),
        figure=draw_sinks(profile, kind="signal"),
        provenance=[*_provenance(goat), _sample_line(goat, profile)],
        claim=(
            "The paper draws mass on token 0, largest mass and mass on the last 128 keys against "
            "the content range, last layer, 8 validation batches of C4: sink mass falls as "
            "the signal grows. This toy's heads divide the work instead, and its values are not "
            "comparable."
        ),
    )


def _held_out_sinks(checkpoint: Checkpoint) -> xr.Dataset:
    task = TrainConfig.from_dict(checkpoint.card["config"]).task
    generator = torch.Generator().manual_seed(checkpoint.card["seed"] + HELD_OUT_STREAM)
    return sink_profile(checkpoint, task.sample(SINK_INPUTS, generator=generator)[:, :-1])


def _sink_lines(profile: xr.Dataset, name: str) -> list[str]:
    lines = []
    for head in profile["head"].values:
        one = profile.sel(layer=0, head=head)
        low, high = (float(one[f"importance_{end}"][0]) for end in ("low", "high"))
        lines.append(
            f"{name}, head {head}: importance of key 0 {float(one['importance'][0]):.3f} "
            f"[{low:.3f}, {high:.3f}], mean content range {float(one['content_range']):.2f}"
        )
    return lines


def _sample_line(checkpoint: Checkpoint, profile: xr.Dataset) -> str:
    return (
        f"{profile.attrs['n_inputs']} held-out sequences of {profile.attrs['length']} tokens, seed "
        f"{checkpoint.card['seed'] + HELD_OUT_STREAM}; intervals: 95 % bootstrap over them"
    )


def _beyond(checkpoint: Checkpoint) -> Exhibit:
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
            f"{length:,}, pooled into bins, never as a whole. What the sink's network does beyond "
            "its training length is extrapolation: it was never asked to hold there. At this "
            f"length the sink head leaves key 0 {sink_mass(profile):.1%} of the last query's "
            f"prior; at the training length it was {sink_mass(trained):.1%}."
        ),
        summary=prior_summary(profile),
        figure=plot_prior(checkpoint, length=length),
        provenance=_provenance(checkpoint),
        claim=(
            "The paper reports priors that extrapolate: on C4, trained at 2,048 tokens, "
            "perplexity stays flat to 16 times that length. This toy is a picture of a prior, "
            "not a test of that claim."
        ),
    )


def _passkey() -> Exhibit:
    sweep = load_shipped_result("passkey-sweep")
    return Exhibit(
        slug="passkey",
        title="Passkey: answers beyond the training length",
        caption=(
            "A number of four digits is hidden in random letters and asked for at the end. All "
            f"models were trained at {sweep.attrs['training_length']} tokens on the same sequences "
            "in the same order, and are asked the same questions; small marks are single runs. "
            f"{_verdict(sweep, 'strict')}"
        ),
        summary=_sweep_lines(sweep, "strict"),
        figure=draw_extrapolation(sweep),
        provenance=_sweep_provenance("passkey", sweep),
        claim=(
            "Passkey retrieval with eight digits, d = 512, 12 layers, 8 heads, R = M = 8, trained "
            "at 1,024 tokens for 2,000 steps of 32 sequences: the paper reports near-perfect "
            "retrieval far beyond the training length with GOAT, against RoPE, ALiBi, sinusoidal "
            "and interpolated positions. Its numbers are not known here. This model has 3 layers "
            "and d = 128."
        ),
    )


def _needle() -> Exhibit:
    sweep = load_shipped_result("needle-sweep")
    return Exhibit(
        slug="needle",
        title="Needle: letters found beyond the training length",
        caption=(
            "As the passkey, with a needle of four letters out of four, and a loss that looks at "
            "the answer alone. A guess is right for one letter in four. "
            f"{_verdict(sweep, 'token')}"
        ),
        summary=_sweep_lines(sweep, "token"),
        figure=draw_extrapolation(sweep, measure="token"),
        provenance=_sweep_provenance("needle", sweep),
        claim=_NEEDLE_CLAIM,
    )


def _needle_depth() -> Exhibit:
    grid = load_shipped_result("needle-grid")
    worst = grid["token"].isel(length=-1)
    return Exhibit(
        slug="needle-depth",
        title="Needle: where in the text it lay",
        caption=(
            "The same models and task by the depth of the needle, three runs of each scheme "
            "together; one scale for all, with chance marked in it. In training the needle lay at "
            "depths up to 80 %: the last row was never seen, and sinusoidal positions miss it even "
            "at the training length."
        ),
        summary=[
            f"{scheme}, {int(grid['length'][-1]):,} tokens: "
            + ", ".join(
                f"{share:.2f} at depth {100 * depth:g} %"
                for depth, share in zip(
                    grid["depth"].values, worst.sel(scheme=scheme).values, strict=True
                )
            )
            for scheme in grid["scheme"].values
        ],
        figure=draw_needle(grid),
        provenance=_sweep_provenance("needle", grid),
        claim=_NEEDLE_CLAIM,
    )


_NEEDLE_CLAIM = (
    "Needle in a haystack with 12 letters of a four-letter alphabet, trained at 256 tokens, token "
    "accuracy over depths 10 to 90 % and lengths 512 to 16,384: the paper reports near-perfect "
    "retrieval far beyond the training length with GOAT. Its numbers are not known here."
)


def _verdict(sweep: xr.Dataset, measure: str) -> str:
    """Who leads at which length, whether the intervals part them, and how far seeds differ."""
    lengths = [n for n in sweep["length"].values if str(n) != sweep.attrs["training_length"]]
    leaders = []
    for length in lengths:
        order = sweep.sel(length=length).sortby(f"mean_{measure}", ascending=False)
        first, second = (order.isel(scheme=at) for at in (0, 1))
        apart = float(first[f"mean_{measure}_low"]) > float(second[f"mean_{measure}_high"])
        leaders.append(
            f"at {length:,} {first['scheme'].item()} {float(first[f'mean_{measure}']):.1%} "
            f"before {second['scheme'].item()} {float(second[f'mean_{measure}']):.1%}"
            f"{'' if apart else ' (intervals overlap)'}"
        )
    spread = (sweep[measure].max("run") - sweep[measure].min("run")).max("length")
    most = spread.isel(scheme=int(spread.argmax("scheme")))
    return (
        f"Who leads: {'; '.join(leaders)}. Seeds of one scheme differ by up to "
        f"{100 * float(most):.0f} points ({most['scheme'].item()}), more than the whiskers: three "
        "runs are few."
    )


def _sweep_lines(sweep: xr.Dataset, measure: str) -> list[str]:
    lines = []
    for scheme in sweep["scheme"].values:
        one = sweep.sel(scheme=scheme)
        shares = ", ".join(
            f"{share:.3f} [{low:.3f}, {high:.3f}] at {length:,}"
            for length, share, low, high in zip(
                sweep["length"].values,
                one[f"mean_{measure}"].values,
                one[f"mean_{measure}_low"].values,
                one[f"mean_{measure}_high"].values,
                strict=True,
            )
        )
        lines.append(f"{scheme}: {shares}")
    return lines


def _sweep_provenance(task: str, result: xr.Dataset) -> list[str]:
    checkpoint = load_pretrained(f"{task}-goat")
    card = checkpoint.card
    model = card["model"]
    again = card["command"].replace("--positions goat --seed 0", "--positions SCHEME --seed SEED")
    return [
        f"{card['data']}; {model['num_layers']} layers, {model['num_heads']} heads, "
        f"d = {model['embed_dim']}, R = {model['prior_rank']}, M = {model['sink_rank']}, "
        f"{card['parameters']:,} parameters (all schemes within 0.1 %); {card['steps']:,} steps, "
        f"about {card['wall_time_s'] / 60:.0f} minutes a run on {card['device']}",
        "Seeds 0, 1 and 2 of every scheme; rope-interpolated is the weights of rope with squeezed "
        f"positions; questions from seed {result.attrs['seed']}; intervals: 95 % (Wilson), over "
        "the questions of all runs together, so they do not say how far other seeds may lie",
        f"Train: {again.replace(f'{task}-goat-0', f'{task}-SCHEME-SEED')}",
        f"Measure: {result.attrs['command']}",
    ]


def _sink_head(checkpoint: Checkpoint) -> int:
    """The head whose induced prior gives key 0 the most mass at the last query."""
    profile = prior_profile(checkpoint.model)
    first = profile["probability"].isel(layer=0, query=-1, key_bin=0)
    return int(first["head"].values[first.values.argmax()])


def _provenance(checkpoint: Checkpoint) -> list[str]:
    card = checkpoint.card
    model = card["model"]
    return [
        f"{checkpoint.name}: {card['data']}",
        f"{model['num_layers']} layer, {model['num_heads']} heads, d = {model['embed_dim']}, "
        f"{'with' if model['skip'] else 'without'} skip connection, "
        f"{card['parameters']:,} parameters; {card['steps']:,} steps, seed {card['seed']}, "
        f"{card['wall_time_s']:.0f} s on {card['device']}",
        f"{card['command']} (torch {card['versions']['torch']}; weights sha256 "
        f"{card['sha256'][:12]}…)",
    ]


def gallery_page(exhibits: list[Exhibit]) -> str:
    """The whole page as one HTML document with plotly.js inside."""
    sections = []
    for number, exhibit in enumerate(exhibits, start=1):
        plot = pio.to_html(
            exhibit.figure,
            config=CONFIG,
            full_html=False,
            include_plotlyjs=False,
            include_mathjax=False,
            div_id=f"figure-{exhibit.slug}",
        )
        sections.append(
            _SECTION.format(
                slug=exhibit.slug,
                number=number,
                title=html.escape(exhibit.title),
                plot=plot,
                caption=html.escape(exhibit.caption),
                summary=_items(exhibit.summary),
                provenance=_items(exhibit.provenance),
                claim=html.escape(exhibit.claim),
            )
        )
    contents = "".join(f'<li><a href="#{e.slug}">{html.escape(e.title)}</a></li>' for e in exhibits)
    values: dict[str, Any] = {
        "plotly": get_plotlyjs(),
        "contents": contents,
        "sections": "".join(sections),
        "paper": html.escape(PAPER),
    }
    page = _PAGE
    for name, value in values.items():
        page = page.replace(f"@@{name}@@", value)
    return page


def _items(lines: list[str]) -> str:
    return "".join(f"<li>{html.escape(line)}</li>" for line in lines)


_SECTION = """
<section id="{slug}">
<h2>{number}. {title}</h2>
<p>{caption}</p>
<div class="plot" role="group" aria-labelledby="summary-{slug}">{plot}</div>
<ul class="summary" id="summary-{slug}" aria-label="The figure in words">{summary}</ul>
<div class="beside">
<div><h3>Ours: scale and provenance</h3><ul>{provenance}</ul></div>
<div><h3>The paper</h3><p>{claim}</p></div>
</div>
</section>
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>goatviz: attention priors, reproduced</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --ink: #23272e; --soft: #5b616a; --ground: #ffffff;
  --card: #f6f7f9; --line: #dfe2e7; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --soft: #a5abb4;
  --ground: #14171b; --card: #1c2026; --line: #31363e; --link: #7db8f5; } }
body { margin: 0 auto; padding: 2rem 1.25rem 5rem; max-width: 68rem; color: var(--ink);
  background: var(--ground); font: 16px/1.55 Inter, Helvetica, Arial, sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .25rem; } h2 { font-size: 1.3rem; margin: 0 0 .5rem; }
h3 { font-size: .95rem; margin: 0 0 .3rem; }
a { color: var(--link); } p, ul, ol { margin: .4rem 0; } ul, ol { padding-left: 1.2rem; }
section { margin-top: 3rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
.plot { margin: .75rem -0.25rem; overflow-x: auto; } .plot > div { min-width: 46rem; }
.plot :is([class*="tick"], .infolayer, .menulayer) text { fill: var(--ink) !important; }
.summary { color: var(--soft); font-size: .9rem; }
.beside { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-top: 1rem; }
.beside > div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; font-size: .88rem; overflow-wrap: anywhere; }
@media (max-width: 44rem) { .beside { grid-template-columns: 1fr; } }
</style>
<script>@@plotly@@</script>
</head>
<body>
<header>
<h1>goatviz: attention priors, reproduced</h1>
<p>Figures of @@paper@@, redrawn from small models trained for goatviz. Each states its own scale
beside what the paper shows.</p>
<nav aria-label="Figures"><ol>@@contents@@</ol></nav>
</header>
<main>@@sections@@</main>
</body>
</html>
"""
