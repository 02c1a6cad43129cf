"""The heads of a sink profile as a table: what each of them does, in numbers side by side."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np

from goatviz.results import SINK_PROFILE, check_result, with_all_dimensions

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

#: Fields of a profile that are numbers of a head, in the order of the table.
_FIELDS = (
    "first_mass",
    "largest_mass",
    "recent_mass",
    "previous_mass",
    "induction_mass",
    "sink_column_mass",
    "entropy",
    "effective_rank",
    "second_importance",
    "content_range",
    "margin",
)


def heads_table(profile: xr.Dataset) -> pd.DataFrame:
    """All heads of a sink profile, one row a head, the strongest sink first.

    Parameters
    ----------
    profile : xarray.Dataset
        From `goatviz.sink_profile`, or a selection of it.

    Returns
    -------
    pandas.DataFrame
        Columns layer, head, layer_name, then means over queries and inputs:

        - first_mass, largest_mass, recent_mass, previous_mass, induction_mass, sink_column_mass:
          weight [probability] of the first key, of the largest one, of the recent window, of the
          token before the query, of the key after the query's token occurred last (among queries
          whose token did; Olsson et al. 2022, arXiv 2209.11895), and of the extra column;
        - entropy [nats], and relative_entropy: its share of that of uniform attention;
        - effective_rank: exp of the information [nats] that a query gives about its key, 1 for a
          plan whose rows are all equal; second_importance: the largest importance of a key other
          than the first;
        - content_range [score], margin [nats];
        - sink_rate: share of inputs whose first key is a sink, at the profile's threshold;
        - rank_correlation: Spearman's, over queries, between content range and the first key's
          mass, from the binned density.

        Sorted by first_mass. NaN where a number is not known: the margin of a head without
        prior, the induction of inputs that are no token ids or repeat none, what a profile that
        was saved by an earlier version lacks.

    Raises
    ------
    TypeError
        If `profile` is no sink profile.

    Examples
    --------
    >>> import torch
    >>> from goatviz import load_pretrained, sink_profile
    >>> ids = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    >>> table = heads_table(sink_profile(load_pretrained("copy-mixture-1-goat"), ids))
    >>> table[["layer", "head", "first_mass", "previous_mass"]].round(2).values.tolist()
    [[0.0, 1.0, 1.0, 0.02], [0.0, 0.0, 0.02, 0.0]]
    """
    check_result(profile, SINK_PROFILE)
    profile = with_all_dimensions(profile, SINK_PROFILE)
    numbers = head_numbers(profile)
    frame = numbers.assign(profile[["layer_name", "present"]]).to_dataframe().reset_index()
    frame = frame[frame["present"]].sort_values("first_mass", ascending=False, kind="stable")
    columns = ["layer", "head", "layer_name", *numbers.data_vars]
    return frame[columns].reset_index(drop=True)


def head_numbers(profile: xr.Dataset) -> xr.Dataset:
    """The numbers of `heads_table` over (layer, head); NaN where a profile lacks them."""
    import xarray as xr

    unknown = xr.full_like(profile["first_mass"], np.nan, dtype=float)
    table = xr.Dataset({name: profile.get(name, unknown) for name in _FIELDS}).reset_coords(
        drop=True
    )
    uniform = profile.get("uniform_entropy", unknown)
    table = table.assign(relative_entropy=(table["entropy"] / uniform).where(uniform > 0))
    # The curve's own thresholds are hundredths, and the profile's need not be one.
    first = profile["first_importance"]
    above = (first > np.float32(profile.attrs["threshold"])).astype(float).where(first.notnull())
    table["sink_rate"] = above.mean("input") if "input" in above.dims else above
    table["rank_correlation"] = xr.apply_ufunc(
        _rank_correlation,
        profile["signal_count"],
        input_core_dims=[["range_bin", "mass_bin"]],
        vectorize=True,
        output_dtypes=[float],
    )
    order = list(_FIELDS)
    order.insert(order.index("entropy") + 1, "relative_entropy")
    return table[[*order, "sink_rate", "rank_correlation"]]


def sink_table(profile: xr.Dataset) -> xr.Dataset:
    """The old name of `heads_table`, as a Dataset over (layer, head), for one release.

    .. deprecated:: 0.2

    Examples
    --------
    >>> import torch
    >>> from goatviz import load_pretrained, sink_profile
    >>> ids = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    >>> profile = sink_profile(load_pretrained("copy-mixture-1-goat"), ids)
    >>> with warnings.catch_warnings(action="ignore"):
    ...     table = sink_table(profile)
    """
    warnings.warn(
        "sink_table is now heads_table, a DataFrame, and will be removed in the next release",
        DeprecationWarning,
        stacklevel=2,
    )
    return head_numbers(check_result(profile, SINK_PROFILE))


def _rank_correlation(counts: np.ndarray) -> float:
    """Spearman's correlation of a two-way table of counts; ties share their mean rank."""
    total = counts.sum()
    if total < 2:
        return math.nan
    ranks, spreads = [], []
    for axis in (0, 1):
        margin = counts.sum(1 - axis)
        rank = np.cumsum(margin) - margin / 2 - total / 2
        ranks.append(rank)
        spreads.append(math.sqrt(float((margin * rank**2).sum())))
    if min(spreads) == 0:
        return math.nan
    return float(ranks[0] @ counts @ ranks[1] / (spreads[0] * spreads[1]))
