"""Attention sinks: how much mass single keys receive, in which heads, and when.

Statistics come from `goatviz.capture`, so no plan is ever formed and any model that can be
captured can be profiled. Importance follows Gu et al. 2025 (arXiv 2410.10781): the mean weight
of a key over the queries that see it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from goatviz import checks
from goatviz.adapters.capture import CapturedCall, Record, capture, find_attention
from goatviz.analysis.inputs import forward_calls, run_model, text_array, token_texts
from goatviz.analysis.intervals import bootstrap_interval, bootstrap_weights
from goatviz.analysis.sink_measures import measures, uniform_importance
from goatviz.analysis.sink_text import at_threshold, margin_texts, shortness
from goatviz.priors.base import Prior
from goatviz.priors.fixed import UniformPrior
from goatviz.results import SINK_PROFILE, check_result, make_result
from goatviz.training.checkpoint import Checkpoint
from goatviz.transport.bounds import protected_length

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
    "incoming_mass",
)

#: An activation is massive above this magnitude and this multiple of the median (Sun et al. 2024).
MASSIVE = (100.0, 1000.0)
#: What a profile says of its priors: that of the layer whose prior is furthest along.
PRIORS = ("none", "uniform", "fixed", "learned")
_THRESHOLDS = np.round(np.linspace(0.0, 1.0, 101), 2)
_RANGE_BINS = 240
_MASS_BINS = 40


def sink_profile(
    source: nn.Module | Checkpoint | Record,
    inputs: Any = None,
    *,
    threshold: float = 0.3,
    min_observers: int = 16,
    recent: int = 128,
    layers: Sequence[int | str] | int | None = None,
    tokenizer: Any = None,
    tokens: Sequence[str] | None = None,
    maps: bool | int = False,
    norms: bool = False,
    resamples: int = 400,
    seed: int = 0,
) -> xr.Dataset:
    r"""Where a model's attention sinks are: importance_j = mean over i that see j of p_ij.

    Parameters
    ----------
    source : nn.Module, Checkpoint or Record
        A model that `goatviz.capture` can watch; or a record of whole sequences, captured with
        at least `SINK_STATISTICS`, whose every call of a layer is one more forward pass.
    inputs : Tensor, mapping, str, or sequence of them
        What the model is called with: token ids or anything else batch first, keyword arguments
        such as a tokenizer's output, or texts (then `tokenizer` is needed). Every sequence is
        one input; padding by an attention_mask is taken away before the model runs.
    threshold : float
        epsilon, in [0, 1): a key is a sink of a head if its importance exceeds this, strictly.
    min_observers : int
        Keys that fewer queries see have importance NaN: the last key of a causal head is seen by
        one query, and an identity head would make it a sink.
    recent : int
        Tokens of the recent window; a record has its own.
    layers : int, str or sequence of them, optional
        Which attention layers, as in `goatviz.capture`; default all. Not with a record.
    tokenizer : callable, optional
        tokenizer(text, return_tensors="pt") gives keyword arguments of the model.
    tokens : sequence of str, optional
        One text for each key, for a single input; default read from `tokenizer` if it can.
    maps : bool or int
        Also average the logits and weights of the first so many tokens (True: 64) over inputs.
    norms : bool
        Also norms of values and hidden states, and massive activations: above 100 and above
        1,000 medians of the block's output. Hooks are put on the blocks for it.
    resamples, seed : int
        Resamples and seed of the bootstrap over inputs that gives 95 % intervals.

    Returns
    -------
    xarray.Dataset
        Schema "sink_profile" (`goatviz.results.SINK_PROFILE`). Queries that see one key only, or
        not the first, count in importance (as in the definition) and not in the signal's density.

    Raises
    ------
    TypeError
        If the model cannot be captured, or inputs are missing, texts without a tokenizer, or of
        another kind.
    ValueError
        If an argument is out of range, or a record is empty, padded on the left, lacks a
        statistic, or holds cached decoding.

    Warns
    -----
    UserWarning
        If an input is shorter than 16 tokens.

    Notes
    -----
    The sink rate is the share of (input, layer, head) whose first key is a sink; inputs whose
    first key has no importance count nowhere. `margin` is that of the longest input.

    Examples
    --------
    >>> import torch
    >>> from goatviz import load_pretrained
    >>> ids = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    >>> profile = sink_profile(load_pretrained("copy-mixture-1-goat"), ids)
    >>> profile["sink_rate"].sel(threshold=0.3).values.shape
    (1, 2)
    """
    steps = sink_profile_steps(
        source,
        inputs,
        threshold=threshold,
        min_observers=min_observers,
        recent=recent,
        layers=layers,
        tokenizer=tokenizer,
        tokens=tokens,
        maps=maps,
        norms=norms,
        resamples=resamples,
        seed=seed,
    )
    profile = _finished(steps)
    if too_short := shortness(profile):
        warnings.warn(too_short, stacklevel=2)
    return profile


def sink_profile_steps(
    source: nn.Module | Checkpoint | Record,
    inputs: Any = None,
    *,
    threshold: float = 0.3,
    min_observers: int = 16,
    recent: int = 128,
    layers: Sequence[int | str] | int | None = None,
    tokenizer: Any = None,
    tokens: Sequence[str] | None = None,
    maps: bool | int = False,
    norms: bool = False,
    resamples: int = 400,
    seed: int = 0,
    first: Callable[[Record], Any] | None = None,
) -> Generator[float, None, xr.Dataset]:
    """`sink_profile` in steps of one forward pass: yields the share that is done, in [0, 1].

    The first step checks what was given and runs nothing; the profile is what the generator
    returns. Parameters and errors are those of `sink_profile`; short inputs give no warning.
    `first` is called with the record of a model's first forward pass, projections kept.

    Examples
    --------
    >>> from goatviz import load_pretrained
    >>> inputs = [torch.zeros(1, 64, dtype=torch.long)] * 2
    >>> list(sink_profile_steps(load_pretrained("copy-mixture-1-goat"), inputs))
    [0.0, 0.5, 1.0]
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold!r}")
    min_observers = checks.positive_int("min_observers", min_observers)
    recent = checks.positive_int("recent", recent)
    resamples = checks.positive_int("resamples", resamples)
    size = 64 if maps is True else int(maps)
    if size < 0:
        raise ValueError(f"maps must be a positive number of tokens, got {maps!r}")
    gathered = _Gathered(map_size=size)
    if isinstance(source, Record):
        if inputs is not None:
            raise TypeError("inputs must not be given with a Record: it has seen its own")
        if layers is not None:
            raise TypeError("layers must not be given with a Record: capture them alone")
        if norms:
            raise ValueError("norms needs the model and inputs: a record holds no hidden states")
        yield 0.0
        _gather_record(gathered, source)
        names = source.layers
        name = "record"
    else:
        name = "model"
        if isinstance(source, Checkpoint):
            name, source = source.name, source.model
        if not isinstance(source, nn.Module):
            raise TypeError(
                f"source must be a model, a Checkpoint or a Record, got {type(source).__name__}"
            )
        name = type(source).__name__ if name == "model" else name
        names = tuple(find_attention(source))
        calls = list(forward_calls(inputs, tokenizer))
        yield 0.0
        for number, arguments in enumerate(calls, start=1):
            keep = "projections" if size or (first and number == 1) else "statistics"
            record = _gather_model(gathered, source, arguments, layers, recent, norms, keep)
            if first and number == 1:
                first(record)
            yield number / len(calls)
        if tokens is None and tokenizer is not None and len(calls) == 1:
            record = gathered.sequences[min(gathered.sequences)]
            tokens = token_texts(tokenizer, calls[0]) if len(record) == 1 else None
    return _profile(
        gathered,
        names,
        name=name,
        threshold=threshold,
        min_observers=min_observers,
        tokens=tokens,
        resamples=resamples,
        seed=seed,
    )


def _finished(steps: Generator[float, None, xr.Dataset]) -> xr.Dataset:
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def sink_table(profile: xr.Dataset) -> xr.Dataset:
    """Signal versus sink, one row a head: the numbers beside the paper's diagnostic figure.

    Parameters
    ----------
    profile : xarray.Dataset
        From `sink_profile`.

    Returns
    -------
    xarray.Dataset
        Over (layer, head): first_mass, largest_mass, recent_mass, content_range, sink_rate (at
        the profile's threshold), and rank_correlation: Spearman's, over queries, between content
        range and the first key's mass (from the binned density). `.to_dataframe()` prints well.

    Examples
    --------
    >>> import torch
    >>> from goatviz import load_pretrained
    >>> ids = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    >>> table = sink_table(sink_profile(load_pretrained("copy-mixture-1-goat"), ids))
    >>> bool(table["first_mass"].max() > 0.5)
    True
    """
    check_result(profile, SINK_PROFILE)
    counts, first = profile["signal_count"], profile["first_importance"]
    names = ("first_mass", "largest_mass", "recent_mass", "content_range")
    table = profile[list(names)].copy()
    # The curve's own thresholds are hundredths, and the profile's need not be one.
    above = (first > np.float32(profile.attrs["threshold"])).astype(float).where(first.notnull())
    table["sink_rate"] = above.mean("input") if "input" in above.dims else above
    table["rank_correlation"] = xr.apply_ufunc(
        _rank_correlation,
        counts,
        input_core_dims=[["range_bin", "mass_bin"]],
        vectorize=True,
        output_dtypes=[float],
    )
    return table


# What a forward pass left behind ------------------------------------------------------------


@dataclass
class _Sequence:
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
    value_norm: np.ndarray | None


@dataclass
class _Gathered:
    """Everything seen so far, by layer."""

    map_size: int
    sequences: dict[int, list[_Sequence]] = field(default_factory=dict)
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

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _gather_model(
    gathered: _Gathered,
    model: nn.Module,
    arguments: dict[str, Any] | Tensor,
    layers: Sequence[int | str] | int | None,
    recent: int,
    norms: bool,
    keep: str,
) -> Record:
    names = SINK_STATISTICS + (("value_norm",) if norms else ())
    hidden: list[dict[str, np.ndarray]] = []
    with capture(model, layers=layers, statistics=names, keep=keep, recent=recent) as record:
        with _hidden_states(model, hidden if norms else None):
            run_model(model, arguments)
    _gather_record(gathered, record)
    if len(record.calls) > len({call.layer for call in record.calls}):
        gathered.note("a layer is called again in a forward pass; every call counts as an input")
    if hidden:
        gathered.hidden.append(hidden)
    return record


def _gather_record(gathered: _Gathered, record: Record) -> None:
    for call in record.check_calls():
        if call.rows is None or call.incoming is None:
            raise ValueError(f"record must hold {', '.join(SINK_STATISTICS)}")
        missing = [
            name
            for name in SINK_STATISTICS
            if name != "incoming_mass" and getattr(call.rows, name) is None
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


def _gather_call(gathered: _Gathered, call: CapturedCall) -> None:
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
            _Sequence(
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
    gathered.causal[layer] = call.call.causal or gathered.causal.get(layer, False)
    gathered.priors.add(_prior_kind(call.call.prior))
    if call.call.biased:
        gathered.note("a bias was added to the logits; it counts as prior")
    if _has_column(call):
        gathered.note("an extra column takes mass: content range does not bound the first key's")


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
def _hidden_states(model: nn.Module, states: list[dict[str, np.ndarray]] | None) -> Iterator[None]:
    """Norms and large activations of what each block with attention returns."""
    if states is None:
        yield
        return
    handles = []
    try:
        for block in _attention_blocks(model):
            handles.append(
                block.register_forward_hook(
                    lambda _module, _arguments, out: states.append(_states(out))
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


def _states(out: Any) -> dict[str, np.ndarray]:
    hidden = out[0] if isinstance(out, tuple | list) else out
    if hidden.ndim != 3:
        raise ValueError(
            f"norms needs block outputs of shape (batch, length, size), got {tuple(hidden.shape)}"
        )
    size = hidden.detach().float().abs()
    median = size.flatten(1).median(-1).values
    bound = torch.clamp(MASSIVE[1] * median, min=MASSIVE[0])
    return {
        "norm": _numpy(torch.linalg.vector_norm(size, dim=-1)),
        "largest": _numpy(size.amax(-1)),
        "median": _numpy(median),
        "massive": _numpy((size > bound[:, None, None]).sum(-1)),
    }


# From sequences to a profile ----------------------------------------------------------------


def _profile(
    gathered: _Gathered,
    names: tuple[str, ...],
    *,
    name: str,
    threshold: float,
    min_observers: int,
    tokens: Sequence[str] | None,
    resamples: int,
    seed: int,
) -> xr.Dataset:
    layers = sorted(gathered.sequences)
    inputs = {len(sequences) for sequences in gathered.sequences.values()}
    if len(inputs) > 1:
        raise ValueError(f"every layer must be called equally often, got {sorted(inputs)} inputs")
    count = inputs.pop()
    length = max(
        s.importance.shape[1] for sequences in gathered.sequences.values() for s in sequences
    )
    heads = max(sequences[0].importance.shape[0] for sequences in gathered.sequences.values())
    shape = (len(layers), heads)
    if tokens is not None and len(tokens) != length:
        raise ValueError(f"tokens must hold {length} texts, one for each key, got {len(tokens)}")
    weights = bootstrap_weights(count, resamples, seed)
    out = _empty_fields(shape, length)
    first = np.full((count, *shape), np.nan, np.float32)
    anywhere = np.full((count, *shape), np.nan, np.float32)
    edges = _range_edges(gathered)
    signal = _empty_signal(shape)
    for at, layer in enumerate(layers):
        sequences = gathered.sequences[layer]
        count_heads = sequences[0].importance.shape[0]
        place = (at, slice(0, count_heads))
        out["present"][place] = True
        stacked = _importances(sequences, length, min_observers)
        for one in sequences:
            out["observers"][at, : len(one.observers)] += one.observers
        out["importance"][place] = _nanmean(stacked)
        low, high = bootstrap_interval(stacked, weights)
        out["importance_low"][place], out["importance_high"][place] = low, high
        first[:, at, :count_heads] = stacked[..., 0]
        anywhere[:, at, :count_heads] = np.fmax.reduce(stacked, axis=-1)
        _add_heads(out, place, sequences, gathered.margins[layer])
        uniform = gathered.uniform[layer]
        out["uniform_importance"][at, : len(uniform)] = uniform
        _add_signal(signal, place, sequences, edges)
    out.update(_finish_signal(signal))
    out.update(_rates(first, anywhere, weights))
    mass_edges = np.linspace(0, 1, _MASS_BINS + 1)
    out["range_stop"], out["mass_stop"] = edges[1:], mass_edges[1:]
    out["first_importance"] = first
    out.update(measures(out))
    out["margin_text"] = margin_texts(out["margin"], out["protected_length"])
    out["layer_name"] = np.array([names[layer] for layer in layers])
    coords: dict[str, Any] = {
        "layer": np.array(layers),
        **{"head": np.arange(heads), "key": np.arange(length), "input": np.arange(count)},
        **{"threshold": _THRESHOLDS, "range_bin": edges[:-1], "mass_bin": mass_edges[:-1]},
    }
    if tokens is not None:
        out["token"] = text_array(tokens)
    if gathered.maps:
        out.update(_mean_maps(gathered, layers, heads, coords))
    out.update(_mean_norms(gathered, layers, length, coords))
    attrs = _attributes(gathered) | {
        "source": name,
        "n_inputs": count,
        "length": length,
        "threshold": threshold,
        "min_observers": min_observers,
        "n_heads": int(out["present"].sum()),
    }
    return at_threshold(make_result(SINK_PROFILE, out, coords=coords, attrs=attrs), threshold)


def _attributes(gathered: _Gathered) -> dict[str, Any]:
    """What is known of the inputs and of the calls as a whole."""
    first = gathered.sequences[min(gathered.sequences)]
    return {
        "length_min": gathered.shortest,
        "recent": gathered.recent,
        "first_key": 0,
        "causal": int(all(gathered.causal.values())),
        "confidence": 0.95,
        "n_queries": sum(one.first.shape[1] for one in first),
        "prior": max(gathered.priors, key=PRIORS.index),
        "notes": " | ".join(gathered.notes),
    }


def _importances(sequences: list[_Sequence], length: int, min_observers: int) -> np.ndarray:
    """Importances of the keys that enough queries see, shape (inputs, heads, length)."""
    heads = len(sequences[0].importance)
    stacked = np.full((len(sequences), heads, length), np.nan, np.float32)
    for kept, one in zip(stacked, sequences, strict=True):
        seen = one.observers >= min_observers
        kept[:, : len(seen)] = np.where(seen, one.importance, np.nan)
    return stacked


def _empty_fields(shape: tuple[int, int], length: int) -> dict[str, np.ndarray]:
    """Fields over layers and heads, and over keys, without a value yet."""
    out = {
        key: np.full((*shape, length), np.nan, np.float32)
        for key in ("importance", "importance_low", "importance_high")
    }
    out["present"] = np.zeros(shape, dtype=bool)
    out["observers"] = np.zeros((shape[0], length), np.int64)
    out["uniform_importance"] = np.full((shape[0], length), np.nan)
    for key in (*_MEANS, "margin", "protected_length", "prior_first_low", "prior_first_high"):
        out[key] = np.full(shape, np.nan)
    return out


def _add_heads(
    out: dict[str, np.ndarray],
    place: tuple[int, slice],
    sequences: list[_Sequence],
    margins: np.ndarray,
) -> None:
    """Means over the queries of a layer's heads, their margins, and the range of their prior."""
    for key, attribute in _MEANS.items():
        each = [np.nanmean(getattr(one, attribute), axis=-1) for one in sequences]
        out[key][place] = np.mean(each, axis=0)
    out["margin"][place] = margins
    known = ~np.isnan(margins)
    lengths = np.full(len(margins), np.nan)
    lengths[known] = protected_length(margins[known])
    out["protected_length"][place] = lengths
    mass = np.concatenate([one.prior_first[:, one.counted] for one in sequences], axis=1)
    if mass.shape[1] and np.isfinite(mass).any():
        out["prior_first_low"][place] = np.nanmin(mass, axis=1)
        out["prior_first_high"][place] = np.nanmax(mass, axis=1)


_MEANS = {
    "first_mass": "first",
    "largest_mass": "largest",
    "recent_mass": "recent",
    "sink_column_mass": "column",
    "entropy": "entropy",
    "content_range": "content_range",
}


def _rates(first: np.ndarray, anywhere: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Shares above each threshold; where no importance is known, nothing is counted."""
    rates = {}
    # Compared in float32, as importances are: 0.1 is not above 0.1.
    limits = _THRESHOLDS.astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        for name, values in (("sink_rate", first), ("any_sink_rate", anywhere)):
            known = (~np.isnan(values)).sum(0)
            rates[name] = np.stack([(values > at).sum(0) / known for at in limits], axis=-1)
        known = (~np.isnan(first)).sum((1, 2))
        by_input = np.stack([(first > at).sum((1, 2)) / known for at in limits], axis=-1)
    low, high = bootstrap_interval(by_input, weights)
    return {
        **rates,
        "model_sink_rate": _nanmean(by_input),
        "model_sink_rate_low": low,
        "model_sink_rate_high": high,
    }


def _nanmean(values: np.ndarray) -> np.ndarray:
    valid = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(valid, values, 0.0).sum(0) / valid.sum(0)


def _range_edges(gathered: _Gathered) -> np.ndarray:
    largest = max(
        (
            float(np.nanmax(one.content_range[:, one.counted]))
            for sequences in gathered.sequences.values()
            for one in sequences
            if one.counted.any()
        ),
        default=1.0,
    )
    largest = largest if largest > 0 else 1.0
    return np.linspace(0.0, largest * (1 + 1e-9), _RANGE_BINS + 1)


def _empty_signal(shape: tuple[int, int]) -> dict[str, np.ndarray]:
    return {
        "count": np.zeros((*shape, _RANGE_BINS, _MASS_BINS), np.int32),
        **{key: np.zeros((*shape, _RANGE_BINS)) for key in ("first", "largest", "recent")},
    }


def _add_signal(
    signal: dict[str, np.ndarray],
    place: tuple[int, slice],
    sequences: list[_Sequence],
    edges: np.ndarray,
) -> None:
    layer = place[0]
    for one in sequences:
        counted = one.counted
        for head in range(one.first.shape[0]):
            x, y = one.content_range[head, counted], one.first[head, counted]
            column = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, _RANGE_BINS - 1)
            row = np.clip((y * _MASS_BINS).astype(int), 0, _MASS_BINS - 1)
            np.add.at(signal["count"][layer, head], (column, row), 1)
            for key in ("first", "largest", "recent"):
                np.add.at(signal[key][layer, head], column, getattr(one, key)[head, counted])


def _finish_signal(signal: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    total = signal["count"].sum(-1)
    out = {"signal_count": signal["count"]}
    with np.errstate(invalid="ignore", divide="ignore"):
        for key in ("first", "largest", "recent"):
            out[f"signal_{key}_mass"] = signal[key] / total
    return out


def _mean_maps(
    gathered: _Gathered, layers: list[int], heads: int, coords: dict[str, Any]
) -> dict[str, np.ndarray]:
    size = min(
        weights.shape[-1] for sequences in gathered.maps.values() for _, weights, _ in sequences
    )
    shape = (len(layers), heads, size, size)
    out = {
        "map_logits": np.full(shape, np.nan),
        "map_probability": np.full(shape, np.nan),
        "map_allowed": np.zeros((len(layers), size, size), dtype=bool),
    }
    for at, layer in enumerate(layers):
        for place, key in enumerate(("map_logits", "map_probability")):
            cut = [entry[place][:, :size, :size] for entry in gathered.maps[layer]]
            out[key][at, : len(cut[0])] = _nanmean(np.stack(cut))
        out["map_allowed"][at] = np.any(
            [entry[2][:size, :size] for entry in gathered.maps[layer]], axis=0
        )
    coords["map_query"] = coords["map_key"] = np.arange(size)
    return out


def _mean_norms(
    gathered: _Gathered, layers: list[int], length: int, coords: dict[str, Any]
) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    if all(
        one.value_norm is not None for sequences in gathered.sequences.values() for one in sequences
    ):
        norm = np.full((len(layers), length), np.nan)
        for at, layer in enumerate(layers):
            norm[at] = _over_keys([one.value_norm for one in gathered.sequences[layer]], length)
        out["value_norm"] = norm
    if not gathered.hidden:
        return out
    states = len(gathered.hidden[0])
    for key, name in (
        ("norm", "hidden_norm"),
        ("largest", "hidden_largest"),
        ("massive", "massive"),
    ):
        out[name] = np.stack(
            [
                _over_keys([row for one in gathered.hidden for row in one[s][key]], length)
                for s in range(states)
            ]
        )
    medians = [[one[s]["median"] for one in gathered.hidden] for s in range(states)]
    out["hidden_median"] = np.array([np.concatenate(chunks).mean() for chunks in medians])
    coords["state"] = np.arange(states)
    return out


def _over_keys(rows: list[np.ndarray], length: int) -> np.ndarray:
    padded = np.full((len(rows), length), np.nan)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return _nanmean(padded)


def _rank_correlation(counts: np.ndarray) -> float:
    """Spearman's correlation of a two-way table of counts; ties share their mean rank."""
    total = counts.sum()
    if total < 2:
        return math.nan
    ranks, spreads = [], []
    for axis in (0, 1):
        margin = counts.sum(1 - axis)
        rank = np.cumsum(margin) - margin / 2 - total / 2
        ranks.append(rank)
        spreads.append(math.sqrt(float((margin * rank**2).sum())))
    if min(spreads) == 0:
        return math.nan
    return float(ranks[0] @ counts @ ranks[1] / (spreads[0] * spreads[1]))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
