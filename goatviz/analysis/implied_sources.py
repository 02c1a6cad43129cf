"""The priors that a profile of an implied prior holds, as priors that can be recombined."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from goatviz.analysis.prior_curves import PriorSource
from goatviz.priors.table import KeyTablePrior, LagTablePrior
from goatviz.results import PRIOR_PROFILE, check_result, is_dataset, with_all_dimensions

if TYPE_CHECKING:
    import xarray as xr


def is_implied(profile: object) -> bool:
    """Whether this is a profile that `implied_prior` made."""
    return is_dataset(profile) and "explained_variance" in profile.variables


def implied_sources(profile: xr.Dataset) -> list[PriorSource]:
    r"""The fitted kappa and u of every layer, as tables: K_ij = kappa(i - j) + u(j).

    Parameters
    ----------
    profile : xarray.Dataset
        From `goatviz.implied_prior`, with a value for every key and lag, or a selection of its
        layers and heads.

    Returns
    -------
    list of PriorSource
        One for each layer, with its number. Its `fitted_length` counts the tokens of which every
        key and lag was seen by some input: beyond, the prior is unknown. `heads` are those of the
        profile.

    Raises
    ------
    TypeError
        If `profile` is not a result of `implied_prior`.
    ValueError
        If keys or lags are pooled in bins, or a layer has seen none.

    Examples
    --------
    >>> from goatviz import implied_prior, load_pretrained
    >>> ids = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    >>> (source,) = implied_sources(implied_prior(load_pretrained("copy-mixture-1-goat"), ids))
    >>> source.fitted_length, list(source.prior.components())
    (64, ['relative', 'sink'])
    """
    check_result(profile, PRIOR_PROFILE)
    if not is_implied(profile):
        raise TypeError("profile must come from goatviz.implied_prior, got one of a learned prior")
    profile = with_all_dimensions(profile, PRIOR_PROFILE)
    for dim in ("key", "lag"):
        width = int((profile[f"{dim}_stop"].values - profile[dim].values).max())
        if width > 1:
            raise ValueError(
                f"profile must hold every {dim} by itself, got means of up to {width:,}: ask "
                f"goatviz.implied_prior for points={int(profile.attrs['length'])}"
            )
    return [_source(profile.isel(layer=at)) for at in range(profile.sizes["layer"])]


def _source(layer: xr.Dataset) -> PriorSource:
    name, causal = layer["layer_name"].item(), bool(layer["causal"])
    first = int(np.flatnonzero(layer["lag"].values == 0)[0])
    seen = [layer["key_inputs"].values > 0, layer["lag_inputs"].values[first:] > 0]
    if not causal:
        # As many lags on the other side.
        seen.append(layer["lag_inputs"].values[first::-1] > 0)
    known = min(_leading(each) for each in seen)
    if not known:
        raise ValueError(f"profile must hold keys and lags that inputs show, got none for {name}")
    kernel = layer["kernel"].values[:, first - (0 if causal else known - 1) : first + known]
    sink = layer["sink"].values[:, :known]
    rotary: tuple[float, ...] = ()
    if "rotary_frequency" in layer.variables:
        speeds = layer["rotary_frequency"].values
        rotary = tuple(speeds[speeds > 0].tolist())
    heads, present = layer["head"].values, layer["present"].values
    lags = LagTablePrior(_table(kernel, heads, present), first_lag=0 if causal else 1 - known)
    return PriorSource(
        name,
        lags + KeyTablePrior(_table(sink, heads, present)),
        causal,
        layer=int(layer["layer"]),
        heads=tuple(heads[present].tolist()),
        fitted_length=known,
        rotary=rotary,
    )


def _leading(seen: np.ndarray) -> int:
    """How many are True before the first False."""
    return int(np.logical_and.accumulate(seen).sum())


def _table(values: np.ndarray, heads: np.ndarray, present: np.ndarray) -> torch.Tensor:
    """Rows at the places of their heads' numbers, float64; 0 for heads that are not there."""
    table = torch.zeros(int(heads[present].max()) + 1, values.shape[-1], dtype=torch.float64)
    table[torch.from_numpy(heads[present])] = torch.from_numpy(values[present])
    return table
