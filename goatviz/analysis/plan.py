"""A window of a transport plan with everything known about its rows.

The plan comes from `goatviz.transport` or from a layer of a model on given tokens; certificates
and the check against POT travel with the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from goatviz.adapters.goat_attention import convert, is_goat_attention
from goatviz.attention.functional import attention_plan
from goatviz.attention.layer import Attention
from goatviz.results import PLAN_SLICE, make_result
from goatviz.transport.rows import TransportPlan
from goatviz.transport.solvers import cross_check

#: Longest input whose dense plan is formed: 4,096^2 float64 scores are 128 MiB.
MAX_DENSE_LENGTH = 4096

#: Rows handed to POT: the semi-relaxed problem decouples, so any rows can be checked alone.
MAX_CHECKED_ROWS = 256


def plan_slice(
    source: TransportPlan | nn.Module,
    inputs: Tensor | None = None,
    *,
    layer: int = 0,
    head: int = 0,
    batch: int = 0,
    queries: slice | None = None,
    keys: slice | None = None,
    tokens: Sequence[str] | None = None,
    check: bool = True,
) -> xr.Dataset:
    r"""One head's plan on a window: p_i = argmin -<p, s_i> + tau KL(p || pi_i), with certificates.

    Parameters
    ----------
    source : TransportPlan or nn.Module
        A plan (its batch dimensions are read as batch and head where there are two, as head
        where there is one); or a model with goatviz Attention or goat-attention inside.
    inputs : Tensor, optional
        What the model is called with, batch first; needed for a model, not allowed for a plan.
    layer : int
        Which attention layer of the model, in its order.
    head, batch : int
        Which query head and which sequence.
    queries, keys : slice, optional
        The window; default everything. Row statistics and incoming mass are of the whole
        plan, whatever the window;
        the check is of its rows (256 of them, evenly spaced, where there are more).
    tokens : sequence of str, optional
        One text for each position (of queries and keys alike).
    check : bool
        Solve the same problem again through POT and keep the verdict.

    Returns
    -------
    xarray.Dataset
        Schema "plan_slice" (`goatviz.results.PLAN_SLICE`); keys a query may not see have weight
        and prior 0, `allowed` False and NaN in log_prior and logits. Attribute "check" is the
        verdict in words, "verdict" one of agrees, disagrees, solver failed, not checked.

    Raises
    ------
    TypeError
        If `source` is neither, or `inputs` is missing or too much.
    ValueError
        If the input exceeds 4,096 tokens, the model never called its attention layer, or a layer,
        head, batch entry or window is not there.

    Examples
    --------
    >>> from goatviz.transport import solve_rows
    >>> plan = solve_rows(torch.zeros(2, 3, dtype=torch.float64))
    >>> plan_slice(plan)["weights"].sum("key").values.tolist()
    [1.0, 1.0]
    """
    if isinstance(source, TransportPlan):
        if inputs is not None:
            raise TypeError("inputs must not be given with a TransportPlan")
        plan, where = _one_head(source, batch, head), "plan"
    elif isinstance(source, nn.Module):
        if inputs is None:
            raise TypeError("inputs must be given with a model: what it is called with")
        plan, where = _model_plan(source, inputs, layer, head, batch)
    else:
        raise TypeError(
            "expected a TransportPlan or a model with goatviz Attention or goat-attention's "
            f"GoatAttention inside, got {type(source).__name__}"
        )
    n_queries, n_keys = plan.scores.shape
    rows, columns = _window(queries, n_queries, "queries"), _window(keys, n_keys, "keys")
    verdict, words, difference = "not checked", "not checked against POT", float("nan")
    if check:
        verdict, words, difference = _check(plan, rows)
    data: dict[str, np.ndarray] = {}
    allowed = plan.allowed[rows, columns]
    logits = plan.scores / plan.temperature.unsqueeze(-1) + plan.log_prior
    for name, value in (
        ("weights", plan.weights),
        ("prior", plan.log_prior.exp()),
        ("scores", plan.scores),
        ("log_prior", plan.log_prior),
        ("logits", logits),
    ):
        window = value[rows, columns]
        if name in ("log_prior", "logits"):
            window = window.masked_fill(~allowed, torch.nan)
        data[name] = _numpy(window)
    data["allowed"] = _numpy(allowed)
    for name in (
        "potential",
        "transport_cost",
        "entropy",
        "kl_to_prior",
        "kkt_residual",
        "duality_gap",
        "content_range",
        "margin",
    ):
        data[name] = _numpy(getattr(plan, name)[rows])
    data["incoming_mass"] = _numpy(plan.incoming_mass[columns])
    if tokens is not None:
        if n_queries != n_keys or len(tokens) != n_keys:
            raise ValueError(
                f"tokens must hold {n_keys} texts, one for each query and key of a square plan, "
                f"got {len(tokens)} for {n_queries} queries and {n_keys} keys"
            )
        texts = np.array([str(t) for t in tokens], dtype=object).astype(str)
        data["query_token"], data["key_token"] = texts[rows], texts[columns]
    return make_result(
        PLAN_SLICE,
        data,
        coords={
            "query": np.arange(n_queries)[rows],
            "key": np.arange(n_keys)[columns],
        },
        attrs={
            "source": where,
            "temperature": float(plan.temperature.double().mean()),
            "n_queries": n_queries,
            "n_keys": n_keys,
            "verdict": verdict,
            "check": words,
            "largest_difference": difference,
        },
    )


def _check(plan: TransportPlan, rows: slice) -> tuple[str, str, float]:
    """Verdict, words and largest difference of POT's answer on (some of) the rows shown."""
    chosen = torch.arange(rows.start, rows.stop)
    if len(chosen) > MAX_CHECKED_ROWS:
        chosen = chosen[torch.linspace(0, len(chosen) - 1, MAX_CHECKED_ROWS).round().long()]
    part = TransportPlan.from_log_weights(
        plan.log_weights[chosen],
        plan.scores[chosen],
        log_prior=plan.log_prior[chosen],
        temperature=plan.temperature[chosen],
        mask=plan.allowed[chosen],
    )
    result = cross_check(part, solver=("semi_relaxed", "balanced"))
    phrases = []
    for report in result:
        phrase = f"{report.solver.replace('_', '-')} {report.verdict}"
        if np.isfinite(report.largest_difference):
            phrase += f" (largest difference {report.largest_difference:.0e})"
        phrases.append(phrase)
    finite = [r.largest_difference for r in result if np.isfinite(r.largest_difference)]
    words = f"POT {metadata.version('POT')} on {len(chosen)} rows: {', '.join(phrases)}"
    return str(result.verdict), words, max(finite, default=float("nan"))


def _one_head(plan: TransportPlan, batch: int, head: int) -> TransportPlan:
    shape = plan.batch_shape
    if len(shape) > 2:
        raise ValueError(
            f"plan must have at most two batch dimensions (batch, head), got {tuple(shape)}"
        )
    index = (batch, head)[2 - len(shape) :]
    for value, size, name in zip(index, shape, ("batch", "head")[2 - len(shape) :], strict=True):
        if not 0 <= value < size:
            raise ValueError(f"there is no {name} {value}: the plan has {size}")
    if not shape:
        return plan
    return TransportPlan.from_log_weights(
        plan.log_weights[index],
        plan.scores[index],
        log_prior=plan.log_prior[index],
        temperature=plan.temperature[index],
        mask=plan.allowed[index],
        source_mass=plan.source_mass[index],
    )


def _model_plan(
    model: nn.Module, inputs: Tensor, layer: int, head: int, batch: int
) -> tuple[TransportPlan, str]:
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, Attention) or is_goat_attention(module)
    ]
    if not found:
        raise TypeError(
            f"{type(model).__name__} has no goatviz Attention and no goat-attention GoatAttention "
            "inside; compute the scores yourself and pass goatviz.solve_rows(scores)"
        )
    if not 0 <= layer < len(found):
        raise ValueError(f"there is no layer {layer}: layers are 0 to {len(found) - 1}")
    path, module = found[layer]
    if not 0 <= head < module.num_heads:
        raise ValueError(f"there is no head {head}: heads are 0 to {module.num_heads - 1}")
    seen: list[tuple[tuple, dict]] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"the model never called its attention layer {path or layer!r}")
    args, kwargs = seen[0]
    x = args[0] if args else kwargs.get("x", kwargs.get("query"))
    own = module
    if not isinstance(module, Attention):
        if not module.batch_first:
            x = x.transpose(0, 1)
        is_causal = kwargs.get("is_causal", args[8] if len(args) > 8 else False)
        own = convert(module, causal=bool(is_causal), length=x.shape[1])
    if not 0 <= batch < len(x):
        raise ValueError(f"there is no batch entry {batch}: the inputs have {len(x)}")
    if x.shape[1] > MAX_DENSE_LENGTH:
        raise ValueError(
            f"inputs must have at most {MAX_DENSE_LENGTH} tokens for a dense plan, got {x.shape[1]}"
        )
    padding = kwargs.get("padding_mask")
    with torch.no_grad():
        q, k, _, points = own.project(x[batch : batch + 1], positions=kwargs.get("positions"))
        plan = attention_plan(
            q,
            k,
            prior=own.prior,
            query_pos=points,
            key_pos=points,
            causal=own.causal,
            padding_mask=None if padding is None else padding[batch : batch + 1],
        )
    return _one_head(plan, 0, head), f"layer {layer} ({path}), head {head}"


def _window(window: slice | None, length: int, name: str) -> slice:
    if window is None:
        return slice(0, length)
    if not isinstance(window, slice):
        raise TypeError(f"{name} must be a slice, got {type(window).__name__}")
    if window.step not in (None, 1):
        raise ValueError(f"{name} must have a step of 1, got {window.step}")
    start, stop, _ = window.indices(length)
    if start >= stop:
        raise ValueError(f"{name} must hold at least one of {length} positions, got {window}")
    return slice(start, stop)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
