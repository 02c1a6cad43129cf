"""Hugging Face attention that computes its products itself, without the AttentionInterface.

While such a layer's own forward runs, its batched matrix products are intercepted: the first
multiplies queries and keys, the first after the softmax weights and values. Scale, masks and biases
in between are read from the layer's arguments and parameters, class by class. ALiBi becomes a prior
where the layer's tensor is linear.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from goatviz.adapters.huggingface import cached_tokens
from goatviz.adapters.kernel_call import KernelCall, Masks
from goatviz.adapters.watch import Observe, replaced_forwards
from goatviz.priors.fixed import ALiBiPrior
from goatviz.transport.visibility import Visibility, entry_of

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
_SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)
_SUMMED_PRODUCTS = (torch.baddbmm, Tensor.baddbmm)
#: Largest deviation of ALiBi from linearity, relative to its largest value; float32 rounding
#: stays below it.
_LINEAR = 2e-6


class _Reading(NamedTuple):
    """How a class scales and biases its scores.

    `scale` multiplies the product of the intercepted queries and keys, one for all heads or of
    shape (heads, 1, 1); `mask` is additive, or boolean with True = allowed; `bias`, in nats, has
    shape (batch or 1, heads, n_queries or 1, n_keys).
    """

    scale: float | Tensor
    mask: Tensor | None
    dropout: float
    bias: Tensor | None = None
    cross: bool = False


def _read_bloom(module: nn.Module, given: Mapping[str, Any], q: Tensor, k: Tensor) -> _Reading:
    alibi = given["alibi"].unflatten(0, (-1, module.num_heads))
    dropout = module.attention_dropout.p
    return _Reading(module.inv_norm_factor, given["attention_mask"], dropout, alibi)


def _read_falcon(module: nn.Module, given: Mapping[str, Any], q: Tensor, k: Tensor) -> _Reading:
    mask, alibi, dropout = given["attention_mask"], given["alibi"], module.attention_dropout.p
    scale = module.inv_norm_factor
    if module.config._attn_implementation == "sdpa" and not given["output_attentions"]:
        # The mask includes ALiBi already.
        alibi = None
    else:
        # Eager attention adds ALiBi to the mask, and adds even a boolean mask to the scores.
        mask = mask.float()
        alibi = (
            None if alibi is None else alibi.reshape(-1, module.num_heads, 1, k.shape[2]) * scale
        )
    return _Reading(scale, mask, dropout, alibi)


def _read_mpt(module: nn.Module, given: Mapping[str, Any], q: Tensor, k: Tensor) -> _Reading:
    mask, alibi = given.get("attention_mask"), given.get("position_bias")
    return _Reading(
        module.softmax_scale,
        None if mask is None else ~mask,
        module.attn_dropout_p,
        None if alibi is None else alibi[None, :, :, -k.shape[2] :],
    )


def _read_gpt_neo(module: nn.Module, given: Mapping[str, Any], q: Tensor, k: Tensor) -> _Reading:
    queries, keys = q.shape[2], k.shape[2]
    near, mask = module.bias[:, :, keys - queries : keys, :keys], given.get("attention_mask")
    if mask is not None:
        near = mask.masked_fill(~near, torch.finfo(mask.dtype).min)
    return _Reading(1.0, near, module.attn_dropout.p)


def _read_gptj(module: nn.Module, given: Mapping[str, Any], q: Tensor, k: Tensor) -> _Reading:
    return _Reading(
        1.0 / float(module.scale_attn), given.get("attention_mask"), module.attn_dropout.p
    )


def _read_gpt_neox_japanese(
    module: nn.Module, given: Mapping[str, Any], q: Tensor, k: Tensor
) -> _Reading:
    return _Reading(
        1.0 / module.norm_factor, given.get("attention_mask"), module.attention_dropout.p
    )


def _read_swin(module: nn.Module, given: Mapping[str, Any], q: Tensor, k: Tensor) -> _Reading:
    bias = module.relative_position_bias_table[module.relative_position_index]
    mask = _mask_of_windows(given["attention_mask"], len(q))
    scale = module.attention_head_size**-0.5
    return _Reading(scale, mask, module.dropout.p, bias.permute(2, 0, 1).unsqueeze(0))


def _read_swinv2(module: nn.Module, given: Mapping[str, Any], q: Tensor, k: Tensor) -> _Reading:
    # A temperature of each head on normalised queries and keys.
    scale = module.logit_scale.clamp(max=math.log(100.0)).exp()
    table = module.continuous_position_bias_mlp(module.relative_coords_table).flatten(0, -2)
    bias = 16 * table[module.relative_position_index].sigmoid()
    mask = _mask_of_windows(given["attention_mask"], len(q))
    # The layer adds its mask twice.
    mask = None if mask is None else 2 * mask
    return _Reading(scale, mask, module.dropout.p, bias.permute(2, 0, 1).unsqueeze(0))


def _mask_of_windows(mask: Tensor | None, batch: int) -> Tensor | None:
    """Masks of the windows of one image, (windows, n, n), for the windows of all images."""
    return None if mask is None else mask.repeat(batch // len(mask), 1, 1).unsqueeze(1)


def _read_deberta(module: nn.Module, given: Mapping[str, Any], q: Tensor, k: Tensor) -> _Reading:
    if module.talking_head:
        raise ValueError(
            f"{type(module).__name__} cannot be captured: talking heads mix the logits of all "
            "heads, so that none has a plan of its own"
        )
    # The scale is in the queries.
    bias, dropout = None, module.dropout.p
    positions = given["relative_pos"], given["rel_embeddings"]
    if module.relative_attention and module.pos_att_type and positions[1] is not None:
        bias = module.disentangled_att_bias(q, k, *positions, 1 + len(module.pos_att_type))
        dropout = max(dropout, module.pos_dropout.p)
    return _Reading(1.0, given["attention_mask"].bool(), dropout, bias)


def _read_deberta_v2(module: nn.Module, given: Mapping[str, Any], q: Tensor, k: Tensor) -> _Reading:
    # The scale is in the keys.
    kinds = {"c2p", "p2c"} & set(module.pos_att_type)
    bias, dropout = None, module.dropout.p
    if module.relative_attention and kinds:
        key = k * (q.shape[-1] * (1 + len(kinds))) ** 0.5
        positions = given["relative_pos"], given["rel_embeddings"], 1 + len(kinds)
        bias = module.disentangled_attention_bias(q.flatten(0, 1), key.flatten(0, 1), *positions)
        bias, dropout = bias.unflatten(0, q.shape[:2]), max(dropout, module.pos_dropout.p)
    return _Reading(1.0, given["attention_mask"].bool(), dropout, bias)


def _read_superglue(module: nn.Module, given: Mapping[str, Any], q: Tensor, k: Tensor) -> _Reading:
    cross = given["encoder_hidden_states"] is not None
    mask = given["encoder_attention_mask" if cross else "attention_mask"]
    scale = module.attention_head_size**-0.5
    return _Reading(scale, mask, module.dropout.p, cross=cross)


#: By package and class: packages have classes of the same name.
_READERS: dict[str, Callable[[nn.Module, Mapping[str, Any], Tensor, Tensor], _Reading]] = {
    "bloom.BloomAttention": _read_bloom,
    "codegen.CodeGenAttention": _read_gptj,
    "deberta.DisentangledSelfAttention": _read_deberta,
    "deberta_v2.DisentangledSelfAttention": _read_deberta_v2,
    "donut.DonutSwinSelfAttention": _read_swin,
    "falcon.FalconAttention": _read_falcon,
    "gptj.GPTJAttention": _read_gptj,
    "gpt_neo.GPTNeoSelfAttention": _read_gpt_neo,
    "gpt_neox_japanese.GPTNeoXJapaneseAttention": _read_gpt_neox_japanese,
    "maskformer.MaskFormerSwinSelfAttention": _read_swin,
    "mpt.MptAttention": _read_mpt,
    "superglue.SuperGlueSelfAttention": _read_superglue,
    "swin2sr.Swin2SRSelfAttention": _read_swinv2,
    "swinv2.Swinv2SelfAttention": _read_swinv2,
}


def _class(module: nn.Module) -> str:
    """Package and class of one of transformers' layers, as in `_READERS`; empty for others."""
    prefix, _, rest = type(module).__module__.partition("transformers.models.")
    return f"{rest.split('.')[0]}.{type(module).__name__}" if rest and not prefix else ""


def find_inline_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Attention layers of transformers that make their own products and are known here, by path.

    Examples
    --------
    >>> find_inline_attention(nn.Linear(2, 2))
    {}
    """
    return {path: module for path, module in model.named_modules() if _class(module) in _READERS}


@contextmanager
def watch_inline_attention(
    model: nn.Module, modules: Mapping[str, nn.Module], observe: Observe
) -> Iterator[None]:
    """Report every call of these modules to `observe`; outputs keep every bit.

    Parameters
    ----------
    model : nn.Module
        The model that holds the modules.
    modules : mapping
        From `find_inline_attention(model)`.
    observe : callable
        See `goatviz.adapters.watch.Observe`; the kernel's output is the product of weights and
        values.

    Raises
    ------
    ValueError
        If a module is already being watched; while the model runs, if it applies attention
        dropout, is on the meta device, or makes no products that are known.
    """
    masks = Masks()
    forwards = [
        (module, _watched_forward(module, path, observe, masks)) for path, module in modules.items()
    ]
    with replaced_forwards(forwards):
        yield


def _watched_forward(
    module: nn.Module, path: str, observe: Observe, masks: Masks
) -> Callable[..., Any]:
    original = type(module).forward
    signature = inspect.signature(original)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(module, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments

        def report(q: Tensor, k: Tensor, v: Tensor) -> Any:
            with torch.no_grad():
                return observe(path, **_options(module, path, given, masks, (q, k, v)))

        products = _Products(_heads(module), report)
        with products:
            out = original(module, *args, **kwargs)
        if not products.reported:
            raise ValueError(
                f"{path} cannot be captured: no product of weights and values was recognised"
            )
        return out

    return forward


def _heads(module: nn.Module) -> int:
    names = ("num_heads", "n_heads", "num_attention_heads")
    return next(getattr(module, name) for name in names if hasattr(module, name))


class _Products(TorchFunctionMode):
    """Intercepts the two products of one attention call: the first, and the first after a softmax.

    Projections multiply by two-dimensional matrices; products of more dimensions count.
    """

    def __init__(self, heads: int, report: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self._heads, self._report = heads, report
        self._scores: tuple[Tensor, Tensor] | None = None
        self._weighted = self.reported = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._mixed(*args[:3], lambda: func(*args, **kwargs))
        self._weighted = self._weighted or func in _SOFTMAXES
        pair = _operands(func, args, kwargs)
        if pair is not None and self._scores is None:
            self._scores = pair
        elif pair is not None and self._weighted and not self.reported:
            q, k = self._scores
            return self._mixed(q, k.mT, pair[1], lambda: func(*args, **kwargs))
        return func(*args, **kwargs)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, kernel: Callable[[], Tensor]) -> Tensor:
        """Report a call, run its kernel, and return the output or what replaces it."""
        self.reported = True
        q, k, v = (self._by_head(x) for x in (q, k, v))
        answer = self._report(q, k, v)
        out = kernel()
        changed = None if answer is None else answer(self._by_head(out))
        return out if changed is None else changed.reshape(out.shape)

    def _by_head(self, x: Tensor) -> Tensor:
        """Shape (batch, heads, length, d), where a layer merges the first two."""
        return x if x.ndim == 4 else x.unflatten(0, (-1, self._heads))


def _operands(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Operands of a batched matrix product; None for any other function."""
    if func in _SUMMED_PRODUCTS:
        batches = (*args[1:3], kwargs.get("batch1"), kwargs.get("batch2"))
        return tuple(x for x in batches if x is not None)
    if func in _PRODUCTS and len(args) == 2 and args[0].ndim > 2 and args[1].ndim > 2:
        return args
    return None


def _options(
    module: nn.Module,
    path: str,
    given: Mapping[str, Any],
    masks: Masks,
    projections: tuple[Tensor, Tensor, Tensor],
) -> dict[str, Any]:
    """Arguments of `AttentionCall.from_tensors`."""
    q, k, v = projections
    reading = _READERS[_class(module)](module, given, q, k)
    if isinstance(reading.scale, Tensor):
        q, reading = q * reading.scale, reading._replace(scale=1.0)
    cache = given.get("layer_past", given.get("past_key_values"))
    index = getattr(module, "layer_idx", getattr(module, "layer_id", None))
    # Without a mask, only sdpa is causal by itself.
    implementation = "eager" if reading.mask is not None else _implementation(module)
    options = {"scaling": reading.scale, "dropout": reading.dropout}
    tokens = cached_tokens(cache, index)
    given = KernelCall(
        path, module, q, k, reading.mask, implementation, options, tokens, reading.cross
    )
    call = given.options_of_call(masks)
    call |= {"q": q, "k": k, "v": v}
    bias = call["bias"]
    if reading.bias is not None:
        added = reading.bias.detach().float()
        bias = added if bias is None else bias + added
    if bias is not None:
        slopes = _slopes(bias, call["visibility"])
        call["bias"] = bias.expand(-1, -1, q.shape[2], -1) if slopes is None else None
        if slopes is not None:
            call["prior"] = ALiBiPrior(len(slopes), slopes=slopes.tolist()).to(q.device)
            # A prior needs as many heads as the keys have.
            call |= {"k": k.expand(-1, q.shape[1], -1, -1), "v": v.expand(-1, q.shape[1], -1, -1)}
    if getattr(cache, "is_compileable", False):
        # The next step writes into the memory of a static cache.
        call |= {"k": call["k"].clone(), "v": call["v"].clone()}
    return call


def _implementation(module: nn.Module) -> str:
    config = getattr(module, "config", None)
    return getattr(config, "_attn_implementation", None) or "eager"


def _slopes(bias: Tensor, visibility: Visibility) -> Tensor | None:
    """ALiBi's slopes, (heads,), if a bias is m j + a constant of each row; None if it is not.

    Parameters
    ----------
    bias : Tensor, shape (batch or 1, heads, n_queries or 1, n_keys)
        Nats; only allowed pairs count.
    visibility : Visibility
        Of the call.
    """
    found = None
    index = torch.arange(visibility.n_keys, dtype=torch.float64, device=bias.device)
    for b in range(max(len(bias), visibility.batch)):
        values = entry_of(bias, b).double()
        allowed = visibility.block(slice(None), slice(None), batch=b).to(bias.device)
        if allowed.ndim > 2:
            return None
        if values.shape[1] == 1:
            allowed = allowed.any(0, keepdim=True)
        row = int(allowed.sum(-1).argmax())
        seen = allowed[row].nonzero().flatten()
        if len(seen) < 2:
            continue
        first, last = int(seen[0]), int(seen[-1])
        slopes = (values[:, row, last] - values[:, row, first]) / (last - first)
        rest = values - slopes[:, None, None] * index
        spread = rest.masked_fill(~allowed, -torch.inf).amax(-1)
        spread = spread - rest.masked_fill(~allowed, torch.inf).amin(-1)
        size = 1.0 + float(values.masked_fill(~allowed, 0.0).abs().max())
        if float(spread.max()) > _LINEAR * size or float(slopes.min()) <= 0:
            return None
        if found is not None and not torch.allclose(found, slopes, rtol=1e-5, atol=0):
            return None
        found = slopes if found is None else found
    return found
