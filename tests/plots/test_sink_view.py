"""What is drawn of a sink profile when not all of it fits, and in which words."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goatviz.plots import sink_view

SIZES = st.integers(1, 3000)
MOST = st.integers(1, 200)


@given(count=SIZES, most=MOST)
def test_even_bins_are_a_partition(count, most):
    edges = sink_view.even_bins(count, most)
    assert edges[0] == 0 and edges[-1] == count and len(edges) - 1 == min(count, most)
    assert np.ptp(np.diff(edges)) <= 2 and np.diff(edges).min() >= 1


@given(count=SIZES, most=MOST, start=st.integers(0, 500))
def test_logarithmic_bins_are_a_partition(count, most, start):
    edges = sink_view.log_bins(np.arange(start, start + count), most)
    assert edges[0] == 0 and edges[-1] == count and len(edges) - 1 <= most
    assert np.diff(edges).min() >= 1
    if count <= most:
        assert len(edges) == count + 1


def test_the_largest_of_a_bin_is_a_number_if_there_is_one():
    values = np.array([0.1, 0.3, np.nan, 0.2, np.nan, np.nan, 0.3, 0.3])
    assert sink_view.largest(values, np.array([0, 2, 4, 6, 8])).tolist() == [1, 3, 4, 6]


def test_pooled_cells_are_means_over_what_is_allowed():
    rng = np.random.default_rng(0)
    values, allowed = rng.standard_normal((7, 9)), rng.random((7, 9)) < 0.5
    allowed[:3, :4] = False
    values[~allowed] = np.nan
    rows, cols = np.array([0, 3, 7]), np.array([0, 4, 5, 9])
    mean, seen = sink_view.pooled_mean(values, allowed, rows, cols)
    for a, b in np.ndindex(2, 3):
        cell = np.s_[rows[a] : rows[a + 1], cols[b] : cols[b + 1]]
        assert seen[a, b] == allowed[cell].any()
        if seen[a, b]:
            assert mean[a, b] == pytest.approx(values[cell][allowed[cell]].mean())
        else:
            assert np.isnan(mean[a, b])


def test_the_mean_leaves_out_what_is_not_finite():
    values = np.array([[1.0, np.nan, np.inf], [3.0, 2.0, np.nan]])
    np.testing.assert_array_equal(sink_view.mean_of_finite(values), [2, 2, np.nan])
    assert sink_view.mean_of_finite(values, (0, 1)) == 2


@pytest.mark.parametrize("causal", [True, False])
def test_uniform_importance_is_the_mean_of_uniform_weights(causal):
    length = 12
    weights = np.tri(length) if causal else np.ones((length, length))
    weights /= weights.sum(axis=1, keepdims=True)
    wanted = [weights[j:, j].mean() if causal else weights[:, j].mean() for j in range(length)]
    found = sink_view.uniform_importance(np.arange(length), length, causal=causal)
    np.testing.assert_allclose(found, wanted)


@pytest.mark.parametrize(
    ("values", "text"),
    [([3], "3"), ([0, 1], "0, 1"), (range(12), "0 to 11"), ([0, 4, 5], "0, 4, 5")],
)
def test_numbers_in_a_sentence(values, text):
    assert sink_view.listed(np.array(values)) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, ""), (0.004, ".00"), (0.5, ".50"), (0.994, ".99"), (0.995, "1")]
)
def test_cells_have_room_for_three_characters(value, text):
    value = np.nan if text == "" else value
    assert sink_view.cell_texts(np.array([[value]])) == [[text]]


def test_long_tokens_are_cut_before_they_are_escaped():
    assert sink_view.shortened("<b>") == "&lt;b&gt;"
    assert sink_view.shortened("<" * 40) == "&lt;" * 40
    assert sink_view.shortened("<" * 41) == "&lt;" * 39 + "…"


def test_wide_characters_need_more_room():
    assert sink_view.token_room(np.array(["ab", "日本日本"])) == sink_view.token_room(
        np.array(["abcdefgh"])
    )
    assert sink_view.token_room(np.array(["a"])) == 0


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("count", [1, 12, 13, 49, 128])
def test_ticks_are_at_most_twelve_and_name_what_lies_there(count, step):
    ids = np.arange(100, 100 + step * count, step)
    places = sink_view.places(ids)
    ticks = sink_view.id_ticks(places, ids)
    assert 1 <= len(ticks["tickvals"]) <= 12
    named = dict(zip(places.tolist(), ids.tolist(), strict=True))
    assert [str(named[at]) for at in ticks["tickvals"]] == ticks["ticktext"]


def test_ids_that_follow_one_another_are_their_own_places():
    assert sink_view.places(np.array([4, 5, 6])).tolist() == [4, 5, 6]
    assert sink_view.places(np.array([0, 4, 5])).tolist() == [0, 1, 2]


def test_logarithmic_ticks_are_decades_among_the_keys():
    assert sink_view.log_ticks(np.arange(3, 300)).tolist() == [5, 10, 20, 50, 100, 200]
    assert sink_view.log_ticks(np.arange(30_000)).tolist() == [0, 1, 10, 100, 1000, 10_000]
