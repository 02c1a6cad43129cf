"""A window of a transport plan with everything known about its rows.

The plan comes from `goatviz.transport`, from a model that `goatviz.capture` can watch, from a
record of one, or from arrays. Certificates and the check against POT are part of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from goatviz import checks
from goatviz.adapters.capture import (
    CapturedCall,
    Record,
    capture,
    find_attention,
    without_output,
)
from goatviz.analysis.inputs import forward_calls, run_model, text_array, token_texts
from goatviz.results import PLAN_SLICE, make_result
from goatviz.training.checkpoint import model_of
from goatviz.transport.call import AttentionCall
from goatviz.transport.rows import TransportPlan
from goatviz.transport.solvers import cross_check
from goatviz.transport.statistics import incoming_of

if TYPE_CHECKING:
    import xarray as xr

#: Largest number of pairs of a window's rows with all keys: 4,096^2 float64 scores are 128 MiB.
MAX_PAIRS = 4096**2

#: Largest number of rows checked by POT: the semi-relaxed problem decouples into its rows.
MAX_CHECKED_ROWS = 256

#: Queries at which the output of a model's own kernel is compared with the plan.
_CERTIFIED = 16

#: Statistics of rows, first those that need no scores and no prior.
_KNOWN_FROM_WEIGHTS = ("entropy",)
_ROWS = (
    *_KNOWN_FROM_WEIGHTS,
    "potential",
    "transport_cost",
    "kl_to_prior",
    "kkt_residual",
    "duality_gap",
    "content_range",
    "margin",
)


def plan_slice(
    source: Any,
    inputs: Any = None,
    *,
    layer: int = 0,
    head: int = 0,
    batch: int = 0,
    queries: slice | None = None,
    keys: slice | None = None,
    tokenizer: Any = None,
    tokens: Sequence[str] | None = None,
    causal: bool | None = None,
    check: bool = True,
) -> xr.Dataset:
    r"""One head's plan on a window: p_i = argmin -<p, s_i> + tau KL(p || pi_i), with certificates.

    Parameters
    ----------
    source : TransportPlan, nn.Module, Checkpoint, Record, CapturedCall, AttentionCall or array
        A plan (batch dimensions are read as batch and head where there are two, as head where
        there is one); a model that `goatviz.capture` can watch, with `inputs`; a record or one of
        its calls, captured with keep="projections"; an attention call, or its queries and keys, a
        pair of numpy arrays or Tensors of shape (length, d), (heads, ...) or (batch, heads, ...);
        or attention weights, an array of shape (n_queries, n_keys), (heads, ...) or (batch,
        heads, ...). The scores and prior of weights are unknown, so they are NaN; rows that sum to
        less than 1 have lost the column of a sink.
    inputs : Tensor, mapping, str, or sequence of them, optional
        Inputs of the model, as in `goatviz.sink_profile`; with a model only.
    layer : int
        Number of the attention layer in the model or record.
    head, batch : int
        Numbers of the query head, and of the sequence among all inputs.
    queries, keys : slice, optional
        The window; default everything. Whatever the window, incoming mass is that of the whole
        plan, and each row is normalised over all its keys; the check covers the window's rows (256
        of them, evenly spaced, where there are more). Keys count from the start of the text; those
        that have left a cache are not shown.
    tokenizer : callable, optional
        Tokenizer of texts, tokenizer(text, return_tensors="pt"), which names the tokens if it can.
    tokens : sequence of str, optional
        One text for each position (of queries and keys alike).
    causal : bool, optional
        Whether a query sees no later key, for a pair of queries and keys only; default True.
    check : bool
        Whether to solve the same problem again by POT and keep the verdict.

    Returns
    -------
    xarray.Dataset
        Schema "plan_slice" (`goatviz.results.PLAN_SLICE`); keys that a query may not see have
        weight and prior 0, `allowed` False, and NaN in log_prior and logits. Attribute "check" is
        the verdict in words, "verdict" one of agrees, disagrees, solver failed, not checked.

    Raises
    ------
    TypeError
        If `source` is none of these, a model cannot be captured, or `inputs` is missing or not
        wanted.
    ValueError
        If there is no such layer, head, sequence or window, a record holds statistics only, the
        window's rows have more than 4,096^2 pairs, or weights are negative or sum to more than 1.

    Examples
    --------
    >>> from goatviz.transport import solve_rows
    >>> plan = solve_rows(torch.zeros(2, 3, dtype=torch.float64))
    >>> plan_slice(plan)["weights"].sum("key").values.tolist()
    [1.0, 1.0]
    >>> plan_slice(np.eye(2))["weights"].values.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    source = model_of(source)
    if not isinstance(source, tuple | list):
        checks.not_given("anything but queries and keys", causal=causal)
    if isinstance(source, nn.Module):
        call, entry, named = captured_call(source, inputs, layer, batch, tokenizer)
        part = _of_call(call, head, entry, queries)
        tokens = named if tokens is None else tokens
    else:
        checks.not_given(f"a {type(source).__name__}", inputs=inputs, tokenizer=tokenizer)
        if isinstance(source, Record):
            part = _of_call(source.of(layer)[-1], head, batch, queries)
        elif isinstance(source, tuple | list):
            call = _from_arrays(source, True if causal is None else causal)
            part = _of_call(call, head, batch, queries)
        elif isinstance(source, CapturedCall | AttentionCall):
            part = _of_call(source, head, batch, queries)
        elif isinstance(source, TransportPlan):
            part = _of_plan(_one_head(source, batch, head), queries)
        elif isinstance(source, np.ndarray | Tensor):
            part = _of_weights(source, head, batch, queries)
        else:
            raise TypeError(
                "source must be a TransportPlan, a model, a Checkpoint, a Record or one of its "
                "calls, an array of attention weights, or a pair of queries and keys, "
                f"got {type(source).__name__}"
            )
    return _result(part, keys, tokens, check)


@dataclass(frozen=True, eq=False)
class _Part:
    """Some rows of one head's plan over all keys, with facts about the whole plan."""

    plan: TransportPlan
    rows: slice
    n_queries: int
    n_keys: int
    incoming: Tensor
    where: str
    empty: Tensor
    scores_known: bool = True
    gone: int = 0
    residual: float | None = None


def _result(
    part: _Part, keys: slice | None, tokens: Sequence[str] | None, check: bool
) -> xr.Dataset:
    plan, columns = part.plan, slice(*checks.window("keys", keys, part.n_keys, part.gone))
    verdict, words, difference = "not checked", "not checked against POT", float("nan")
    if not part.scores_known:
        words = "not checked against POT: the scores and the prior of these weights are not known"
    elif check:
        verdict, words, difference = _check(plan, ~part.empty)
    allowed = plan.allowed[:, columns] & ~part.empty[:, None]
    logits = plan.scores / plan.temperature.unsqueeze(-1) + plan.log_prior
    data = {
        "weights": plan.weights,
        "prior": plan.log_prior.exp(),
        "scores": plan.scores,
        "log_prior": plan.log_prior,
        "logits": logits,
    }
    for name, values in data.items():
        fill = 0.0 if name in ("weights", "prior") else torch.nan
        seen = allowed if name != "scores" else ~part.empty[:, None]
        if not part.scores_known and name != "weights":
            fill, seen = torch.nan, torch.zeros_like(allowed)
        data[name] = _numpy(torch.where(seen, values[:, columns], fill))
    data["allowed"] = _numpy(allowed)
    for name in _ROWS:
        values = getattr(plan, name)
        known = part.scores_known or name in _KNOWN_FROM_WEIGHTS
        data[name] = _numpy(torch.where(part.empty | (not known), torch.nan, values))
    if plan.n_keys > part.n_keys:
        data["sink_weight"] = _numpy(plan.weights[:, part.n_keys :].sum(-1))
    data["incoming_mass"] = _numpy(part.incoming[columns])
    if tokens is not None:
        if part.n_queries != part.n_keys or len(tokens) != part.n_keys:
            raise ValueError(
                f"tokens must hold {part.n_keys} texts, one for each query and key of a square "
                f"plan, got {len(tokens)} for {part.n_queries} queries and {part.n_keys} keys"
            )
        texts = text_array(tokens)
        data["query_token"], data["key_token"] = texts[part.rows], texts[columns]
    return make_result(
        PLAN_SLICE,
        data,
        coords={
            "query": np.arange(part.n_queries)[part.rows],
            "key": part.gone + np.arange(part.n_keys)[columns],
        },
        attrs={
            "source": part.where,
            "temperature": float(plan.temperature.double().mean()),
            "n_queries": part.n_queries,
            "n_keys": part.n_keys,
            "scores_known": int(part.scores_known),
            "verdict": verdict,
            "check": words,
            "largest_difference": difference,
            **({} if part.residual is None else {"residual": part.residual}),
        },
    )


# --- sources ---


def captured_call(
    model: nn.Module, inputs: Any, layer: int, batch: int, tokenizer: Any
) -> tuple[CapturedCall, int, list[str] | None]:
    """A layer's call that holds a sequence, the sequence's number in it, and its tokens if any."""
    paths = list(find_attention(model))
    if paths:
        checks.index("layer", layer, len(paths))
    checks.integer("batch", batch, low=0)
    before = 0
    options = {"statistics": (), "keep": "projections"}
    certify = _CERTIFIED if paths and not without_output(model, [paths[layer]]) else None
    for arguments in forward_calls(inputs, tokenizer):
        with capture(model, layers=[layer], certify=certify, **options) as record:
            run_model(model, arguments)
        if not record.calls:
            raise ValueError(f"the model never called its attention layer {paths[layer]!r}")
        call = record.of(layer)[-1]
        if batch < before + call.shape[0]:
            return call, batch - before, token_texts(tokenizer, arguments, batch - before)
        before += call.shape[0]
    raise ValueError(f"batch must be an integer in 0 .. {before - 1}, got {batch}")


def _of_call(
    source: CapturedCall | AttentionCall, head: int, batch: int, queries: slice | None
) -> _Part:
    where = f"head {head}"
    call = source
    if isinstance(source, CapturedCall):
        where = f"layer {source.layer} ({source.name}), {where}"
        call = source.projections
    _check_head(batch, head, call.shape[:2])
    n_queries, n_keys = call.shape[2:]
    rows = _rows(queries, n_queries, n_keys)
    at = torch.arange(rows.start, rows.stop)
    # Padding has no mass: the real queries share the mass of 1.
    one = call.of_head(batch, head)
    real = torch.ones(1, n_queries) if one.query_mask is None else one.query_mask
    mass = incoming_of(one, query_mass=real / real.sum()).mass[0]
    return _Part(
        call.solve(batch, head, at),
        rows,
        n_queries,
        n_keys,
        mass[head if len(mass) > 1 else 0].double(),
        where,
        ~call.has_keys(batch, head, at).to(call.device),
        gone=call.gone,
        residual=source.residual if isinstance(source, CapturedCall) else None,
    )


def _from_arrays(pair: Sequence[Any], causal: bool) -> AttentionCall:
    """An attention call of plain queries and keys, which have two to four dimensions."""
    if len(pair) != 2 or not all(isinstance(part, np.ndarray | Tensor) for part in pair):
        kinds = ", ".join(type(part).__name__ for part in pair)
        raise TypeError(f"source must be a pair of arrays, queries and keys, got ({kinds})")
    tensors = [torch.as_tensor(part) for part in pair]
    for tensor in tensors:
        if tensor.ndim not in (2, 3, 4):
            raise ValueError(
                "source must hold queries and keys of shape (length, d), (heads, length, d) or "
                f"(batch, heads, length, d), got {tuple(tensor.shape)}"
            )
    q, k = (tensor.reshape(*(1,) * (4 - tensor.ndim), *tensor.shape) for tensor in tensors)
    return AttentionCall.from_tensors(q, k, causal=causal)


def _of_plan(plan: TransportPlan, queries: slice | None) -> _Part:
    rows = slice(*checks.window("queries", queries, plan.n_queries))
    return _Part(
        _rows_of(plan, rows),
        rows,
        plan.n_queries,
        plan.n_keys,
        plan.incoming_mass,
        "plan",
        torch.zeros(rows.stop - rows.start, dtype=torch.bool),
    )


def _of_weights(
    weights: np.ndarray | Tensor, head: int, batch: int, queries: slice | None
) -> _Part:
    """Attention weights alone: their logarithms serve as logits under a uniform prior."""
    weights = torch.as_tensor(weights).detach().cpu()
    if not weights.is_floating_point():
        raise TypeError(f"source must hold floating-point weights, got {weights.dtype}")
    if weights.ndim not in (2, 3, 4) or 0 in weights.shape:
        raise ValueError(
            "source must hold weights of shape (n_queries, n_keys), (heads, ...) or "
            f"(batch, heads, ...), got {tuple(weights.shape)}"
        )
    _check_head(batch, head, weights.shape[:-2])
    where = "weights given" if weights.ndim == 2 else f"weights given, head {head}"
    weights = weights[batch] if weights.ndim == 4 else weights
    weights = (weights[head] if weights.ndim == 3 else weights).double()
    sums = weights.sum(-1)
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()) or bool((sums > 1 + 1e-2).any()):
        raise ValueError(
            "source must hold weights of at least 0 whose rows sum to at most 1, got rows that sum "
            f"to {float(sums.min()):.4g} to {float(sums.max()):.4g}"
        )
    n_queries, n_keys = weights.shape
    rows = slice(*checks.window("queries", queries, n_queries))
    # Only zeros above the diagonal are a mask, the causal one; others are underflow.
    causal = n_queries == n_keys and not bool(weights.triu(1).any())
    allowed = torch.ones_like(weights, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    lost = (1 - sums).clamp(min=0)
    if bool((lost > 1e-2).any()):
        weights = torch.cat([weights, lost.unsqueeze(-1)], dim=-1)
        allowed = torch.nn.functional.pad(allowed, (0, 1), value=True)
    empty = sums == 0
    weights = torch.where(empty.unsqueeze(-1), allowed.double(), weights)
    logs = (weights / weights.sum(-1, keepdim=True)).log()
    plan = TransportPlan.from_log_weights(
        logs[rows], torch.zeros_like(logs[rows]), mask=allowed[rows]
    )
    incoming = torch.where(empty.unsqueeze(-1), 0.0, weights)[:, :n_keys].sum(0) / n_queries
    return _Part(plan, rows, n_queries, n_keys, incoming, where, empty[rows], scores_known=False)


def _rows(queries: slice | None, n_queries: int, n_keys: int) -> slice:
    rows = slice(*checks.window("queries", queries, n_queries))
    if (rows.stop - rows.start) * n_keys > MAX_PAIRS:
        raise ValueError(
            f"queries must be a window of at most {max(1, MAX_PAIRS // n_keys):,} rows over "
            f"{n_keys:,} keys, got {rows.stop - rows.start:,}: pass queries=slice(start, stop)"
        )
    return rows


def _check(plan: TransportPlan, real: Tensor) -> tuple[str, str, float]:
    """Verdict, its words and the largest difference of POT's answer on (some of) the rows."""
    chosen = real.nonzero().flatten()
    if not len(chosen):
        return "not checked", "not checked against POT: no query may see a key", float("nan")
    if len(chosen) > MAX_CHECKED_ROWS:
        chosen = chosen[torch.linspace(0, len(chosen) - 1, MAX_CHECKED_ROWS).round().long()]
    result = cross_check(_rows_of(plan, chosen), solver=("semi_relaxed", "balanced"))
    phrases = []
    for report in result:
        phrase = f"{report.solver.replace('_', '-')} {report.verdict}"
        if np.isfinite(report.largest_difference):
            phrase += f" (largest difference {report.largest_difference:.0e})"
        phrases.append(phrase)
    finite = [r.largest_difference for r in result if np.isfinite(r.largest_difference)]
    words = f"POT {metadata.version('POT')} on {len(chosen)} rows: {', '.join(phrases)}"
    return str(result.verdict), words, max(finite, default=float("nan"))


def _rows_of(plan: TransportPlan, rows: slice | Tensor | tuple[int, ...]) -> TransportPlan:
    """Some rows of a plan without batch, as a plan, which stays marked as solved if it was."""
    part = TransportPlan(
        **{
            name: getattr(plan, name)[rows]
            for name in (
                "scores",
                "log_prior",
                "temperature",
                "source_mass",
                "allowed",
                "log_weights",
            )
        }
    )
    object.__setattr__(part, "_solved", plan._solved)
    return part


def _one_head(plan: TransportPlan, batch: int, head: int) -> TransportPlan:
    shape = plan.batch_shape
    if len(shape) > 2:
        raise ValueError(
            f"plan must have at most two batch dimensions (batch, head), got {tuple(shape)}"
        )
    _check_head(batch, head, shape)
    return _rows_of(plan, (batch, head)[2 - len(shape) :]) if shape else plan


def _check_head(batch: int, head: int, shape: Sequence[int]) -> None:
    """Check numbers of a sequence and a head; dimensions that `shape` lacks have one entry."""
    sequences, heads = (1, 1, *shape)[-2:]
    checks.index("batch", batch, sequences)
    checks.index("head", head, heads)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
