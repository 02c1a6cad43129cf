"""Single numbers out of sweeps, with intervals over examples and over training seeds apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from goatviz import bins, checks
from goatviz.analysis.intervals import (
    bootstrap_interval,
    bootstrap_weights,
    difference_interval,
    student_interval,
)
from goatviz.results import LENGTH_SWEEP, PERPLEXITY_SWEEP, check_result

if TYPE_CHECKING:
    import xarray as xr


class Contrast(NamedTuple):
    """A number with its 95 % intervals over examples and over training seeds.

    Attributes
    ----------
    value, low, high : float
        The number, and the interval over questions or pieces, runs pooled.
    seed_low, seed_high : float
        Student's interval over runs; NaN for a single run.
    examples, seeds : int
        Numbers of questions or pieces, and of runs.
    """

    value: float
    low: float
    high: float
    seed_low: float
    seed_high: float
    examples: int
    seeds: int


def loss_contrast(
    sweep: xr.Dataset,
    scheme: str,
    length: int,
    *,
    less: str | None = None,
    at: int | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Contrast:
    """Loss of a scheme at a length, less that of another scheme or length, on the same pieces.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.perplexity_sweep`.
    scheme, length
        Scheme and length in tokens whose loss counts.
    less, at : str, int, optional
        Scheme and length whose loss is subtracted; default the same ones.
    resamples, seed : int
        Number of resamples of the bootstrap over pieces, and its seed.

    Returns
    -------
    Contrast
        In nats per token; with another scheme it equals `goatviz.loss_difference`.

    Raises
    ------
    ValueError
        If the sweep lacks a scheme or length.

    Examples
    --------
    >>> from goatviz.results import load_shipped_result
    >>> novels = load_shipped_result("text-eltec")
    >>> round(loss_contrast(novels, "goat", 256, less="rope").value, 4)
    0.0103
    """
    check_result(sweep, PERPLEXITY_SWEEP)
    first = _part(sweep, scheme=scheme, length=length)
    second = _part(sweep, less=less or scheme, at=at or length)
    by_piece = bins.mean_of_finite((first["loss"] - second["loss"]).values, axis=0)
    sizes = first["tokens"].values
    weights = bootstrap_weights(len(by_piece), resamples, seed)
    low, high = bootstrap_interval(by_piece, weights, sizes)
    runs = (first["run_loss"] - second["run_loss"]).values
    runs = runs[np.isfinite(runs)]
    value = float((by_piece * sizes).sum() / sizes.sum())
    ends = student_interval(runs)
    return Contrast(value, float(low), float(high), *ends, len(by_piece), len(runs))


def share_contrast(
    sweep: xr.Dataset, scheme: str, length: int, *, less: str | None = None, measure: str = "strict"
) -> Contrast:
    """Share of right answers of a scheme at a length, less that of another scheme.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.length_sweep`.
    scheme, length
        Scheme and length in tokens.
    less : str, optional
        Scheme whose share is subtracted; default none.
    measure : {"strict", "token"}
        Whether whole answers are counted, or their tokens.

    Returns
    -------
    Contrast
        Wilson's interval of a share, Newcombe's of a difference, over the questions of all runs
        together; over runs, Student's, cut at what a share can be.

    Raises
    ------
    ValueError
        If the sweep lacks the scheme or length, or the measure is unknown.

    Examples
    --------
    >>> from goatviz.results import load_shipped_result
    >>> passkey = load_shipped_result("passkey-sweep")
    >>> round(share_contrast(passkey, "goat", 1024).value, 3)
    0.648
    """
    check_result(sweep, LENGTH_SWEEP)
    checks.one_of("measure", measure, ("strict", "token"))
    first = _part(sweep, scheme=scheme, length=length)
    runs, share = first[measure].values, _share(first, measure)
    if less is None:
        value, low, high = share
        least = 0.0
    else:
        second = _part(sweep, less=less, length=length)
        runs = runs - second[measure].values
        other = _share(second, measure)
        value, (low, high) = share[0] - other[0], difference_interval(share, other)
        least = -1.0
    runs = runs[np.isfinite(runs)]
    seed_low, seed_high = np.clip(student_interval(runs), least, 1.0)
    return Contrast(
        value,
        low,
        high,
        float(seed_low),
        float(seed_high),
        int(first["examples"].sum()),
        len(runs),
    )


def _part(sweep: xr.Dataset, **place: str | int) -> xr.Dataset:
    """The part of a sweep at a scheme and a length, each under its argument's name."""
    (first, scheme), (second, length) = place.items()
    checks.one_of(first, scheme, sweep["scheme"].values.tolist())
    checks.one_of(second, length, sweep["length"].values.tolist())
    return sweep.sel(scheme=scheme, length=length)


def _share(one: xr.Dataset, measure: str) -> tuple[float, float, float]:
    low, value, high = (float(one[f"mean_{measure}{end}"]) for end in ("_low", "", "_high"))
    return value, low, high
