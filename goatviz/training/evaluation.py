"""Held-out evaluation, of losses and of answers, at any length.

Long sequences go through the key-value cache chunk by chunk: memory grows with the length times
the chunk, never with its square, and the numbers are those of the full pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goatviz.attention.positions import InterpolatedRotaryEmbedding
from goatviz.models import CausalLM
from goatviz.tasks import Task

#: Added to a run's seed for held-out data: a stream no training run of that seed ever draws from.
HELD_OUT_STREAM = 1_000_003
#: Tokens that go through the model at a time.
CHUNK = 1024


class HeldOutLoss(NamedTuple):
    """Mean loss in nats per token, its standard error over sequences, and how many there were."""

    mean: float
    standard_error: float
    sequences: int


class AnswerAccuracy(NamedTuple):
    """Right answers under teacher forcing: counts of examples and of their tokens.

    Attributes
    ----------
    examples, right : int
        Sequences, and those whose whole answer is right.
    tokens, right_tokens : int
        Tokens of answers, and those that are right given the true ones before.
    log_probability : float
        Mean log-probability of an answer's token, nats.
    """

    examples: int
    right: int
    tokens: int
    right_tokens: int
    log_probability: float

    @property
    def strict(self) -> float:
        """Share of whole answers that are right."""
        return self.right / self.examples

    @property
    def token(self) -> float:
        """Share of tokens that are right."""
        return self.right_tokens / self.tokens


@torch.no_grad()
def evaluate(
    model: CausalLM,
    task: Task,
    *,
    sequences: int = 4096,
    batch_size: int = 256,
    seed: int = HELD_OUT_STREAM,
) -> HeldOutLoss:
    """Loss on fresh sequences, nats per predicted token, with its standard error.

    Parameters
    ----------
    model : CausalLM
        Left in evaluation mode.
    task : Task
        A task of any length; a sequence without a target that counts is left out.
    sequences, batch_size : int
        How many, and how many at a time.
    seed : int
        Seed of the sequences.

    Raises
    ------
    ValueError
        If sequences is below 2, or fewer than two have targets.
    """
    if sequences < 2:
        raise ValueError(f"sequences must be at least 2, got {sequences}")
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for start in range(0, sequences, batch_size):
        count = min(batch_size, sequences - start)
        ids = task.sample(count, generator=generator).to(device)
        counted = counts(ids, task)
        sums = (next_token_loss(model, ids) * counted).sum(dim=-1)
        targets = counted.sum(dim=-1)
        losses.append((sums / targets)[targets > 0].double().cpu())
    each = torch.cat(losses)
    if len(each) < 2:
        raise ValueError(f"task must have targets in two sequences at least, got {len(each)}")
    return HeldOutLoss(each.mean().item(), (each.std() / math.sqrt(len(each))).item(), len(each))


@torch.no_grad()
def prefill(model: CausalLM, ids: Tensor, *, chunk: int = CHUNK, last: int | None = None) -> Tensor:
    """Next-token logits through the key-value cache, `chunk` tokens at a time.

    Parameters
    ----------
    model : CausalLM
        Its mode is left alone.
    ids : Tensor
        Integers, shape (batch, length).
    chunk : int
        Tokens at a time.
    last : int, optional
        Return the logits of the last positions only, which saves most of the memory.

    Returns
    -------
    Tensor
        Shape (batch, length or last, vocab_size).

    Raises
    ------
    ValueError
        If `chunk` or `last` is out of range.

    Examples
    --------
    >>> from goatviz.models import ModelConfig
    >>> model = CausalLM(ModelConfig(vocab_size=8, training_length=16, embed_dim=32))
    >>> ids = torch.arange(8)[None]
    >>> torch.allclose(prefill(model, ids, chunk=3), model(ids), atol=1e-5)
    True
    """
    length = ids.shape[-1]
    if last is not None and not 1 <= last <= length:
        raise ValueError(f"last must lie between 1 and the length {length}, got {last}")
    first = 0 if last is None else length - last
    kept = [
        logits[:, max(first - start, 0) :]
        for start, logits in _chunks(model, ids, chunk)
        if start + logits.shape[1] > first
    ]
    return torch.cat(kept, dim=1)


@torch.no_grad()
def evaluate_answers(
    model: CausalLM,
    task: Task,
    *,
    examples: int = 256,
    batch_size: int = 16,
    seed: int = HELD_OUT_STREAM,
    depth: float | None = None,
    chunk: int = CHUNK,
) -> AnswerAccuracy:
    """Accuracy of the answers on fresh sequences, the true answer being fed back.

    Parameters
    ----------
    model : CausalLM
        Left in evaluation mode.
    task : Task
        `Passkey` or `Needle`, of any length.
    examples, batch_size : int
        How many, and how many at a time.
    seed : int
        Seed of the sequences.
    depth : float, optional
        Where the pair stands, see `Passkey.sample`.
    chunk : int
        Tokens that go through the model at a time.

    Raises
    ------
    ValueError
        If the task has no answers, or `examples` is below 1.

    Examples
    --------
    >>> from goatviz.models import ModelConfig
    >>> from goatviz.tasks import Needle
    >>> model = CausalLM(ModelConfig(vocab_size=128, training_length=32, embed_dim=32))
    >>> evaluate_answers(model, Needle(length=32), examples=2).tokens
    24
    """
    if not task.answer_length:
        raise ValueError(f"task must have answers (passkey, needle), got {task.name}")
    if examples < 1:
        raise ValueError(f"examples must be at least 1, got {examples}")
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    span = task.answer_length
    right = right_tokens = 0
    total = 0.0
    for start in range(0, examples, batch_size):
        count = min(batch_size, examples - start)
        ids = task.sample(count, generator=generator, depth=depth).to(device)
        logits = prefill(model, ids[:, :-1], chunk=chunk, last=span).double()
        wanted = ids[:, -span:]
        same = logits.argmax(-1) == wanted
        right += int(same.all(-1).sum())
        right_tokens += int(same.sum())
        total -= float(F.cross_entropy(logits.mT, wanted, reduction="sum"))
    return AnswerAccuracy(examples, right, examples * span, right_tokens, total / examples / span)


@torch.no_grad()
def sequence_loss(model: CausalLM, ids: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """Cross-entropy of every next token through the key-value cache, `chunk` tokens at a time.

    Parameters
    ----------
    model : CausalLM
        Its mode is left alone.
    ids : Tensor
        Integers, shape (batch, length + 1).
    chunk : int
        Tokens at a time: the logits of no more are ever held.

    Returns
    -------
    Tensor
        Nats, shape (batch, length).

    Examples
    --------
    >>> from goatviz.models import ModelConfig
    >>> model = CausalLM(ModelConfig(vocab_size=8, training_length=16, embed_dim=32))
    >>> ids = torch.arange(8)[None]
    >>> torch.allclose(sequence_loss(model, ids, chunk=3), next_token_loss(model, ids), atol=1e-5)
    True
    """
    kept = []
    for start, logits in _chunks(model, ids[:, :-1], chunk):
        wanted = ids[:, start + 1 : start + 1 + logits.shape[1]]
        kept.append(F.cross_entropy(logits.float().mT, wanted, reduction="none"))
    return torch.cat(kept, dim=1)


def _chunks(model: CausalLM, ids: Tensor, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """Where each chunk starts, and its logits, through one cache."""
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be an integer of at least 1, got {chunk!r}")
    cache = model.new_cache()
    with squeezed_to(model, ids.shape[-1]):
        for start in range(0, ids.shape[-1], chunk):
            yield start, model(ids[:, start : start + chunk], cache=cache)


@contextmanager
def squeezed_to(model: nn.Module, length: int) -> Iterator[None]:
    """Let interpolated positions reach `length`, all chunks alike, and put them back after."""
    rotaries = [m for m in model.modules() if isinstance(m, InterpolatedRotaryEmbedding)]
    before = [rotary.target_length for rotary in rotaries]
    try:
        for rotary in rotaries:
            rotary.target_length = max(length, rotary.training_length)
        yield
    finally:
        for rotary, target in zip(rotaries, before, strict=True):
            rotary.target_length = target


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of every next token, nats, shape (batch, length - 1)."""
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.float().mT, ids[:, 1:], reduction="none")


def counts(ids: Tensor, task: Task) -> Tensor:
    """Which predicted tokens count: booleans, shape (batch, length) for ids of length + 1."""
    targets = ids[:, 1:]
    if task.masked is None:
        return torch.ones_like(targets, dtype=torch.bool)
    return targets != task.masked


def loss_weights(ids: Tensor, task: Task) -> Tensor:
    """What each predicted token of a batch counts in the loss; sums to 1, or 0 without targets.

    Parameters
    ----------
    ids : Tensor
        The whole batch of an optimiser step, shape (batch, length + 1).
    task : Task
        Its weights, and the targets it masks.

    Returns
    -------
    Tensor
        Float32, shape (batch, length).
    """
    counted = counts(ids, task)
    targets = task.target_weights()
    if targets is None:
        return counted / counted.sum().clamp_min(1)
    if task.masked is None:
        # The same for every sequence: nothing to be summed over the batch.
        return (targets.to(ids.device) / len(ids)).expand(counted.shape)
    weights = counted * targets.to(ids.device)
    return weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def task_loss(
    model: nn.Module, ids: Tensor, task: Task, *, weights: Tensor | None = None
) -> Tensor:
    """What training minimises: the weighted sum over predicted tokens, nats, a number.

    Parameters
    ----------
    model : nn.Module
        From ids to logits.
    ids : Tensor
        Shape (batch, length + 1).
    task : Task
        Its weights.
    weights : Tensor, optional
        Rows of the whole batch's `loss_weights` that belong to `ids`, where these are a part of
        it; default: `ids` are the whole batch.
    """
    each = next_token_loss(model, ids)
    return (each * (loss_weights(ids, task) if weights is None else weights)).sum()
