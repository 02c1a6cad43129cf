"""Loss on documents against context length and by position in the window, with intervals.

The same text is cut into windows of every length, so that only the context differs between lengths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from goatviz import bins, checks
from goatviz.analysis.cells import (
    Models,
    cached,
    check_cache,
    check_lengths,
    check_models,
    each_model,
    exceeds_positions,
    model_digest,
    trained_lengths,
)
from goatviz.analysis.intervals import bootstrap_interval, bootstrap_weights
from goatviz.derived import perplexities
from goatviz.models import CausalLM
from goatviz.results import LOSS_DIFFERENCE, PERPLEXITY_SWEEP, check_result, make_result
from goatviz.tasks import DNA, Text
from goatviz.training.evaluation import CHUNK, counts, sequence_loss

if TYPE_CHECKING:
    import xarray as xr

#: Resamples of the bootstrap.
RESAMPLES = 2000
#: Attributes of a sweep, equal in sweeps of the same pieces.
SAME = ("task", "source", "documents", "training_length", "resamples", "seed")
# Tokens whose logits are held at a time, over all windows of a batch.
_BATCH_TOKENS = 2**13
# Logits of a chunk where the caller sets no chunk.
_LOGITS = 2**22


def perplexity_sweep(
    models: Models,
    task: Text | DNA,
    *,
    lengths: Sequence[int],
    per_document: int = 1,
    documents: int | None = None,
    chunk: int | None = None,
    seed: int = 0,
    cache: str | os.PathLike | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Loss on the documents of `task.source`, for several schemes and training seeds.

    A piece is a stretch of as many tokens as the longest length, cut into windows of every length:
    all lengths predict the same tokens, and a longer one gives them more context.

    Parameters
    ----------
    models : mapping of str to CausalLM or sequence of CausalLM
        Models by scheme; several models of a scheme are runs with different seeds.
    task : Text or DNA
        Documents that no model was trained or tuned on; its own length does not matter.
    lengths : sequence of int
        Context lengths in tokens, increasing; each divides the last.
    per_document : int
        Largest number of pieces, which do not overlap, from one document.
    documents : int, optional
        Largest number of pieces in all, spread evenly over those there are. Default: all.
    chunk : int, optional
        Number of tokens that go through a model at a time. Default: those of 4 million logits, at
        least 1,024; one large pass is faster than several small ones.
    seed : int
        Seed of the bootstrap.
    cache : path-like, optional
        Existing folder that keeps measured cells for later sweeps.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    xarray.Dataset
        Schema `perplexity_sweep`, losses in nats per token. Intervals are 95 % percentile bootstrap
        over pieces (documents, where each gives one), of means over runs, with the same resamples
        for all schemes and lengths. A position is the upper end of its bin in the longest windows:
        the first bin holds 16 tokens, and each later end is twice the one before. Models with
        learned positions are missing (NaN) beyond their training length.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range, or the documents are too short.

    Examples
    --------
    >>> import tempfile
    >>> from goatviz import CausalLM, ModelConfig
    >>> model = CausalLM(ModelConfig(vocab_size=256, training_length=16, embed_dim=32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("one", "two"):
    ...         _ = (Path(folder) / f"{name}.txt").write_text("It rained all day. " * 4)
    ...     sweep = perplexity_sweep({"goat": model}, Text(source=folder), lengths=[16, 64])
    >>> sweep["tokens"].values.tolist()
    [[64, 64], [64, 64]]
    """
    models, windows, asked = _asked(models, task, lengths, per_document, documents, seed)
    if chunk is not None:
        checks.positive_int("chunk", chunk)
    windows = windows._replace(chunk=chunk, cache=check_cache(cache))
    loss, place = _losses_of(models, windows, progress)
    counted = windows.counted
    by_place = np.add.reduceat(counted, [0, *windows.ends[:-1]], axis=1, dtype=int)
    tokens = np.repeat(counted.sum(axis=1)[:, None], len(windows.lengths), axis=1)
    return _swept(loss, tokens, place, by_place, asked)


def joined_losses(sweeps: Sequence[xr.Dataset]) -> xr.Dataset:
    """Sweeps of the same pieces as one; see `join_sweeps`, which checks that they are the same."""
    first = sweeps[0]
    for sweep in sweeps:
        if not sweep["position_tokens"].equals(first["position_tokens"]):
            raise ValueError("sweeps must be of the same pieces, but their tokens are not as many")
    loss, place = (
        np.concatenate([sweep[name].values for sweep in sweeps], axis=1)
        for name in ("loss", "position_loss")
    )
    return _swept(loss, first["tokens"].values, place, first["position_tokens"].values, first)


def asked_pieces(
    models: Models,
    task: Text | DNA,
    *,
    lengths: Sequence[int],
    per_document: int = 1,
    documents: int | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Coordinates and attributes of a `perplexity_sweep` with these arguments, before it is run."""
    return _asked(models, task, lengths, per_document, documents, seed)[2]


def _asked(
    models: Models,
    task: Text | DNA,
    lengths: Sequence[int],
    per_document: int,
    documents: int | None,
    seed: int,
) -> tuple[dict[str, list[CausalLM]], _Windows, xr.Dataset]:
    """The checked models, the windows that they read, and coordinates and attributes of a sweep."""
    import xarray as xr

    checks.instance("task", task, (Text, DNA), "a Text or DNA")
    models = check_models(models, task)
    lengths = check_lengths(lengths)
    longest = lengths[-1]
    if any(longest % length for length in lengths):
        raise ValueError(f"lengths must all divide the last, {longest}, got {lengths}")
    pieces, names = _pieces(task, longest, per_document, documents)
    counted = counts(pieces[:, 1:], task).numpy()
    ends = [2**power for power in range(4, longest.bit_length()) if 2**power < longest] + [longest]
    coords = {
        "scheme": list(models),
        "piece": np.arange(len(names)),
        "length": lengths,
        "position": ends,
    }
    attrs = {
        "task": task.name,
        "source": task.source,
        "documents": json.dumps(names),
        "training_length": trained_lengths(models),
        "resamples": RESAMPLES,
        "seed": seed,
    }
    windows = _Windows(pieces, counted, names, lengths, ends, None, None)
    return models, windows, xr.Dataset(coords=coords, attrs=attrs)


def _swept(
    loss: np.ndarray,
    tokens: np.ndarray,
    place: np.ndarray,
    by_place: np.ndarray,
    asked: xr.Dataset,
) -> xr.Dataset:
    """The result of a sweep from the losses of its pieces, shape (schemes, runs, pieces, ...)."""
    data = {"loss": loss, "tokens": tokens, "position_loss": place, "position_tokens": by_place}
    # The same tokens at every length.
    data["run_loss"] = np.einsum("srpt,p->srt", loss, tokens[:, 0] / tokens[:, 0].sum())
    resamples, seed = (int(asked.attrs[name]) for name in ("resamples", "seed"))
    weights = bootstrap_weights(len(tokens), resamples, seed)
    data |= _mean_over_pieces("mean_loss", loss, tokens, weights)
    data |= _mean_over_pieces("mean_position_loss", place, by_place, weights)
    coords = {"scheme": asked["scheme"].values, "run": np.arange(loss.shape[1])}
    coords |= {name: asked[name].values for name in ("piece", "length", "position")}
    attrs = {name: asked.attrs[name] for name in SAME}
    data |= perplexities(data, coords, attrs)
    return make_result(PERPLEXITY_SWEEP, data, coords=coords, attrs=attrs)


def loss_difference(
    sweep: xr.Dataset, reference: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> xr.Dataset:
    r"""Loss of every scheme less that of one, on the same pieces: d = mean_p (l_p - l_p^reference).

    Pieces differ far more than schemes do, but a piece that is hard for one scheme is hard for all:
    this part cancels in the difference.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `perplexity_sweep`.
    reference : str
        Scheme whose loss is subtracted.
    resamples, seed : int
        Number of resamples of the bootstrap, and its seed.

    Returns
    -------
    xarray.Dataset
        Schema `loss_difference`: nats per token by scheme and length, runs averaged, with 95 %
        percentile bootstrap intervals over pieces. Below 0, a scheme is better than the reference.

    Raises
    ------
    TypeError
        If `sweep` is not a perplexity sweep.
    ValueError
        If it lacks the reference, or `resamples` is below 1.

    Examples
    --------
    >>> from goatviz import load_shipped_result
    >>> difference = loss_difference(load_shipped_result("text-eltec"), "rope")
    >>> float(difference["difference"].sel(scheme="rope").max())
    0.0
    """
    check_result(sweep, PERPLEXITY_SWEEP)
    schemes = [str(scheme) for scheme in sweep["scheme"].values]
    checks.one_of("reference", reference, schemes)
    checks.positive_int("resamples", resamples)
    loss = bins.mean_of_finite(sweep["loss"].values, axis=1)
    difference = (loss - loss[schemes.index(reference)])[:, None]
    pieces = sweep.sizes["piece"]
    weights = bootstrap_weights(pieces, resamples, seed)
    return make_result(
        LOSS_DIFFERENCE,
        _mean_over_pieces("difference", difference, sweep["tokens"].values, weights),
        coords={"scheme": schemes, "length": sweep["length"].values},
        attrs={
            "reference": reference,
            "training_length": sweep.attrs["training_length"],
            "resamples": resamples,
            "seed": seed,
            "pieces": pieces,
        },
    )


class _Windows(NamedTuple):
    """Pieces of documents, their tokens that count, and how they are cut into windows."""

    pieces: Tensor
    counted: np.ndarray
    names: tuple[str, ...]
    lengths: list[int]
    ends: list[int]
    chunk: int | None
    cache: Path | None


def _losses_of(
    models: dict[str, list[CausalLM]], windows: _Windows, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Mean losses by length and by position: (schemes, runs, pieces, lengths or positions)."""
    shape = (len(models), max(map(len, models.values())), len(windows.pieces))
    loss = np.full((*shape, len(windows.lengths)), np.nan)
    place = np.full((*shape, len(windows.ends)), np.nan)
    total = sum(map(len, models.values())) * len(windows.pieces)
    with tqdm(total=total, disable=not progress, unit="piece") as bar:
        for s, r, scheme, model in each_model(models):
            digest = None if windows.cache is None else model_digest(model)
            for p, name in enumerate(windows.names):
                bar.set_postfix_str(f"{scheme} {name}", refresh=False)
                for t, length in enumerate(windows.lengths):
                    # The last length is the longest, whose positions are kept.
                    loss[s, r, p, t], place[s, r, p] = _cell(model, digest, windows, p, length)
                bar.update()
    return loss, place


def _pieces(
    task: Text | DNA, length: int, per_document: int, most: int | None
) -> tuple[Tensor, tuple[str, ...]]:
    pieces, names = task.pieces(length, per_document=per_document)
    # A piece whose tokens are all masked says nothing about a model.
    keep = [at for at, row in enumerate(counts(pieces[:, 1:], task)) if bool(row.any())]
    if most is not None:
        checks.integer("documents", most, low=2)
        if len(keep) > most:
            keep = [keep[(2 * index + 1) * len(keep) // (2 * most)] for index in range(most)]
    if len(keep) < 2:
        raise ValueError(
            f"{task.source} must give at least two pieces of {length + 1} tokens, got {len(keep)}: "
            "raise per_document, or shorten lengths"
        )
    return pieces[keep], tuple(names[at] for at in keep)


def _cell(
    model: CausalLM, digest: str | None, windows: _Windows, at: int, length: int
) -> tuple[float, list[float]]:
    """Mean loss of the tokens of a piece that count, in all and by position, in nats."""
    piece, counted, ends = windows.pieces[at], windows.counted[at], windows.ends
    if exceeds_positions(model, length):
        return np.nan, [np.nan] * len(ends)
    chunk = windows.chunk or max(CHUNK, _LOGITS // model.config.vocab_size)

    def measure() -> list:
        losses = _losses(model, piece, length, chunk)
        places = []
        for start, end in pairwise([0, *ends]):
            within = counted[start:end]
            places.append(float(losses[start:end][within].mean()) if within.any() else None)
        return [float(losses[counted].mean()), places]

    key = [digest, piece.tolist(), counted.tolist(), length, ends]
    mean, places = cached(windows.cache, f"perplexity-{length}", key, measure)
    return mean, [np.nan if value is None else value for value in places]


@torch.no_grad()
def _losses(model: CausalLM, piece: Tensor, length: int, chunk: int) -> np.ndarray:
    """Loss of every token, in windows of `length`, shape (tokens,)."""
    model.eval()
    device = next(model.parameters()).device
    # Each window ends with the token that the next one begins with.
    windows = piece.unfold(0, length + 1, length).to(device)
    batch = max(1, _BATCH_TOKENS // min(length, chunk))
    parts = [
        sequence_loss(model, windows[start : start + batch], chunk=chunk)
        for start in range(0, len(windows), batch)
    ]
    return torch.cat(parts).flatten().double().cpu().numpy()


def _mean_over_pieces(
    name: str, loss: np.ndarray, tokens: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Mean over runs and tokens, with its bootstrap interval over pieces."""
    by_piece = bins.mean_of_finite(loss, axis=1)
    sizes = np.where(np.isnan(by_piece), 0, tokens)
    with np.errstate(invalid="ignore"):
        mean = (np.nan_to_num(by_piece) * sizes).sum(axis=1) / sizes.sum(axis=1)
    low, high = bootstrap_interval(by_piece.swapaxes(0, 1), weights, sizes.swapaxes(0, 1))
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
