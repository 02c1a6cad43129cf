"""The heads of a sink profile as a table: what each does, in numbers side by side."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

from goatviz.results import SINK_PROFILE, check_result


def sink_table(profile: xr.Dataset) -> xr.Dataset:
    """Signal versus sink, one row a head: the numbers beside the paper's diagnostic figure.

    Parameters
    ----------
    profile : xarray.Dataset
        From `sink_profile`.

    Returns
    -------
    xarray.Dataset
        Over (layer, head): first_mass, largest_mass, recent_mass, content_range, sink_rate (at
        the profile's threshold), and rank_correlation: Spearman's, over queries, between content
        range and the first key's mass (from the binned density). `.to_dataframe()` prints well.

    Examples
    --------
    >>> import torch
    >>> from goatviz import load_pretrained
    >>> ids = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    >>> table = sink_table(sink_profile(load_pretrained("copy-mixture-1-goat"), ids))
    >>> bool(table["first_mass"].max() > 0.5)
    True
    """
    check_result(profile, SINK_PROFILE)
    counts, first = profile["signal_count"], profile["first_importance"]
    names = ("first_mass", "largest_mass", "recent_mass", "content_range")
    table = profile[list(names)].copy()
    # The curve's own thresholds are hundredths, and the profile's need not be one.
    above = (first > np.float32(profile.attrs["threshold"])).astype(float).where(first.notnull())
    table["sink_rate"] = above.mean("input") if "input" in above.dims else above
    table["rank_correlation"] = xr.apply_ufunc(
        _rank_correlation,
        counts,
        input_core_dims=[["range_bin", "mass_bin"]],
        vectorize=True,
        output_dtypes=[float],
    )
    return table


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
