"""Every head of a model at a glance: small pictures of all plans, and the head worth a look.

Some queries stand for all, so that hundreds of heads take a moment beside the forward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from goatviz import checks
from goatviz.adapters.capture import CapturedCall, Record
from goatviz.analysis.levels import first_key
from goatviz.bins import even_edges
from goatviz.results import PLAN_THUMBNAILS, check_result, make_result, with_all_dimensions
from goatviz.transport.call import AttentionCall
from goatviz.transport.visibility import entry_of

# Number of pairs whose float64 logits are held at a time.
_PAIRS = 2**23


def plan_thumbnails(record: Record, *, cells: int = 32, batch: int = 0) -> xr.Dataset:
    """Small pictures of every head's plan, and how spread each plan is.

    At evenly spaced queries i, row i of the plan is computed as in `Record.plan` and pooled: a cell
    is the largest weight of its keys, so that a thin diagonal stays visible.

    Parameters
    ----------
    record : Record
        Captured with keep="projections"; of several calls of a layer, the last is shown.
    cells : int
        Largest number of rows and columns of a picture.
    batch : int
        Number of the sequence.

    Returns
    -------
    xarray.Dataset
        Schema "plan_thumbnails", with the captured layers by their numbers. `weights`, shape
        (layer, head, row, column), float32: NaN where no key of a cell is visible. `query` is the
        query of a row, `key_start` and `key_stop` the keys of a column, counted from the start of
        the text; -1 where a layer has fewer rows or columns than others. Means over the shown
        queries that see two keys or more, padding left out: `relative_entropy`, that of
        H(p_i) / log(number of visible keys), in [0, 1], where the column of a sink counts as a key;
        and `first_mass`, the weight of the first key that is no padding. They are NaN where there
        is no such query, and where `present` is False because a layer has fewer heads.

    Raises
    ------
    TypeError
        If `record` is not a Record.
    ValueError
        If it is empty or holds statistics only, or there is no such sequence.

    Examples
    --------
    >>> from goatviz import capture, load_pretrained
    >>> model = load_pretrained("copy-mixture-1-goat").model
    >>> with capture(model, statistics=(), keep="projections") as record:
    ...     _ = model(torch.zeros(1, 64, dtype=torch.long))
    >>> dict(plan_thumbnails(record, cells=16)["weights"].sizes)
    {'layer': 1, 'head': 2, 'row': 16, 'column': 16}
    """
    checks.instance("record", record, Record, "a Record")
    cells = checks.positive_int("cells", cells)
    # The last call of each layer.
    calls = {call.layer: call for call in record.check_calls()}
    layers = sorted(calls)
    parts = [_thumbnails(calls[layer], cells, batch) for layer in layers]
    heads, rows, columns = np.max([part.weights.shape for part in parts], axis=0)
    shape = (len(layers), heads)
    data = {
        "layer_name": np.array([calls[layer].name for layer in layers]),
        "present": np.zeros(shape, dtype=bool),
        "weights": np.full((*shape, rows, columns), np.nan, np.float32),
        "relative_entropy": np.full(shape, np.nan),
        "first_mass": np.full(shape, np.nan),
        "query": np.full((len(layers), rows), -1),
        "key_start": np.full((len(layers), columns), -1),
        "key_stop": np.full((len(layers), columns), -1),
    }
    for at, part in enumerate(parts):
        count, height, width = part.weights.shape
        data["present"][at, :count] = True
        data["weights"][at, :count, :height, :width] = part.weights
        data["relative_entropy"][at, :count] = part.relative_entropy
        data["first_mass"][at, :count] = part.first_mass
        data["query"][at, :height] = part.queries
        data["key_start"][at, :width], data["key_stop"][at, :width] = (
            part.edges[:-1],
            part.edges[1:],
        )
    coords = {"layer": layers, "head": np.arange(heads)}
    coords |= {"row": np.arange(rows), "column": np.arange(columns)}
    return make_result(PLAN_THUMBNAILS, data, coords=coords, attrs={"batch": batch})


def structured_head(thumbnails: xr.Dataset, sink: float = 0.3) -> tuple[int, int]:
    """The head whose plan has most structure: of least relative entropy among those without a sink.

    A head is left out if its mean weight on the first key is `sink` or more: its entropy is low
    because it looks at nothing else. If that leaves none, all heads are compared.

    Parameters
    ----------
    thumbnails : xarray.Dataset
        From `plan_thumbnails`.
    sink : float
        Mean weight of the first key from which a head counts as a sink, in [0, 1].

    Returns
    -------
    layer, head : int
        Numbers of the layer and of the head; the first of equals.

    Raises
    ------
    TypeError
        If `thumbnails` is not a result of `plan_thumbnails`.
    ValueError
        If `sink` is out of range, or no head has a query that sees two keys.

    Examples
    --------
    >>> from goatviz import capture, load_pretrained
    >>> model = load_pretrained("copy-mixture-1-goat").model
    >>> with capture(model, statistics=(), keep="projections") as record:
    ...     _ = model(torch.zeros(1, 64, dtype=torch.long))
    >>> structured_head(plan_thumbnails(record))
    (0, 0)
    """
    check_result(thumbnails, PLAN_THUMBNAILS)
    sink = checks.number("sink", sink, low=0, high=1)
    thumbnails = with_all_dimensions(thumbnails, PLAN_THUMBNAILS)
    entropy, first = thumbnails["relative_entropy"].values, thumbnails["first_mass"].values
    if np.isnan(entropy).all():
        raise ValueError("thumbnails must hold a head whose queries see two keys, got none")
    left = np.where(first < sink, entropy, np.nan)
    if np.isnan(left).all():
        left = entropy
    layer, head = np.unravel_index(np.nanargmin(left), left.shape)
    return int(thumbnails["layer"][layer]), int(thumbnails["head"][head])


class _Thumbnails(NamedTuple):
    """Those of one layer, in numpy: heads first."""

    weights: np.ndarray
    relative_entropy: np.ndarray
    first_mass: np.ndarray
    queries: np.ndarray
    edges: np.ndarray


@torch.no_grad()
def _thumbnails(captured: CapturedCall, cells: int, batch: int) -> _Thumbnails:
    call = captured.projections
    batch = checks.index("batch", batch, call.shape[0])
    _, heads, n_queries, n_keys = call.shape
    queries = np.linspace(0, n_queries - 1, min(cells, n_queries)).round().astype(np.int64)
    rows, edges = torch.from_numpy(queries), even_edges(n_keys, cells)
    first = first_key(call, batch)
    counted = torch.ones(len(rows), dtype=torch.bool)
    if call.query_mask is not None:
        counted = entry_of(call.query_mask, batch).cpu()[rows]
    pictures, entropies, firsts = [], [], []
    step = max(1, _PAIRS // (len(rows) * n_keys))
    for start in range(0, heads, step):
        at = slice(start, start + step)
        weights, allowed = head_weights(call, batch, at, rows)
        count = allowed.sum(-1)
        if call.sink is not None:
            count = count + (count > 0)
        entropy = torch.special.entr(weights).sum(-1) / count.double().log()
        used = counted.to(count.device) & (count > 1)
        entropies.append(_mean(entropy, used))
        mass = torch.zeros_like(entropy) if first is None else weights[..., first]
        firsts.append(_mean(mass, used))
        visible = weights[..., :n_keys].masked_fill(~allowed, -torch.inf).cpu().numpy()
        best = np.maximum.reduceat(visible, edges[:-1].astype(np.intp), axis=-1)
        pictures.append(np.where(np.isneginf(best), np.nan, best).astype(np.float32))
    joined = (np.concatenate(parts) for parts in (pictures, entropies, firsts))
    return _Thumbnails(*joined, queries, call.gone + edges)


def head_weights(
    call: AttentionCall, batch: int, heads: slice, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights of several heads, as in `AttentionCall.plan`, and which pairs are allowed.

    Both float64 and bool, shape (heads, rows, keys); the weights have the column of a sink behind
    their keys. Without a key to use, a row is NaN, or all of it is in that column.
    """
    _, _, logits, allowed = call.logits(batch, heads, rows)
    allowed = allowed.expand_as(logits)
    if call.sink is not None:
        column = call.sink_logits(batch, heads, rows).unsqueeze(-1)
        logits = torch.cat([logits, column.to(logits)], dim=-1)
    return logits.softmax(-1), allowed


def _mean(values: Tensor, used: Tensor) -> np.ndarray:
    """The mean over the used queries of each head, NaN where there is none."""
    total = torch.where(used, values, 0.0).sum(-1)
    return (total / used.sum(-1)).cpu().numpy()
