"""Held-out evaluation of losses and of answers, at any length.

Long sequences go through the key-value cache chunk by chunk: memory grows with length times chunk,
never with the square of the length, and the numbers equal those of a full pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goatviz import checks
from goatviz.attention.positions import InterpolatedRotaryEmbedding
from goatviz.models import CausalLM, Transformer
from goatviz.tasks import Task

#: Added to a run's seed for held-out data: a stream that no training run of that seed draws from.
HELD_OUT_STREAM = 1_000_003
#: Tokens that go through the model at a time.
CHUNK = 1024
#: Most logits of a batch of `evaluate`: a gigabyte of float32.
_LOGITS = 2**28


class HeldOutLoss(NamedTuple):
    """Mean loss in nats per token, its standard error over sequences, and their number."""

    mean: float
    standard_error: float
    sequences: int


class AnswerAccuracy(NamedTuple):
    """Right answers under teacher forcing, counted by example and by token.

    Attributes
    ----------
    examples, right : int
        Number of sequences, and of those whose whole answer is right.
    tokens, right_tokens : int
        Number of answer tokens, and of those predicted right from the true tokens before.
    log_probability : float
        Mean log-probability of an answer token, nats.
    """

    examples: int
    right: int
    tokens: int
    right_tokens: int
    log_probability: float

    @property
    def strict(self) -> float:
        """Fraction of answers that are right as a whole."""
        return self.right / self.examples

    @property
    def token(self) -> float:
        """Fraction of answer tokens that are right."""
        return self.right_tokens / self.tokens


@torch.no_grad()
def evaluate(
    model: Transformer,
    task: Task,
    *,
    sequences: int = 4096,
    batch_size: int | None = None,
    seed: int = HELD_OUT_STREAM,
) -> HeldOutLoss:
    """Loss on fresh sequences, nats per predicted token, with its standard error.

    Parameters
    ----------
    model : Transformer
        Model to evaluate; it is left in evaluation mode.
    task : Task
        A task of any length. Sequences in which every target is masked are left out.
    sequences : int
        Number of sequences.
    batch_size : int, optional
        Number of sequences in one batch. Default: 256, or fewer where their logits would be more
        than 2^28 numbers.
    seed : int
        Seed of the sequences.

    Raises
    ------
    ValueError
        If `sequences` is below 2, or fewer than two have targets.
    """
    checks.integer("sequences", sequences, low=2)
    if batch_size is None:
        batch_size = max(1, min(256, _LOGITS // (task.predicted * task.vocab_size)))
    losses = []
    for ids in _batches(model, task, sequences, batch_size, seed):
        counted = counts(ids[:, -task.predicted :], task)
        sums = (next_token_loss(model, ids) * counted).sum(dim=-1)
        targets = counted.sum(dim=-1)
        losses.append((sums / targets)[targets > 0].double().cpu())
    each = torch.cat(losses)
    if len(each) < 2:
        raise ValueError(f"task must have targets in two sequences at least, got {len(each)}")
    return HeldOutLoss(each.mean().item(), (each.std() / math.sqrt(len(each))).item(), len(each))


@torch.no_grad()
def prefill(
    model: Transformer, ids: Tensor, *, chunk: int = CHUNK, last: int | None = None
) -> Tensor:
    """Next-token logits through the key-value cache, `chunk` tokens at a time.

    Parameters
    ----------
    model : Transformer
        Model to run, in whichever mode it is. One of images has logits for the last position only.
    ids : Tensor
        Integers, shape (batch, length).
    chunk : int
        Number of tokens at a time, where there is a cache.
    last : int, optional
        Number of positions at the end whose logits are returned, which saves most of the memory;
        default all.

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
    model: Transformer,
    task: Task,
    *,
    examples: int = 256,
    batch_size: int = 16,
    seed: int = HELD_OUT_STREAM,
    depth: float | None = None,
    chunk: int = CHUNK,
) -> AnswerAccuracy:
    """Accuracy of the answers on fresh sequences, under teacher forcing.

    Parameters
    ----------
    model : Transformer
        Model to evaluate; it is left in evaluation mode.
    task : Task
        A `Passkey`, `Needle` or `Images` of any length.
    examples, batch_size : int
        Number of sequences, and of those in one batch.
    seed : int
        Seed of the sequences.
    depth : float, optional
        Position of the pair in the filler, see `Passkey.sample`.
    chunk : int
        Number of tokens that go through the model at a time.

    Raises
    ------
    TypeError, ValueError
        If the task has no answers, or a number is below 1.

    Examples
    --------
    >>> from goatviz.models import ModelConfig
    >>> from goatviz.tasks import Needle
    >>> model = CausalLM(ModelConfig(vocab_size=128, training_length=32, embed_dim=32))
    >>> evaluate_answers(model, Needle(length=32), examples=2).tokens
    24
    """
    if not task.answer_length:
        raise ValueError(f"task must have answers (passkey, needle, images), got {task.name}")
    checks.positive_int("examples", examples)
    span = task.answer_length
    right = right_tokens = 0
    total = 0.0
    options = {} if depth is None else {"depth": depth}
    for ids in _batches(model, task, examples, batch_size, seed, **options):
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
        Model to run, in whichever mode it is.
    ids : Tensor
        Integers, shape (batch, length + 1).
    chunk : int
        Number of tokens at a time; the logits of no more than these are ever held.

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


def _batches(
    model: Transformer, task: Task, count: int, size: int, seed: int, **options: float
) -> Iterator[Tensor]:
    """Fresh sequences in batches, for a model in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, size):
        drawn = task.sample(min(size, count - start), generator=generator, **options)
        yield drawn.to(device)


def _chunks(model: Transformer, ids: Tensor, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """The start of each chunk and its logits, through one cache if the model is causal."""
    checks.positive_int("chunk", chunk)
    if not hasattr(model, "new_cache"):
        logits = model(ids)
        yield ids.shape[-1] - logits.shape[1], logits
        return
    cache = model.new_cache()
    with squeezed_to(model, ids.shape[-1]):
        for start in range(0, ids.shape[-1], chunk):
            yield start, model(ids[:, start : start + chunk], cache=cache)


@contextmanager
def squeezed_to(model: nn.Module, length: int) -> Iterator[None]:
    """Let interpolated positions reach `length`, the same for all chunks, and undo that after."""
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
    """Cross-entropy of every id that the model predicts, nats; shape (batch, predicted)."""
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.float().mT, ids[:, -logits.shape[1] :], reduction="none")


def counts(targets: Tensor, task: Task) -> Tensor:
    """Whether each target is not masked: booleans of the same shape."""
    if task.masked is None:
        return torch.ones_like(targets, dtype=torch.bool)
    return targets != task.masked


def loss_weights(ids: Tensor, task: Task) -> Tensor:
    """Weight of each predicted token in the loss of a batch; they sum to 1, or 0 without targets.

    Parameters
    ----------
    ids : Tensor
        The whole batch of an optimiser step, shape (batch, length + 1).
    task : Task
        Task that gives the weights of positions and the id of masked targets.

    Returns
    -------
    Tensor
        Float32, shape (batch, predicted).
    """
    counted = counts(ids[:, -task.predicted :], task)
    targets = task.target_weights()
    if targets is None:
        return counted / counted.sum().clamp_min(1)
    if task.masked is None:
        # All sequences have the same weights: no sum over the batch is needed.
        return (targets.to(ids.device) / len(ids)).expand(counted.shape)
    weights = counted * targets.to(ids.device)
    return weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def task_loss(
    model: nn.Module, ids: Tensor, task: Task, *, weights: Tensor | None = None
) -> Tensor:
    """The loss that training minimises: a weighted sum over predicted tokens, a scalar in nats.

    Parameters
    ----------
    model : nn.Module
        Module from ids to logits.
    ids : Tensor
        A batch or a part of it, shape (rows, length + 1).
    task : Task
        Task that gives the weights.
    weights : Tensor, optional
        Rows of the `loss_weights` of the whole batch that belong to `ids`; default: `ids` are the
        whole batch.
    """
    each = next_token_loss(model, ids)
    return (each * (loss_weights(ids, task) if weights is None else weights)).sum()
