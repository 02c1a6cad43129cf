"""goat-attention, the paper's own package: its modules become goatviz priors and layers.

Parameters are copied and the module is left unchanged. Choices that the package makes at call time
and that a prior cannot know (is_causal, the current length, a query-norm gate) are reported, not
guessed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from goatviz import checks
from goatviz.adapters.watch import Observe, allowed_by, is_same, replaced_forwards
from goatviz.attention.layer import Attention
from goatviz.priors.base import Prior, ScaledPrior, SumPrior
from goatviz.priors.fixed import UniformPrior
from goatviz.priors.sink import RecencyPrior, SinkPrior
from goatviz.priors.spectral import SpectralPrior


@dataclass(frozen=True)
class GoatAttentionRecord:
    """What one GoatAttention module holds.

    Attributes
    ----------
    path : str
        The module's path in its tree, "" for the root.
    prior : Prior
        One head for each key-value head, with gains, bump, prior scale and recency. With a
        query-norm gate, the ungated prior (see `query_dependent`).
    causal : bool
        Whether recency is included: the package adds it to causal calls only.
    query_dependent : bool
        The module gates its prior by each query's norm, so no single prior describes it.
    length_dependent : bool
        The module has no training_seq_len and normalises its sink by the current length.
    """

    path: str
    prior: Prior
    causal: bool
    query_dependent: bool
    length_dependent: bool

    @property
    def notes(self) -> list[str]:
        """Caveats to print beside this prior."""
        notes = []
        if self.query_dependent:
            notes.append("gated by the query's norm: the prior shown is the ungated one")
        if self.length_dependent:
            notes.append("no training_seq_len: this prior holds at the length shown only")
        return notes


def is_goat_attention(module: object) -> bool:
    """Whether `module` is goat-attention's GoatAttention; the package is not imported."""
    return any(
        cls.__name__ == "GoatAttention" and cls.__module__.split(".")[0] == "goat"
        for cls in type(module).__mro__
    )


def find_goat_attention(module: nn.Module) -> dict[str, nn.Module]:
    """Every GoatAttention in a module tree, by path, in the order of the tree."""
    return {path: child for path, child in module.named_modules() if is_goat_attention(child)}


def read_goat_attention(
    module: nn.Module,
    *,
    causal: bool | None = None,
    length: int | None = None,
    axes: int | None = None,
    path: str = "",
) -> GoatAttentionRecord:
    """The prior of one GoatAttention module.

    Parameters
    ----------
    module : GoatAttention
        From the package goat-attention.
    causal : bool, optional
        The is_causal that the module is called with; default: True unless it is on a grid.
    length : int, optional
        Current length in tokens; needed only by modules without training_seq_len.
    axes : int, optional
        0 or 2; needed only by modules with pos_encoding="auto", which decide on every call.
    path : str
        The record's `path`.

    Raises
    ------
    TypeError
        If `module` is not a GoatAttention.
    ValueError
        If `length` or `axes` is needed and missing.
    """
    if not is_goat_attention(module):
        raise TypeError(
            f"module must be goat-attention's GoatAttention, got {type(module).__name__}"
        )
    axes = _axes(module, axes)
    causal = axes == 0 if causal is None else checks.flag("causal", causal)
    heads = module.kv_num_heads
    relative = SpectralPrior(heads, rank=module.R, axes=axes, init="uniform")
    _copy(relative.alpha, module.lambda_sym)
    _copy(relative.beta, module.lambda_asym)
    relative.frequencies = module.rel_freqs_base.detach().clone()
    parts: list[Prior] = [relative]
    length_dependent = False
    if module.enable_key_bias:
        length_dependent = module.training_seq_len is None
        if length_dependent and length is None:
            raise ValueError(
                "length is needed: this module has no training_seq_len and normalises its sink "
                "by the current length"
            )
        training_length = max(length - 1, 1) if length_dependent else module.training_seq_len
        scale = float(module.goat_prior_scale)
        for part in _key_terms(module, training_length, axes, causal):
            parts.append(part if scale == 1.0 else ScaledPrior(part, scale))
    prior = SumPrior(parts) if len(parts) > 1 else parts[0]
    if module.R == 0 and len(parts) == 1:
        prior = UniformPrior(heads)
    return GoatAttentionRecord(
        path=path,
        prior=prior.to(module.lambda_sym.device),
        causal=causal,
        query_dependent=module.prior_gate == "query_norm",
        length_dependent=length_dependent,
    )


def convert(
    module: nn.Module,
    *,
    causal: bool | None = None,
    length: int | None = None,
    axes: int | None = None,
) -> Attention:
    """A goatviz `Attention` with the outputs of a GoatAttention module in evaluation mode.

    Parameters
    ----------
    module : GoatAttention
        Self-attention; left unchanged.
    causal, length, axes
        As in `read_goat_attention`.

    Returns
    -------
    Attention
        Takes (batch, length, embed_dim), whatever the module's batch_first.

    Raises
    ------
    TypeError
        If `module` is not a GoatAttention.
    ValueError
        If the module has something that `Attention` lacks: a query-norm gate, appended bias or
        zero keys, keys or values of another size, dropout in training mode.

    Examples
    --------
    >>> convert(nn.Linear(4, 4))
    Traceback (most recent call last):
    ...
    TypeError: module must be goat-attention's GoatAttention, got Linear
    """
    record = read_goat_attention(module, causal=causal, length=length, axes=axes)
    other_sizes = module.kdim != module.embed_dim or module.vdim != module.embed_dim
    _refuse(
        "module cannot be converted: it has",
        {
            "a prior gated by the query's norm (prior_gate='query_norm')": record.query_dependent,
            "appended keys (add_bias_kv, add_zero_attn)": module.add_bias_kv
            or module.add_zero_attn,
            "keys or values of another size (kdim, vdim)": other_sizes,
            "dropout in training mode (call eval() first)": _drops(module),
        },
    )
    bias = module.out_proj.bias is not None
    layer = Attention(
        module.embed_dim,
        module.num_heads,
        num_kv_heads=module.kv_num_heads,
        content_dim=module.content_dim,
        prior=record.prior,
        causal=record.causal,
        bias=bias,
    )
    layer.to(device=module.out_proj.weight.device, dtype=module.out_proj.weight.dtype)
    if module.in_proj is not None:
        sizes = [module.embed_dim, module.kv_embed_dim, module.kv_embed_dim]
        weights = module.in_proj.weight.split(sizes)
        biases = module.in_proj.bias.split(sizes) if bias else (None, None, None)
    else:
        theirs = (module.q_proj, module.k_proj, module.v_proj)
        weights = [linear.weight for linear in theirs]
        biases = [linear.bias for linear in theirs]
    ours = (layer.q_proj, layer.k_proj, layer.v_proj)
    for linear, weight, offset, is_value in zip(
        ours, weights, biases, (False, False, True), strict=True
    ):
        keep = module.head_dim if is_value else module.content_dim
        _copy(linear.weight, _content_rows(weight, module.head_dim, keep))
        if offset is not None:
            _copy(linear.bias, _content_rows(offset, module.head_dim, keep))
    _copy(layer.out_proj.weight, module.out_proj.weight)
    if bias:
        _copy(layer.out_proj.bias, module.out_proj.bias)
    return layer.train(module.training)


def _refuse(sentence: str, faults: Mapping[str, bool]) -> None:
    """Raise a ValueError that ends with the first fault that is true."""
    for fault, present in faults.items():
        if present:
            raise ValueError(f"{sentence} {fault}")


def _drops(module: nn.Module) -> bool:
    return module.training and module.dropout > 0


def _axes(module: nn.Module, axes: int | None) -> int:
    encoding = module.pos_encoding
    if encoding == "auto":
        if axes not in (0, 2):
            raise ValueError(
                "axes must be 0 (a sequence) or 2 (a grid): this module has pos_encoding='auto' "
                f"and decides on every call; got {axes!r}"
            )
        return axes
    dimensions = 2 if encoding == "2d" else 0
    if axes is not None and axes != dimensions:
        raise ValueError(f"axes must be {dimensions} for pos_encoding={encoding!r}, got {axes!r}")
    return dimensions


def _key_terms(module: nn.Module, training_length: int, axes: int, causal: bool) -> list[Prior]:
    hidden = module.key_bias.fc1.out_features
    sink = SinkPrior(
        module.kv_num_heads,
        rank=module.M,
        training_length=training_length,
        hidden=hidden,
        axes=axes,
        init="uniform",
    )
    sink.frequencies = module.abs_freqs_base.detach().clone()
    for ours, theirs in ((sink.mlp[0], module.key_bias.fc1), (sink.mlp[2], module.key_bias.fc2)):
        _copy(ours.weight, theirs.weight)
        _copy(ours.bias, theirs.bias)
    _copy(sink.gain, module.sink_gain)
    _copy(sink.bump, module.sink_bump)
    if not causal:
        return [sink]
    recency = RecencyPrior(module.kv_num_heads)
    _copy(recency.raw_slope, module.recency_slope_raw)
    return [sink, recency]


def _content_rows(tensor: Tensor, head_dim: int, keep: int) -> Tensor:
    """The first `keep` output features of every head."""
    return tensor.unflatten(0, (-1, head_dim))[:, :keep].flatten(0, 1)


@torch.no_grad()
def _copy(ours: Tensor, theirs: Tensor) -> None:
    ours.copy_(theirs)


@contextmanager
def watch_goat_attention(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    observe: Observe,
) -> Iterator[None]:
    """Report every call of these GoatAttention modules to `observe`; outputs keep every bit.

    Parameters
    ----------
    model : nn.Module
        The model that holds the modules.
    modules : mapping
        From `find_goat_attention(model)`.
    observe : callable
        observe(path, q, k, **options), as in `AttentionCall.from_tensors`: content queries and
        keys, and the prior as an object.

    Raises
    ------
    ValueError
        If a module is already being watched, or has a query-norm gate or appended keys, which no
        prior can express; while the model runs, if it is called with a key-value cache, a grid,
        positional offsets, keys of another sequence, or dropout in training mode.
    """
    for path, module in modules.items():
        _refuse(
            f"{path or 'model'} cannot be captured: it has",
            {
                "a prior gated by the query's norm": module.prior_gate == "query_norm",
                "appended keys": module.add_bias_kv or module.add_zero_attn,
            },
        )
    forwards = [
        (module, _watched_forward(module, path, observe)) for path, module in modules.items()
    ]
    with replaced_forwards(forwards):
        yield


def _watched_forward(module: nn.Module, path: str, observe: Observe) -> Callable[..., object]:
    original = type(module).forward
    signature = inspect.signature(original)

    def forward(*args: object, **kwargs: object) -> object:
        bound = signature.bind(module, *args, **kwargs).arguments
        observe(path, **_watched_call(module, path, {**bound.pop("kwargs", {}), **bound}))
        return original(module, *args, **kwargs)

    return forward


@torch.no_grad()
def _watched_call(module: nn.Module, path: str, given: Mapping[str, object]) -> dict[str, Any]:
    query, key, value = (given[name] for name in ("query", "key", "value"))
    _refuse(
        f"{path or 'model'} cannot be captured: it is called with",
        {
            "a key-value cache": given.get("past_key_value") is not None,
            "keys of another sequence": not is_same(query, key),
            "a grid": _on_grid(module, given),
            "positional offsets": any(given.get(f"position_offset_{x}") for x in "qk"),
            "attention dropout in training mode": _drops(module),
        },
    )
    x = query if module.batch_first else query.transpose(0, 1)
    batch, length, _ = x.shape
    causal = bool(given.get("is_causal", False))
    # A new layer draws initial values; the model's own random numbers must not change.
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        layer = convert(
            module, causal=causal, length=length, axes=0 if module.pos_encoding == "auto" else None
        )
    q, k, v, points = layer.project(x)
    if not is_same(query, value):
        v = layer.project(value if module.batch_first else value.transpose(0, 1))[2]
    keep, pairs = _their_masks(module, given, batch, length)
    mask, bias = keep, None
    if pairs is not None:
        # The package clamps extreme values, so that they do not overflow.
        mask, bias = allowed_by(pairs if pairs.dtype == torch.bool else pairs.clamp(max=80.0))
        mask = mask if keep is None else mask & keep[:, None, None, :].to(mask.device)
    return {
        "q": q,
        "k": k,
        "v": v,
        "prior": layer.prior,
        "causal": causal,
        "mask": mask,
        "bias": bias,
        "query_pos": points,
        "key_pos": points,
        "query_mask": keep,
    }


def _on_grid(module: nn.Module, given: Mapping[str, object]) -> bool:
    """Whether positions form a grid; "auto" takes any square number of tokens for one."""
    if module.pos_encoding != "auto":
        return module.pos_encoding == "2d"
    if given.get("spatial_shape") is not None:
        return True
    class_token = given.get("has_cls_token")
    class_token = module.has_cls_token_default if class_token is None else class_token
    patches = given["key"].shape[1 if module.batch_first else 0] - bool(class_token)
    return patches > 0 and math.isqrt(patches) ** 2 == patches


def _their_masks(
    module: nn.Module, given: Mapping[str, object], batch: int, length: int
) -> tuple[Tensor | None, Tensor | None]:
    """Real keys (batch, length) and the pair mask in four dimensions, as the package reads them."""
    padding, pairs = given.get("key_padding_mask"), given.get("attn_mask")
    either = given.get("attention_mask")
    if either is not None:
        if either.ndim == 2 and padding is None and pairs is None:
            padding = either == 0
        elif pairs is None:
            pairs = either
    keep = None if padding is None else ~padding.bool()
    if pairs is not None:
        if pairs.ndim == 2:
            pairs = pairs[None, None]
        elif pairs.ndim == 3 and len(pairs) in (1, batch):
            pairs = pairs.unsqueeze(1)
        elif pairs.ndim == 3:
            pairs = pairs.reshape(batch, -1, length, length)
        if pairs.shape[1] not in (1, module.num_heads):
            pairs = pairs.repeat_interleave(module.num_heads // pairs.shape[1], dim=1)
        if pairs.dtype != torch.bool:
            pairs = pairs.float()
        pairs = pairs.expand(-1, -1, length, -1)
    return keep, pairs
