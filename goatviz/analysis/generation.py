"""What a model attends to while it writes: the plan's row of every head at every new token.

`generation_thumbnails` shows all heads at a glance, `step_summary` says one row in words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from goatviz import checks
from goatviz.adapters.capture import CapturedCall, Record, capture
from goatviz.analysis.inputs import check_fits, forward_calls, text_array, token_ids, token_texts
from goatviz.analysis.thumbnails import (
    LayerThumbnails,
    even_queries,
    head_weights,
    pooled_weights,
    stacked_thumbnails,
)
from goatviz.bins import even_edges
from goatviz.models import CausalLM
from goatviz.results import GENERATION, check_result, make_result, with_all_dimensions
from goatviz.training.checkpoint import Checkpoint

if TYPE_CHECKING:
    import xarray as xr

#: What a row of float32 weights without a sink's column lacks of 1, at most.
_ROUNDING = 1e-4


@torch.no_grad()
def generation_steps(
    model: nn.Module | Checkpoint,
    prompt: Any,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 16,
    layers: Sequence[int | str] | int | None = None,
) -> xr.Dataset:
    """Rows of the plan while a model goes on with a text: greedily, through its cache.

    Step t is the query that chooses new token t: the last token of the prompt, then each new token
    but the last. Its row is the one of a single forward pass over the whole text, up to rounding.

    Parameters
    ----------
    model : nn.Module or Checkpoint
        A goatviz CausalLM, or a model of transformers with `generate`.
    prompt : str, Tensor of int64 or mapping
        One text (then `tokenizer` is needed), its token ids, shape (1, length), or what the
        tokenizer makes of it; padding is cut away.
    tokenizer : callable, optional
        tokenizer(text, return_tensors="pt"), which names the tokens if it can.
    max_new_tokens : int
        Largest number of new tokens; a model of transformers ends earlier at its end of text.
    layers : int, str or sequence of them, optional
        Attention layers, as in `goatviz.capture`; default all.

    Returns
    -------
    xarray.Dataset
        Schema "generation". `weights`, shape (step, layer, head, key), float32: 0 at earlier keys
        that the query may not see, NaN beyond the query and where a layer has fewer heads than
        others. `query` is the place of a step's query in the text, `next_id` the token that it
        chooses; `token` and `next_token` are texts, with a tokenizer. Rows sum to 1, or less by
        what the column of a sink takes.

    Raises
    ------
    TypeError
        If the model cannot generate or be captured, or the prompt is of another kind.
    ValueError
        If the prompt is not one sequence of at least one token, it and the new tokens do not fit
        the model, the model has an encoder, or a layer does not attend to the text so far.

    Examples
    --------
    >>> from goatviz import load_pretrained
    >>> steps = generation_steps(load_pretrained("passkey-goat"), torch.zeros(1, 9).long(),
    ...     max_new_tokens=4)
    >>> steps["query"].values.tolist(), steps.sizes["key"]
    ([8, 9, 10, 11], 12)
    """
    model = model.model if isinstance(model, Checkpoint) else model
    checks.instance("model", model, nn.Module, "an nn.Module")
    new = checks.positive_int("max_new_tokens", max_new_tokens)
    if not isinstance(model, CausalLM) and not callable(getattr(model, "generate", None)):
        raise TypeError(
            "model must be a CausalLM or have generate(), as language models of transformers do, "
            f"got {type(model).__name__}"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"model must be a decoder alone, got {type(model).__name__}")
    arguments, ids = _one_text(prompt, tokenizer)
    check_fits(model, ids)
    check_fits(model, ids.new_zeros(1, ids.shape[1] + new - 1))
    steps: list[dict[int, np.ndarray]] = []
    with capture(model, layers=layers, statistics=(), keep="projections") as record:

        def look() -> None:
            steps.append(_rows(record, ids.shape[1] + len(steps)))

        text = _generated(model, arguments, ids, new, look)
    texts = None if tokenizer is None else token_texts(tokenizer, text)
    return _result(record.layers, steps, text[0].cpu().numpy(), texts)


def generation_thumbnails(steps: xr.Dataset, *, cells: int = 32) -> xr.Dataset:
    r"""Small pictures of every head's rows while a model wrote: steps by keys.

    Parameters
    ----------
    steps : xarray.Dataset
        From `generation_steps`.
    cells : int
        Largest number of rows and columns of a picture.

    Returns
    -------
    xarray.Dataset
        Schema "plan_thumbnails", as from `goatviz.analysis.plan_thumbnails`; its means are over
        all steps whose query sees two keys or more, and entropy is relative to log(i + 1) of query
        i. What a row lacks of 1 counts as one key: the column of a sink.

    Raises
    ------
    TypeError
        If `steps` is not a result of `generation_steps`.

    Examples
    --------
    >>> from goatviz import load_pretrained
    >>> steps = generation_steps(load_pretrained("passkey-goat"), torch.zeros(1, 9).long(),
    ...     max_new_tokens=4)
    >>> dict(generation_thumbnails(steps)["weights"].sizes)
    {'layer': 3, 'head': 4, 'row': 4, 'column': 12}
    """
    steps = with_all_dimensions(check_result(steps, GENERATION), GENERATION)
    cells = checks.positive_int("cells", cells)
    rows = even_queries(steps.sizes["step"], cells)
    edges = even_edges(steps.sizes["key"], cells)
    query, numbers = steps["query"].values, steps["head"].values
    used = query > 0
    parts = {}
    for at, layer in enumerate(steps["layer"].values.tolist()):
        own = steps["present"].values[at]
        weights = steps["weights"].values[:, at, own].swapaxes(0, 1).astype(np.float64)
        entropy = _entropy(weights)[:, used] / np.log1p(query[used])
        with np.errstate(invalid="ignore"):
            measures = {
                "relative_entropy": entropy.sum(-1) / used.sum(),
                "first_mass": weights[:, used, 0].sum(-1) / used.sum(),
            }
        pictures = pooled_weights(weights[:, rows], edges)
        parts[layer] = LayerThumbnails(numbers[own], pictures, measures, query[rows], edges)
    attrs = {"prompt_tokens": steps.attrs["prompt_tokens"]}
    return stacked_thumbnails(parts, steps["layer_name"].values, attrs)


def step_summary(steps: xr.Dataset, *, layer: int, head: int, query: int) -> str:
    """One row in words: what its query chose, and where it looked.

    Parameters
    ----------
    steps : xarray.Dataset
        From `generation_steps`.
    layer, head, query : int
        Numbers of the layer and head, and the query's place in the text.

    Raises
    ------
    TypeError
        If `steps` is not a result of `generation_steps`.
    KeyError, ValueError
        If there is no such head, or query.

    Examples
    --------
    >>> from goatviz import load_pretrained
    >>> steps = generation_steps(load_pretrained("passkey-goat"), torch.zeros(1, 9).long(),
    ...     max_new_tokens=4)
    >>> step_summary(steps, layer=0, head=0, query=8)[:35]
    'Step 1 of 4: query 8 chooses token '
    """
    steps = with_all_dimensions(check_result(steps, GENERATION), GENERATION)
    at = steps["query"].values.tolist().index(query)
    row = steps.sel(layer=layer, head=head).isel(step=at)
    weights = row["weights"].values[: query + 1].astype(np.float64)

    def named(key: int) -> str:
        return f"{key:,}" + (f" “{steps['token'].values[key]}”" if "token" in steps else "")

    chosen = f"“{row['next_token'].item()}”" if "next_token" in row else str(int(row["next_id"]))
    most = ", ".join(f"{named(key)} ({weights[key]:.3g})" for key in weights.argsort()[::-1][:3])
    rest = 1.0 - weights.sum()
    lacks = rest > _ROUNDING
    column = f" A column without a key takes {rest:.3g}." if lacks else ""
    return (
        f"Step {at + 1} of {steps.sizes['step']}: query {named(query)} chooses token {chosen}. "
        f"Layer {layer}, head {head} gives most to key {most}; entropy "
        f"{float(_entropy(weights)):.3g} of at most {np.log1p(query + lacks):.3g} nats.{column}"
    )


def _entropy(weights: np.ndarray) -> np.ndarray:
    """Entropy of rows along the last axis, nats; what they lack of 1 counts as one key."""
    from scipy.special import entr

    weights = np.nan_to_num(weights)
    rest = np.clip(1.0 - weights.sum(-1, keepdims=True), 0.0, None)
    return entr(np.concatenate([weights, rest], axis=-1)).sum(-1)


def _one_text(prompt: Any, tokenizer: Any) -> tuple[dict[str, Any], Tensor]:
    """The arguments of a forward pass over the prompt without padding, and its token ids."""
    calls = list(forward_calls(prompt, tokenizer))
    ids = token_ids(calls[0]) if len(calls) == 1 else None
    if ids is None or len(ids) != 1 or not ids.numel():
        raise ValueError(
            "prompt must be one text, or its token ids of shape (1, length), got "
            f"{checks.count_text(len(calls), 'input')}"
            + ("" if ids is None else f" of shape {tuple(ids.shape)}")
        )
    return (dict(calls[0]) if isinstance(calls[0], Mapping) else {}), ids


def _generated(
    model: nn.Module, arguments: dict[str, Any], ids: Tensor, new: int, look: Callable[[], None]
) -> Tensor:
    """The text with its new tokens, (1, length); `look` is called after every forward pass."""
    if isinstance(model, CausalLM):
        cache, text, piece = model.new_cache(), ids, ids
        for _ in range(new):
            piece = model(piece, cache=cache)[:, -1].argmax(-1, keepdim=True)
            look()
            text = torch.cat([text, piece], dim=1)
        return text

    def looked(_: Tensor, logits: Tensor) -> Tensor:
        look()
        return logits

    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | arguments
    return model.generate(
        **arguments,
        max_new_tokens=new,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        return_dict_in_generate=False,
        logits_processor=[looked],
    )


def _rows(record: Record, keys: int) -> dict[int, np.ndarray]:
    """The last query's row in every layer, (heads, keys), over a text of so many tokens.

    The calls are forgotten, since each holds a copy of its cache.
    """
    calls = {call.layer: call for call in record.calls}
    record.calls.clear()
    return {layer: _row(call, keys) for layer, call in calls.items()}


def _row(captured: CapturedCall, keys: int) -> np.ndarray:
    call = captured.projections
    if float(call.query_pos[-1, 0]) != keys - 1 or call.gone + call.shape[3] < keys:
        raise ValueError(
            f"layer {captured.layer} ({captured.name}) must attend to the text so far; name the "
            "layers that do: layers="
        )
    weights, _ = head_weights(call, 0, slice(None), torch.tensor([call.shape[2] - 1]))
    row = np.zeros((len(weights), keys), np.float32)
    row[:, call.gone :] = weights[:, 0, : keys - call.gone].cpu().numpy()
    return row


def _result(
    paths: Sequence[str],
    steps: list[dict[int, np.ndarray]],
    ids: np.ndarray,
    texts: Sequence[str] | None,
) -> xr.Dataset:
    layers = sorted(set().union(*steps))
    now_and_then = [layer for layer in layers if not all(layer in rows for rows in steps)]
    if now_and_then or not layers:
        which = ", ".join(paths[layer] for layer in now_and_then) or "none"
        raise ValueError(
            "layers must name attention that every forward pass calls, got "
            + (f"{which}, which some passes leave out" if now_and_then else which)
        )
    heads = max(len(row) for rows in steps for row in rows.values())
    first, keys = len(ids) - len(steps), len(ids) - 1
    weights = np.full((len(steps), len(layers), heads, keys), np.nan, np.float32)
    present = np.zeros((len(layers), heads), dtype=bool)
    for step, rows in enumerate(steps):
        for at, layer in enumerate(layers):
            row = rows[layer]
            weights[step, at, : len(row), : row.shape[1]] = row
            present[at, : len(row)] = True
    data = {
        "layer_name": np.array([paths[layer] for layer in layers]),
        "present": present,
        "weights": weights,
        "query": np.arange(first - 1, keys),
        "next_id": ids[first:],
    }
    if texts is not None:
        data["token"], data["next_token"] = text_array(texts[:-1]), text_array(texts[first:])
    coords = {"step": np.arange(len(steps)), "layer": layers}
    coords |= {"head": np.arange(heads), "key": np.arange(keys)}
    return make_result(GENERATION, data, coords=coords, attrs={"prompt_tokens": first})
