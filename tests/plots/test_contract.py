"""One contract for every plot: a Figure with titled axes, marked gaps, and a light payload."""

import subprocess
import sys

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from goatviz.analysis import plan_slice, prior_profile
from goatviz.figures import plot_plan, plot_prior
from goatviz.models import CausalLM, ModelConfig, goat_prior
from goatviz.plots import PRIOR_KINDS, Figure, draw_losses, draw_plan, draw_prior
from goatviz.plots.schemes import SCHEMES, scheme_look
from goatviz.priors import ALiBiPrior
from goatviz.results import save_result
from goatviz.transport import solve_rows
from tests.factories import (
    FIGURES,
    drawn,
    grid_result,
    length_result,
    mass_result,
    perplexity_result,
    plan_result,
    prior_result,
    sink_result,
    training_result,
)

LIMIT_BYTES = 2_000_000


def lively(heads=2, **options):
    torch.manual_seed(0)
    prior = goat_prior(heads, rank=3, sink_rank=2, training_length=64, **options)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return prior


#: Axes of names, which have no unit.
NAMES = {"change", "head", "layer", "task"}
MARKS = ("not allowed", "NaN", "−∞", "+∞")


def check_contract(figure):
    assert isinstance(figure, Figure) and isinstance(figure, go.Figure)
    assert figure.layout.title.text
    used = {(t.xaxis or "x", t.yaxis or "y") for t in figure.data}
    for axes in used:
        for name in axes:
            axis = figure.layout[f"{name[0]}axis{name[1:]}"]
            title = axis.title.text or ""
            named = "[" in title or title in NAMES
            assert named or axis.showticklabels is False, f"axis {name} says {title!r}, no unit"
        assert any(shows(trace) for trace in figure.data if (trace.xaxis or "x") == axes[0])
    for trace in figure.data:
        if isinstance(trace, go.Heatmap):
            check_gaps(trace, figure)
        elif trace.name in SCHEMES:
            look = scheme_look(trace.name)
            assert trace.line.color in (None, look.color)
            assert trace.marker.color in (None, look.color)
    assert len(figure.to_json()) < LIMIT_BYTES


def shows(trace):
    """Whether a trace has a finite value to show."""
    values = trace.z if isinstance(trace, go.Heatmap) else trace.y
    return values is not None and np.isfinite(np.asarray(values, dtype=float)).any()


def check_gaps(trace, figure):
    z = np.asarray(trace.z, dtype=float)
    assert not np.isinf(z).any(), "an infinite value has no colour"
    empty = np.isnan(z)
    if trace.showscale is not False or trace.name == "probability":
        marks = [
            ~np.isnan(np.asarray(other.z, dtype=float))
            for other in figure.data
            if isinstance(other, go.Heatmap)
            and other.name in MARKS
            and other.xaxis == trace.xaxis
            and np.asarray(other.z).shape == z.shape
        ]
        if empty.any() and marks:
            assert (empty <= np.logical_or.reduce(marks)).all(), "a gap without a mark"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 64, 1000, 16_384])
@pytest.mark.parametrize("kind", PRIOR_KINDS)
def test_every_kind_at_every_length(kind, length, causal):
    check_contract(plot_prior(lively(), kind=kind, length=length, causal=causal))


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure(name):
    check_contract(drawn(name))


@pytest.mark.parametrize("kind", PRIOR_KINDS)
def test_a_million_tokens(kind):
    check_contract(plot_prior(lively(1), kind=kind, length=1_000_000))


@pytest.mark.parametrize(("layers", "heads"), [(12, 12), (32, 8), (1, 48)])
@pytest.mark.parametrize("kind", PRIOR_KINDS)
def test_large_models_stay_light(kind, layers, heads):
    config = ModelConfig(
        vocab_size=4,
        training_length=2048,
        num_layers=layers,
        num_heads=heads,
        embed_dim=heads * 16,
        content_dim=2,
        mlp_ratio=0.0,
    )
    model = CausalLM(config)
    figure = plot_prior(model, kind=kind)
    check_contract(figure)
    if kind != "heads":
        menus = figure.layout.updatemenus
        first = [menu for menu in menus if menu.buttons[0].label.startswith("head")]
        assert sum(len(menu.buttons) for menu in first) == layers * heads


@pytest.mark.parametrize("size", [1, 2, 30, 161, 300])
def test_plans_of_every_size(size):
    plan = solve_rows(torch.randn(size, size + 3, dtype=torch.float64))
    check_contract(plot_plan(plan))


def test_no_losses():
    with pytest.raises(ValueError, match="rows must hold at least one"):
        draw_losses([])


@pytest.mark.parametrize("wrong", [None, 3, {}, np.zeros(3), torch.zeros(2)])
@pytest.mark.parametrize("draw", [draw_prior, draw_plan])
def test_wrong_types_are_refused(draw, wrong):
    with pytest.raises(TypeError, match="expected a"):
        draw(wrong)


def test_one_result_is_not_the_other():
    profile = prior_profile(ALiBiPrior(1), length=8)
    plan = plan_slice(solve_rows(torch.zeros(2, 2)))
    with pytest.raises(TypeError, match="plan_slice.*prior_profile"):
        draw_plan(profile)
    with pytest.raises(TypeError, match="prior_profile.*plan_slice"):
        draw_prior(plan)
    with pytest.raises(ValueError, match="kind must be one of decomposition.*got 'map'"):
        draw_prior(profile, kind="map")


@pytest.mark.parametrize("kind", PRIOR_KINDS)
def test_drawing_leaves_the_result_alone(kind):
    profile = prior_profile(lively(), length=300, resolution=20)
    before = profile.copy(deep=True)
    draw_prior(profile, kind=kind)
    assert profile.identical(before)


def test_everything_draws_without_torch(tmp_path):
    results = {
        "prior": prior_result(),
        "sinks": sink_result("hostile"),
        "plan": plan_result(),
        "length": length_result(),
        "needle": grid_result(),
        "mass": mass_result(),
        "perplexity": perplexity_result(),
        "training": training_result(),
    }
    for name, result in results.items():
        save_result(result, tmp_path / f"{name}.nc")
    code = f"""
import sys
sys.modules["torch"] = None
import goatviz.plots as plots
from goatviz.results import load_result
kinds = {{"prior": plots.PRIOR_KINDS, "sinks": plots.SINK_KINDS}}
for name in {list(results)}:
    result = load_result(f"{tmp_path}/{{name}}.nc")
    for options in [{{"kind": kind}} for kind in kinds.get(name, ())] or [{{}}]:
        getattr(plots, f"draw_{{name}}")(result, **options)
print("drawn")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "drawn", run.stderr
