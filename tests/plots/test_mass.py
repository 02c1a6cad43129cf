"""The picture of masses shows the means of the sweep, which follow heads chosen once."""

import numpy as np
import pytest

from goatviz.plots import draw_mass
from goatviz.plots.mass import GROUPS, mass_panel
from goatviz.plots.schemes import Focus
from tests.factories import mass_result


def traces_of(panel, scheme):
    return [trace for trace in panel.traces if trace.get("legendgroup") == scheme]


def check_whiskers(line, one, name):
    np.testing.assert_array_equal(line["y"], one[name])
    np.testing.assert_allclose(line["y"] + line["error_y"]["array"], one[f"{name}_high"])
    np.testing.assert_allclose(line["y"] - line["error_y"]["arrayminus"], one[f"{name}_low"])


@pytest.mark.parametrize("group", GROUPS)
def test_a_panel_shows_a_groups_mass_and_its_priors(group):
    sweep = mass_result()
    panel = mass_panel(sweep, of=group)
    for scheme in sweep["scheme"].values:
        one = sweep.sel(scheme=scheme)
        attention, prior, dots = traces_of(panel, scheme)
        check_whiskers(attention, one, f"mean_{group}_mass")
        np.testing.assert_array_equal(prior["y"], one[f"mean_prior_{group}_mass"])
        assert prior["marker"]["symbol"].endswith("-open") and not prior["showlegend"]
        np.testing.assert_array_equal(dots["y"], one[f"run_{group}_mass"].values.ravel())
        heads = zip(one[f"{group}_layer"].values, one[f"{group}_head"].values, strict=True)
        assert ", ".join(f"{layer}.{head}" for layer, head in heads) in attention["hovertemplate"]
    assert panel.title == GROUPS[group].format(recent=8)
    assert panel.y["title"] == "mass [probability]"
    assert any("at 32 tokens" in line for line in panel.caption)


def test_accuracy_is_the_mean_over_runs():
    sweep = mass_result()
    panel = mass_panel(sweep)
    line, dots = traces_of(panel, "goat")
    one = sweep.sel(scheme="goat")
    check_whiskers(line, one, "mean_token")
    np.testing.assert_array_equal(dots["y"], one["token"].values.ravel())
    np.testing.assert_array_equal(line["customdata"][:, 3], one["tokens"].sum("run"))
    assert panel.traces[-1]["name"] == "chance (0.25)"


def test_a_scheme_that_was_not_measured_has_no_masses():
    sweep = mass_result()
    for group in GROUPS:
        sweep[f"{group}_layer"].loc["goat"] = -1
    panel = mass_panel(sweep, of="answer")
    assert not traces_of(panel, "goat") and traces_of(panel, "learned")


def test_single_runs_and_other_schemes_can_be_left_out():
    panel = mass_panel(mass_result(), Focus("goat", "hidden", runs=False), of="answer")
    assert [trace["name"] for trace in panel.traces] == ["goat", "goat"]


def test_the_figure_is_its_four_panels():
    sweep = mass_result()
    figure = draw_mass(sweep)
    panels = [mass_panel(sweep, of=of) for of in ("accuracy", *GROUPS)]
    assert len(figure.data) == sum(len(panel.traces) for panel in panels)
    texts = " ".join(note.text for note in figure.layout.annotations)
    assert all(panel.title in texts for panel in panels)
    assert texts.count("Whiskers span") == 1
    assert figure.layout.title.text == "What the answer rests on: needle"


def test_scheme_names_are_text():
    figure = draw_mass(mass_result())
    assert any("&lt;b&gt;rope" in trace.name for trace in figure.data)
    assert not any("<b>rope" in str(trace.hovertemplate) for trace in figure.data)


def test_what_cannot_be_drawn():
    with pytest.raises(TypeError, match="expected a mass_sweep Dataset"):
        draw_mass({})
    sweep = mass_result()
    with pytest.raises(ValueError, match="at least one measured cell"):
        draw_mass(sweep.assign(tokens=0 * sweep["tokens"]))
    with pytest.raises(ValueError, match="mass_sweep lacks mean_token"):
        draw_mass(sweep.drop_vars("mean_token"))
