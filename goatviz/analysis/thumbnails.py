"""Every head of a model at a glance: small pictures of all plans or priors, and one worth a look.

Some queries stand for all, so that hundreds of heads take a moment beside the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from goatviz import checks
from goatviz.adapters.capture import CapturedCall, Record
from goatviz.analysis.levels import first_key
from goatviz.analysis.prior import prior_sources
from goatviz.analysis.prior_curves import PriorCurves, PriorSource
from goatviz.bins import even_edges
from goatviz.priors.base import Prior
from goatviz.results import PLAN_THUMBNAILS, check_result, make_result, with_all_dimensions
from goatviz.transport.call import AttentionCall
from goatviz.transport.visibility import entry_of

if TYPE_CHECKING:
    import xarray as xr

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
    parts = {layer: _of_call(calls[layer], cells, batch) for layer in sorted(calls)}
    names = [calls[layer].name for layer in parts]
    return stacked_thumbnails(parts, names, {"batch": batch})


@torch.no_grad()
def prior_thumbnails(
    source: Prior | nn.Module | Sequence[PriorSource],
    *,
    length: int,
    cells: int = 32,
) -> xr.Dataset:
    r"""Small pictures of every head's prior, pi_ij = exp(K_ij) / sum_j' exp(K_ij').

    Parameters
    ----------
    source : Prior, nn.Module or list of PriorSource
        See `goatviz.analysis.prior_sources`.
    length : int
        Number of tokens; fewer in a layer whose prior was fitted and is known to fewer.
    cells : int
        Largest number of rows and columns of a picture.

    Returns
    -------
    xarray.Dataset
        Schema "plan_thumbnails", as from `plan_thumbnails`, where heads are parameter sets; and the
        `margin` of the last query's top key, nats, NaN if it sees a single key.

    Raises
    ------
    TypeError
        If `source` has no explicit prior.
    ValueError
        If `length` or `cells` is below 1, or the prior is on a grid.

    Examples
    --------
    >>> from goatviz.priors import ALiBiPrior
    >>> prior_thumbnails(ALiBiPrior(2), length=17)["margin"].values.tolist()
    [[0.0625, 0.00390625]]
    """
    length, cells = checks.positive_int("length", length), checks.positive_int("cells", cells)
    sources = prior_sources(source, length=length)
    parts = {
        at if each.layer is None else each.layer: _of_prior(each, length, cells)
        for at, each in enumerate(sources)
    }
    return stacked_thumbnails(parts, [each.name for each in sources], {"length": length})


def structured_head(thumbnails: xr.Dataset, sink: float | None = 0.3) -> tuple[int, int]:
    """The head whose plan has most structure: of least relative entropy among those without a sink.

    A head is left out if its mean weight on the first key is `sink` or more: its entropy is low
    because it looks at nothing else. If that leaves none, all heads are compared.

    Parameters
    ----------
    thumbnails : xarray.Dataset
        From `plan_thumbnails` or `prior_thumbnails`.
    sink : float, optional
        Mean weight of the first key from which a head counts as a sink, in [0, 1]; None compares
        all heads.

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
    if sink is not None:
        sink = checks.number("sink", sink, low=0, high=1)
    thumbnails = with_all_dimensions(thumbnails, PLAN_THUMBNAILS)
    entropy, first = thumbnails["relative_entropy"].values, thumbnails["first_mass"].values
    if np.isnan(entropy).all():
        raise ValueError("thumbnails must hold a head whose queries see two keys, got none")
    left = entropy if sink is None else np.where(first < sink, entropy, np.nan)
    if np.isnan(left).all():
        left = entropy
    layer, head = np.unravel_index(np.nanargmin(left), left.shape)
    return int(thumbnails["layer"][layer]), int(thumbnails["head"][head])


class LayerThumbnails(NamedTuple):
    """Those of one layer, in numpy.

    Attributes
    ----------
    heads : sequence of int
        Numbers of its heads.
    weights : ndarray
        Shape (heads, rows, columns).
    measures : mapping of str to ndarray
        Fields of a head, each of shape (heads,).
    queries, edges : ndarray
        The query of each row, and the edges of the columns' keys.
    """

    heads: Sequence[int]
    weights: np.ndarray
    measures: Mapping[str, np.ndarray]
    queries: np.ndarray
    edges: np.ndarray


def stacked_thumbnails(
    parts: Mapping[int, LayerThumbnails], names: Sequence[str], attrs: Mapping[str, Any]
) -> xr.Dataset:
    """The thumbnails of all layers as a result, filled up where a layer has fewer."""
    heads = 1 + max(max(part.heads) for part in parts.values())
    rows, columns = np.max([part.weights.shape[1:] for part in parts.values()], axis=0)
    shape = (len(parts), heads)
    data = {
        "layer_name": np.array(names),
        "present": np.zeros(shape, dtype=bool),
        "weights": np.full((*shape, rows, columns), np.nan, np.float32),
        "query": np.full((len(parts), rows), -1),
        "key_start": np.full((len(parts), columns), -1),
        "key_stop": np.full((len(parts), columns), -1),
    }
    for at, part in enumerate(parts.values()):
        own, (_, height, width) = list(part.heads), part.weights.shape
        data["present"][at, own] = True
        data["weights"][at, own, :height, :width] = part.weights
        for name, values in part.measures.items():
            data.setdefault(name, np.full(shape, np.nan))[at, own] = values
        data["query"][at, :height] = part.queries
        data["key_start"][at, :width] = part.edges[:-1]
        data["key_stop"][at, :width] = part.edges[1:]
    coords = {"layer": list(parts), "head": np.arange(heads)}
    coords |= {"row": np.arange(rows), "column": np.arange(columns)}
    return make_result(PLAN_THUMBNAILS, data, coords=coords, attrs=attrs)


def even_queries(count: int, cells: int) -> np.ndarray:
    """At most so many queries, evenly spaced from the first to the last."""
    return np.linspace(0, count - 1, min(cells, count)).round().astype(np.int64)


def pooled_weights(weights: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The largest weight of each bin of keys, float32; NaN where all of them are NaN."""
    visible = np.where(np.isnan(weights), -np.inf, weights)
    best = np.maximum.reduceat(visible, edges[:-1].astype(np.intp), axis=-1)
    return np.where(np.isneginf(best), np.nan, best).astype(np.float32)


@torch.no_grad()
def _of_call(captured: CapturedCall, cells: int, batch: int) -> LayerThumbnails:
    call = captured.projections
    batch = checks.index("batch", batch, call.shape[0])
    _, heads, n_queries, n_keys = call.shape
    queries = even_queries(n_queries, cells)
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
        visible = weights[..., :n_keys].masked_fill(~allowed, torch.nan).cpu().numpy()
        pictures.append(pooled_weights(visible, edges))
    measures = {
        "relative_entropy": np.concatenate(entropies),
        "first_mass": np.concatenate(firsts),
    }
    weights = np.concatenate(pictures)
    return LayerThumbnails(range(heads), weights, measures, queries, call.gone + edges)


def _of_prior(source: PriorSource, length: int, cells: int) -> LayerThumbnails:
    length = min(length, source.fitted_length or length)
    rows_of = _rows_of(PriorCurves(source, source.heads, length))
    queries, edges = even_queries(length, cells), even_edges(length, cells)
    keys = torch.arange(length)
    pictures, entropies, firsts, lead = [], [], [], np.zeros(0)
    step = max(1, _PAIRS // (len(source.heads) * length))
    for start in range(0, len(queries), step):
        rows = torch.from_numpy(queries[start : start + step])
        hidden = keys > rows.unsqueeze(-1) if source.causal else torch.zeros(1, 1, dtype=bool)
        log_prior = rows_of(rows).masked_fill(hidden, -torch.inf)
        weights = log_prior.softmax(-1)
        pictures.append(pooled_weights(weights.masked_fill(hidden, torch.nan).numpy(), edges))
        entropies.append(torch.special.entr(weights).sum(-1).numpy())
        firsts.append(weights[..., 0].numpy())
        # In the end, of the last query.
        best = log_prior[:, -1].topk(min(2, length), dim=-1).values
        lead = (best[:, 0] - best[:, -1]).numpy()
    seen = queries + 1 if source.causal else np.full(len(queries), length)
    used = seen > 1
    with np.errstate(invalid="ignore", divide="ignore"):
        entropy = np.concatenate(entropies, axis=1) / np.log(seen)
        measures = {
            "relative_entropy": entropy[:, used].sum(-1) / used.sum(),
            "first_mass": np.concatenate(firsts, axis=1)[:, used].sum(-1) / used.sum(),
            "margin": lead if length > 1 else np.full(len(source.heads), np.nan),
        }
    weights = np.concatenate(pictures, axis=1)
    return LayerThumbnails(source.heads, weights, measures, queries, edges)


def _rows_of(curves: PriorCurves) -> Callable[[Tensor], Tensor]:
    """How to get rows of the log-prior, float64, (heads, rows, keys), up to row constants."""
    if curves.misfit() or not curves.finite:
        heads = curves.heads if curves.prior.num_heads > 1 else [0] * len(curves.heads)
        return lambda rows: curves.prior.log_prior(rows, curves.length)[heads].double()
    # A prior of waves is evaluated once at each lag, and not at each pair.
    sink = torch.from_numpy(curves.sink().copy()).unsqueeze(1)
    kernel, keys = (
        torch.from_numpy(curves.relative() + curves.recency()),
        torch.arange(curves.length),
    )

    def summed(rows: Tensor) -> Tensor:
        places = rows.unsqueeze(-1) - keys - curves.first_lag
        return sink + kernel[:, places.clamp(min=0)]

    return summed


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
