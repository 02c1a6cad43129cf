"""Arguments that many functions share are refused alike: by name, with what came and was wanted."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch

import goatviz
from goatviz.analysis import PlanLevels, prior_sources
from goatviz.attention.functional import attention_plan
from goatviz.models import ModelConfig, goat_prior
from goatviz.priors import SinkPrior, SpectralPrior
from goatviz.tasks import CopyMixture, Passkey, Text
from goatviz.training import TrainConfig
from goatviz.transport import collapse_bound, doubly_stochastic
from goatviz.transport.call import AttentionCall
from goatviz.transport.statistics import all_of, statistics_of

Q = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0))
CALL = AttentionCall.from_tensors(Q, Q)
WEIGHTS = torch.eye(3)
ALIBI = goatviz.ALiBiPrior(1)


def captured(**options):
    layer = goatviz.Attention(8, 1)
    with goatviz.capture(layer, **options) as record:
        layer(torch.zeros(1, 4, 8))
    return record


def passkey(function, *given, **options):
    model = goatviz.load_pretrained("passkey-goat").model
    return function(
        model if function is goatviz.sink_profile else {"goat": model}, *given, **options
    )


def levels(keys):
    return PlanLevels(captured(keep="projections").calls[0]).view((0, 4), keys)


ROWS = {
    "row_statistics": lambda **given: goatviz.row_statistics(Q, Q, **given),
    "statistics_of": lambda **given: statistics_of(CALL, **given),
    "all_of": lambda **given: all_of(CALL, **given),
    "capture": captured,
}
RECENT = ROWS | {
    "sink_profile": lambda **given: passkey(
        goatviz.sink_profile, torch.zeros(1, 20, dtype=torch.long), **given
    ),
    "mass_sweep": lambda **given: passkey(goatviz.mass_sweep, Passkey(), lengths=[32], **given),
}
WINDOWS = {
    "plan_slice": lambda keys: goatviz.plan_slice((Q, Q), keys=keys),
    "prior_profile": lambda keys: goatviz.prior_profile(ALIBI, length=8, keys=keys),
    "AttentionCall.plan": lambda keys: CALL.plan(keys=keys),
    "Record.plan": lambda keys: captured(keep="projections").plan(keys=keys),
}
#: None stands for what the layers say.
OPTIONAL_CAUSAL = {
    "prior_sources": lambda **given: prior_sources(ALIBI, **given),
    "prior_sources of a list": lambda **given: prior_sources(prior_sources(ALIBI), **given),
    "prior_sources of a layer": lambda **given: prior_sources(goatviz.Attention(8, 1), **given),
    "prior_profile": lambda **given: goatviz.prior_profile(ALIBI, length=8, **given),
    "plan_slice": lambda **given: goatviz.plan_slice((Q, Q), **given),
    "plot_plan": lambda **given: goatviz.plot_plan((Q, Q), **given),
    "plot_prior": lambda **given: goatviz.plot_prior(ALIBI, length=8, **given),
    "explore_prior": lambda **given: goatviz.explore_prior(ALIBI, length=8, **given),
}
CAUSAL = {
    "row_statistics": ROWS["row_statistics"],
    "incoming_mass": lambda **given: goatviz.incoming_mass(Q, Q, **given),
    "from_tensors": lambda **given: AttentionCall.from_tensors(Q, Q, **given),
    "prior_attention": lambda **given: goatviz.prior_attention(Q, Q, Q, **given),
    "attention_plan": lambda **given: attention_plan(Q, Q, **given),
    "Attention": lambda **given: goatviz.Attention(8, 1, **given),
    "goat_prior": lambda **given: goat_prior(1, rank=1, sink_rank=1, training_length=8, **given),
}
#: Integers with a lower bound: name -> (call, arguments).
INTEGERS = {
    "CopyMixture": (CopyMixture, ("length", "vocab_size", "offset")),
    "Passkey": (Passkey, ("length", "value_length", "distractors")),
    "Text": (Text, ("length", "streamed_documents")),
    "TrainConfig": (TrainConfig, ("steps", "batch_size")),
    "Execution": (goatviz.Execution, ("accumulation",)),
    "ModelConfig": (
        partial(ModelConfig, **{"vocab_size": 4, "training_length": 8}),
        ("vocab_size", "training_length", "embed_dim", "num_layers", "num_heads", "prior_rank"),
    ),
    "SpectralPrior": (partial(SpectralPrior, **{"num_heads": 1, "rank": 1}), ("rank", "axes")),
    "SinkPrior": (
        partial(SinkPrior, **{"num_heads": 1, "rank": 1, "training_length": 8}),
        ("num_heads", "rank", "training_length", "hidden"),
    ),
}
FLOATING = {
    "solve_rows": (goatviz.solve_rows, "scores"),
    "from_weights": (lambda x: goatviz.TransportPlan.from_weights(x, WEIGHTS), "weights"),
    "from_weights (scores)": (lambda x: goatviz.TransportPlan.from_weights(WEIGHTS, x), "scores"),
    "from_log_weights": (
        lambda x: goatviz.TransportPlan.from_log_weights(x, WEIGHTS),
        "log_weights",
    ),
    "doubly_stochastic": (doubly_stochastic, "scores"),
    "collapse_bound": (lambda x: collapse_bound(x, 0.1), "prior"),
    "plan_slice (weights)": (goatviz.plan_slice, "source"),
    "plan_slice (pair)": (lambda x: goatviz.plan_slice((x, x)), "q"),
    "row_statistics": (lambda x: goatviz.row_statistics(x[None, None], x[None, None]), "q"),
    "incoming_mass": (lambda x: goatviz.incoming_mass(x[None, None], x[None, None]), "q"),
    "prior_attention": (lambda x: goatviz.prior_attention(*[x[None, None]] * 3), "q"),
    "attention_plan": (lambda x: attention_plan(x[None, None], x[None, None]), "q"),
}


def table():
    """(test id, call, bad value, error, message)."""
    count = "recent must be an integer of at least 1, got"
    kinds = (math.inf, TypeError), (math.nan, TypeError), (2.5, TypeError), ("3", TypeError)
    for name, call in RECENT.items():
        for value, error in (*kinds, (True, TypeError), (0, ValueError)):
            yield name, lambda v, call=call: call(recent=v), value, error, f"{count} {value!r}"
    for name, (call, arguments) in INTEGERS.items():
        for argument in arguments:
            for value, error in (*kinds, (True, TypeError), (-1, ValueError)):
                message = rf"{argument} must be an integer of at least \d, got {value!r}"
                make = partial(lambda call, argument, v: call(**{argument: v}), call, argument)
                yield f"{name}-{argument}", make, value, error, message
    for name, call in ROWS.items():
        for value in (0, "0", None):
            message = f"keys must be a list of integers, got {value!r}"
            yield name, lambda v, call=call: call(keys=v), value, TypeError, message
        for value, error in (
            (0.5, TypeError),
            (math.nan, TypeError),
            (True, TypeError),
            (-1, None),
        ):
            yield (
                name,
                lambda v, call=call: call(keys=[v]),
                value,
                error or ValueError,
                rf"keys must be an integer (in 0 .. 3|of at least 0), got {value!r}",
            )
    for name, call in WINDOWS.items():
        for value in (0, "0", [0]):
            message = f"keys must be a slice, got {type(value).__name__}"
            yield name, call, value, TypeError, message
    for value, wanted in ((0, "a pair of integers"), ("0", "a pair of integers"), ([0], "a pair")):
        message = f"keys must be {wanted}.*, got {re.escape(repr(value))}"
        yield "PlanLevels.view", levels, value, TypeError, message
    for name, call in (CAUSAL | OPTIONAL_CAUSAL).items():
        for value in ("no", 1, *([None] if name not in OPTIONAL_CAUSAL else [])):
            message = f"causal must be True or False, got {value!r}"
            yield name, lambda v, call=call: call(causal=v), value, TypeError, message
    yield "PlanLevels.view", levels, (0.5, 2), TypeError, "keys must be an integer, got 0.5"
    for name, (call, argument) in FLOATING.items():
        for value in (torch.int64, torch.bool):
            message = f"{argument} must .*float.*, got {value}"
            yield name, lambda v, call=call: call(WEIGHTS.to(v)), value, TypeError, message


CASES = [pytest.param(*case, id=f"{name}-{case[1]}") for name, *case in table()]


@pytest.mark.parametrize(("call", "value", "error", "message"), CASES)
def test_a_bad_value_is_named(call, value, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in FLOATING if name != "from_log_weights"])
def test_half_precision_is_taken(name, dtype):
    call, _ = FLOATING[name]
    call(WEIGHTS.to(dtype))


@pytest.mark.parametrize("keys", [[1, 0], (1, 0), np.array([1, 0]), torch.tensor([1, 0])])
def test_keys_are_any_sequence_of_integers(keys):
    assert goatviz.row_statistics(Q, Q, keys=keys).keys == (1, 0)


def test_arrays_are_no_tensors():
    with pytest.raises(TypeError, match="q must be a Tensor, got ndarray"):
        goatviz.prior_attention(*[Q.numpy()] * 3)
    with pytest.raises(TypeError, match="v must be a Tensor, got ndarray"):
        goatviz.prior_attention(Q, Q, Q.numpy())
