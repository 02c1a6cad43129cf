"""Who takes part in `attention.py`: attention alone, layers, decoding, and whole training steps.

Each table maps a case's name to a function of a `Setting` that builds it; one line adds a case.
Names that begin with "layer" have the four projections. A case is a function to call and the
tensors whose gradients it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from goat import GoatAttention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from goatviz.attention import Attention, prior_attention
from goatviz.attention.layer import LayerCache
from goatviz.attention.positions import RotaryEmbedding
from goatviz.models import CausalLM, goat_prior
from goatviz.priors import ALiBiPrior, Prior
from goatviz.tasks import Passkey
from goatviz.training import TrainConfig
from goatviz.training.execution import Engine
from goatviz.training.presets import preset

HEAD_DIM = 64
RANK = 4
TRAINING_LENGTH = 1024
PACKAGE = "goat-attention"


@dataclass(frozen=True)
class Setting:
    """The size of a problem and where it is computed."""

    length: int
    heads: int = 4
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def width(self) -> int:
        return self.heads * HEAD_DIM

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def qkv(self, content: int = HEAD_DIM) -> list[Tensor]:
        """Queries, keys and values of one sequence that want gradients."""
        sizes = (content, content, HEAD_DIM)
        return [self.normal(1, self.heads, self.length, d).requires_grad_() for d in sizes]

    def prior(self) -> Prior:
        prior = goat_prior(self.heads, rank=RANK, sink_rank=RANK, training_length=TRAINING_LENGTH)
        return prior.to(self.device)


@dataclass(frozen=True)
class Call:
    """A case: what to call, and the tensors whose gradients it is asked for."""

    run: Callable[[], Tensor]
    #: Without any, a case runs forward only.
    wanted: list[Tensor]

    def forward(self) -> None:
        with torch.no_grad():
            self.run()

    def both(self) -> None:
        """Forward, and the gradient of the output's sum if any is wanted."""
        if not self.wanted:
            return self.forward()
        torch.autograd.grad(self.run().sum(), self.wanted)


# --- attention alone ---


def rope(setting: Setting, *, flash: bool = False) -> Call:
    """SDPA of rotated queries and keys; the tables of cosines are made once, outside the call."""
    q, k, v = setting.qkv()
    speeds = RotaryEmbedding(HEAD_DIM).speeds().repeat(2)
    phase = torch.arange(setting.length, dtype=torch.float64).unsqueeze(-1) * speeds
    cosine, sine = (each.to(q) for each in (phase.cos(), phase.sin()))

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-second, first], dim=-1) * sine

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext():
            return F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)

    return Call(run, [q, k, v])


def alibi_mask(setting: Setting) -> Call:
    """ALiBi as people give it to SDPA: a dense mask, made once, outside the call."""
    q, k, v = setting.qkv()
    mask = ALiBiPrior(setting.heads).log_prior(setting.length, setting.length)
    causal = torch.ones(setting.length, setting.length, dtype=torch.bool).tril()
    mask = mask.masked_fill_(~causal, -math.inf).unsqueeze(0).to(q)
    return Call(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), [q, k, v])


def flex(setting: Setting) -> Call:
    """GOAT's prior by compiled FlexAttention, which has no gradients on a CPU."""
    prior, tensors = setting.prior(), setting.qkv()
    wanted = [] if setting.device == "cpu" else [*tensors, *prior.parameters()]
    call = Call(lambda: prior_attention(*tensors, prior=prior, impl="flex"), wanted)
    call.forward()  # compiles
    return call


def goat(setting: Setting, *, inside: bool = False, impl: str = "sdpa") -> Call:
    """GOAT's prior; inside, its lanes take their place from the content's channels."""
    prior = setting.prior()
    lanes = prior.num_lanes(setting.dtype) if inside else 0
    q, k, v = setting.qkv(HEAD_DIM - lanes)
    wanted = [q, k, v, *prior.parameters()]
    return Call(lambda: prior_attention(q, k, v, prior=prior, impl=impl), wanted)


FLEX = "goatviz, flex"
ATTENTION: dict[str, Callable[[Setting], Call]] = {
    "SDPA + RoPE": rope,
    "SDPA + ALiBi as a mask": alibi_mask,
    "goatviz, lanes beside": goat,
    "goatviz, lanes inside": lambda setting: goat(setting, inside=True),
    FLEX: flex,
}
#: Only on a GPU.
FLASH = {"FlashAttention + RoPE": lambda setting: rope(setting, flash=True)}


# --- layers ---


def layer_of(setting: Setting, positions: str) -> nn.Module:
    """A layer of ours by position scheme, or the package's."""
    width, heads = setting.width, setting.heads
    if positions == PACKAGE:
        module = GoatAttention(
            width,
            heads,
            batch_first=True,
            pos_rank=RANK,
            abs_rank=RANK,
            training_seq_len=TRAINING_LENGTH,
            fuse_qkv=True,
        )
    elif positions == "rope":
        module = Attention(width, heads, rotary=RotaryEmbedding(HEAD_DIM))
    elif positions == "alibi":
        module = Attention(width, heads, content_dim=HEAD_DIM, prior=ALiBiPrior(heads))
    else:
        content = HEAD_DIM if positions == "beside" else None
        module = Attention(width, heads, content_dim=content, prior=setting.prior())
    return module.to(setting.device)


def layer(setting: Setting, positions: str) -> Call:
    """One layer on one sequence."""
    module = layer_of(setting, positions)
    x = torch.randn(1, setting.length, setting.width, device=setting.device, requires_grad=True)
    half = setting.dtype != torch.float32
    # Gates that the package's module leaves unused have no gradient.
    weights = [p for name, p in module.named_parameters() if not name.startswith("prior_gate")]

    def run() -> Tensor:
        with torch.autocast(setting.device, setting.dtype) if half else nullcontext():
            if positions == PACKAGE:
                return module(x, x, x, is_causal=True, need_weights=False)[0]
            return module(x)

    return Call(run, [x, *weights])


LAYERS: dict[str, Callable[[Setting], Call]] = {
    "layer: RoPE": lambda setting: layer(setting, "rope"),
    "layer: goatviz, beside": lambda setting: layer(setting, "beside"),
    "layer: goatviz, inside": lambda setting: layer(setting, "inside"),
    f"layer: {PACKAGE}": lambda setting: layer(setting, PACKAGE),
}


@torch.no_grad()
def decode(setting: Setting, positions: str) -> Call:
    """One more token of a layer that has read `length` of them, in float32."""
    module = layer_of(setting, positions).eval()
    x, new = (torch.randn(1, n, setting.width, device=setting.device) for n in (setting.length, 1))
    if positions == PACKAGE:
        held = module(x, x, x, is_causal=True, need_weights=False, return_present_kv=True)[2]
        return Call(
            lambda: module(new, new, new, is_causal=True, need_weights=False, past_key_value=held)[
                0
            ],
            [],
        )
    cache = LayerCache()
    module(x, cache=cache)
    if positions == "alibi":
        module.impl = "sdpa_bias"  # one row of a mask at a time, but the prompt as lanes
    module(new, cache=cache)  # makes room behind the keys, once for many tokens
    return Call(lambda: module(new, cache=cache), [])


DECODE: dict[str, Callable[[Setting], Call]] = {
    "layer: RoPE": lambda setting: decode(setting, "rope"),
    "layer: ALiBi as a mask": lambda setting: decode(setting, "alibi"),
    "layer: goatviz, beside": lambda setting: decode(setting, "beside"),
    "layer: goatviz, inside": lambda setting: decode(setting, "inside"),
    f"layer: {PACKAGE}": lambda setting: decode(setting, PACKAGE),
}
#: Masks of heads x length x length numbers are formed up to here.
LIMITS = {"SDPA + ALiBi as a mask": 8192}


# --- training steps ---


class PackageAttention(nn.Module):
    """goat-attention's module where a block expects our layer."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.module = GoatAttention(
            config.embed_dim,
            config.num_heads,
            bias=False,
            pos_rank=config.prior_rank,
            abs_rank=config.sink_rank,
            training_seq_len=config.task.length,
            batch_first=True,
            fuse_qkv=True,
        )

    def forward(
        self,
        x: Tensor,
        *,
        positions: None = None,
        padding_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        return self.module(x, x, x, need_weights=False, is_causal=True)[0]


COMPILED = "goat, compiled"
#: As the package splits it: the prior's lanes take their place from the content's 32.
SPLIT = "goat, 23 + 9"
#: One channel less than the head, so that content and lanes fill a kernel's multiple of 8.
NARROW = "goat, 31 + 9"
STEPS = ("rope", "goat", NARROW, SPLIT, COMPILED, "alibi", PACKAGE)


def recipe(length: int, case: str, tokens: int) -> TrainConfig:
    """The tiny recipe on sequences of that length, `tokens` in a batch (or one sequence)."""
    tiny = preset("passkey")
    return replace(
        tiny,
        task=Passkey(length=length, value_length=4),
        batch_size=max(1, tokens // length),
        positions=case if case in ("rope", "alibi") else "goat",
        content_dim={SPLIT: None, NARROW: tiny.content_dim - 1}.get(case, tiny.content_dim),
    )


def model_of(config: TrainConfig, case: str) -> CausalLM:
    """Seeded; with the package's attention where the case says so."""
    torch.manual_seed(0)
    model = CausalLM(config.model_config())
    if case == PACKAGE:
        for block in model.blocks:
            block.attention = PackageAttention(config)
    return model


def stepper(engine: Engine, length: int, case: str, tokens: int) -> Callable[[], object]:
    """A function that takes one training step."""
    config = recipe(length, case, tokens)
    model = model_of(config, case).to(engine.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    prepared, optimizer = engine.prepare(model, optimizer)
    if case == COMPILED:
        prepared = torch.compile(prepared, fullgraph=True, dynamic=False)
    data = torch.Generator().manual_seed(0)
    return lambda: engine.take_step(config, prepared, optimizer, data, 0)


# --- arithmetic ---


def attention_operations(length: int, width: int) -> float:
    """Operations of causal attention forward: two products of half a square, 2 L^2 width."""
    return 2.0 * length**2 * width


def operations(setting: Setting, case: str, *, backward: bool) -> float:
    """Operations of a case, counted for 64 channels of content and no prior.

    A backward pass takes 2.5 times the attention's and twice the projections'.
    """
    total = attention_operations(setting.length, setting.width) * (3.5 if backward else 1.0)
    if case.startswith("layer"):
        total += 8.0 * setting.length * setting.width**2 * (3.0 if backward else 1.0)
    return total


def step_operations(length: int, tokens: int) -> float:
    """Operations of a training step of the rope model: 6 a weight and token, and attention."""
    config = recipe(length, "rope", tokens)
    model = model_of(config, "rope")
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    each = 3.5 * config.num_layers * attention_operations(length, config.embed_dim)
    return config.batch_size * (6.0 * weights * length + each)
