"""Where attention and its prior put their mass while a model answers, against length.

A retrieval task knows where its answer stands in the text, so the plans of the queries that must
give it can be read: mass on the answer is what a head retrieves, mass on the first key what it
leaves unused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from goatviz import checks
from goatviz.adapters.capture import capture
from goatviz.analysis.cells import (
    Models,
    check_lengths,
    check_models,
    each_model,
    exceeds_positions,
    trained_lengths,
)
from goatviz.analysis.intervals import bootstrap_interval, bootstrap_weights, share_fields
from goatviz.derived import leading_masses
from goatviz.models import CausalLM
from goatviz.results import MASS_GROUPS, MASS_SWEEP, make_result
from goatviz.tasks import Needle, Passkey
from goatviz.training.evaluation import HELD_OUT_STREAM, squeezed_to
from goatviz.transport.call import AttentionCall

if TYPE_CHECKING:
    import xarray as xr

#: Resamples of the bootstrap.
RESAMPLES = 1000
# Tokens that go through a model at a time, over all examples of a batch.
_BATCH_TOKENS = 2**14


def mass_sweep(
    models: Models,
    task: Passkey | Needle,
    *,
    lengths: Sequence[int],
    examples: int = 32,
    recent: int = 16,
    seed: int = HELD_OUT_STREAM,
) -> xr.Dataset:
    r"""Mass of the answering queries on the answer, the first key and the recent keys, by length.

    Queries are those that predict the answer's tokens, under teacher forcing. Their rows p_i, and
    those of the prior, pi_i proportional to exp K_ij over the keys that i sees, are summed over
    three groups of keys: the answer's tokens where they stand in the text, key 0, and the last
    `recent` keys.

    Parameters
    ----------
    models : mapping of str to CausalLM or sequence of CausalLM
        Models by scheme, all with the same numbers of layers and heads; several models of a scheme
        are runs.
    task : Passkey or Needle
        The task that asks for answers; its own length does not matter.
    lengths : sequence of int
        Context lengths in tokens, increasing.
    examples : int
        Number of examples for each length, the same for all models; at least 2.
    recent : int
        Number of recent keys, including the query itself.
    seed : int
        Seed of the examples and of the bootstrap.

    Returns
    -------
    xarray.Dataset
        Schema `mass_sweep`. Masses by layer and head are means over examples and the answer's
        queries, with 95 % percentile bootstrap intervals over examples; the share of answer
        tokens that are right comes with 95 % Wilson intervals. Means over runs follow
        one head of each run, the one with most of a group's mass at the training length (see
        `goatviz.derived.leading_masses`). The groups of keys may overlap. Models with learned
        positions are missing (NaN) beyond their training length.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range, or models differ in their numbers of
        layers or heads.

    Notes
    -----
    Litman and Guo 2026 explain sinks and extrapolation by the prior's mass: a prior that holds
    its sink keeps mass off the filler, however long that is.

    Examples
    --------
    >>> from goatviz import load_pretrained
    >>> sweep = mass_sweep(
    ...     {"goat": load_pretrained("passkey-goat").model},
    ...     Passkey(length=64, value_length=4),
    ...     lengths=[64],
    ...     examples=4,
    ... )
    >>> bool(sweep["answer_mass"].max() > 0.5)
    True
    """
    checks.instance("task", task, (Passkey, Needle), "a Passkey or Needle")
    models = check_models(models, task)
    lengths = check_lengths(lengths)
    examples = checks.integer("examples", examples, low=2)
    recent = checks.positive_int("recent", recent)
    layers, heads = _size(models)
    coords = {
        "scheme": list(models),
        "run": np.arange(max(len(run) for run in models.values())),
        "length": lengths,
        "layer": np.arange(layers),
        "head": np.arange(heads),
    }
    attrs = {
        "task": task.name,
        "task_options": json.dumps(asdict(task), sort_keys=True),
        "training_length": trained_lengths(models),
        "chance_token": task.chance,
        "examples": examples,
        "recent": recent,
        "resamples": RESAMPLES,
        "seed": seed,
    }
    data = _fields(models, task, coords, attrs)
    data |= leading_masses(data, coords, attrs)
    return make_result(MASS_SWEEP, data, coords=coords, attrs=attrs)


def _size(models: dict[str, list[CausalLM]]) -> tuple[int, int]:
    """The numbers of layers and heads, which all models share."""
    configs = [model.config for run in models.values() for model in run]
    sizes = sorted({(config.num_layers, config.num_heads) for config in configs})
    if len(sizes) > 1:
        raise ValueError(f"models must all have the same (layers, heads), got {sizes}")
    return sizes[0]


def _fields(
    models: dict[str, list[CausalLM]],
    task: Passkey | Needle,
    coords: Mapping[str, Sequence],
    attrs: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Counts, shares and masses of every model at every length; NaN where there is none."""
    examples, seed = attrs["examples"], attrs["seed"]
    *shape, layers, heads = (len(values) for values in coords.values())
    masses = np.full((3, 2, len(MASS_GROUPS), *shape, layers, heads), np.nan)
    right, tokens = np.zeros((2, *shape), dtype=int)
    weights = bootstrap_weights(examples, RESAMPLES, seed)
    for t, length in enumerate(coords["length"]):
        asked = task.at_length(length)
        ids = asked.sample(examples, generator=torch.Generator().manual_seed(seed))
        for s, r, _, model in each_model(models):
            if exceeds_positions(model, length):
                continue
            values, right[s, r, t] = _measured(model, asked, ids, attrs["recent"])
            tokens[s, r, t] = examples * asked.answer_length
            masses[..., s, r, t, :, :] = np.stack(
                [values.mean(axis=0), *bootstrap_interval(values, weights)]
            )
    data = {"tokens": tokens, **share_fields("token", right, tokens)}
    for e, end in enumerate(("", "_low", "_high")):
        for p, plan in enumerate(("", "prior_")):
            for g, group in enumerate(MASS_GROUPS):
                data[f"{plan}{group}_mass{end}"] = masses[e, p, g]
    return data


@torch.no_grad()
def _measured(
    model: CausalLM, task: Passkey | Needle, ids: Tensor, recent: int
) -> tuple[np.ndarray, int]:
    """Masses by example, plan or prior, group, layer and head, and the number of right tokens."""
    model.eval()
    device = next(model.parameters()).device
    answers = task.answer_keys(ids)
    span = task.answer_length
    queries = torch.arange(task.length - span, task.length)
    batch = max(1, _BATCH_TOKENS // task.length)
    parts, right = [], 0
    for start in range(0, len(ids), batch):
        some = ids[start : start + batch].to(device)
        with (
            squeezed_to(model, task.length),
            capture(model, statistics=(), keep="projections") as record,
        ):
            logits = model(some[:, :-1])
        right += int((logits[:, -span:].argmax(-1) == some[:, -span:]).sum())
        groups = _groups(answers[start : start + batch], queries, task.length, recent)
        layers = [
            _masses(record.of(layer)[0].call, queries, groups) for layer in range(len(record))
        ]
        parts.append(torch.stack(layers, dim=3))
    return torch.cat(parts).cpu().numpy(), right


def _groups(answers: Tensor, queries: Tensor, length: int, recent: int) -> Tensor:
    """Which keys belong to each group: booleans of shape (examples, groups, queries, keys)."""
    keys = torch.arange(length)
    lag = queries[:, None] - keys
    answer = (answers[:, :, None] == keys).any(dim=1)
    by_name = {
        "answer": answer[:, None].expand(-1, len(queries), -1),
        "first": (keys == 0).expand(len(answers), len(queries), -1),
        "recent": ((lag >= 0) & (lag < recent)).expand(len(answers), -1, -1),
    }
    return torch.stack([by_name[group] for group in MASS_GROUPS], dim=1)


def _masses(call: AttentionCall, queries: Tensor, groups: Tensor) -> Tensor:
    """Mean over queries of the mass in each group: (examples, plan and prior, groups, heads)."""
    rows = slice(int(queries[0]), int(queries[-1]) + 1)
    groups = groups.to(call.device, torch.float64)
    masses = []
    for example, wanted in enumerate(groups):
        window = call.logits(example, slice(None), rows)
        prior = window.log_prior.masked_fill(~window.allowed, -torch.inf)
        both = torch.stack([window.logits.softmax(-1), prior.softmax(-1)])
        masses.append(torch.einsum("phqk,gqk->pgh", both, wanted) / len(queries))
    return torch.stack(masses)
