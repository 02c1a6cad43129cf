"""Which attention families of transformers `goatviz.capture` can watch, and how exactly.

Run with ``python docs/families.py``; it writes families.md beside itself. A family is a model type
of transformers' AutoModel. Each is built tiny and random where its configuration lets itself be
shrunk, is captured under eager attention, and every plan is compared with the weights that the
layer itself returned.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import itertools
import re
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from goatviz.adapters.capture import Record, capture, find_attention
from goatviz.adapters.huggingface import find_huggingface_attention
from goatviz.adapters.inline_attention import find_inline_attention
from goatviz.priors import ALiBiPrior

TABLE = Path(__file__).with_suffix(".md")
#: What a small model is made of, under all the names that configurations have for it.
_SIZES = {
    32: "hidden_size d_model n_embd dim embed_dim embedding_size width",
    2: "encoder_layers decoder_layers depth num_decoder_layers num_encoder_layers "
    "num_experts_per_tok moe_topk num_local_experts attn_layer_period",
    4: "num_hidden_layers num_layers n_layer n_layers num_attention_heads n_head n_heads num_heads "
    "encoder_attention_heads decoder_attention_heads attention_heads num_experts "
    "n_routed_experts num_key_value_heads mamba_n_heads",
    48: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim "
    "moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp",
    8: "head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim kv_lora_rank q_lora_rank "
    "patch_size query_pre_attn_scalar attention_window",
    64: "vocab_size max_position_embeddings n_positions max_source_positions max_target_positions",
    16: "projection_dim mamba_d_head hidden_size_per_layer_input",
    5: "sliding_window",
    1: "attn_layer_offset n_group topk_group first_k_dense_replace bos_token_id "
    "decoder_start_token_id",
    0: "pad_token_id num_kv_shared_layers",
    3: "eos_token_id num_channels",
}
TINY = {name: size for size, names in _SIZES.items() for name in names.split()} | {
    "image_size": 32,
    "use_cache": False,
    "vocab_size_per_layer_input": 64,
}
_WINDOWED = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_WINDOWED["patch_size"] = 4
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
#: What four layers need besides.
_OWN = {
    **dict.fromkeys(("donut-swin", "maskformer-swin", "swin", "swinv2"), _WINDOWED),
    "swin2sr": _WINDOWED | {"image_size": 8, "patch_size": 1, "num_heads": [2, 2]},
    **dict.fromkeys(("deberta", "deberta-v2"), _DISENTANGLED),
    "step3p5": {"sliding_window": 5},
    "bailing_hybrid": {
        **{"layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_heads": 4},
        **{"mlp_layer_types": ["dense"] * 4, "linear_head_dim": 8},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 5},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
}
#: What q, k and the plan do not show: temperatures inside the queries, biases that queries ask
#: for, and gates behind the plan that are not masses of its rows.
_TOLD = {
    "B: bias of each key": {"doge"},
    "C: bias of each query": {
        *("inkling2_text", "inkling_text", "inkling_mm_model", "wav2vec2-conformer"),
        *("deberta", "deberta-v2"),
    },
    "E: temperature of each row": {
        *("inkling2_text", "inkling_text", "inkling_mm_model", "llama4", "llama4_text"),
        *("ministral3", "mistral4"),
    },
    "F: cosine": {"swin2sr", "swinv2"},
    "H: gate of each channel": {
        *("afmoe", "inkling2_text", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
        *("axk2", "beam", "hrm_text", "hy_v4", "minimax", "muse_glimmer_text", "muse_spark_text"),
        *("neomme", "qwen3_next"),
    },
    "H: gate of each head, not below 1": {"laguna"},
    "I: two plans": {"diffllama"},
}
_LENGTH = 12
_LARGEST = 20_000_000
_SECONDS = 60


class Outcome(NamedTuple):
    """What became of one family."""

    family: str
    model: str
    verdict: str
    why: str
    reading: str = ""


class NotBuiltError(Exception):
    """A family that no tiny model was made of."""


def tiny_config(kind: type) -> Any:
    """A configuration of a kind whose sizes are small, those of its parts included."""
    default, changes = kind(), {}
    # Sizes that vary by layer are set for all layers alike.
    default.allow_global_per_layer_attribute_access = True
    widths = isinstance(getattr(default, "num_heads", None), list | tuple)
    for name, size in TINY.items():
        value = getattr(default, name, "")
        if isinstance(getattr(kind, name, None), property) or (
            widths and name in ("embed_dim", "hidden_size")
        ):
            continue
        if isinstance(value, list) and name == "image_size":
            changes[name] = [size, size]
        elif isinstance(value, int) or (value is None and name != "sliding_window"):
            changes[name] = size
    rotary = getattr(default, "rope_parameters", None)
    if isinstance(rotary, dict) and "rope_type" in rotary:
        changes["rope_parameters"] = rotary | {"mrope_section": [2, 1, 1]}
    for name in getattr(kind, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None:
            changes[name] = tiny_config(type(part)).to_dict()
    return kind(**changes | _OWN.get(kind.model_type, {}))


def build(family: str) -> nn.Module:
    """A tiny random model of a family, its attention far from flat."""
    try:
        config = tiny_config(transformers.CONFIG_MAPPING[family])
        with torch.device("meta"):
            size = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters())
        if size > _LARGEST:
            raise NotBuiltError(f"{size:,} parameters, shrunk as far as we know how")
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config).eval()
    except NotBuiltError:
        raise
    except (Exception, SystemExit) as error:
        raise NotBuiltError(_short(error)) from error
    for layer in find_attention(model).values():
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model


def inputs(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """What a model might be called with: its main input, and that with others."""
    torch.manual_seed(0)
    config, main = model.config, model.main_input_name
    size = getattr(getattr(config, "vision_config", config), "image_size", 32)
    size = size if isinstance(size, list | tuple) else (size, size)
    ids = torch.randint(3, 60, (2, _LENGTH))
    mels = getattr(config, "num_mel_bins", None) or 80
    known = {
        "input_ids": ids,
        "pixel_values": torch.randn(2, getattr(config, "num_channels", 3), *size),
        "input_features": torch.randn(2, mels, 2 * getattr(config, "max_source_positions", 64)),
        "input_values": torch.randn(2, 4000),
    }
    if not isinstance(main, str) or main not in known:
        raise NotBuiltError(f"takes {main if isinstance(main, str) else ', '.join(main)}")
    named = inspect.signature(model.forward).parameters
    decoder = {"decoder_input_ids": ids.flip(1)} if "decoder_input_ids" in named else {}
    both = {name: known[name] for name in ("input_ids", "pixel_values") if name in named}
    return [{main: known[main], **decoder}, {**both, **decoder}]


def working_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """The first inputs that the model runs with."""
    reasons = []
    for given in inputs(model):
        try:
            with torch.no_grad():
                model(**given)
            return given
        except NotBuiltError:
            raise
        except Exception as error:
            reasons.append(_short(error))
    raise NotBuiltError(reasons[0])


@contextlib.contextmanager
def outputs(model: nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor | None]]]:
    """What the eager functions of the watched layers return, call by call: output and weights."""
    kept: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def watched(function: Any) -> Any:
        def eager_attention_forward(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            kept.append(result[:2])
            return result

        return eager_attention_forward

    with contextlib.ExitStack() as stack:
        kinds = {type(layer) for layer in find_huggingface_attention(model).values()}
        scopes = [inspect.unwrap(kind.forward).__globals__ for kind in kinds]
        for scope in {id(scope): scope for scope in scopes}.values():
            for name in [name for name in scope if name.endswith("eager_attention_forward")]:
                stack.enter_context(mock.patch.dict(scope, {name: watched(scope[name])}))
        yield kept


def largest_deviation(
    model: nn.Module, record: Record, kept: list[tuple[torch.Tensor, torch.Tensor | None]]
) -> float | None:
    """Of the plans from the layers' weights and, over the values' size, of their outputs."""
    names = find_huggingface_attention(model)
    calls = [call for call in record.calls if call.name in names]
    if len(kept) != len(calls):
        return None
    worst = 0.0
    for captured, (output, weights) in zip(calls, kept, strict=True):
        call = captured.projections
        group = call.shape[1] // call.v.shape[1]
        size = float(call.v.abs().max())
        for batch, head in itertools.product(*map(range, call.shape[:2])):
            plan = call.plan(batch, head).weights
            seen = call.has_keys(batch, head)
            mixed = plan @ call.v[batch, head // group].double()
            if captured.gate is not None:
                # The layer multiplies by its gate after the kernel.
                mixed = mixed / captured.gate[batch, head, :, None].double().sigmoid()
            pairs = [(mixed / size, output[batch, :, head] / size)]
            if weights is not None and call.sink is None:
                pairs.append((plan, weights[batch, head]))
            worst = max(worst, *(float((a - b)[seen].abs().max()) for a, b in pairs))
    return worst


def reading(family: str, model: nn.Module, record: Record) -> str:
    """What a family is in the one row problem: letters A to I, each with a word.

    A fixed prior, B bias of each key, C bias of each query, D sink column, E temperature, F
    changed cost, G support chosen by another score, H gate of the output, I no plan.
    """
    seen, calls = record.calls, [captured.call for captured in record.calls]
    layers = find_attention(model)
    kinds = {type(part).__name__ for layer in layers.values() for part in layer.modules()}
    rotary = any("Rotary" in type(part).__name__ for part in model.modules())
    rotary = rotary or any(hasattr(layer, "rotary_dim") for layer in layers.values())
    told = [what for what, families in _TOLD.items() if family in families]
    biased = any(call.biased for call in calls) and not any(one[0] in "BC" for one in told)
    derived = {
        "A: ALiBi": any(isinstance(call.prior, ALiBiPrior) for call in calls),
        "A: bias": biased,
        "D: sink column": any(one.call.sink is not None and one.gate is None for one in seen),
        "F: rotary": rotary,
        "F: softcap": any(call.softcap is not None for call in calls),
        "H: gate of each head": any(one.gate is not None for one in seen),
        "G: indexer": any(kind.endswith("Indexer") for kind in kinds),
        "I: layers without a plan": bool(record.skipped),
    }
    found = sorted({*told, *(what for what, holds in derived.items() if holds)})
    return ", ".join(found) or "A: uniform"


def measure(family: str) -> Outcome:
    """Build a family, capture it, and compare."""
    name = _class_name(family)
    try:
        model = build(family)
        name = type(model).__name__
        model.set_attn_implementation("eager")
        given = working_inputs(model)
    except NotBuiltError as error:
        return Outcome(family, name, "not built", str(error))
    try:
        with torch.no_grad(), outputs(model) as kept:
            # What makes its own products has no eager function; it certifies itself.
            certify = _LENGTH if find_inline_attention(model) else None
            with capture(model, statistics=(), keep="projections", certify=certify) as record:
                model(**given)
    except (TypeError, ValueError) as error:
        return Outcome(family, name, "refused", _short(error))
    if not len(record):
        return Outcome(family, name, "not built", "its attention layers were not called")
    deviation = largest_deviation(model, record, kept)
    if certify is not None:
        deviation = max(record.residuals().values())
    why = "unknown" if deviation is None else f"{deviation:.0e}"
    return Outcome(family, name, "captured", why, reading(family, model, record))


def _class_name(family: str) -> str:
    name = MODEL_MAPPING_NAMES[family]
    return name if isinstance(name, str) else name[0]


def _short(error: BaseException) -> str:
    """The heart of a message, fit for a cell of a table."""
    text = re.sub(r" from '[^']+'", "", " ".join(str(error).split())) or type(error).__name__
    cannot = re.search(r"\(([\w, ]+) cannot\)", text)
    if cannot:
        return f"{cannot[1]}: no AttentionInterface"
    no_plan = re.search(r"\(([\w, ]+) has no plan", text)
    if no_plan:
        return f"I: {no_plan[1]}: no plan whose rows are a softmax"
    if "has attention that cannot be captured" in text:
        return "no attention layer that is known"
    text = text.split("; ")[0].replace("|", "/")
    return text if len(text) <= 160 else f"{text[:157]}..."


def _within_time(family: str) -> Outcome:
    def stop(*_: Any) -> None:
        raise NotBuiltError(f"took more than {_SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        return measure(family)
    except NotBuiltError as error:
        # Wherever it was stopped.
        return Outcome(family, _class_name(family), "not built", str(error))
    finally:
        signal.alarm(0)


def document(outcomes: list[Outcome]) -> str:
    """The tables, as Markdown."""
    lines = [
        f"# Attention families of transformers {transformers.__version__}",
        "",
        "Written by `python docs/families.py`: a tiny random model of each model type of",
        "`AutoModel`, captured under eager attention. The deviation is the largest of its plans",
        "from the weights that the eager functions return, and of their outputs, over the largest",
        "value, from the same recomputed from the plans; where a column without key takes mass,",
        "outputs alone are compared. Layers that make their own products are compared by their",
        "outputs too.",
        "",
        "A reading has a letter for each part: A a fixed prior, B a bias of each key, C one of",
        "each query, D a column without key, E a temperature, F a changed cost, G a support chosen",
        "by another score, H a gate behind the plan, I layers without a plan whose rows are a",
        "softmax. A gate of each head is the mass of a row: the plan's rows sum to it. A gate of",
        "each channel is no part of any plan. A tiny model may lack what the large ones have.",
        "",
        "SuperGlue is no `AutoModel`. Its graph attention is captured (A: uniform); its matching",
        "is a two-sided plan with dustbins, which POT's `ot.sinkhorn` confirms to 1e-6 in",
        "`tests/adapters/test_position_biases.py`.",
    ]
    for verdict, what in (
        ("captured", "largest deviation"),
        ("refused", "why"),
        ("not built", "why no tiny model of it runs here"),
    ):
        rows = [one for one in outcomes if one.verdict == verdict]
        lines += ["", f"## {verdict.capitalize()}: {len(rows)}", ""]
        if verdict == "captured":
            lines += [f"| family | class | reading | {what} |", "| --- | --- | --- | --- |"]
            lines += [f"| {one.family} | {one.model} | {one.reading} | {one.why} |" for one in rows]
        else:
            lines += [f"| family | class | {what} |", "| --- | --- | --- |"]
            lines += [f"| {one.family} | {one.model} | {one.why} |" for one in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the tables of the families named, or write those of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="default all, into families.md")
    families = parser.parse_args().families
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    text = document([_within_time(family) for family in families or sorted(MODEL_MAPPING_NAMES)])
    if families:
        print(text, end="")
    else:
        TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
