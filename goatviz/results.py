"""Everything that crosses from computing to drawing: labelled datasets with a named schema.

A result is an xarray Dataset whose attributes name its schema and whose variables carry units. It
saves, loads, selects and draws on a machine without torch. Nothing is computed or drawn here.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from goatviz import checks
from goatviz.derived import completed
from goatviz.files import check_shipped, shipped_file, shipped_names, whole_file

if TYPE_CHECKING:
    import xarray as xr

#: Attribute of files that end in the sha256 of everything before it; absent in memory.
_SUM = "goatviz_file_sha256"
_SUM_LENGTH = 64
#: Largest ratio of claimed content to file size, above that of the best compression.
_LARGEST = 2000


@dataclass(frozen=True)
class Field:
    """One variable of a schema.

    Attributes
    ----------
    dims : tuple of str
        Its dimensions, in order.
    units : str
        "nats", "probability", "tokens", "tokens/s", "score", "radian/token", "count", "MiB", or
        "1".
    long_name : str
        Text of an axis title.
    """

    dims: tuple[str, ...]
    units: str
    long_name: str


@dataclass(frozen=True)
class Schema:
    """A named list of fields; `optional` ones may be missing."""

    name: str
    fields: Mapping[str, Field]
    optional: frozenset[str] = frozenset()


def _interval(name: str, dims: tuple[str, ...], units: str, long_name: str) -> dict[str, Field]:
    """Fields of a value and of the ends of its interval."""
    return {
        name: Field(dims, units, long_name),
        f"{name}_low": Field(dims, units, "lower end of its interval"),
        f"{name}_high": Field(dims, units, "upper end of its interval"),
    }


_HEAD = ("layer", "head")
_ROW = (*_HEAD, "query")
_CELL = (*_ROW, "key_bin")

PRIOR_PROFILE = Schema(
    "prior_profile",
    {
        "layer_name": Field(("layer",), "1", "layer"),
        "present": Field(_HEAD, "1", "whether this layer has this head"),
        "causal": Field(("layer",), "1", "whether keys after the query are forbidden"),
        "sink": Field((*_HEAD, "key"), "nats", "sink u(j)"),
        "sink_low": Field((*_HEAD, "key"), "nats", "smallest u(j) in the bin"),
        "sink_high": Field((*_HEAD, "key"), "nats", "largest u(j) in the bin"),
        "key_stop": Field(("key",), "tokens", "end of the key bin (exclusive)"),
        "kernel": Field((*_HEAD, "lag"), "nats", "kernel, recency included"),
        "kernel_low": Field((*_HEAD, "lag"), "nats", "smallest kernel in the bin"),
        "kernel_high": Field((*_HEAD, "lag"), "nats", "largest kernel in the bin"),
        "relative": Field((*_HEAD, "lag"), "nats", "relative term"),
        "recency": Field((*_HEAD, "lag"), "nats", "recency, 0 at lag 0"),
        "lag_stop": Field(("lag",), "tokens", "end of the lag bin (exclusive)"),
        "recency_slope": Field(_HEAD, "nats/token", "recency slope m"),
        "frequency": Field(("layer", "rank"), "radian/token", "frequency"),
        "amplitude": Field((*_HEAD, "rank"), "nats", "amplitude"),
        "phase": Field((*_HEAD, "rank"), "radian", "phase, the peak's lag times the frequency"),
        "log_prior": Field(_CELL, "nats", "log-prior, mean over the bin"),
        "row_centred": Field(_CELL, "nats", "log-prior less its mean over the row"),
        "probability": Field(_CELL, "probability", "prior mass in the bin"),
        "allowed": Field(_CELL, "1", "whether the bin holds a key the query may see"),
        "bin_stop": Field(("key_bin",), "tokens", "end of the key bin (exclusive)"),
        "margin": Field(_ROW, "nats", "lead of the top key over the runner-up"),
        "margin_key": Field(_ROW, "tokens", "the top key"),
        "top_mass": Field(_ROW, "probability", "prior mass on the top key"),
        "prior_entropy": Field(_ROW, "nats", "entropy of the prior"),
        "explained_variance": Field(_HEAD, "1", "share of the logits' variance explained"),
        **_interval("held_out", _HEAD, "1", "share of the variance of unseen inputs explained"),
        "verdict": Field(_HEAD, "1", "prior-like, content-like or not known"),
        "kernel_error": Field((*_HEAD, "lag"), "nats", "half of the kernel's 95 % interval"),
        "sink_error": Field((*_HEAD, "key"), "nats", "half of u(j)'s 95 % interval"),
        "lag_inputs": Field(("layer", "lag"), "count", "inputs that saw the lag, mean in the bin"),
        "key_inputs": Field(("layer", "key"), "count", "inputs that saw the key, mean in the bin"),
        "rotary_frequency": Field(("layer", "pair"), "radian/token", "frequency of a rotary pair"),
        "rotary_share": Field(_HEAD, "1", "share of the kernel's variance in rotary waves"),
        "kernel_range": Field(_HEAD, "nats", "largest less smallest kernel over all lags"),
        "relative_range": Field(_HEAD, "nats", "largest less smallest relative term"),
        # Ranks over all layers, ties in order; -1 for a head that a layer does not have.
        "margin_rank": Field(_HEAD, "1", "place by the last query's margin, 0 the largest"),
        "kernel_rank": Field(_HEAD, "1", "place by the kernel's range, 0 the least flat"),
    },
    # Profiles of earlier versions lack the ranges and ranks.
    optional=frozenset(
        {"explained_variance", "kernel_range", "relative_range", "margin_rank", "kernel_rank"}
        | {"held_out", "held_out_low", "held_out_high", "verdict", "kernel_error", "sink_error"}
        | {"lag_inputs", "key_inputs", "rotary_frequency", "rotary_share"}
    ),
)

PRIOR_MIX = Schema(
    "prior_mix",
    {
        "key_stop": Field(("key",), "tokens", "end of the key bin (exclusive)"),
        "sink": Field(("key",), "nats", "sink u(j), scaled"),
        "sink_low": Field(("key",), "nats", "smallest u(j) in the bin"),
        "sink_high": Field(("key",), "nats", "largest u(j) in the bin"),
        "learned_sink": Field(("key",), "nats", "sink u(j), as learned"),
        "lag_stop": Field(("lag",), "tokens", "end of the lag bin (exclusive)"),
        "kernel": Field(("lag",), "nats", "kernel, scaled, recency included"),
        "kernel_low": Field(("lag",), "nats", "smallest kernel in the bin"),
        "kernel_high": Field(("lag",), "nats", "largest kernel in the bin"),
        "learned_kernel": Field(("lag",), "nats", "kernel, as learned"),
        "frequency": Field(("rank",), "radian/token", "frequency"),
        "amplitude": Field(("rank",), "nats", "amplitude, scaled"),
        "learned_amplitude": Field(("rank",), "nats", "amplitude, as learned"),
        "bin_stop": Field(("key_bin",), "tokens", "end of the key bin (exclusive)"),
        "probability": Field(("query", "key_bin"), "probability", "prior mass in the bin"),
        "allowed": Field(
            ("query", "key_bin"), "1", "whether the bin holds a key the query may see"
        ),
        "margin": Field(("query",), "nats", "lead of the top key over the runner-up"),
        "learned_margin": Field(("query",), "nats", "lead of the top key, as learned"),
        "margin_key": Field(("query",), "tokens", "the top key"),
        "top_mass": Field(("query",), "probability", "prior mass on the top key"),
        "prior_entropy": Field(("query",), "nats", "entropy of the prior"),
        "seen": Field(("query",), "count", "keys the query may see"),
        "last_stop": Field(("last_key",), "tokens", "end of the key bin (exclusive)"),
        "last": Field(("last_key",), "probability", "last query's prior mass, mean over the bin"),
        "last_low": Field(("last_key",), "probability", "least mass that content can leave"),
        "last_high": Field(("last_key",), "probability", "largest mass that content can give"),
        "learned_last": Field(("last_key",), "probability", "last query's prior mass, as learned"),
        "rotary_frequency": Field(("pair",), "radian/token", "frequency of a rotary pair"),
    },
    optional=frozenset({"rotary_frequency"}),
)

PLAN_SLICE = Schema(
    "plan_slice",
    {
        "weights": Field(("query", "key"), "probability", "attention weight"),
        "prior": Field(("query", "key"), "probability", "prior"),
        "scores": Field(("query", "key"), "score", "content score"),
        "log_prior": Field(("query", "key"), "nats", "log-prior"),
        "logits": Field(("query", "key"), "nats", "score/temperature + log-prior"),
        "allowed": Field(("query", "key"), "1", "whether the query may see the key"),
        "potential": Field(("query",), "score", "potential (free energy)"),
        "transport_cost": Field(("query",), "score", "transport cost, minus the mean score"),
        "entropy": Field(("query",), "nats", "entropy"),
        "kl_to_prior": Field(("query",), "nats", "KL to the prior"),
        "kkt_residual": Field(("query",), "score", "KKT residual"),
        "duality_gap": Field(("query",), "score", "duality gap"),
        "content_range": Field(("query",), "score", "content range"),
        "margin": Field(("query",), "nats", "margin of the prior"),
        "incoming_mass": Field(("key",), "probability", "incoming mass"),
        "sink_weight": Field(("query",), "probability", "weight of the sink's own column"),
        "query_token": Field(("query",), "1", "query token"),
        "key_token": Field(("key",), "1", "key token"),
    },
    optional=frozenset({"sink_weight", "query_token", "key_token"}),
)

PLAN_ROW = Schema(
    "plan_row",
    {
        "key_stop": Field(("key",), "tokens", "end of the key bin (exclusive)"),
        "weights": Field(("key",), "probability", "attention mass in the bin"),
        "prior": Field(("key",), "probability", "prior mass in the bin"),
        "scores": Field(("key",), "score", "content score, mean over the bin"),
        "log_prior": Field(("key",), "nats", "log-prior, mean over the bin"),
        "allowed": Field(("key",), "1", "whether the bin holds a key the query may see"),
        "key_token": Field(("key",), "1", "key token"),
        "solver": Field(("key",), "probability", "mass in the bin by POT's own solution"),
        "balanced": Field(("key",), "probability", "mass in the bin, doubly stochastic plan"),
        "mean": Field(("key",), "probability", "mass in the bin, mean of several queries"),
    },
    optional=frozenset({"key_token", "solver", "balanced", "mean"}),
)

PLAN_THUMBNAILS = Schema(
    "plan_thumbnails",
    {
        "layer_name": Field(("layer",), "1", "layer"),
        "present": Field(_HEAD, "1", "whether this layer has this head"),
        "weights": Field((*_HEAD, "row", "column"), "probability", "largest weight in the cell"),
        "relative_entropy": Field(_HEAD, "1", "mean entropy over that of uniform attention"),
        "first_mass": Field(_HEAD, "probability", "mean weight of the first key"),
        "query": Field(("layer", "row"), "tokens", "query of the row; -1: none"),
        "key_start": Field(("layer", "column"), "tokens", "first key of the column; -1: none"),
        "key_stop": Field(("layer", "column"), "tokens", "end of its keys (exclusive); -1: none"),
        "margin": Field(_HEAD, "nats", "lead of the prior's top key at the last query"),
    },
    optional=frozenset({"margin"}),
)

GENERATION = Schema(
    "generation",
    {
        "layer_name": Field(("layer",), "1", "layer"),
        "present": Field(_HEAD, "1", "whether this layer has this head"),
        "weights": Field(("step", *_HEAD, "key"), "probability", "attention weight"),
        "query": Field(("step",), "tokens", "query"),
        "next_id": Field(("step",), "1", "id of the token that follows"),
        "token": Field(("key",), "1", "token"),
        "next_token": Field(("step",), "1", "token that follows"),
    },
    optional=frozenset({"token", "next_token"}),
)

_CURVE = (*_HEAD, "threshold")
_SIGNAL = (*_HEAD, "range_bin")
_LAYER_SIGNAL = ("layer", "range_bin")
_MAP = (*_HEAD, "map_query", "map_key")

SINK_PROFILE = Schema(
    "sink_profile",
    {
        "layer_name": Field(("layer",), "1", "layer"),
        "present": Field(_HEAD, "1", "whether this layer has this head"),
        **_interval(
            "importance", (*_HEAD, "key"), "probability", "mean weight over observing queries"
        ),
        "observers": Field(("layer", "key"), "count", "queries that see the key, over all inputs"),
        "first_importance": Field(("input", *_HEAD), "probability", "importance of the first key"),
        "sink_rate": Field(_CURVE, "probability", "share of inputs whose first key is a sink"),
        "any_sink_rate": Field(_CURVE, "probability", "share of inputs with a sink at any key"),
        **_interval("model_sink_rate", ("threshold",), "probability", "sink rate of the model"),
        "first_mass": Field(_HEAD, "probability", "mean weight of the first key"),
        "largest_mass": Field(_HEAD, "probability", "mean largest weight"),
        "recent_mass": Field(_HEAD, "probability", "mean weight of the recent keys"),
        "sink_column_mass": Field(_HEAD, "probability", "mean weight of the extra column"),
        "entropy": Field(_HEAD, "nats", "mean entropy"),
        "content_range": Field(_HEAD, "score", "mean content range"),
        "uniform_entropy": Field(_HEAD, "nats", "mean entropy of uniform attention"),
        "previous_mass": Field(_HEAD, "probability", "mean weight of the previous token"),
        "induction_mass": Field(
            _HEAD, "probability", "mean weight of the key after the token's last occurrence"
        ),
        "effective_rank": Field(_HEAD, "1", "effective rank of the plan"),
        "second_importance": Field(_HEAD, "probability", "largest importance of a later key"),
        "second_key": Field(_HEAD, "tokens", "that key"),
        "margin": Field(_HEAD, "nats", "lead of the prior's first key at the last query"),
        "protected_length": Field(_HEAD, "tokens", "length that this margin protects"),
        "range_stop": Field(("range_bin",), "score", "end of the content-range bin"),
        "mass_stop": Field(("mass_bin",), "probability", "end of the sink-mass bin"),
        "signal_count": Field((*_SIGNAL, "mass_bin"), "count", "queries"),
        "signal_first_mass": Field(_SIGNAL, "probability", "mean weight of the first key"),
        "signal_largest_mass": Field(_SIGNAL, "probability", "mean largest weight"),
        "signal_recent_mass": Field(_SIGNAL, "probability", "mean weight of the recent keys"),
        "prior_first_low": Field(_HEAD, "probability", "least prior mass on the first key"),
        "prior_first_high": Field(_HEAD, "probability", "largest prior mass on the first key"),
        "sink_rank": Field(_HEAD, "1", "place by the first key's importance, 0 the strongest sink"),
        "signal_lower": Field(_SIGNAL, "probability", "least mass of the first key in the bin"),
        "signal_upper": Field(_SIGNAL, "probability", "largest mass of the first key in the bin"),
        "margin_text": Field(_HEAD, "1", "what the margin law says"),
        "uniform_importance": Field(("layer", "key"), "probability", "under uniform attention"),
        "layer_sink_rate": Field(("layer", "threshold"), "probability", "sink rate of the layer"),
        "model_any_sink_rate": Field(("threshold",), "probability", "the model's, at any key"),
        "layer_signal_count": Field((*_LAYER_SIGNAL, "mass_bin"), "count", "queries of all heads"),
        **{
            f"layer_signal_{name}": Field(_LAYER_SIGNAL, "probability", f"{what}, all heads")
            for name, what in (
                ("first_mass", "mean weight of the first key"),
                ("largest_mass", "mean largest weight"),
                ("recent_mass", "mean weight of the recent keys"),
                ("lower", "least mass of the first key"),
                ("upper", "largest mass of the first key"),
            )
        },
        "residual": Field(("layer",), "1", "distance of the kernel's output from the plan's"),
        "token": Field(("key",), "1", "token"),
        "map_logits": Field(_MAP, "nats", "mean logit"),
        "map_probability": Field(_MAP, "probability", "mean attention weight"),
        "map_allowed": Field(("layer", "map_query", "map_key"), "1", "whether the pair is allowed"),
        "value_norm": Field(("layer", "key"), "1", "mean norm of the values"),
        "hidden_norm": Field(("state", "key"), "1", "mean norm of the hidden state"),
        "hidden_largest": Field(("state", "key"), "1", "largest magnitude in the hidden state"),
        "hidden_median": Field(("state",), "1", "median magnitude of the hidden state"),
        "massive": Field(("state", "key"), "count", "massive activations"),
        "norm_ratio": Field(
            ("state",), "1", "norm of the first hidden state over the others' mean"
        ),
        "hidden_entropy": Field(("state",), "nats", "matrix entropy of the hidden states"),
        "hidden_anisotropy": Field(("state",), "1", "anisotropy of the hidden states"),
    },
    optional=frozenset(
        {
            # Profiles saved before these were computed lack them.
            "effective_rank",
            "second_importance",
            "second_key",
            "norm_ratio",
            "hidden_entropy",
            "hidden_anisotropy",
            "uniform_entropy",
            "previous_mass",
            "induction_mass",
            "sink_rank",
            "signal_lower",
            "signal_upper",
            "margin_text",
            "uniform_importance",
            "layer_sink_rate",
            "model_any_sink_rate",
            "layer_signal_count",
            "layer_signal_first_mass",
            "layer_signal_largest_mass",
            "layer_signal_recent_mass",
            "layer_signal_lower",
            "layer_signal_upper",
            "residual",
            "token",
            "map_logits",
            "map_probability",
            "map_allowed",
            "value_norm",
            "hidden_norm",
            "hidden_largest",
            "hidden_median",
            "massive",
        }
    ),
)

_RUN = ("scheme", "run", "length")
_POOLED = ("scheme", "length")
_GRID = ("scheme", "depth", "length")

LENGTH_SWEEP = Schema(
    "length_sweep",
    {
        "examples": Field(_RUN, "count", "examples"),
        "right": Field(_RUN, "count", "examples whose whole answer is right"),
        "tokens": Field(_RUN, "count", "tokens of answers"),
        "right_tokens": Field(_RUN, "count", "right tokens of answers"),
        "log_probability": Field(_RUN, "nats", "mean log-probability of an answer's token"),
        **_interval("strict", _RUN, "probability", "whole answers right"),
        **_interval("token", _RUN, "probability", "answer tokens right"),
        **_interval("mean_strict", _POOLED, "probability", "whole answers right, all runs"),
        **_interval("mean_token", _POOLED, "probability", "answer tokens right, all runs"),
    },
)

NEEDLE_GRID = Schema(
    "needle_grid",
    {
        "examples": Field(_GRID, "count", "examples, all runs"),
        "tokens": Field(_GRID, "count", "tokens of answers"),
        **_interval("token", _GRID, "probability", "answer tokens right"),
        **_interval("strict", _GRID, "probability", "whole answers right"),
    },
)

_PIECE = ("scheme", "run", "piece", "length")
_PLACE = ("scheme", "run", "piece", "position")
_AT = ("scheme", "position")

PERPLEXITY_SWEEP = Schema(
    "perplexity_sweep",
    {
        "loss": Field(_PIECE, "nats", "mean loss of a piece's tokens in windows of a length"),
        "tokens": Field(("piece", "length"), "count", "tokens that count"),
        "run_loss": Field(_RUN, "nats", "mean loss over pieces, each run"),
        **_interval("mean_loss", _POOLED, "nats", "mean loss over pieces and runs"),
        **_interval("perplexity", _POOLED, "1", "exp of the mean loss"),
        "run_perplexity": Field(_RUN, "1", "exp of the mean loss, each run"),
        "position_loss": Field(_PLACE, "nats", "mean loss by position in the longest windows"),
        "position_tokens": Field(("piece", "position"), "count", "tokens that count there"),
        **_interval(
            "mean_position_loss", _AT, "nats", "mean loss by position over pieces and runs"
        ),
        **_interval("position_perplexity", _AT, "1", "exp of the mean loss by position"),
    },
)

LOSS_DIFFERENCE = Schema(
    "loss_difference",
    {
        **_interval("difference", _POOLED, "nats", "loss less that of the reference"),
    },
)

#: Groups of keys whose mass a mass sweep holds.
MASS_GROUPS = ("answer", "first", "recent")
_MASS = (*_RUN, "layer", "head")
_MASS_NAMES = {
    "answer": "on the answer's tokens",
    "first": "on the first key",
    "recent": "on the recent keys",
}

_PLANS = (("", "mass"), ("prior_", "prior mass"))
_ENDS = (("", ""), ("_low", ", lower end"), ("_high", ", upper end"))

MASS_SWEEP = Schema(
    "mass_sweep",
    {
        "tokens": Field(_RUN, "count", "tokens of answers"),
        **_interval("token", _RUN, "probability", "answer tokens right"),
        **{
            f"{plan}{group}_mass{end}": Field(
                _MASS, "probability", f"{what} {_MASS_NAMES[group]}{of}"
            )
            for plan, what in _PLANS
            for group in MASS_GROUPS
            for end, of in _ENDS
        },
        "reference_length": Field((), "tokens", "length at which leading heads are chosen"),
        **{
            f"mean_token{end}": Field(
                _POOLED, "probability", f"answer tokens right, mean over runs{of}"
            )
            for end, of in _ENDS
        },
        **{
            f"{group}_{what}": Field(
                ("scheme", "run"), "1", f"{what} of the leading head; -1: none"
            )
            for group in MASS_GROUPS
            for what in ("layer", "head")
        },
        **{
            f"run_{plan}{group}_mass": Field(
                _RUN, "probability", f"{what} {_MASS_NAMES[group]}, leading head"
            )
            for plan, what in _PLANS
            for group in MASS_GROUPS
        },
        **{
            f"mean_{plan}{group}_mass{end}": Field(
                _POOLED, "probability", f"{what} {_MASS_NAMES[group]}, mean over leading heads{of}"
            )
            for plan, what in _PLANS
            for group in MASS_GROUPS
            for end, of in _ENDS
        },
    },
)

EXPLANATION = Schema(
    "explanation",
    {
        "key": Field(("place",), "tokens", "key"),
        "key_token": Field(("place",), "1", "key token"),
        "weight": Field(("place",), "probability", "attention weight"),
        "logit": Field(("place",), "nats", "logit less its mean over the row"),
        "value": Field(("part", "place"), "nats", "part of the logit less its mean over the row"),
        "part_text": Field(("part",), "1", "what the part is"),
    },
    optional=frozenset({"key_token"}),
)

SINK_EFFECT = Schema(
    "sink_effect",
    {
        "loss": Field(("input",), "nats", "loss of the model as it is"),
        "tokens": Field(("input",), "count", "tokens that are predicted"),
        "mean_loss": Field((), "nats", "mean loss of the model as it is"),
        "layer_name": Field(("layer",), "1", "layer"),
        **{
            f"{where}{name}": Field((*dims, *extra), "nats", f"loss increase, {what}{of}")
            for where, dims, what in (
                ("", ("change",), "all layers changed"),
                ("layer_", ("change", "layer"), "one layer changed"),
            )
            for name, extra, of in (
                ("increase", ("input",), ""),
                ("mean_increase", (), ", mean"),
                ("mean_increase_low", (), ", lower end"),
                ("mean_increase_high", (), ", upper end"),
            )
        },
    },
    optional=frozenset(
        {
            "layer_name",
            "layer_increase",
            "layer_mean_increase",
            "layer_mean_increase_low",
            "layer_mean_increase_high",
        }
    ),
)

SIGNAL_CORRELATION = Schema(
    "signal_correlation",
    {
        **_interval("correlation", ("head",), "1", "correlation of content range and sink mass"),
        **_interval("mean_correlation", (), "1", "its mean over heads"),
    },
)

TRAINING_LOG = Schema(
    "training_log",
    {
        "loss": Field(("run", "step"), "nats", "training loss"),
        "learning_rate": Field(("run", "step"), "1", "learning rate"),
        "held_out": Field(("run",), "nats", "held-out loss"),
        "held_out_standard_error": Field(("run",), "nats", "its standard error"),
    },
)

TRAINING_COST = Schema(
    "training_cost",
    {
        "tokens_per_second": Field(_POOLED, "tokens/s", "throughput of training steps"),
        "attention_tokens_per_second": Field(
            _POOLED, "tokens/s", "throughput of a layer's attention, forward and backward"
        ),
        **_interval("peak_memory", _POOLED, "MiB", "what a training step adds to peak memory"),
    },
)

SCHEMAS = {
    schema.name: schema
    for schema in (
        PRIOR_PROFILE,
        PRIOR_MIX,
        PLAN_SLICE,
        PLAN_ROW,
        PLAN_THUMBNAILS,
        GENERATION,
        SINK_PROFILE,
        LENGTH_SWEEP,
        NEEDLE_GRID,
        PERPLEXITY_SWEEP,
        LOSS_DIFFERENCE,
        EXPLANATION,
        MASS_SWEEP,
        SINK_EFFECT,
        SIGNAL_CORRELATION,
        TRAINING_LOG,
        TRAINING_COST,
    )
}


def make_result(
    schema: Schema,
    data: Mapping[str, Any],
    *,
    coords: Mapping[str, Any],
    attrs: Mapping[str, str | int | float] | None = None,
) -> xr.Dataset:
    """Build a result and check it against its schema.

    Parameters
    ----------
    schema : Schema
        Which result this is.
    data : mapping
        Arrays by field name, with the dimensions the schema gives them.
    coords : mapping
        Coordinates by dimension; all in tokens or indices.
    attrs : mapping, optional
        Strings and numbers.

    Raises
    ------
    ValueError
        If a field is missing or unknown, or an array does not have the schema's dimensions.
    """
    import xarray as xr

    unknown = set(data) - set(schema.fields)
    if unknown:
        raise ValueError(f"data holds fields {schema.name} does not have: {sorted(unknown)}")
    variables = {}
    for name, values in data.items():
        field = schema.fields[name]
        array = np.asarray(values)
        if array.ndim != len(field.dims):
            raise ValueError(
                f"{name} must have dimensions {field.dims}, got an array of shape {array.shape}"
            )
        variables[name] = (
            field.dims,
            array,
            {"units": field.units, "long_name": field.long_name},
        )
    dataset = xr.Dataset(variables, coords=dict(coords), attrs=dict(attrs or {}))
    dataset.attrs["schema"] = schema.name
    check_result(dataset, schema)
    return dataset


def is_dataset(value: object) -> TypeGuard[xr.Dataset]:
    """Whether this is a labelled dataset, as every result is."""
    import xarray as xr

    return isinstance(value, xr.Dataset)


def check_result(dataset: object, schema: Schema) -> xr.Dataset:
    """Return `dataset` if it is a result of this schema, or say what it is instead.

    Raises
    ------
    TypeError
        If it is not a Dataset, or is one of another schema.
    ValueError
        If fields are missing or have other dimensions.
    """
    if not is_dataset(dataset):
        raise TypeError(f"expected a {schema.name} Dataset, got {type(dataset).__name__}")
    name = dataset.attrs.get("schema")
    if name != schema.name:
        raise TypeError(f"expected a Dataset of schema {schema.name!r}, got {name!r}")
    missing = [
        name
        for name in schema.fields
        if name not in dataset.variables and name not in schema.optional
    ]
    if missing:
        raise ValueError(f"{schema.name} lacks {', '.join(missing)}")
    for name, field in schema.fields.items():
        if name not in dataset.variables:
            continue
        dims = tuple(map(str, dataset.variables[name].dims))
        # Selecting one layer or head drops that dimension, and the result stays a result.
        if tuple(d for d in field.dims if d in dims) != dims:
            raise ValueError(f"{name} must have dimensions {field.dims}, got {dims}")
    return dataset


def with_all_dimensions(dataset: xr.Dataset, schema: Schema) -> xr.Dataset:
    """A result with the dimensions that a selection dropped, each of length 1."""
    import xarray as xr

    coords, data = {}, {}
    for name, field in schema.fields.items():
        if name not in dataset.variables:
            continue
        array = dataset[name]
        missing = tuple(at for at, dim in enumerate(field.dims) if dim not in array.dims)
        data[name] = (field.dims, np.expand_dims(array.values, missing), array.attrs)
        for dim, size in zip(field.dims, data[name][1].shape, strict=True):
            given = dataset.coords.get(dim)
            coords[dim] = np.arange(size) if given is None else np.atleast_1d(given.values)
    return xr.Dataset(data, coords=coords, attrs=dataset.attrs)


def save_result(dataset: xr.Dataset, path: str | os.PathLike) -> Path:
    """Write a result as netCDF-4, whole or not at all, with its sha256 appended.

    Parameters
    ----------
    dataset : xarray.Dataset
        Any goatviz result.
    path : path-like
        Ends in .nc, in an existing folder.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    TypeError
        If `dataset` is not a goatviz result.
    ValueError
        If `path` does not end in .nc or its folder does not exist, or the result has fields or
        units that its schema does not have.

    Examples
    --------
    >>> import tempfile
    >>> from goatviz import prior_profile, ALiBiPrior
    >>> profile = prior_profile(ALiBiPrior(1), length=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_result(profile, Path(folder) / "alibi.nc")
    ...     load_result(path).identical(profile)
    True
    """
    schema = dataset.attrs.get("schema") if is_dataset(dataset) else None
    if schema not in SCHEMAS:
        raise TypeError(f"dataset must be a goatviz result, got {type(dataset).__name__}")
    _check_fields(check_result(dataset, SCHEMAS[schema]), SCHEMAS[schema])
    path = checks.output_file("path", path, ".nc")
    with whole_file(path) as temporary:
        marked = dataset.assign_attrs({_SUM: f"the last {_SUM_LENGTH} bytes of the file"})
        # Most bins of a histogram are empty: a profile shrinks to a tenth.
        numbers = [name for name, field in marked.items() if field.dtype.kind in "biuf"]
        compressed = {name: {"zlib": True} for name in numbers if marked[name].ndim}
        marked.to_netcdf(temporary, engine="h5netcdf", encoding=compressed)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
        with temporary.open("ab") as file:
            file.write(digest.encode())
    return path


def load_result(path: str | os.PathLike) -> xr.Dataset:
    """Read a result that `save_result` wrote, verify it and complete it.

    Fields that files of earlier versions lack are derived from others: see `goatviz.derived`. Such
    files have no checksum to verify, but fields, units and types are always checked.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, is not netCDF-4, or does not hold a goatviz result.

    Examples
    --------
    >>> load_result("nowhere.nc")
    Traceback (most recent call last):
    ...
    FileNotFoundError: there is no file nowhere.nc
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    _check_sum(path)
    dataset = _read(path)
    dataset.attrs.pop(_SUM, None)
    schema = SCHEMAS.get(str(dataset.attrs.get("schema")))
    if schema is None:
        raise ValueError(
            f"{path.name} holds no goatviz result (schema {dataset.attrs.get('schema')!r})"
        )
    try:
        dataset = check_result(completed(dataset, schema), schema)
        _check_fields(dataset, schema)
    except Exception as error:
        # Deriving fields from damaged ones can fail in any way.
        raise ValueError(f"{path.name} holds a damaged result: {error}") from error
    return dataset


def _check_sum(path: Path) -> None:
    """Raise a ValueError if a file has a checksum that does not match.

    Call this before HDF5 sees the file: it may search damaged bytes for ever.
    """
    content = path.read_bytes()
    digest = hashlib.sha256(content[:-_SUM_LENGTH]).hexdigest()
    if _SUM.encode() in content and content[-_SUM_LENGTH:] != digest.encode():
        raise ValueError(f"{path.name} was damaged since it was saved: its checksum does not match")


def _read(path: Path) -> xr.Dataset:
    """The content of a netCDF-4 file; a ValueError if it is not one or claims too much data."""
    import h5py
    import xarray as xr

    try:
        # Damage at the root is found here: h5netcdf would print errors when it closes the file.
        with h5py.File(path) as file:
            dict(file.attrs)
            stored = [each for each in file.values() if isinstance(each, h5py.Dataset)]
            claimed, most = sum(each.nbytes for each in stored), _LARGEST * path.stat().st_size
        if claimed > most:
            raise ValueError(f"must hold at most {most} bytes of numbers, claims {claimed}")
        return xr.load_dataset(path, engine="h5netcdf")
    except Exception as error:
        # h5py, h5netcdf and xarray raise errors of every kind for damaged files.
        raise ValueError(f"{path.name} is not a readable netCDF-4 file: {error}") from error


def _check_fields(dataset: xr.Dataset, schema: Schema) -> None:
    """Raise a ValueError for a variable that the schema lacks, or of other units or type."""
    for name, variable in dataset.data_vars.items():
        if name not in schema.fields:
            raise ValueError(f"{schema.name} has no field {name}")
        units, came = schema.fields[name].units, variable.attrs.get("units")
        if came != units:
            raise ValueError(f"{name} must have units {units!r}, got {came!r}")
        if units != "1" and variable.dtype.kind not in "biuf":
            raise ValueError(f"{name} must hold numbers, got {variable.dtype}")


def list_results() -> list[str]:
    """Names of the results that come with goatviz, for `load_shipped_result`.

    Examples
    --------
    >>> "passkey-sweep" in list_results()
    True
    """
    return shipped_names(".nc")


def load_shipped_result(name: str) -> xr.Dataset:
    """Read a result that comes with goatviz.

    Parameters
    ----------
    name : str
        One of `list_results()`.

    Raises
    ------
    KeyError
        If there is no result of that name; the message lists the names.
    ValueError
        If the file was damaged since it was shipped.

    Examples
    --------
    >>> load_shipped_result("passkey-sweep").sizes["run"]
    5
    """
    check_shipped(name, list_results())
    with importlib.resources.as_file(shipped_file(f"{name}.nc")) as path:
        return load_result(path)
