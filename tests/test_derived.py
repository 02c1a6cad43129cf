"""Fields that follow from others: against loops over runs, and in files that lack them."""

import numpy as np
import pytest

from goatviz.derived import leading_masses
from goatviz.results import MASS_SWEEP, PERPLEXITY_SWEEP, load_result, save_result
from tests.factories import mass_result, perplexity_result

RAW = {"tokens", "token", "token_low", "token_high"} | {
    f"{plan}{group}_mass{end}"
    for plan in ("", "prior_")
    for group in ("answer", "first", "recent")
    for end in ("", "_low", "_high")
}


def fields_of(sweep, training_length=None):
    """The derived fields of a sweep, from its others."""
    return leading_masses(
        {name: sweep[name].values for name in RAW},
        sweep.coords,
        {"training_length": training_length or sweep.attrs["training_length"]},
    )


def test_means_follow_the_head_that_leads_at_the_training_length():
    sweep = mass_result()
    assert int(sweep["reference_length"]) == 32
    for group in ("answer", "first", "recent"):
        for scheme in sweep["scheme"].values:
            runs = {plan: [] for plan in ("", "prior_")}
            for run in sweep["run"].values:
                one = sweep.sel(scheme=scheme, run=run)
                at_training = one[f"{group}_mass"].sel(length=32).values
                layer, head = np.unravel_index(at_training.argmax(), at_training.shape)
                assert (int(one[f"{group}_layer"]), int(one[f"{group}_head"])) == (layer, head)
                for plan, led in runs.items():
                    ends = [one[f"{plan}{group}_mass{end}"] for end in ("", "_low", "_high")]
                    led.append(np.stack([end.sel(layer=layer, head=head) for end in ends]))
            for plan, led in runs.items():
                mean, low, high = np.moveaxis(np.array(led), 1, 0)
                one = sweep.sel(scheme=scheme)
                np.testing.assert_array_equal(one[f"run_{plan}{group}_mass"], mean)
                name = f"mean_{plan}{group}_mass"
                np.testing.assert_allclose(one[name], mean.mean(0))
                np.testing.assert_array_equal(one[f"{name}_low"], low.min(0))
                np.testing.assert_array_equal(one[f"{name}_high"], high.max(0))
    # Learned positions end at the training length.
    assert np.isnan(sweep["mean_answer_mass"].sel(scheme="learned", length=64))
    np.testing.assert_allclose(sweep["mean_token"], sweep["token"].mean("run"))


@pytest.mark.parametrize(("trained", "reference"), [("32", 32), ("48", 24), ("24, 32", 24)])
def test_without_one_measured_training_length_heads_are_chosen_at_the_shortest(trained, reference):
    assert fields_of(mass_result(), trained)["reference_length"] == reference


def test_a_run_that_was_not_measured_has_no_head_and_no_say():
    sweep = mass_result()
    for name in RAW - {"tokens"}:
        sweep[name][0, 1] = np.nan
    fields = fields_of(sweep)
    assert fields["answer_layer"][0, 1] == fields["answer_head"][0, 1] == -1
    assert np.isnan(fields["run_answer_mass"][0, 1]).all()
    np.testing.assert_array_equal(fields["mean_answer_mass"][0], fields["run_answer_mass"][0, 0])


@pytest.mark.parametrize(
    ("result", "schema", "raw"),
    [
        (mass_result, MASS_SWEEP, RAW),
        (
            perplexity_result,
            PERPLEXITY_SWEEP,
            {name for name in PERPLEXITY_SWEEP.fields if "perplexity" not in name},
        ),
    ],
)
def test_files_of_earlier_versions_are_completed(result, schema, raw, tmp_path):
    whole = result()
    old = whole[sorted(raw)].assign_attrs(whole.attrs)
    old.to_netcdf(tmp_path / "old.nc", engine="h5netcdf")
    loaded = load_result(tmp_path / "old.nc")
    assert set(loaded.data_vars) == set(schema.fields)
    for name in schema.fields:
        assert loaded[name].identical(whole[name]), name
    # A dimension that a selection dropped stays dropped.
    one = old.isel(scheme=0)
    one.to_netcdf(tmp_path / "one.nc", engine="h5netcdf")
    loaded = load_result(tmp_path / "one.nc")
    for name in schema.fields:
        np.testing.assert_array_equal(
            loaded[name], whole[name].isel(scheme=0, missing_dims="ignore")
        )
    assert load_result(save_result(whole, tmp_path / "new.nc")).identical(whole)


def test_what_nothing_follows_from_is_named(tmp_path):
    mass_result()[["token"]].to_netcdf(tmp_path / "damaged.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match="mass_sweep lacks tokens, "):
        load_result(tmp_path / "damaged.nc")
