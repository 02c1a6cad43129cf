"""What forward passes leave behind for a sink profile: sequences in numpy, layer by layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from goatviz.adapters.capture import CapturedCall, Record, capture, find_attention
from goatviz.analysis.inputs import run_model, token_ids
from goatviz.analysis.sink_measures import uniform_importance
from goatviz.priors.base import Prior
from goatviz.priors.fixed import UniformPrior
from goatviz.transport.call import AttentionCall
from goatviz.transport.statistics import RowStatistics, previous_keys

#: What a record must hold.
SINK_STATISTICS = (
    "log_normaliser",
    "entropy",
    "expected_score",
    "kl_to_prior",
    "key_mass",
    "recent_mass",
    "sink_mass",
    "largest_weight",
    "content_range",
    "gathered_mass",
    "incoming_mass",
)
#: Of them, what a record may lack: then the mass on the previous token is not known.
_DISPENSABLE = ("gathered_mass", "incoming_mass")

#: An activation is massive above this magnitude and this multiple of the median (Sun et al. 2024).
MASSIVE = (100.0, 1000.0)
#: What can be gathered of hidden states; spectra take an eigendecomposition a block and input.
HIDDEN = ("norms", "spectra")
#: What a profile says of its priors: that of the layer whose prior is furthest along.
PRIORS = ("none", "uniform", "fixed", "learned")


@dataclass
class SinkSequence:
    """One input in one layer, in numpy: heads first."""

    importance: np.ndarray
    observers: np.ndarray
    first: np.ndarray
    largest: np.ndarray
    recent: np.ndarray
    column: np.ndarray
    entropy: np.ndarray
    content_range: np.ndarray
    prior_first: np.ndarray
    counted: np.ndarray
    uniform_entropy: np.ndarray
    previous: np.ndarray
    induction: np.ndarray
    value_norm: np.ndarray | None


@dataclass
class Gathered:
    """Everything seen so far, by layer."""

    map_size: int
    sequences: dict[int, list[SinkSequence]] = field(default_factory=dict)
    causal: dict[int, bool] = field(default_factory=dict)
    margins: dict[int, np.ndarray] = field(default_factory=dict)
    uniform: dict[int, np.ndarray] = field(default_factory=dict)
    priors: set[str] = field(default_factory=set)
    maps: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = field(default_factory=dict)
    hidden: list[list[dict[str, np.ndarray]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recent: int = 0
    shortest: int = 2**62
    longest: dict[int, int] = field(default_factory=dict)
    residuals: dict[int, float] = field(default_factory=dict)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def gather_model(
    gathered: Gathered,
    model: nn.Module,
    arguments: dict[str, Any] | Tensor,
    layers: Sequence[int | str] | int | None,
    recent: int,
    hidden: Collection[str],
    keep: str,
    certify: int | None,
) -> Record:
    """Run a model and gather what it leaves; `hidden` names parts of `HIDDEN`."""
    ids = token_ids(arguments)
    if not isinstance(arguments, Tensor) and "decoder_input_ids" in arguments:
        # Two texts: a layer's tokens may be those of either.
        ids = None
    places = None if ids is None else functools.partial(_places, induction_keys(ids))
    names = SINK_STATISTICS + (("value_norm",) if hidden else ())
    states: list[dict[str, np.ndarray]] = []
    options = {"statistics": names, "keep": keep, "recent": recent, "at": places}
    with capture(model, layers=layers, certify=certify, **options) as record:
        with _hidden_states(model, states, hidden):
            run_model(model, arguments)
    gather_record(gathered, record)
    if len(record.calls) > len({call.layer for call in record.calls}):
        gathered.note("a layer is called again in a forward pass; every call counts as an input")
    if states:
        gathered.hidden.append(states)
    return record


def induction_keys(ids: Tensor) -> Tensor:
    """The key after the last earlier occurrence of each token: where an induction head looks.

    Parameters
    ----------
    ids : Tensor of integers, shape (batch, length)

    Returns
    -------
    Tensor of int64, shape (batch, length)
        -1 for a token that did not occur before.

    Examples
    --------
    >>> induction_keys(torch.tensor([[5, 7, 5, 5, 7]])).tolist()
    [[-1, -1, 1, 3, 2]]
    """
    ids = ids.cpu()
    ordered, order = ids.sort(dim=-1, stable=True)
    again = ordered[:, 1:] == ordered[:, :-1]
    keys = torch.full(ids.shape, -1)
    keys.scatter_(1, order[:, 1:], torch.where(again, order[:, :-1] + 1, -1))
    return keys


def _places(keys: Tensor, call: AttentionCall) -> Tensor:
    """The key before each query and, where a call's tokens are those of `keys`, also these."""
    previous = previous_keys(call)
    if keys.shape != (call.shape[0], call.shape[2]) or call.shape[2] != call.shape[3]:
        return previous
    return torch.cat([previous.expand(len(keys), -1, -1), keys.unsqueeze(-1)], dim=-1)


def gather_record(gathered: Gathered, record: Record) -> None:
    for call in record.check_calls():
        if call.rows is None or call.incoming is None:
            raise ValueError(f"record must hold {', '.join(SINK_STATISTICS)}")
        missing = [
            name
            for name in SINK_STATISTICS
            if name not in _DISPENSABLE and getattr(call.rows, name) is None
        ]
        if missing:
            raise ValueError(f"record lacks {', '.join(missing)}; capture it with the defaults")
        if call.rows.keys[:1] != (0,):
            raise ValueError(f"record must hold the mass of key 0 first, got {call.rows.keys}")
        if call.shape[2] != call.shape[3]:
            raise ValueError(
                f"layer {call.name}: {call.shape[2]} queries over {call.shape[3]} keys; sinks need "
                "whole sequences (no cached decoding, no cross-attention)"
            )
        _gather_call(gathered, call)


def _gather_call(gathered: Gathered, call: CapturedCall) -> None:
    layer, rows = call.layer, call.rows
    length = call.shape[2]
    mask = torch.ones(call.shape[0], length, dtype=torch.bool)
    if call.call.query_mask is not None:
        mask = call.call.query_mask.cpu().expand(call.shape[0], -1)
        if not bool(mask[:, 0].all()):
            raise ValueError(
                f"layer {call.name}: padded on the left, so key 0 is no token; pass the model and "
                "inputs with their attention_mask instead of a record, or pad on the right"
            )
    prior_first = _prior_on_first(call)
    observers = call.incoming.observers.expand(call.shape[0], -1, -1)
    previous, induction = _gathered_mass(call)
    column = _has_column(call)
    gathered.recent = rows.recent
    for b in range(call.shape[0]):
        real = mask[b]
        # A sliding window hides the first key: such queries tell nothing of signal and sink.
        first_seen = call.call.visibility.block(slice(None), slice(0, 1), batch=b)[:, 0]
        visible = rows.visible[b if len(rows.visible) > 1 else 0].amax(0)
        seen = (visible >= 2) & first_seen.to(visible.device)
        take = real.to(rows.visible.device)
        length = int(real.sum())
        importance = call.incoming.importance[b][:, take].clamp(max=1.0)
        norm = None
        if call.value_norm is not None:
            norm = _numpy(call.value_norm[b].mean(0)[take])
        gathered.sequences.setdefault(layer, []).append(
            SinkSequence(
                importance=_numpy(importance),
                observers=_numpy(observers[b].amax(0)[take]),
                first=_numpy(rows.key_mass[b, :, take, 0]),
                largest=_numpy(rows.largest_weight[b][:, take]),
                recent=_numpy(rows.recent_mass[b][:, take]),
                column=_numpy(rows.sink_mass[b][:, take]),
                entropy=_numpy(rows.entropy[b][:, take]),
                content_range=_numpy(rows.content_range[b][:, take]),
                prior_first=_numpy(prior_first[b][:, take]),
                counted=_numpy(seen[take]),
                uniform_entropy=_uniform_entropy(rows, b, take, column),
                previous=_numpy(previous[b][:, take]),
                induction=_numpy(induction[b][:, take]),
                value_norm=norm,
            )
        )
        gathered.shortest = min(gathered.shortest, length)
        if length > gathered.longest.get(layer, 0):
            gathered.longest[layer] = length
            gathered.margins[layer] = _margin(call, real)
            gathered.uniform[layer] = uniform_importance(
                _numpy(visible[take]), _numpy(observers[b].amax(0)[take]), causal=call.call.causal
            )
        if gathered.map_size:
            gathered.maps.setdefault(layer, []).append(_map(call, b, real, gathered.map_size))
    if call.residual is not None:
        gathered.residuals[layer] = max(gathered.residuals.get(layer, 0.0), call.residual)
    gathered.causal[layer] = call.call.causal or gathered.causal.get(layer, False)
    gathered.priors.add(_prior_kind(call.call.prior))
    if call.call.biased:
        gathered.note("a bias was added to the logits; it counts as prior")
    if column:
        gathered.note("an extra column takes mass: content range does not bound the first key's")


def _gathered_mass(call: CapturedCall) -> tuple[Tensor, Tensor]:
    """Mass on the key before each query, and on that of `induction_keys`; NaN if not known."""
    rows = call.rows
    unknown = torch.full_like(rows.entropy, math.nan)
    if rows.gathered_mass is None or not torch.equal(rows.at[:1, :, :1], previous_keys(call.call)):
        return unknown, unknown
    return rows.gathered_mass[..., 0], (
        rows.gathered_mass[..., 1] if rows.at.shape[2] > 1 else unknown
    )


def _uniform_entropy(rows: RowStatistics, batch: int, take: Tensor, column: bool) -> np.ndarray:
    """Entropy of equal weights for each query, (heads, queries): that of all it may use."""
    visible = rows.visible[batch if len(rows.visible) > 1 else 0][:, take]
    count = (visible + int(column)).clamp(min=1).double().log()
    return _numpy(count.expand(rows.entropy.shape[1], -1))


def _prior_on_first(call: CapturedCall) -> Tensor:
    """Prior mass on key 0 for each query: log pi_i0 = K_i0 - log Z_i, from the row statistics."""
    rows, prior = call.rows, call.call.prior
    partition = rows.kl_to_prior - rows.expected_score + rows.log_normaliser
    sink = torch.zeros_like(partition)
    if call.call.biased or _has_column(call):
        return torch.full_like(sink, math.nan)
    if prior is not None:
        values = prior.log_prior(call.call.query_pos, call.call.key_pos[:1]).detach()[..., 0]
        sink = values.repeat_interleave(call.shape[1] // len(values), dim=0).to(partition)
    return (sink - partition).exp().clamp(max=1.0)


def _prior_kind(prior: Prior | None) -> str:
    """One of `PRIORS`."""
    if prior is None:
        return "none"
    if isinstance(prior, UniformPrior):
        return "uniform"
    return "learned" if any(True for _ in prior.parameters()) else "fixed"


def _has_column(call: CapturedCall) -> bool:
    """Whether an extra column takes mass; its score is 0, outside the range of the keys' scores."""
    return bool((call.rows.sink_mass > 0).any())


def _margin(call: CapturedCall, real: Tensor) -> np.ndarray:
    """Lead of the prior's first key over every other key, at the last query, shape (heads,)."""
    heads, prior = call.shape[1], call.call.prior
    if prior is None or call.call.biased or int(real.sum()) < 2:
        return np.full(heads, np.nan)
    query, key = call.call.query_pos[real][-1:], call.call.key_pos[real]
    values = prior.log_prior(query, key).detach()[:, 0].double()
    lead = values[:, 0] - values[:, 1:].amax(-1)
    return _numpy(lead.repeat_interleave(heads // len(lead)))


def _map(
    call: CapturedCall, batch: int, real: Tensor, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, weights and allowed pairs of the first real tokens, (heads, size, size)."""
    at = real.nonzero().flatten()[:size]
    window = call.projections.logits(batch, slice(None), at)
    logits = window.logits
    if call.call.sink is not None:
        column = call.call.sink_logits(batch, slice(None), at).unsqueeze(-1)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(-1)
    allowed = window.allowed.expand(window.scores.shape)[:, :, at]
    parts = (part[:, :, at].masked_fill(~allowed, math.nan) for part in (window.logits, weights))
    logits, weights = map(_numpy, parts)
    return logits, weights, _numpy(allowed.any(0))


@contextmanager
def _hidden_states(
    model: nn.Module, states: list[dict[str, np.ndarray]], hidden: Collection[str]
) -> Iterator[None]:
    """Norms, large activations and spectra of what each block with attention returns."""
    handles = []
    try:
        for block in _attention_blocks(model) if hidden else ():
            handles.append(
                block.register_forward_hook(
                    lambda _module, _arguments, out: states.append(_states(out, hidden))
                )
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attention_blocks(model: nn.Module) -> list[nn.Module]:
    modules = dict(model.named_modules())
    blocks: dict[str, nn.Module] = {}
    for path in find_attention(model):
        parts = path.split(".")
        for depth in range(len(parts), 0, -1):
            parent = ".".join(parts[: depth - 1])
            if isinstance(modules.get(parent), nn.ModuleList):
                block = ".".join(parts[:depth])
                blocks.setdefault(block, modules[block])
                break
    if not blocks:
        raise ValueError("norms needs blocks in a ModuleList, and this model has none")
    return list(blocks.values())


def _states(out: Any, hidden: Collection[str]) -> dict[str, np.ndarray]:
    state = out[0] if isinstance(out, tuple | list) else out
    if state.ndim != 3:
        raise ValueError(
            f"norms needs block outputs of shape (batch, length, size), got {tuple(state.shape)}"
        )
    state = state.detach().float()
    size = state.abs()
    median = size.flatten(1).median(-1).values
    bound = torch.clamp(MASSIVE[1] * median, min=MASSIVE[0])
    values = {
        "norm": torch.linalg.vector_norm(size, dim=-1),
        "largest": size.amax(-1),
        "median": median,
        "massive": (size > bound[:, None, None]).sum(-1),
    }
    if "spectra" in hidden:
        values |= spectrum_of(state)
    return {name: _numpy(value) for name, value in values.items()}


def spectrum_of(states: Tensor) -> dict[str, Tensor]:
    r"""Matrix entropy and anisotropy of hidden states, from their singular values.

    With :math:`\lambda_i = \sigma_i^2 / \sum_j \sigma_j^2` of the length x size matrix, not
    centred: entropy :math:`-\sum_i \lambda_i \ln \lambda_i` [nats] and anisotropy
    :math:`\max_i \lambda_i`. A massive activation makes one direction hold almost everything:
    entropy near 0, anisotropy near 1, a compression valley (arXiv 2510.06477).

    Parameters
    ----------
    states : Tensor
        Shape (batch, length, size).

    Returns
    -------
    dict of str to Tensor
        "entropy" and "anisotropy", float64, shape (batch,).

    Examples
    --------
    >>> {name: value.item() for name, value in spectrum_of(torch.eye(1)[None]).items()}
    {'entropy': 0.0, 'anisotropy': 1.0}
    """
    states = states.double()
    if states.shape[1] > states.shape[2]:
        states = states.mT
    powers = torch.linalg.eigvalsh(states @ states.mT).clamp(min=0)
    shares = powers / powers.sum(-1, keepdim=True)
    return {
        "entropy": torch.special.entr(shares).sum(-1).abs(),
        "anisotropy": shares.amax(-1),
    }


def _numpy(tensor: Tensor) -> np.ndarray:
    # In one layout, as from a file: the last bit of a sum depends on it.
    return np.ascontiguousarray(tensor.detach().cpu().numpy())
