"""Why a query attends where it does: its logits, taken apart into what makes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from goatviz import checks
from goatviz.adapters.capture import CapturedCall, Record
from goatviz.analysis.inputs import text_array
from goatviz.analysis.plan import captured_call
from goatviz.priors.base import Prior
from goatviz.results import EXPLANATION, make_result
from goatviz.training.checkpoint import Checkpoint, model_of
from goatviz.transport.call import AttentionCall
from goatviz.transport.rows import TransportPlan, solve_rows

if TYPE_CHECKING:
    import xarray as xr

#: Descriptions of the parts of scores, by name.
_SCORES = {
    "content": "scores of channels that do not turn with position",
    "scores": "scores q·k",
    "fast rotation": "scores of rotary channels that turn at least once in the context",
    "slow rotation": "scores of rotary channels that do not turn once in the context",
    "rest": "scores less the prior that they imply",
}


def explain(
    source: nn.Module | Checkpoint | Record | CapturedCall | AttentionCall,
    inputs: Any = None,
    *,
    layer: int = 0,
    head: int = 0,
    query: int = -1,
    batch: int = 0,
    top: int = 12,
    temperature: float = 1.0,
    prior: Prior | None = None,
    tokenizer: Any = None,
    tokens: Sequence[str] | None = None,
) -> xr.Dataset:
    r"""Take the logits of one query apart: :math:`l_{ij} = \sum_a l_{ij}^{(a)}`, for its top keys.

    A softmax ignores a constant of its row, so each part is taken less its mean over all keys that
    the query may use: a part that is the same for all keys explains nothing.

    Parameters
    ----------
    source : nn.Module, Checkpoint, Record, CapturedCall or AttentionCall
        A model that `goatviz.capture` can watch, with `inputs`; or what was captured with
        keep="projections".
    inputs : Tensor, mapping, str, or sequence of them, optional
        Inputs of a model, as in `goatviz.sink_profile`.
    layer, head, batch : int
        Numbers of the attention layer, the query head and the sequence.
    query : int
        Number of the query in the call; negative numbers count from its end.
    top : int
        Number of keys that are kept, those of the largest weights.
    temperature : float
        tau by which scores, and the parts of scores, are divided, above 0; 1 is the model's own.
    prior : Prior, optional
        Prior that the scores imply, such as one of `goatviz.fit_priors`, with 1 head or as many as
        there are query heads: its parts are taken out of the scores.
    tokenizer : callable, optional
        Tokenizer of texts, tokenizer(text, return_tensors="pt"), which names the tokens if it can.
    tokens : sequence of str, optional
        One text for each key.

    Returns
    -------
    xarray.Dataset
        Schema "explanation", keys by falling weight: `value` (part, place), nats; the parts add up
        to `logit`. The parts of scores are "content" (channels that do not turn with position) and
        rotary channels by their period in tokens: "fast rotation" if it is at most the number of
        keys that the query sees, else "slow rotation". They are a single part, "scores", where
        rotations are not known or a softcap bends their sum, and "rest" where an implied prior is
        taken out. Then follow the parts of the layer's own prior by name, and "bias". Attributes
        hold the mass of other keys (`rest_weight`) and of the extra column (`column_weight`), and
        the `residual` of a call whose kernel was compared with the plan.

    Raises
    ------
    TypeError
        If `source` is none of these, a model cannot be captured, or inputs are missing or not
        wanted.
    ValueError
        If there is no such layer, head, query or sequence, the query may use no key, a record
        holds statistics only, or `tokens` or `prior` does not fit.

    Examples
    --------
    >>> from goatviz import load_pretrained
    >>> ids = torch.arange(24)[None]
    >>> why = explain(load_pretrained("copy-mixture-1-goat"), ids, head=1, top=3)
    >>> why["part"].values.tolist()
    ['content', 'relative', 'sink', 'recency']
    >>> bool(abs(why["value"].sum("part") - why["logit"]).max() < 1e-9)
    True
    """
    source = model_of(source)
    if isinstance(source, nn.Module):
        source, batch, named = captured_call(source, inputs, layer, batch, tokenizer)
        tokens = named if tokens is None else tokens
    else:
        checks.not_given(f"a {type(source).__name__}", inputs=inputs, tokenizer=tokenizer)
    if isinstance(source, Record):
        source = source.of(layer)[-1]
    where, residual = "", None
    if isinstance(source, CapturedCall):
        residual = source.residual
        where, source = f"layer {source.layer} ({source.name}), ", source.projections
    call = checks.instance(
        "source",
        source,
        AttentionCall,
        "a model, a Checkpoint, a Record or one of its calls",
    )
    checks.index("batch", batch, call.shape[0])
    checks.index("head", head, call.shape[1])
    count = call.shape[2]
    query = checks.integer("query", query, low=-count, high=count - 1) % count
    top = checks.positive_int("top", top)
    temperature = checks.number("temperature", temperature, above=0)
    if tokens is not None and len(tokens) != call.shape[3] + call.gone:
        raise ValueError(
            f"tokens must hold {call.shape[3] + call.gone} texts, one for each key, "
            f"got {len(tokens)}"
        )
    plan, count = _row(call, batch, head, query, temperature), call.shape[3]
    allowed = plan.allowed[0, :count]
    weights = torch.where(allowed, plan.weights[0, :count], -1.0)
    order = weights.argsort(descending=True, stable=True)[: min(top, int(allowed.sum()))]
    parts = _parts(call, batch, head, query, prior, temperature)
    values = {
        name: (value - value[allowed].mean())[order].cpu().numpy() for name, value in parts.items()
    }
    logits = sum(parts.values())
    data = {
        "key": (order + call.gone).cpu().numpy(),
        "weight": weights[order].cpu().numpy(),
        "logit": (logits - logits[allowed].mean())[order].cpu().numpy(),
        "value": np.stack(list(values.values())),
        "part_text": np.array([_SCORES.get(name, f"log-prior, {name}") for name in values]),
    }
    attrs = {
        "source": f"{where}head {head}",
        "query": int(call.query_pos[query, 0]),
        "n_keys": int(allowed.sum()),
        "rest_weight": float(weights[allowed].sum() - weights[order].sum()),
        "column_weight": float(plan.weights[0, count:].sum()),
        "temperature": temperature,
        "scale": call.scale,
    }
    if residual is not None:
        attrs["residual"] = residual
    if tokens is not None:
        texts = text_array(tokens)
        data["key_token"] = texts[data["key"]]
        attrs["query_token"] = str(texts[min(attrs["query"], len(texts) - 1)])
    coords = {"part": list(values), "place": np.arange(len(order))}
    return make_result(EXPLANATION, data, coords=coords, attrs=attrs)


def _row(
    call: AttentionCall, batch: int, head: int, query: int, temperature: float
) -> TransportPlan:
    """One row of the plan, with the extra column behind its keys if there is one."""
    row = torch.tensor([query])
    if not bool(call.has_keys(batch, head, row)):
        raise ValueError(f"query must be one that may use a key, got {query}")
    plan = call.solve(batch, head, row)
    if temperature == 1:
        return plan
    return solve_rows(
        plan.scores, log_prior=plan.log_prior, temperature=temperature, mask=plan.allowed
    )


def _parts(
    call: AttentionCall,
    batch: int,
    head: int,
    query: int,
    prior: Prior | None,
    temperature: float,
) -> dict[str, Tensor]:
    """Parts of one row's logits over all keys, float64, shape (keys,), by name."""
    rows = slice(query, query + 1)
    whole = call.logits(batch, head, rows)
    parts = _score_parts(call, batch, head, query, whole.scores[0])
    parts = {name: value / temperature for name, value in parts.items()}
    own = {} if call.prior is None else call.prior.components()
    if prior is not None:
        checks.instance("prior", prior, Prior, "a goatviz Prior")
        if prior.num_heads not in (1, call.shape[1]):
            raise ValueError(f"prior must have 1 or {call.shape[1]} heads, got {prior.num_heads}")
        parts = {"rest": whole.scores[0] / temperature}
        for name, part in prior.components().items():
            value = _prior_row(call, part, head, query) / temperature
            parts["rest"] = parts["rest"] - value
            parts[f"implied {name}"] = value
    explicit = torch.zeros_like(whole.scores[0])
    for name, part in own.items():
        parts[name] = _prior_row(call, part, head, query)
        explicit = explicit + parts[name]
    if call.bias is not None:
        parts["bias"] = torch.where(whole.allowed[0], whole.log_prior[0] - explicit, 0.0)
    return parts


def _prior_row(call: AttentionCall, prior: Prior, head: int, query: int) -> Tensor:
    values = prior.log_prior(call.query_pos[query : query + 1], call.key_pos).detach()
    return values[head // (call.shape[1] // prior.num_heads), 0].double().to(call.device)


def _score_parts(
    call: AttentionCall, batch: int, head: int, query: int, scores: Tensor
) -> dict[str, Tensor]:
    """Scores by how fast their channels turn with position."""
    if call.rotary is None or call.softcap is not None:
        return {"scores": scores}
    channel = call.scale * call.q[batch, head, query].double()
    channel = channel * call.k[batch, head // (call.shape[1] // call.kv_heads)].double()
    speeds = call.rotary.to(channel.device)
    seen = int(call.query_pos[query, 0]) + 1
    fast = speeds * seen >= 2 * math.pi
    kinds = {
        "content": speeds == 0,
        "fast rotation": fast,
        "slow rotation": (speeds > 0) & ~fast,
    }
    return {name: channel[:, at].sum(-1) for name, at in kinds.items() if bool(at.any())}
