"""Tiny real models, token ids, and the results computed from them, shared by every test.

Models: `tiny_lm(positions)`, `tiny_huggingface(name)`, names in `HUGGINGFACE`, `MixedHeads`, and
`lively(module)`, which draws every parameter of a module. Inputs: `ids(batch, length)`, `HOSTILE`
tokens and their `TextTokenizer`. Results: `sink_result(case)`, `prior_result(case)`,
`plan_result(case)`, `row_result(case)`, cases in `SINK_CASES` and so on; `length_result()`,
`grid_result()`, `mass_result()`, `perplexity_result()`, `effect_result()`,
`explanation_result()`, and `training_result()`,
whose schemes are `SCHEMES`. Each is computed once a process and handed out as a copy, which the
caller may change.
Figures: `drawn(name)`, names in `FIGURES`, every kind of figure of every kind of result; and
`unpacked(json)`. `figure_text(explorer, panel)` is a figure as a page has it.
"""

from __future__ import annotations

import base64
import copy
import functools
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
import xarray as xr
from torch import Tensor, nn

from goatviz import plots
from goatviz.adapters import capture
from goatviz.analysis import (
    PlanLevels,
    explain,
    implied_prior,
    length_sweep,
    mass_sweep,
    needle_grid,
    perplexity_sweep,
    plan_slice,
    prior_profile,
    sink_effect,
    sink_profile,
    training_log,
)
from goatviz.attention import Attention
from goatviz.models import CausalLM, ModelConfig, goat_prior
from goatviz.priors import ALiBiPrior, BucketPrior, KeyTablePrior, SpectralPrior, UniformPrior
from goatviz.tasks import CopyMixture, Needle, Text
from goatviz.training import TrainConfig, train
from goatviz.transport import Temper, solve_rows

#: Tokens that break pages, axes and hover texts which do not escape them.
HOSTILE = ["the", "the", "<s>", "</script>", "<b>", "Ã©", "café", "日本", "🙂", "%{x}"]
#: Names and position schemes of the models compared: one name must arrive on a page as text, and
#: learned positions reach no further than training, so that lengths beyond are missing.
SCHEMES = {"goat": "goat", "<b>rope</b>": "rope", "learned": "learned"}


# --- inputs ---


def ids(batch: int = 1, length: int = 32, *, vocab: int = 20, seed: int = 0) -> Tensor:
    """Random token ids, (batch, length), the same on every call."""
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


class TextTokenizer:
    """A tokenizer of one token a letter, whose every token reads as one of `HOSTILE`."""

    def __call__(self, text: str, return_tensors: str = "pt") -> dict[str, Tensor]:
        return {"ids": torch.tensor([[ord(letter) % len(HOSTILE) for letter in text]])}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [HOSTILE[i] for i in ids]


# --- models ---


def lively(module: nn.Module, std: float = 0.7, *, seed: int = 0) -> nn.Module:
    """The module itself, every parameter drawn from N(0, std^2), so that every part shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return module


def tiny_lm(positions: str = "goat", *, seed: int = 0, std: float = 0.5, **options) -> CausalLM:
    """A `CausalLM` of two layers and two heads whose scores and prior are far from flat."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "training_length": 32, "embed_dim": 32, "num_layers": 2}
    model = CausalLM(ModelConfig(positions=positions, **(sizes | options))).eval()
    for name, parameter in model.named_parameters():
        if "raw_slope" in name:
            nn.init.constant_(parameter, -3.0)
        elif ".prior." in name or "q_proj.weight" in name:
            nn.init.normal_(parameter, std=std)
    return model


_COMMON = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
_WINDOW = {**_GROUPED, "sliding_window": 5}
_GEMMA = {**_WINDOW, "query_pre_attn_scalar": 8}
_GPT2 = {
    "vocab_size": 50,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Tiny Hugging Face models: name -> (model class, configuration class, options).
HUGGINGFACE = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", _WINDOW),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_COMMON, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _GROUPED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GEMMA, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **_WINDOW,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "bert": ("BertModel", "BertConfig", _COMMON),
    "t5": (
        "T5EncoderModel",
        "T5Config",
        {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "vit": (
        "ViTModel",
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 32,
            "patch_size": 8,
        },
    ),
}


def build_huggingface(
    model_class: str, config_class: str, options: dict, *, std: float = 0.2
) -> nn.Module:
    """A Hugging Face model by the names of its classes, every parameter drawn from N(0, std^2)."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        config = getattr(transformers, config_class)(**options)
        return lively(getattr(transformers, model_class)(config).eval(), std)
    finally:
        transformers.logging.set_verbosity(before)


@functools.cache
def _built(name: str, std: float, changes: tuple) -> nn.Module:
    model_class, config_class, options = HUGGINGFACE[name]
    return build_huggingface(model_class, config_class, options | dict(changes), std=std)


def tiny_huggingface(name: str, *, std: float = 0.2, **changes) -> nn.Module:
    """A copy of a tiny Hugging Face model of `HUGGINGFACE`, with changes of its configuration."""
    return copy.deepcopy(_built(name, std, tuple(sorted(changes.items()))))


class MixedHeads(nn.Module):
    """Three layers of GOAT attention, of which the first has one head less than the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            Attention(
                24,
                heads,
                prior=goat_prior(heads, rank=1, sink_rank=1, training_length=16),
                content_dim=4,
            )
            for heads in (3, 4, 4)
        )
        for depth, layer in enumerate(self.layers):
            lively(layer.prior, 0.7, seed=depth)
            for name, parameter in layer.prior.named_parameters():
                # Sinks of different strength, the strongest in the last head of the last layer.
                if name.endswith("bump"):
                    nn.init.constant_(parameter, 0.0)
                    with torch.no_grad():
                        parameter += torch.linspace(0, 2 + 2 * depth, len(parameter))
                elif name.endswith("raw_slope"):
                    nn.init.constant_(parameter, -3.0)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def hidden_states(*lengths: int, width: int = 24, seed: int = 0) -> list[Tensor]:
    """Random inputs of a stack of layers, one a length, (1, length, width)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, length, width, generator=generator) for length in lengths]


# --- results ---


def _results(cases: dict[str, Callable[[], xr.Dataset]]) -> Callable[[str], xr.Dataset]:
    """A function that computes each case once and hands out copies."""
    computed = functools.cache(lambda case: cases[case]())
    return lambda case="toy": computed(case).copy(deep=True)


def _wide_sinks(layers: int, heads: int, length: int, **options) -> xr.Dataset:
    model = tiny_lm(
        num_layers=layers,
        num_heads=heads,
        embed_dim=4 * heads,
        content_dim=2,
        prior_rank=1,
        sink_rank=0,
        mlp_ratio=0.0,
    )
    return sink_profile(
        model, ids(2, length), resamples=20, min_observers=1, spectra=True, **options
    )


def _reader_sinks(name: str) -> xr.Dataset:
    model = tiny_huggingface(name)
    return sink_profile(model, ids(3, 40, vocab=50), maps=16, spectra=True)


def _short_sinks(length: int) -> xr.Dataset:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the shortest input has", UserWarning)
        return sink_profile(
            MixedHeads(), hidden_states(length), maps=length, min_observers=1, spectra=True
        )


def _hostile_sinks() -> xr.Dataset:
    """Tokens, the module's class and its layers are all called like markup."""

    def forward(module: nn.Module, ids: Tensor) -> Tensor:
        (model,) = module.children()
        return model(ids)

    model = type("<i>net</i>", (nn.Module,), {"forward": forward})()
    model.add_module("<img src=x onerror=alert(1)>", tiny_lm())
    text = "".join(map(chr, range(100, 120)))
    return sink_profile(
        model, text, tokenizer=TextTokenizer(), maps=20, min_observers=4, spectra=True
    )


#: What `sink_result` computes: name -> function without arguments.
SINK_CASES = {
    # 3 x 4 heads, one of them absent, learned priors, five inputs of 27 to 30 tokens, maps.
    "toy": lambda: sink_profile(
        MixedHeads(), hidden_states(30, 29, 28, 27, 30), maps=8, min_observers=4, spectra=True
    ),
    "one input": lambda: sink_profile(
        MixedHeads(), hidden_states(30), maps=8, min_observers=4, spectra=True
    ),
    "one key": lambda: _short_sinks(1),
    "two keys": lambda: _short_sinks(2),
    "long": lambda: sink_profile(
        tiny_lm(num_layers=1), ids(2, 3000), maps=400, resamples=20, spectra=True
    ),
    "no maps": lambda: sink_profile(MixedHeads(), hidden_states(30, 27)),
    # The reader's: no explicit prior, causal; a window; both directions; an extra column of mass.
    "gpt2": lambda: _reader_sinks("gpt2"),
    "llama": lambda: _reader_sinks("llama"),
    "mistral": lambda: _reader_sinks("mistral"),
    "bert": lambda: _reader_sinks("bert"),
    "gpt-oss": lambda: _reader_sinks("gpt-oss"),
    # Twenty tokens of which none may be taken for markup, in one input.
    "hostile": _hostile_sinks,
    # Heads by the hundred.
    "12 x 12": lambda: _wide_sinks(12, 12, 64, maps=16),
    "32 x 32": lambda: _wide_sinks(32, 32, 16),
}  # fmt: skip
sink_result = _results(SINK_CASES)


def _tiny_goat(heads: int = 3, **options) -> nn.Module:
    return lively(goat_prior(heads, rank=3, sink_rank=2, training_length=64, **options))


#: What `prior_result` computes.
PRIOR_CASES = {
    "toy": lambda: prior_profile(_tiny_goat(), length=40),
    "model": lambda: prior_profile(tiny_lm(), length=40),
    "one head": lambda: prior_profile(_tiny_goat(1), length=40),
    "one key": lambda: prior_profile(_tiny_goat(), length=1),
    "two keys": lambda: prior_profile(_tiny_goat(), length=2),
    "long": lambda: prior_profile(_tiny_goat(), length=16_384),
    "bidirectional": lambda: prior_profile(
        _tiny_goat(causal=False), length=40, causal=False
    ),
    "alibi": lambda: prior_profile(ALiBiPrior(3), length=40),
    "bucket": lambda: prior_profile(lively(BucketPrior(2)), length=40),
    "rank 0": lambda: prior_profile(SpectralPrior(2, rank=0), length=40),
    "uniform": lambda: prior_profile(UniformPrior(), length=40),
    "table": lambda: prior_profile(
        KeyTablePrior(torch.linspace(-2, 2, 80).view(2, 40)), length=40
    ),
    "implied": lambda: implied_prior(
        tiny_huggingface("gpt2"), ids(3, 40, vocab=50), resolution=40
    ),
    "implied, bidirectional": lambda: implied_prior(
        tiny_huggingface("bert"), ids(3, 40, vocab=50), resolution=40
    ),
    "12 x 12": lambda: prior_profile(
        tiny_lm(num_layers=12, num_heads=12, embed_dim=144, prior_rank=1, sink_rank=1),
        length=48,
        resolution=16,
    ),
}  # fmt: skip
prior_result = _results(PRIOR_CASES)


def tiny_plan(*shape: int, length: int = 16, temperature: float = 0.7):
    """A causal `TransportPlan` of random scores under a GOAT prior, of shape (*shape, L, L)."""
    scores = torch.randn(
        *shape, length, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    log_prior = _tiny_goat(1).double().log_prior(range(length), range(length)).detach()[0]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    return solve_rows(scores, log_prior=log_prior, temperature=temperature, mask=mask)


#: What `plan_result` computes.
PLAN_CASES = {
    "toy": lambda: plan_slice(tiny_plan()),
    "model": lambda: plan_slice(tiny_lm(), ids(1, 24), layer=1, head=1),
    "window": lambda: plan_slice(
        tiny_lm(), ids(1, 24), queries=slice(12, 20), keys=slice(4, 24), check=False
    ),
    "hostile": lambda: plan_slice(tiny_lm(), ids(1, len(HOSTILE)), tokens=HOSTILE),
}
plan_result = _results(PLAN_CASES)


@functools.cache
def tiny_levels(length: int = 30, positions: str = "goat") -> PlanLevels:
    """The last layer's first head, as the explorers' map and rows read it."""
    model = tiny_lm(positions)
    with capture(model, statistics=(), keep="projections") as record, torch.no_grad():
        model(ids(1, length))
    return PlanLevels(record.calls[-1])


#: What `row_result` computes.
ROW_CASES = {
    "toy": lambda: tiny_levels().row(20, check=True),
    "first query": lambda: tiny_levels().row(0),
    "pooled": lambda: tiny_levels(500).row(450, points=17),
    "hostile": lambda: tiny_levels(len(HOSTILE)).row(8, tokens=HOSTILE),
}
row_result = _results(ROW_CASES)


def tiny_schemes(*, runs: int = 2, **options) -> dict[str, list[CausalLM]]:
    """Untrained models of `SCHEMES`, several runs each."""
    sizes = {"vocab_size": 128, "num_layers": 1, **options}
    return {
        name: [tiny_lm(positions, seed=seed, **sizes) for seed in range(runs)]
        for name, positions in SCHEMES.items()
    }


def _perplexity() -> xr.Dataset:
    """Losses on three small documents of random letters."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for name, size in (("a", 200), ("b", 150), ("c", 300)):
            letters = bytes(random.integers(97, 123, size).tolist())
            (Path(folder) / f"{name}.txt").write_bytes(letters)
        task = Text(source=folder)
        return perplexity_sweep(tiny_schemes(vocab_size=256), task, lengths=[16, 32, 128])


def _training() -> xr.Dataset:
    """Logs of two runs of different length, so that each lacks steps of the other."""
    task = CopyMixture(length=8, vocab_size=4)
    runs = {
        name: train(
            TrainConfig(task=task, embed_dim=32, batch_size=4, positions=positions, steps=steps),
            progress=False,
        )
        for (name, positions), steps in zip(SCHEMES.items(), (3, 5), strict=False)
    }
    return training_log(runs)


_NEEDLE = Needle(length=32, value_length=2)
length_result = _results(
    {
        "toy": lambda: length_sweep(tiny_schemes(), _NEEDLE, lengths=[24, 32, 64], examples=6),
        "one run": lambda: length_sweep(
            tiny_schemes(runs=1), _NEEDLE, lengths=[24, 32, 64], examples=6
        ),
    }
)
grid_result = _results(
    {
        "toy": lambda: needle_grid(
            tiny_schemes(), _NEEDLE, lengths=[32, 64], depths=(0.1, 0.5, 0.9), examples=4
        )
    }
)
mass_result = _results(
    {
        "toy": lambda: mass_sweep(
            tiny_schemes(num_layers=2), _NEEDLE, lengths=[24, 32, 64], examples=4, recent=8
        )
    }
)
perplexity_result = _results({"toy": _perplexity})
training_result = _results({"toy": _training})
explanation_result = _results(
    {
        "toy": lambda: explain(tiny_lm(), ids(1, 24), layer=1, head=1),
        "hostile": lambda: explain(tiny_lm(), ids(1, len(HOSTILE)), tokens=HOSTILE),
        "one key": lambda: explain(tiny_huggingface("gpt-oss"), ids(1, 24), query=0),
    }
)
effect_result = _results(
    {
        "toy": lambda: sink_effect(tiny_lm(), ids(4, 24)),
        # A name that must arrive as text, one input, and no layer alone.
        "one input": lambda: sink_effect(
            tiny_lm(), ids(1, 24), changes={"<b>hot</b>": Temper(2.0)}, per_layer=False
        ),
        "12 x 12": lambda: sink_effect(
            tiny_lm(num_layers=12, num_heads=12, embed_dim=144), ids(3, 24)
        ),
    }
)


# --- what is drawn ---


def _draw(draw: Callable, result: Callable, case: str, options: dict) -> plots.Figure:
    return draw(result(case), **options)


_LOSSES = [("offset 1", "GOAT", 1.8, 0.01, 1.7), ("offset 1", "uniform", 1.9, 0.01, 1.7)]
_SINKS = ("toy", "one key", "long", "gpt2", "hostile", "12 x 12")
_PRIORS = ("toy", "one key", "long", "alibi", "uniform", "table", "implied", "12 x 12")
_DRAWINGS: list[tuple[str, Callable, Callable, tuple[str, ...], tuple[str, ...]]] = [
    ("prior", plots.draw_prior, prior_result, _PRIORS, tuple(plots.PRIOR_KINDS)),
    ("sinks", plots.draw_sinks, sink_result, _SINKS, plots.SINK_KINDS),
    ("plan", plots.draw_plan, plan_result, tuple(PLAN_CASES), ()),
    ("length", plots.draw_length, length_result, ("toy", "one run"), ()),
    ("needle", plots.draw_needle, grid_result, ("toy",), ()),
    ("mass", plots.draw_mass, mass_result, ("toy",), ()),
    ("perplexity", plots.draw_perplexity, perplexity_result, ("toy",), ("length", "position")),
    (
        "explanation",
        plots.draw_explanation,
        explanation_result,
        ("toy", "hostile", "one key"),
        (),
    ),
    ("effect", plots.draw_sink_effect, effect_result, ("toy", "one input", "12 x 12"), ()),
    ("training", plots.draw_training, training_result, ("toy",), ()),
]
#: Every kind of figure of small results, and of 12 x 12 heads: name -> how it is drawn.
FIGURES: dict[str, Callable[[], plots.Figure]] = {"losses": lambda: plots.draw_losses(_LOSSES)} | {
    ", ".join((subject, case, *options.values())): functools.partial(
        _draw, draw, result, case, options
    )
    for subject, draw, result, cases, kinds in _DRAWINGS
    for case in cases
    for options in ([{"kind": kind} for kind in kinds] or [{}])
}


def drawn(name: str) -> plots.Figure:
    """A figure of `FIGURES`."""
    return FIGURES[name]()


def unpacked(value):
    """plotly's JSON with its packed arrays as arrays."""
    if isinstance(value, dict) and "bdata" in value:
        array = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
        return array.reshape([int(n) for n in str(value.get("shape", array.size)).split(",")])
    if isinstance(value, dict):
        return {name: unpacked(part) for name, part in value.items()}
    return [unpacked(part) for part in value] if isinstance(value, list | tuple) else value


def figure_text(explorer, panel):
    """The figure of a panel as the page has it: plotly's JSON, with arrays as base64."""
    figure = explorer.parts[panel].figure

    def packed(value):
        if isinstance(value.get("bdata"), int):
            value["bdata"] = base64.b64encode(figure["buffers"][value["bdata"]]).decode()
        return value

    return json.dumps(
        json.loads(figure["text"], object_hook=packed), separators=(",", ":"), allow_nan=False
    )
