"""The table of heads: previous-token and induction masses by definition, and what is not known."""

import numpy as np
import pytest
import torch

from goatviz import capture
from goatviz.analysis import heads_table, sink_profile, sink_table
from goatviz.analysis.heads import head_numbers
from goatviz.analysis.sink_passes import induction_keys
from goatviz.attention import Attention
from goatviz.results import load_result, save_result
from goatviz.transport import AttentionCall
from tests.factories import (
    MixedHeads,
    hidden_states,
    ids,
    sink_result,
    tiny_huggingface,
    tiny_lm,
)

COLUMNS = [
    "layer",
    "head",
    "layer_name",
    "first_mass",
    "largest_mass",
    "recent_mass",
    "previous_mass",
    "induction_mass",
    "sink_column_mass",
    "entropy",
    "relative_entropy",
    "effective_rank",
    "second_importance",
    "content_range",
    "margin",
    "sink_rate",
    "rank_correlation",
]


def eager(model, given):
    """The model's own weights, (layers, batch, heads, queries, keys)."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(model(given, output_attentions=True).attentions).double().numpy()


def places(row):
    """Where an induction head looks, token by token."""
    out = []
    for i, token in enumerate(row):
        before = [j for j in range(i) if row[j] == token]
        out.append(before[-1] + 1 if before else -1)
    return out


def mean_over_inputs(rows):
    """Means of means; inputs without any value do not count."""
    means = [np.nanmean(row) for row in rows if np.isfinite(row).any()]
    return np.mean(means) if means else np.nan


@pytest.mark.parametrize("seed", range(5))
def test_the_places_of_induction_are_those_by_hand(seed):
    given = ids(3, 40, vocab=3 + 8 * seed, seed=seed)
    assert induction_keys(given).tolist() == [places(row) for row in given.tolist()]
    assert induction_keys(torch.arange(7)[None]).tolist() == [[-1] * 7]
    assert induction_keys(torch.zeros(1, 1, dtype=torch.int32)).tolist() == [[-1]]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gpt-oss", "gemma2", "bert"])
def test_masses_are_those_of_the_models_own_weights(name):
    model = tiny_huggingface(name, std=0.3).base_model
    inputs = [ids(2, 24, vocab=12), ids(1, 30, vocab=50, seed=1), torch.arange(20)[None]]
    profile = sink_profile(model, inputs)
    weights = [eager(model, given) for given in inputs]
    for layer, head in np.ndindex(*profile["present"].shape):
        previous, induction = [], []
        for given, found in zip(inputs, weights, strict=True):
            for row, plan in zip(given.tolist(), found[layer, :, head], strict=True):
                at = np.array(places(row))
                previous.append(np.diagonal(plan, -1))
                own = plan[np.arange(len(at)), at]
                induction.append(np.where(at >= 0, own, np.nan))
        for name, rows in (("previous_mass", previous), ("induction_mass", induction)):
            found = profile[name].values[layer, head]
            assert found == pytest.approx(mean_over_inputs(rows), abs=2e-5), name


def test_a_head_that_copies_and_one_that_looks_back_are_found():
    """Heads made by hand: one repeats the token before, one what followed the last time."""
    text = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4] * 2])
    length = text.shape[1]
    logits = torch.full((1, 2, length, length), -30.0)
    back, keys = torch.arange(1, length), induction_keys(text)[0]
    logits[0, 0, back, back - 1] = 0.0
    logits[0, 1, keys >= 0, keys[keys >= 0]] = 0.0

    class Made(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, ids):
            x = torch.zeros(*ids.shape, 4)
            return self.attention(x, x, x, attn_mask=logits[0], need_weights=False)[0]

    table = heads_table(sink_profile(Made().eval(), text)).set_index("head")
    assert table["previous_mass"][0] > 0.99 > 0.3 > table["previous_mass"][1]
    assert table["induction_mass"][1] > 0.99 > 0.3 > table["induction_mass"][0]


def test_what_is_not_known_is_not_a_number():
    profile = sink_profile(MixedHeads(), hidden_states(30, 27))
    assert profile["induction_mass"].isnull().all()
    assert np.isfinite(profile["previous_mass"].values[profile["present"].values]).all()
    assert sink_profile(tiny_lm(), torch.arange(20)[None])["induction_mass"].isnull().all()
    # A record knows no token ids; one without the statistic, not the previous token either.
    model = tiny_lm()
    for statistics, known in ((None, True), (("gathered_mass",), False)):
        options = {} if known else {"statistics": _all_but(statistics)}
        with capture(model, **options) as record:
            model(ids(1, 24))
        found = sink_profile(record)
        assert found["previous_mass"].notnull().all() == known
        assert found["induction_mass"].isnull().all()
    with capture(model, at=_diagonal) as record:
        model(ids(1, 24))
    assert sink_profile(record)["previous_mass"].isnull().all()


def _all_but(left_out):
    from goatviz.adapters import CAPTURE_STATISTICS

    return [name for name in CAPTURE_STATISTICS if name not in left_out]


def _diagonal(call: AttentionCall):
    return torch.arange(call.shape[2])[None, :, None]


def test_tokens_of_two_texts_are_not_mixed_up():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Attention(8, 2)
            self.table = torch.nn.Embedding(20, 8)

        def forward(self, input_ids, decoder_input_ids):
            return self.layer(self.table(decoder_input_ids))

    given = {"input_ids": ids(1, 20), "decoder_input_ids": ids(1, 20, seed=1)}
    assert sink_profile(Two(), given)["induction_mass"].isnull().all()


def test_relative_entropy_is_that_share_of_uniform_attention():
    layer = Attention(8, 1, content_dim=4)
    torch.nn.init.zeros_(layer.q_proj.weight)
    torch.nn.init.zeros_(layer.q_proj.bias)
    x = torch.randn(2, 20, 8)
    (row,) = heads_table(sink_profile(layer, x)).to_dict("records")
    assert row["relative_entropy"] == pytest.approx(1.0, abs=1e-6)
    assert row["entropy"] == pytest.approx(np.log(np.arange(1, 21)).mean(), abs=1e-6)
    for case in ("mistral", "gpt-oss", "bert"):
        share = heads_table(sink_result(case))["relative_entropy"]
        assert share.between(0, 1 + 1e-6).all(), case


# --- the table ---


def test_the_table_has_a_row_for_every_head_that_there_is_strongest_sinks_first():
    profile = sink_result("toy")
    table = heads_table(profile)
    assert list(table) == COLUMNS and len(table) == profile.attrs["n_heads"] == 11
    assert table["first_mass"].is_monotonic_decreasing
    assert table.index.tolist() == list(range(11))
    for row in table.to_dict("records"):
        part = profile.sel(layer=row["layer"], head=row["head"])
        assert row["layer_name"] == part["layer_name"].item()
        for name in COLUMNS[3:]:
            if name in part:
                value = row[name]
                if name == "sink_rate":
                    continue
                np.testing.assert_equal(value, part[name].item(), err_msg=name)
        assert row["sink_rate"] == part["sink_rate"].sel(threshold=0.3).item()
    assert "<table" in table._repr_html_()
    part = heads_table(profile.sel(layer=1))
    wanted = table[table["layer"] == 1].reset_index(drop=True)
    assert part.equals(wanted)
    assert (
        heads_table(profile.sel(layer=1, head=2))
        .iloc[0]
        .equals(wanted[wanted["head"] == 2].iloc[0].rename(0))
    )


def test_layers_called_like_markup_stay_text():
    shown = heads_table(sink_result("hostile"))._repr_html_()
    assert "<img" not in shown and "&lt;img" in shown


def test_profiles_of_earlier_versions_have_a_table(tmp_path):
    profile = sink_result("gpt2").drop_vars(
        [
            "previous_mass",
            "induction_mass",
            "uniform_entropy",
            "effective_rank",
            "second_importance",
        ]
    )
    loaded = load_result(save_result(profile, tmp_path / "old.nc"))
    table = heads_table(loaded)
    assert list(table) == COLUMNS
    for name in ("previous_mass", "induction_mass", "relative_entropy"):
        assert table[name].isna().all()
    assert np.array_equal(table["entropy"], heads_table(sink_result("gpt2"))["entropy"])


def test_the_old_name_warns():
    profile = sink_result("gpt2")
    with pytest.warns(DeprecationWarning, match="sink_table is now heads_table"):
        old = sink_table(profile)
    assert old.identical(head_numbers(profile))
    with pytest.raises(TypeError, match="expected a sink_profile Dataset, got dict"):
        heads_table({})


def ranks(values):
    """Average ranks, from 1."""
    order = np.sort(values)
    low = np.searchsorted(order, values, side="left")
    return (low + np.searchsorted(order, values, side="right") + 1) / 2


def test_the_tables_rank_correlation_is_spearmans():
    profile = sink_profile(tiny_lm(), ids(4, 40))
    table = heads_table(profile).set_index(["layer", "head"])
    for layer, head in np.ndindex(2, 2):
        counts = profile["signal_count"].values[layer, head]
        at = np.repeat(np.argwhere(counts), counts[counts > 0], axis=0)
        wanted = np.corrcoef(ranks(at[:, 0]), ranks(at[:, 1]))[0, 1]
        assert table["rank_correlation"][layer, head] == pytest.approx(wanted, abs=1e-12)


def test_the_tables_rate_is_at_the_profiles_own_threshold():
    model, x = tiny_lm(num_heads=4, embed_dim=64), ids(9, 24)
    first = np.sort(sink_profile(model, x)["first_importance"].values.ravel())
    # Between two importances that share a hundredth, where the curve knows no threshold.
    cells = np.floor(100 * first)
    pair = np.flatnonzero((np.diff(cells) == 0) & (np.diff(first) > 1e-5))[0]
    threshold = float(first[pair : pair + 2].mean())
    table = heads_table(sink_profile(model, x, threshold=threshold))
    assert table["sink_rate"].mean() == pytest.approx((first > threshold).mean())
    one = sink_profile(model, x).sel(input=0, layer=1)
    assert set(heads_table(one)["sink_rate"]) <= {0.0, 1.0}
    uniform = tiny_lm("none")
    for parameter in uniform.parameters():
        torch.nn.init.zeros_(parameter)
    assert heads_table(sink_profile(uniform, ids(1, 20)))["rank_correlation"].isna().all()
