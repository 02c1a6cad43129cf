"""Small transformers built from one block, in which only the position scheme changes.

The shipped checkpoints are `CausalLM`s; an `ImageClassifier` reads pixels. Layers live in
`goatviz.attention`, priors in `goatviz.priors`; `goatviz.analysis` reads the priors of a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from goatviz import checks
from goatviz.attention.layer import Attention, LayerCache
from goatviz.attention.positions import (
    InterpolatedRotaryEmbedding,
    LearnedEmbedding,
    LearnedGridEmbedding,
    RotaryEmbedding,
    SinusoidalEmbedding,
)
from goatviz.priors.base import PositionsLike, Prior, grid_positions, readable
from goatviz.priors.fixed import ALiBiPrior, BucketPrior, UniformPrior
from goatviz.priors.sink import RecencyPrior, SinkPrior
from goatviz.priors.spectral import SpectralPrior

POSITION_SCHEMES = (
    "goat",
    "none",
    "rope",
    "rope-interpolated",
    "alibi",
    "bucket",
    "sinusoidal",
    "learned",
)
#: Those of them that are defined on a grid.
IMAGE_SCHEMES = ("goat", "none", "learned")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines a model except its weights.

    Attributes
    ----------
    vocab_size, embed_dim, num_layers, num_heads : int
        The usual sizes.
    num_kv_heads : int or None
        Key-value heads; None: as many as query heads.
    content_dim : int or None
        Content size of queries and keys; None: the head size minus the prior's lanes.
    mlp_ratio : float
        Hidden size of the MLP over embed_dim; 0 leaves the MLP out.
    positions : str
        One of `POSITION_SCHEMES`; "none" has a uniform prior and no positions at all.
    training_length : int
        T, tokens: normalises the sink, bounds learned positions, anchors interpolation. An image
        has a class token and n x n patches.
    prior_rank, sink_rank : int
        R and M of the GOAT prior.
    prior_init : str
        "seeded" or "uniform".
    base : float
        Base of relative, absolute and rotary frequencies.
    skip : bool
        Add the residual stream to the output of attention. Without it every token, even the
        query's own, reaches the output only through the transport plan.
    patch : int or None
        Side of a square patch in pixels makes it an `ImageClassifier`, whose `positions` is one
        of `IMAGE_SCHEMES`; None: a `CausalLM`.
    channels : int
        Numbers of a pixel.
    """

    vocab_size: int
    training_length: int
    embed_dim: int = 64
    num_layers: int = 1
    num_heads: int = 2
    num_kv_heads: int | None = None
    content_dim: int | None = None
    mlp_ratio: float = 4.0
    positions: str = "goat"
    prior_rank: int = 4
    sink_rank: int = 4
    prior_init: str = "seeded"
    base: float = 10_000.0
    skip: bool = True
    patch: int | None = None
    channels: int = 1

    def __post_init__(self) -> None:
        checks.integer_fields(
            self, vocab_size=1, training_length=1, embed_dim=1, num_layers=1, num_heads=1
        )
        for name in ("num_kv_heads", "content_dim"):
            if getattr(self, name) is not None:
                checks.positive_int(name, getattr(self, name))
        for name in ("prior_rank", "sink_rank"):
            checks.integer(name, getattr(self, name), low=0)
        checks.number("mlp_ratio", self.mlp_ratio, low=0)
        checks.number("base", self.base, above=1)
        checks.flag("skip", self.skip)
        checks.one_of("positions", self.positions, POSITION_SCHEMES)
        checks.one_of("prior_init", self.prior_init, ("seeded", "uniform"))
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got {self.embed_dim} and "
                f"{self.num_heads}"
            )
        checks.integer_fields(self, channels=1)
        if self.patch is not None:
            checks.positive_int("patch", self.patch)
            checks.one_of("positions of images", self.positions, IMAGE_SCHEMES)
            patches_across(self.training_length)

    def count_ids(self, length: int) -> int:
        """Number of ids of a sequence of `length` tokens; an image's are the numbers of pixels."""
        if self.patch is None:
            return length
        return (self.patch * patches_across(length)) ** 2 * self.channels


def patches_across(length: int) -> int:
    """Patches along a side of a square image of `length` tokens, the class token among them.

    Raises
    ------
    ValueError
        If there is no such image.

    Examples
    --------
    >>> patches_across(1 + 7 * 7)
    7
    """
    across = math.isqrt(max(length - 1, 0))
    if not across or 1 + across * across != length:
        raise ValueError(
            f"length must be 1 + n x n tokens, a class token and a square of patches, got {length}"
        )
    return across


def goat_prior(
    num_heads: int,
    *,
    rank: int,
    sink_rank: int,
    training_length: int,
    causal: bool = True,
    base: float = 10_000.0,
    init: str = "seeded",
    axes: int = 0,
) -> Prior:
    r"""GOAT's log-prior: relative + sink, + recency when causal.

    Parameters
    ----------
    num_heads : int
        Key-value heads.
    rank, sink_rank : int
        R relative and M absolute frequencies.
    training_length : int
        T, tokens.
    causal : bool
        Include the recency term, which is for causal attention only.
    base : float
        Base of both sets of frequencies.
    init : str
        "seeded": small random spectrum and sink, ALiBi's slopes; "uniform": a flat prior with a
        slope of 0.001, from which everything can still be learned.
    axes : int
        0 for sequences; 2 for images.

    Examples
    --------
    >>> list(goat_prior(2, rank=4, sink_rank=4, training_length=64).components())
    ['relative', 'sink', 'recency']
    """
    common = {"base": base, "axes": axes, "init": init}
    prior = SpectralPrior(num_heads, rank=rank, **common) + SinkPrior(
        num_heads, rank=sink_rank, training_length=training_length, **common
    )
    if checks.flag("causal", causal):
        slopes = None if init == "seeded" else [1e-3] * num_heads
        prior = prior + RecencyPrior(num_heads, slopes=slopes)
    return prior


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream (attention only if `skip`)."""

    def __init__(self, attention: Attention, mlp_ratio: float, *, skip: bool = True) -> None:
        super().__init__()
        self.skip = skip
        width = attention.embed_dim
        hidden = int(mlp_ratio * width)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(width) if hidden else None
        self.mlp = (
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            if hidden
            else None
        )

    def forward(
        self,
        x: Tensor,
        *,
        positions: PositionsLike | None = None,
        padding_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Shape (batch, length, embed_dim) in and out."""
        carried = self.attention(
            self.attention_norm(x), positions=positions, padding_mask=padding_mask, cache=cache
        )
        x = x + carried if self.skip else carried
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x


class Transformer(nn.Module):
    """What `CausalLM` and `ImageClassifier` share: blocks, a norm and a head.

    Attributes
    ----------
    config : ModelConfig
        Sizes and the position scheme.
    checkpoint_activations : bool
        Keep only the inputs of blocks and recompute the rest in the backward pass; default False.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = checks.instance("config", config, ModelConfig, "a ModelConfig")
        self._add_inputs(config)
        self.blocks = nn.ModuleList(
            Block(_attention(config), config.mlp_ratio, skip=config.skip)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.embed_dim)
        self.head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.checkpoint_activations = False
        self._reset_weights()

    def _add_inputs(self, config: ModelConfig) -> None:
        """Make what comes before the blocks."""
        raise NotImplementedError

    def _check(self, ids: Tensor) -> None:
        if ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(f"ids must have shape (batch, length), got {tuple(ids.shape)}")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be integers, got {ids.dtype}")
        if readable():
            _check_range(ids, self.config.vocab_size)

    def _through_blocks(
        self, x: Tensor, cache: list[LayerCache] | None = None, **options: Any
    ) -> Tensor:
        again = self.checkpoint_activations and cache is None and torch.is_grad_enabled()
        for depth, block in enumerate(self.blocks):
            if again:
                x = checkpoint(block, x, use_reentrant=False, **options)
            else:
                x = block(x, cache=None if cache is None else cache[depth], **options)
        return x

    def _reset_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, Attention):
                projections = (module.q_proj, module.k_proj, module.v_proj, module.out_proj)
            elif isinstance(module, Block) and module.mlp is not None:
                projections = (module.mlp[0], module.mlp[2])
            else:
                continue
            for linear in projections:
                nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
                nn.init.zeros_(linear.bias)
            # The residual stream sums 2 x layers outputs: keep its variance at the start.
            projections[-1].weight.data /= math.sqrt(2 * len(self.blocks))
        self._reset_inputs()
        nn.init.normal_(self.head.weight, std=0.02)

    def _reset_inputs(self) -> None:
        """Draw the weights of what `_add_inputs` made."""
        raise NotImplementedError


class CausalLM(Transformer):
    """A decoder-only language model with one of the position schemes.

    Parameters
    ----------
    config : ModelConfig
        Sizes and the position scheme; without a patch.

    Examples
    --------
    >>> model = CausalLM(ModelConfig(vocab_size=8, training_length=16, embed_dim=32))
    >>> model(torch.zeros(1, 4, dtype=torch.long)).shape
    torch.Size([1, 4, 8])
    """

    def _add_inputs(self, config: ModelConfig) -> None:
        if config.patch is not None:
            raise ValueError(f"patch must be None for a language model, got {config.patch}")
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.position_embedding = _position_embedding(config)

    def _reset_inputs(self) -> None:
        nn.init.normal_(self.embedding.weight, std=1.0)

    def new_cache(self) -> list[LayerCache]:
        """An empty cache with one entry per layer, for successive calls of `forward`."""
        return [LayerCache() for _ in self.blocks]

    def forward(
        self,
        ids: Tensor,
        *,
        padding_mask: Tensor | None = None,
        cache: list[LayerCache] | None = None,
    ) -> Tensor:
        """Next-token logits. Compiled, it is one graph, and the values of `ids` are not checked.

        Parameters
        ----------
        ids : Tensor
            Integers in [0, vocab_size), shape (batch, length).
        padding_mask : Tensor, optional
            Boolean, shape (batch, length), True at real tokens (padding on the right).
        cache : list of LayerCache, optional
            From `new_cache`; `ids` continue what it holds, and it grows in place.

        Returns
        -------
        Tensor
            Shape (batch, length, vocab_size).
        """
        self._check(ids)
        if cache is not None and len(cache) != len(self.blocks):
            raise ValueError(f"cache must have {len(self.blocks)} entries, got {len(cache)}")
        start = 0 if cache is None else cache[0].length
        x = self.embedding(ids)
        if self.position_embedding is not None:
            end = start + ids.shape[1]
            index = torch.arange(start, end, device=ids.device)
            x = x + self.position_embedding(index, last=end - 1)
        return self.head(self.norm(self._through_blocks(x, cache, padding_mask=padding_mask)))


class ImageClassifier(Transformer):
    """A vision transformer: patches of a square image, a class token in front, no causal mask.

    It reads an image as a language model reads text: as numbers in a row, of which the class is
    the next. So tasks, training and sweeps are the same, and a higher resolution is more tokens.

    Parameters
    ----------
    config : ModelConfig
        Sizes and the position scheme, with a patch.

    Notes
    -----
    GOAT's prior is on the grid of patches, where the class token has no place, and has no recency
    term (Litman and Guo 2026, vision experiment). Learned positions are interpolated bicubically
    to other resolutions, as vision transformers do.

    Examples
    --------
    >>> config = ModelConfig(vocab_size=256, training_length=5, embed_dim=32, patch=4)
    >>> ImageClassifier(config)(torch.zeros(1, 12 * 12, dtype=torch.long)).shape
    torch.Size([1, 1, 256])
    """

    def _add_inputs(self, config: ModelConfig) -> None:
        if config.patch is None:
            raise ValueError("patch must be the side of a patch in pixels, got None")
        self.embedding = nn.Linear(config.patch**2 * config.channels, config.embed_dim)
        self.class_token = nn.Parameter(torch.zeros(config.embed_dim))
        self.position_embedding = None
        if config.positions == "learned":
            across = patches_across(config.training_length)
            self.position_embedding = LearnedGridEmbedding(config.embed_dim, side=across)

    def _reset_inputs(self) -> None:
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(self.embedding.in_features))
        nn.init.zeros_(self.embedding.bias)
        nn.init.normal_(self.class_token, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the class.

        Parameters
        ----------
        ids : Tensor
            Integers in [0, 256) and below vocab_size, shape (batch, side x side x channels): rows
            of pixels from the top, each pixel's channels together.

        Returns
        -------
        Tensor
            Shape (batch, 1, vocab_size).

        Raises
        ------
        ValueError
            If `ids` are no square image whose side is a multiple of the patch.
        """
        self._check(ids)
        patch, channels = self.config.patch, self.config.channels
        across = math.isqrt(ids.shape[1] // channels) // patch
        if not across or ids.shape[1] != (across * patch) ** 2 * channels:
            raise ValueError(
                f"ids must hold side x side x {channels} numbers, with a side that is a multiple "
                f"of patch={patch}, got {ids.shape[1]}"
            )
        pixels = ids.to(self.embedding.weight.dtype) / 127.5 - 1
        pixels = pixels.reshape(len(ids), across, patch, across, patch, channels)
        patches = pixels.transpose(2, 3).reshape(len(ids), across * across, -1)
        x = self.embedding(patches)
        if self.position_embedding is not None:
            x = x + self.position_embedding(across)
        x = torch.cat([self.class_token.expand(len(ids), 1, -1), x], dim=1)
        positions = None
        if self.config.positions == "goat":
            positions = grid_positions(across, across, class_token=True)
        x = self._through_blocks(x, positions=positions)
        return self.head(self.norm(x[:, :1]))


def build_model(config: ModelConfig) -> Transformer:
    """The model that a config determines, with fresh weights.

    Examples
    --------
    >>> type(build_model(ModelConfig(vocab_size=8, training_length=16))).__name__
    'CausalLM'
    """
    checks.instance("config", config, ModelConfig, "a ModelConfig")
    return CausalLM(config) if config.patch is None else ImageClassifier(config)


def interpolate_positions(model: CausalLM) -> CausalLM:
    """The same weights with rotary positions squeezed into the training length.

    Up to the training length the two models are identical, so that training one trains the other
    (position interpolation without fine-tuning, Chen et al. 2023).

    Parameters
    ----------
    model : CausalLM
        With positions "rope"; left unchanged.

    Returns
    -------
    CausalLM
        With positions "rope-interpolated", in evaluation mode; its weights are copies.

    Raises
    ------
    ValueError
        If the model has other positions.

    Examples
    --------
    >>> rope = CausalLM(ModelConfig(vocab_size=8, training_length=16, positions="rope"))
    >>> interpolate_positions(rope).config.positions
    'rope-interpolated'
    """
    if model.config.positions != "rope":
        raise ValueError(f"model must have positions 'rope', got {model.config.positions!r}")
    squeezed = CausalLM(replace(model.config, positions="rope-interpolated"))
    squeezed.load_state_dict(model.state_dict())
    device = next(model.parameters()).device
    return squeezed.to(device).eval()


def _check_range(ids: Tensor, vocab_size: int) -> None:
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= vocab_size:
        raise ValueError(f"ids must lie in [0, {vocab_size}), got values from {low} to {high}")


def _attention(config: ModelConfig) -> Attention:
    heads = config.num_heads if config.num_kv_heads is None else config.num_kv_heads
    head_dim = config.embed_dim // config.num_heads
    content_dim = head_dim if config.content_dim is None else config.content_dim
    prior: Prior = UniformPrior()
    rotary = None
    causal = config.patch is None
    if config.positions == "goat":
        prior = goat_prior(
            heads,
            rank=config.prior_rank,
            sink_rank=config.sink_rank,
            training_length=config.training_length,
            causal=causal,
            base=config.base,
            init=config.prior_init,
            axes=0 if causal else 2,
        )
        content_dim = config.content_dim
    elif config.positions == "alibi":
        prior = ALiBiPrior(heads)
    elif config.positions == "bucket":
        prior = BucketPrior(heads)
    elif config.positions == "rope":
        rotary = RotaryEmbedding(content_dim, base=config.base)
    elif config.positions == "rope-interpolated":
        rotary = InterpolatedRotaryEmbedding(
            content_dim, training_length=config.training_length, base=config.base
        )
    return Attention(
        config.embed_dim,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        content_dim=content_dim,
        prior=prior,
        rotary=rotary,
        causal=causal,
    )


def _position_embedding(config: ModelConfig) -> nn.Module | None:
    if config.positions == "sinusoidal":
        return SinusoidalEmbedding(config.embed_dim)
    if config.positions == "learned":
        return LearnedEmbedding(config.embed_dim, max_length=config.training_length)
    return None
