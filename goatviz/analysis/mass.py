"""Where attention and its prior put their mass when an answer is due, against length.

A retrieval task says where its answer stands, so that the plan of the queries that must give it
can be read: mass on the answer is what a head found, mass on the first key what it left unused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from goatviz.adapters.capture import CapturedCall, capture, problem_of
from goatviz.analysis.cells import Models, check_lengths, check_models, trained_lengths
from goatviz.analysis.intervals import wilson_interval
from goatviz.models import CausalLM
from goatviz.results import MASS_GROUPS, MASS_SWEEP, make_result
from goatviz.tasks import Needle, Passkey
from goatviz.training.evaluation import HELD_OUT_STREAM, squeezed_to
from goatviz.transport.fused import dense_window

#: Draws of the bootstrap.
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

    Queries are those that predict the answer's tokens, under teacher forcing. Each of their rows
    p_i, and of the prior pi_i proportional to exp K_ij over the keys that i sees, is summed over
    the answer's tokens where they stand in the text; over key 0; and over the last `recent` keys.

    Parameters
    ----------
    models : mapping of str to CausalLM or sequence of CausalLM
        By scheme, all with as many layers and heads; several models of a scheme are runs.
    task : Passkey or Needle
        Its own length does not matter.
    lengths : sequence of int
        Tokens of context, increasing.
    examples : int
        For each model and length, the same for all models.
    recent : int
        Keys that end at the query itself.
    seed : int
        Of the examples.

    Returns
    -------
    xarray.Dataset
        Schema `mass_sweep`: masses by layer and head, means over examples and the answer's
        queries, with 95 % percentile bootstrap intervals over examples; the share of answer
        tokens that these examples got right, with Wilson intervals. The groups of keys may
        overlap. Models with learned positions are missing (NaN) beyond their training length.

    Raises
    ------
    TypeError
        If the task has no answers, or a model is not a CausalLM.
    ValueError
        If models, lengths, examples or recent do not fit.

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
    if not isinstance(task, Passkey | Needle):
        raise TypeError(f"task must be Passkey or Needle, got {type(task).__name__}")
    models = check_models(models, task)
    lengths = check_lengths(lengths)
    for name, value, least in (("examples", examples, 2), ("recent", recent, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    sizes = {
        (model.config.num_layers, model.config.num_heads)
        for each in models.values()
        for model in each
    }
    if len(sizes) > 1:
        raise ValueError(
            f"models must all have as many layers and heads, got (layers, heads) {sorted(sizes)}"
        )
    (size,) = sizes
    runs = max(len(each) for each in models.values())
    shape = (len(models), runs, len(lengths))
    masses = np.full((2, 3, len(MASS_GROUPS), *shape, *size), np.nan)
    right = np.zeros(shape, dtype=int)
    tokens = np.zeros(shape, dtype=int)
    drawn = np.random.default_rng(seed).integers(examples, size=(RESAMPLES, examples))
    weights = np.stack([np.bincount(row, minlength=examples) for row in drawn]) / examples
    for t, asked in enumerate(task.at_length(length) for length in lengths):
        ids = asked.sample(examples, generator=torch.Generator().manual_seed(seed))
        for s, each in enumerate(models.values()):
            for r, model in enumerate(each):
                config = model.config
                if config.positions == "learned" and asked.length > config.training_length:
                    continue
                found, right[s, r, t] = _measured(model, asked, ids, recent)
                tokens[s, r, t] = examples * asked.answer_length
                drawn_means = np.einsum("de,e...->d...", weights, found)
                low, high = np.percentile(drawn_means, [2.5, 97.5], axis=0)
                masses[..., s, r, t, :, :] = np.stack([found.mean(axis=0), low, high], axis=1)
    with np.errstate(invalid="ignore"):
        share = right / tokens
    low, high = wilson_interval(right, tokens)
    data = {"tokens": tokens, "token": share, "token_low": low, "token_high": high}
    for p, plan in enumerate(("", "prior_")):
        for e, end in enumerate(("", "_low", "_high")):
            for g, group in enumerate(MASS_GROUPS):
                data[f"{plan}{group}_mass{end}"] = masses[p, e, g]
    return make_result(
        MASS_SWEEP,
        data,
        coords={
            "scheme": list(models),
            "run": np.arange(runs),
            "length": lengths,
            "layer": np.arange(size[0]),
            "head": np.arange(size[1]),
        },
        attrs={
            "task": task.name,
            "task_options": json.dumps(asdict(task), sort_keys=True),
            "training_length": trained_lengths(models),
            "chance_token": task.chance,
            "examples": examples,
            "recent": recent,
            "resamples": RESAMPLES,
            "seed": seed,
        },
    )


@torch.no_grad()
def _measured(
    model: CausalLM, task: Passkey | Needle, ids: Tensor, recent: int
) -> tuple[np.ndarray, int]:
    """Masses of each example, (examples, plan and prior, groups, layers, heads); right tokens."""
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
        layers = [_masses(record.of(layer)[0], queries, groups) for layer in range(len(record))]
        parts.append(torch.stack(layers, dim=3))
    return torch.cat(parts).cpu().numpy(), right


def _groups(answers: Tensor, queries: Tensor, length: int, recent: int) -> Tensor:
    """Which keys a group holds, booleans of shape (examples, groups, queries, keys)."""
    keys = torch.arange(length)
    lag = queries[:, None] - keys
    answer = (answers[:, :, None] == keys).any(dim=1)
    by_name = {
        "answer": answer[:, None].expand(-1, len(queries), -1),
        "first": (keys == 0).expand(len(answers), len(queries), -1),
        "recent": ((lag >= 0) & (lag < recent)).expand(len(answers), -1, -1),
    }
    return torch.stack([by_name[group] for group in MASS_GROUPS], dim=1)


def _masses(call: CapturedCall, queries: Tensor, groups: Tensor) -> Tensor:
    """Mean over queries of the mass in each group: (examples, plan and prior, groups, heads)."""
    problem = problem_of(call.call)
    rows = slice(int(queries[0]), int(queries[-1]) + 1)
    groups = groups.to(problem.q.device, torch.float64)
    found = []
    for example, wanted in enumerate(groups):
        for head in range(call.shape[1]):
            window = dense_window(problem, batch=example, head=head, queries=rows)
            prior = window.log_prior.masked_fill(~window.allowed, -torch.inf).softmax(dim=-1)
            rows_of_both = torch.stack([window.weights.masked_fill(~window.allowed, 0.0), prior])
            found.append(torch.einsum("pqk,gqk->pg", rows_of_both, wanted) / len(queries))
    shape = (len(groups), call.shape[1], *found[0].shape)
    return torch.stack(found).reshape(shape).permute(0, 2, 3, 1)
