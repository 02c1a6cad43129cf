"""What sinks do for a language model: its loss with changed plans less its loss as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from goatviz import checks
from goatviz.adapters.capture import check_watchable, chosen_layers
from goatviz.adapters.intervene import Changes, intervene
from goatviz.analysis.inputs import check_fits, forward_calls, run_model, token_ids
from goatviz.analysis.intervals import bootstrap_interval, bootstrap_weights
from goatviz.results import SINK_EFFECT, make_result
from goatviz.training.checkpoint import Checkpoint, model_of
from goatviz.transport.changes import Change, Hide

if TYPE_CHECKING:
    import xarray as xr

#: The default changes.
CHANGES: Mapping[str, Change] = {"first key hidden": Hide([0]), "sinks hidden": Hide("sinks")}


def sink_effect(
    model: nn.Module | Checkpoint,
    inputs: Any,
    *,
    changes: Mapping[str, Changes] = CHANGES,
    layers: Sequence[int | str] | int | None = None,
    per_layer: bool = True,
    budget: int | None = None,
    tokenizer: Any = None,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    r"""Loss of a language model with changed plans less its loss as it is, on the same tokens.

    The mean over inputs x of l(x; changed) - l(x), where l is the cross-entropy of every next
    token. Each change is made in all chosen layers at once, then in each of them alone.

    Parameters
    ----------
    model : nn.Module or Checkpoint
        A causal language model that `goatviz.intervene` can change, whose forward pass returns
        logits, or an object that holds `logits`.
    inputs : Tensor, mapping, str, or sequence of them
        As in `goatviz.sink_profile`. Every sequence is one unit of the bootstrap, so it is better
        to cut a long text into several, for example as a Tensor of shape (pieces, length).
    changes : mapping of str to Change, sequence of Change, or mapping by layer
        Changes by name, each as `goatviz.intervene` takes it. Default: the first key hidden, and
        every key hidden that gets more than 0.3 of a head's mass.
    layers : int, str or sequence of them, optional
        Layers to change; default all. A change given as a mapping by layer names its own.
    per_layer : bool
        Whether to change each layer alone too, at one more forward pass per layer and change.
    budget : int, optional
        Largest number of forward passes in all; inputs beyond it are left out, the last first.
    tokenizer : callable, optional
        As in `goatviz.sink_profile`.
    resamples, seed : int
        Number of resamples of the bootstrap, and its seed.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    xarray.Dataset
        Schema "sink_effect", nats per token: `mean_increase` (change,), and `layer_mean_increase`
        (change, layer), NaN in layers that a change does not name, with 95 % percentile bootstrap
        intervals over paired inputs, NaN for a single input. Above 0, the model predicts worse.

    Raises
    ------
    TypeError
        If the model is not a language model or cannot be changed, or inputs are of another kind.
    ValueError
        If an argument is out of range, an input holds one token, or the budget is too small.

    Examples
    --------
    >>> from goatviz import CausalLM, ModelConfig
    >>> model = CausalLM(ModelConfig(vocab_size=16, training_length=32, embed_dim=32))
    >>> import torch
    >>> effect = sink_effect(model.eval(), torch.arange(32).remainder(16).view(2, 16))
    >>> effect["mean_increase"].dims, effect["layer_mean_increase"].dims
    (('change',), ('change', 'layer'))
    """
    source = model
    model = model_of(source)
    checks.instance("model", model, nn.Module, "an nn.Module or a Checkpoint")
    if not isinstance(changes, Mapping) or not changes:
        raise TypeError(f"changes must be a mapping of names to changes, got {changes!r}")
    paths, _ = check_watchable(model, any_layer=layers is None)
    plans = _plans(changes, layers, checks.flag("per_layer", per_layer), paths)
    checks.positive_int("resamples", resamples)
    calls = list(forward_calls(inputs, tokenizer))
    for call in calls:
        check_fits(model, call)
    dropped = [one for one in model.modules() if isinstance(one, nn.Dropout) and one.p]
    if any(one.training for one in dropped):
        raise ValueError("model must not drop activations, got training mode; call model.eval()")
    every = len(calls)
    passes = 1 + len(plans)
    if budget is not None:
        checks.integer("budget", budget, low=passes)
        calls = calls[: budget // passes]
    loss, tokens, changed = _measure(model, calls, plans, progress)
    places = sorted({layer for _, layer in plans if layer is not None})
    data = _fields(loss, tokens, changed, (list(changes), places), (resamples, seed))
    coords = {"change": list(changes), "input": np.arange(len(loss))}
    if places:
        coords["layer"] = places
        data["layer_name"] = np.array([paths[layer] for layer in places], dtype=str)
    return make_result(
        SINK_EFFECT,
        data,
        coords=coords,
        attrs={
            "source": source.name if source is not model else type(model).__name__,
            "layers": len(paths),
            "left_out": every - len(calls),
            "longest": int(max(tokens)) + 1,
            "resamples": resamples,
            "seed": seed,
        },
    )


def _plans(
    changes: Mapping[str, Changes],
    layers: Sequence[int | str] | int | None,
    per_layer: bool,
    paths: tuple[str, ...],
) -> dict[tuple[str, int | None], Mapping[str, Any]]:
    """What is changed in each forward pass, by (name, layer), None being all layers at once."""
    plans: dict[tuple[str, int | None], Mapping[str, Any]] = {}
    for name, change in changes.items():
        checks.instance("the name of a change", name, str, "text")
        if isinstance(change, Mapping):
            by_path = {
                path: one for layer, one in change.items() for path in chosen_layers([layer], paths)
            }
        else:
            by_path = dict.fromkeys(chosen_layers(layers, paths), change)
        plans[name, None] = by_path
        for path, one in by_path.items() if per_layer else ():
            plans[name, paths.index(path)] = {path: one}
    return plans


def _measure(
    model: nn.Module,
    calls: list[Any],
    plans: Mapping[tuple[str, int | None], Mapping[str, Any]],
    progress: bool,
) -> tuple[np.ndarray, np.ndarray, dict[tuple[str, int | None], np.ndarray]]:
    """Mean loss and number of tokens of every sequence, and its mean losses under each change."""
    losses: list[np.ndarray] = []
    tokens: list[int] = []
    changed: dict[tuple[str, int | None], list[np.ndarray]] = {place: [] for place in plans}
    total = len(calls) * (1 + len(plans))
    with tqdm(total=total, disable=not progress, unit="pass") as bar:
        for call in calls:
            for place in (None, *plans):
                with intervene(model, plans[place]) if place else nullcontext():
                    each = next_token_losses(model, call)
                if place is None:
                    losses.append(each.mean(-1))
                    tokens += [each.shape[1]] * len(each)
                else:
                    changed[place].append(each.mean(-1))
                bar.update()
    return (
        np.concatenate(losses),
        np.array(tokens),
        {place: np.concatenate(parts) for place, parts in changed.items()},
    )


def next_token_losses(model: nn.Module, call: Tensor | Mapping[str, Any]) -> np.ndarray:
    """Cross-entropy of every next token in one forward pass, nats, shape (batch, length - 1).

    Raises
    ------
    TypeError
        If inputs are not token ids, or the model does not return logits of them.
    ValueError
        If an input holds a single token, which predicts nothing.
    """
    ids = token_ids(call)
    if ids is None:
        raise TypeError("inputs must be texts or token ids of shape (batch, length)")
    if ids.shape[1] < 2:
        raise ValueError("inputs must hold at least two tokens: the first predicts the second")
    out = run_model(model, call)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape or logits.ndim != 3:
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(out).__name__
        raise TypeError(
            "model must be a language model, whose forward pass returns logits of shape "
            f"({ids.shape[0]}, {ids.shape[1]}, vocabulary), got {came}"
        )
    # Row by row, since float32 copies of a whole batch's logits are large.
    rows = [
        F.cross_entropy(row[:-1].float(), wanted[1:].to(row.device), reduction="none")
        for row, wanted in zip(logits, ids, strict=True)
    ]
    return np.stack([row.double().cpu().numpy() for row in rows])


def _fields(
    loss: np.ndarray,
    tokens: np.ndarray,
    changed: Mapping[tuple[str, int | None], np.ndarray],
    size: tuple[list[str], list[int]],
    bootstrap: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Increases of the loss with means over inputs and intervals, for all layers and for each."""
    names, places = size
    weights = bootstrap_weights(len(loss), *bootstrap)
    data = {"loss": loss, "tokens": tokens, "mean_loss": np.average(loss, weights=tokens)}
    for prefix, layers in (("", [None]), ("layer_", places)):
        if not layers:
            continue
        shape = len(names), len(layers), len(loss)
        increase = np.full(shape, np.nan)
        for a, name in enumerate(names):
            for b, layer in enumerate(layers):
                if (name, layer) in changed:
                    increase[a, b] = changed[name, layer] - loss
        by_input = np.moveaxis(increase, -1, 0)
        sizes = np.broadcast_to(tokens[:, None, None], by_input.shape)
        low, high = bootstrap_interval(by_input, weights, sizes)
        parts = {
            "increase": increase,
            "mean_increase": np.average(increase, axis=-1, weights=tokens),
            "mean_increase_low": low,
            "mean_increase_high": high,
        }
        for name, value in parts.items():
            data[f"{prefix}{name}"] = value if layers != [None] else value[:, 0]
    return data
