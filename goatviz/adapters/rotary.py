"""How fast each channel of queries and keys rotates with position, measured on a model's own code.

Layouts differ: pairs are halves or neighbours, and some channels are not rotated, before or after
the others. Nothing is assumed: unit vectors go through the function that the layer itself calls.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

_APPLY, _INTERLEAVED = "apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave"
#: Models that rotate queries and keys only in layers with a sliding window.
_ONLY_WINDOWS = ("cohere2", "cohere2_moe", "flint")

#: Radians per token that are no more than rounding.
_STILL = 1e-12


@torch.no_grad()
def rotary_frequencies(module: nn.Module, angles: Any, size: int) -> Tensor | None:
    """Rotation of each channel of a layer's queries and keys, in radians per token.

    Parameters
    ----------
    module : nn.Module
        A Hugging Face attention layer.
    angles : (Tensor, Tensor) or None
        Cosines and sines that the layer is called with, shape (batch or 1, length, channels), at
        consecutive positions, except in padding on the left.
    size : int
        Number of channels of a query.

    Returns
    -------
    Tensor or None
        float64, shape (size,), 0 for channels that are not rotated; None if the layer is called
        without angles, or its rotation is not understood.
    """
    forward = inspect.unwrap(type(module).forward)
    names = forward.__code__.co_names
    interleaved = _INTERLEAVED in names and getattr(module.config, "rope_interleave", False)
    apply = forward.__globals__.get(_INTERLEAVED if interleaved else _APPLY)
    pair = isinstance(angles, tuple | list) and len(angles) == 2
    if apply is None or not pair or not all(isinstance(part, Tensor) for part in angles):
        return None
    if angles[0].ndim != 3 or angles[0].shape[1] < 2:
        return None
    if not _turns(module, names):
        return torch.zeros(size, dtype=torch.float64)
    speeds = None
    # Positions do not advance in padding on the left.
    for places in (slice(0, 2), slice(-2, None)):
        cos, sin = (part[:1, places].double() for part in angles)
        speeds = _speeds(apply, cos, sin, size)
        if speeds is None or bool(speeds.any()):
            break
    if speeds is None:
        return None
    rest = speeds.new_zeros(size - len(speeds))
    # Latent attention has its rotated channels after the others.
    last = hasattr(module, "qk_rope_head_dim")
    return torch.cat([rest, speeds] if last else [speeds, rest]).cpu()


def _turns(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether this layer rotates its queries and keys: in some models, not all layers do."""
    if "use_rope" in names:
        return bool(module.use_rope)
    if "is_local_attention" in names:
        return bool(module.is_local_attention)
    window = getattr(module, "sliding_window", None) is not None
    if module.config.model_type in _ONLY_WINDOWS:
        return window or bool(getattr(module, "force_rope", False))
    if "is_sliding" in names and "sliding_window" in names:
        return not window or bool(module.is_sliding)
    return True


def _speeds(apply: Any, cos: Tensor, sin: Tensor, size: int) -> Tensor | None:
    """Rotation of each channel, or of those with angles, from one position to the next."""
    for width in dict.fromkeys((size, cos.shape[-1])):
        turned = _turned(apply, cos, sin, width) if width <= size else None
        if turned is not None:
            # In the order of the output channels, which may differ from that of the input.
            turn = torch.linalg.solve(turned[:, 0], turned[:, 1])
            turn = turn - torch.eye(width, dtype=turn.dtype, device=turn.device)
            # A unit vector moves by 2 sin(w / 2), which is exact for slow channels too.
            half = torch.linalg.vector_norm(turn, dim=-1) / 2
            speeds = 2 * torch.asin(half.clamp(max=1.0))
            return torch.where(speeds > _STILL, speeds, 0.0)
    return None


def _turned(apply: Any, cos: Tensor, sin: Tensor, width: int) -> Tensor | None:
    """Unit vectors of every channel at two positions, shape (width, 2, width)."""
    probe = torch.eye(width, dtype=torch.float64, device=cos.device)
    probe = probe[None, :, None].expand(1, width, 2, width).contiguous()
    try:
        turned = apply(probe, probe.clone(), cos, sin)[0]
    except (RuntimeError, TypeError, IndexError, ValueError):
        return None
    fits = isinstance(turned, Tensor) and turned.shape == probe.shape
    return turned[0] if fits and not turned.is_complex() else None
