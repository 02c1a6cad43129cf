"""Hugging Face models: their attention calls, watched without changing what they compute.

A model's modules look up their attention function by a name in their config. While the model is
watched, the config holds an equal string with an entry of its own in the registry: a function that
reports the call and then runs the original. transformers is imported only for such a model.
"""

from __future__ import annotations

import copy
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from goatviz.adapters.kernel_call import KernelCall, Masks
from goatviz.adapters.rotary import rotary_frequencies
from goatviz.adapters.watch import Observe

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"
#: Classes of layers without a plan: recurrences and linear attention. KimiLinearAttention does not
#: belong here: it is its model's softmax attention.
_NO_PLAN = re.compile(
    r"(DeltaAttention|GatedDeltaNet|LightningAttention|TextLinearAttention|RwkvLinearAttention"
    r"|RwkvSelfAttention|(Mamba2?|Bamba|FalconH1)Mixer|MambaLayer)$"
)
#: Layers that multiply each head's output by sigmoid(g_proj(hidden states)).
_HEAD_GATED = (
    "BailingHybridAttention",
    "Dots3NoteTextAttention",
    "Lfm3Attention",
    "Step3p7Attention",
)


class _Captured(str):
    """An implementation's name for one watched model: equal to it as text, but a key of its own.

    Model code compares the name ("eager", "sdpa", anything with "flash") and must see no
    difference; registries look it up and must find our entry.
    """

    __slots__ = ("_own",)

    def __new__(cls, name: str) -> _Captured:
        self = super().__new__(cls, name)
        self._own = object()
        return self

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        return hash(self._own)

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        # A config that is copied or saved in the meantime is not watched.
        return str, (str(self),)


def find_huggingface_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that dispatch through transformers' AttentionInterface, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if _has_config(module) and _INTERFACE in _names_used(module)
    }


def unwatchable_huggingface(
    model: nn.Module, watched: Mapping[str, nn.Module]
) -> tuple[dict[str, str], dict[str, str]]:
    """Class names of transformers' layers that cannot be watched, by path.

    Parameters
    ----------
    model : nn.Module
        Any model.
    watched : mapping
        Its attention layers that can be watched, by path.

    Returns
    -------
    refused, skipped : dict of str
        Attention that cannot be read, and layers that have no plan whose rows are a softmax:
        linear, delta-rule, lightning and state-space layers (`_NO_PLAN`).

    Examples
    --------
    >>> unwatchable_huggingface(nn.Linear(2, 2), {})
    ({}, {})
    """
    prefixes = [f"{path}." for path in watched]
    refused, skipped = {}, {}
    for path, module in model.named_modules():
        name = type(module).__name__
        inside = path in watched or any(f"{path}.".startswith(prefix) for prefix in prefixes)
        holds = any(other.startswith(f"{path}.") or not path for other in watched)
        projects = any(isinstance(child, nn.Linear) for child in module.children())
        theirs = type(module).__module__.startswith("transformers.")
        if inside or holds or not projects or not theirs:
            continue
        if _NO_PLAN.search(name):
            skipped[path] = name
        elif "SelfOutput" not in name and name.endswith(("Attention", "SelfAttention")):
            refused[path] = name
    return refused, skipped


@contextmanager
def watch_huggingface(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    observe: Observe,
) -> Iterator[None]:
    """Report every attention call of these modules to `observe`; outputs keep every bit.

    Parameters
    ----------
    model : nn.Module
        The model that holds the modules; its configs name our entries inside the block.
    modules : mapping
        From `find_huggingface_attention(model)`.
    observe : callable
        observe(path, q, k, **options), as in `AttentionCall.from_tensors`.

    Raises
    ------
    ValueError
        If the model is already being watched, an implementation is not set, or eager attention
        bypasses the interface (GPT-2's reorder_and_upcast_attn; code for transformers before
        5.1); while the model runs, if attention applies dropout, is on the meta device, gets
        packed sequences under flash attention, or has weights that depend on something that
        cannot be read.
    TypeError
        While the model runs, for a mask of an unknown kind.
    """
    from transformers import Cache

    for path, module in modules.items():
        _check_implementation(path, module)
    configs = [module.config for module in model.modules() if _has_config(module)]
    if any(isinstance(config._attn_implementation_internal, _Captured) for config in configs):
        raise ValueError("model is being captured already")
    paths = {id(module): path for path, module in modules.items()}
    masks, here = Masks(), _Here()
    speeds: dict[int, Tensor] = {}

    def entry(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        original = str(module.config._attn_implementation_internal)
        path, answer = paths.get(id(module)), None
        if path is not None:
            # Differential attention calls twice in one forward pass: the cache stays here.
            cache, index, angles, gate, mask = here.seen.get(id(module), (None,) * 5)
            tokens = cached_tokens(cache, index)
            given = KernelCall(path, module, query, key, attention_mask, original, kwargs, tokens)
            call = given._replace(whole_mask=mask).options_of_call(masks)
            # A single position of cached decoding does not tell; some models change with length.
            speed = rotary_frequencies(module, angles, query.shape[-1])
            if speed is not None:
                speeds[id(module)] = speed
            call |= {"rotary": speeds.get(id(module)), "gate": gate}
            # The next step overwrites the memory of a static cache.
            own = torch.clone if getattr(cache, "is_compileable", False) else torch.Tensor.detach
            answer = observe(path, query, own(key), v=own(value), **call)
        function, plain = _unwatched(module, original)
        result = function(plain, query, key, value, attention_mask, *args, **kwargs)
        changed = None if answer is None else answer(result[0].transpose(1, 2))
        if changed is None:
            return result
        # The weights that an eager kernel returned do not belong to the changed output.
        weights = None if result[1] is None else torch.full_like(result[1], torch.nan)
        return changed.transpose(1, 2).contiguous(), weights

    names = _Names(entry)

    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # set_attn_implementation may have been called since the block began.
        if not isinstance(module.config._attn_implementation_internal, _Captured):
            _check_implementation(paths[id(module)], module)
            names.put(module.config)
        given = (*args, *kwargs.values())
        cache = next((one for one in given if isinstance(one, Cache)), None)
        index = kwargs.get("layer_idx", getattr(module, "layer_idx", None))
        gate = _head_gate(module, kwargs.get("hidden_states", next(iter(args), None)))
        mask = kwargs.get("attention_mask") if hasattr(module, "indexer") else None
        here.seen[id(module)] = cache, index, kwargs.get("position_embeddings"), gate, mask

    with ExitStack() as stack:
        stack.callback(names.restore)
        for config in configs:
            if config._attn_implementation_internal is not None:
                names.put(config)
        for module in modules.values():
            hook = module.register_forward_pre_hook(_Hook(before_forward), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _unwatched(module: nn.Module, name: str) -> tuple[Callable[..., Any], nn.Module]:
    """The function of an implementation, and the module with that name in its config."""
    scope = inspect.unwrap(type(module).forward).__globals__
    eager = [scope.get(name) for name in _names_used(module) if name.endswith(_EAGER)]
    function = scope[_INTERFACE].get_interface(name, eager[0] if eager else None)
    # Some functions read the name again, but all threads share the module itself.
    plain = copy.copy(module)
    plain.config = copy.copy(module.config)
    plain.config._attn_implementation_internal = name
    return function, plain


def _check_implementation(path: str, module: nn.Module) -> None:
    implementation = module.config._attn_implementation
    if implementation is None:
        raise ValueError(
            f"{path} has no attention implementation; call set_attn_implementation first"
        )
    if implementation == "eager" and "get_interface" not in _names_used(module):
        raise ValueError(
            f"{path} computes eager attention without asking transformers' AttentionInterface "
            "(as code written before transformers 5.1 does); use attn_implementation='sdpa'"
        )
    if getattr(module, "reorder_and_upcast_attn", False) and implementation == "eager":
        raise ValueError(
            f"{path} has reorder_and_upcast_attn=True, whose eager attention bypasses "
            "transformers' AttentionInterface; use attn_implementation='sdpa'"
        )


class _Names:
    """Our names in the configs of a watched model, and their entries in the registries."""

    def __init__(self, entry: Callable[..., Any]) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        self._attention, self._masks = AttentionInterface, AttentionMaskInterface
        self._entry = entry
        self._ours: dict[str, _Captured] = {}
        self._before: dict[int, tuple[Any, str]] = {}

    def put(self, config: Any) -> None:
        """Make a config name our entry, until `restore`."""
        name = config._attn_implementation_internal
        if isinstance(name, _Captured):
            return
        ours = self._ours.setdefault(name, _Captured(name))
        self._attention.register(ours, self._entry)
        mask_functions = self._masks()
        if name in mask_functions:
            # Without an entry the mask would be None, and causality silently lost.
            self._masks.register(ours, mask_functions[name])
        self._before[id(config)] = config, name
        config._attn_implementation_internal = ours

    def restore(self) -> None:
        """Restore every config, except where the user has set another name since."""
        for config, name in self._before.values():
            if isinstance(config._attn_implementation_internal, _Captured):
                config._attn_implementation_internal = name
        for ours in self._ours.values():
            self._attention._global_mapping.pop(ours, None)
            self._masks._global_mapping.pop(ours, None)


class _Hook:
    """A hook that becomes a no-op in copies and saved models."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self._function = function

    def __call__(self, *args: Any) -> None:
        if self._function is not None:
            self._function(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class _Here(threading.local):
    """Each module's cache, index there, angles, gate and mask, by id; one for each thread."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Any, Any, Any, Tensor | None, Any]] = {}


@torch.no_grad()
def _head_gate(module: nn.Module, hidden: Any) -> Tensor | None:
    """Logits of a layer's gate, shape (batch, heads, n_queries); None without one for each head."""
    gated = type(module).__name__ in _HEAD_GATED and module.g_proj is not None
    return module.g_proj(hidden).mT if gated else None


def cached_tokens(cache: Any, index: Any) -> int | None:
    """Number of tokens that a cache has seen, including this call's; None if unknown."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    seen = [
        int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else 0 for layer in layers
    ]
    own = seen[index] if isinstance(index, int) and 0 <= index < len(seen) else 0
    # Layers that reuse another layer's keys have no cache of their own.
    return own or max(seen, default=0) or None


def _has_config(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return hasattr(config, "_attn_implementation_internal")


def _names_used(module: nn.Module) -> tuple[str, ...]:
    """Global and attribute names in the code of a module's forward."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return () if code is None else code.co_names
