"""Whether a sink sheds its mass as the signal grows, at a fixed number of keys.

Later queries see more keys: their content range is wider and their mass on any one key smaller,
whatever the model does. Comparing queries at the same position takes that away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from goatviz import bins, checks
from goatviz.adapters.capture import capture
from goatviz.analysis.inputs import run_model
from goatviz.analysis.intervals import bootstrap_interval, bootstrap_weights
from goatviz.results import SIGNAL_CORRELATION, make_result
from goatviz.training.checkpoint import Checkpoint, model_of

if TYPE_CHECKING:
    import xarray as xr

#: Number of sequences in a forward pass.
_BATCH = 8


def signal_correlation(
    model: nn.Module | Checkpoint,
    ids: Tensor,
    *,
    layer: int = -1,
    first_query: int = 16,
    resamples: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    r"""Rank correlation of content range and mass on the first key, among queries at one position.

    The mean over positions :math:`i` of Spearman's :math:`\rho(w_i, p_{i0})` over inputs; positions
    at which all masses are equal (as where they underflow to 0) are left out.

    Parameters
    ----------
    model : nn.Module or Checkpoint
        A model that `goatviz.capture` can watch.
    ids : Tensor
        Token ids, shape (inputs, length), at least two inputs.
    layer : int
        Attention layer; negative numbers count from the last.
    first_query : int
        First position that counts: the earliest queries have few keys to choose from.
    resamples, seed : int
        Number of resamples of the bootstrap over inputs, and its seed.

    Returns
    -------
    xarray.Dataset
        Schema `signal_correlation`: in [-1, 1] by head and for their mean, with 95 % percentile
        bootstrap intervals over inputs (ranks are those of all inputs). Below 0, the first key
        loses mass where content differs more. NaN for a head without such positions.

    Raises
    ------
    ValueError
        If there are fewer than two inputs, or none is longer than `first_query`.

    Examples
    --------
    >>> from goatviz.training import load_pretrained
    >>> ids = torch.randint(32, (8, 64), generator=torch.Generator().manual_seed(0))
    >>> shed = signal_correlation(load_pretrained("copy-mixture-1-goat"), ids)
    >>> shed["correlation"].dims, float(shed["mean_correlation"].round(1))
    (('head',), -0.2)
    """
    model = model_of(model)
    checks.instance("ids", ids, Tensor, "a Tensor of token ids")
    checks.integer("first_query", first_query, low=1)
    if ids.ndim != 2 or len(ids) < 2 or ids.shape[1] <= first_query:
        raise ValueError(
            f"ids must have shape (2 or more, more than {first_query}), got {tuple(ids.shape)}"
        )
    ranges, masses = [], []
    for batch in ids.split(_BATCH):
        with capture(model, statistics=("key_mass", "content_range"), keep="statistics") as record:
            run_model(model, batch)
        rows = record.calls[layer].rows
        ranges.append(rows.content_range)
        masses.append(rows.key_mass[..., rows.keys.index(0)])
    kept = [
        torch.cat(parts)[:, :, first_query:].double().cpu().numpy() for parts in (ranges, masses)
    ]
    products = np.prod([_standard_ranks(values) for values in kept], axis=0)
    by_head = bins.mean_of_finite(products, axis=-1)
    weights = bootstrap_weights(len(ids), resamples, seed)
    data = {}
    for name, values in (
        ("correlation", by_head),
        ("mean_correlation", bins.mean_of_finite(by_head, 1)),
    ):
        data[name] = bins.mean_of_finite(values, axis=0)
        data[f"{name}_low"], data[f"{name}_high"] = bootstrap_interval(values, weights)
    return make_result(
        SIGNAL_CORRELATION,
        data,
        coords={"head": np.arange(by_head.shape[1])},
        attrs={
            "layer": record.calls[layer].layer,
            "n_inputs": len(ids),
            "length": ids.shape[1],
            "first_query": first_query,
            "resamples": resamples,
            "seed": seed,
        },
    )


def _standard_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks over the first axis, ties sharing theirs, with mean 0 and variance 1; else NaN."""
    below = (values[:, None] > values).sum(axis=1)
    ranks = below + ((values[:, None] == values).sum(axis=1) - 1) / 2
    ranks -= ranks.mean(axis=0)
    spread = ranks.std(axis=0)
    return ranks / np.where(spread > 0, spread, np.nan)
