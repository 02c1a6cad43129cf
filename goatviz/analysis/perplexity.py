"""Loss on documents against length, with intervals over documents, and by position in the window.

The same text is cut into windows of every length, so that lengths differ in context alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from goatviz.analysis.cells import (
    Models,
    cached,
    check_cache,
    check_lengths,
    check_models,
    model_digest,
    trained_lengths,
)
from goatviz.models import CausalLM
from goatviz.results import LOSS_DIFFERENCE, PERPLEXITY_SWEEP, check_result, make_result
from goatviz.tasks import DNA, Text
from goatviz.training.evaluation import CHUNK, counts, sequence_loss

#: Draws of the bootstrap.
RESAMPLES = 2000
# Tokens whose logits are held at a time, over all windows of a batch.
_BATCH_TOKENS = 2**13
# Logits of a chunk, where nothing else is asked for.
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

    Each piece, a stretch of as many tokens as the longest length, is cut into windows of every
    length: all lengths predict the same tokens, and a longer one gives them more context.

    Parameters
    ----------
    models : mapping of str to CausalLM or sequence of CausalLM
        By scheme; several models of a scheme are runs with different seeds.
    task : Text or DNA
        Documents no model was trained on or tuned on; its own length does not matter.
    lengths : sequence of int
        Tokens of context, increasing; each divides the last.
    per_document : int
        The most pieces of a document, which do not overlap.
    documents : int, optional
        The most pieces in all, spread evenly over those there are; default all.
    chunk : int, optional
        Tokens that go through a model at a time; default 1,024, or as many as have 4 million
        logits: one pass needs no mask and is half as fast again as many.
    seed : int
        Of the bootstrap.
    cache : path-like, optional
        Existing folder in which cells are kept and found again.
    progress : bool
        Show a bar.

    Returns
    -------
    xarray.Dataset
        Schema `perplexity_sweep`, losses in nats per token. Intervals are 95 % percentile bootstrap
        over pieces (documents where each gives one), the same draws for all schemes and lengths,
        runs averaged. Positions are upper ends: p stands for the tokens of the longest windows from
        the position before it (16 from 0) up to the p-th. Models with learned positions are
        missing (NaN) beyond their training length.

    Raises
    ------
    ValueError
        If models, lengths or documents do not fit.
    TypeError
        If the task is neither Text nor DNA, or a model is not a CausalLM.

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
    if not isinstance(task, Text | DNA):
        raise TypeError(f"task must be Text or DNA, got {type(task).__name__}")
    models = check_models(models, task)
    lengths = check_lengths(lengths)
    longest = lengths[-1]
    if any(longest % length for length in lengths):
        raise ValueError(f"lengths must all divide the last, {longest}, got {lengths}")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be an integer of at least 1, got {chunk!r}")
    pieces, names = _pieces(task, longest, per_document, documents)
    counted = counts(pieces, task).numpy()
    ends = [2**power for power in range(4, longest.bit_length()) if 2**power < longest] + [longest]
    folder = check_cache(cache)
    runs = max(len(each) for each in models.values())
    loss = np.full((len(models), runs, len(names), len(lengths)), np.nan)
    place = np.full((len(models), runs, len(names), len(ends)), np.nan)
    total = sum(len(each) for each in models.values()) * len(names)
    with tqdm(total=total, disable=not progress, unit="piece") as bar:
        for s, (scheme, each) in enumerate(models.items()):
            for r, model in enumerate(each):
                digest = None if folder is None else model_digest(model)
                for p, piece in enumerate(pieces):
                    bar.set_postfix_str(f"{scheme} {names[p]}", refresh=False)
                    for t, length in enumerate(lengths):
                        loss[s, r, p, t], place[s, r, p] = _cell(
                            model,
                            digest,
                            piece,
                            counted[p],
                            length,
                            ends,
                            _chunk(model) if chunk is None else chunk,
                            folder,
                        )
                    bar.update()
    by_place = _by_place(counted, ends)
    tokens = np.repeat(counted.sum(axis=1)[:, None], len(lengths), axis=1)
    data = {"loss": loss, "tokens": tokens, "position_loss": place, "position_tokens": by_place}
    # The same tokens at every length.
    data["run_loss"] = np.einsum("srpt,p->srt", loss, tokens[:, 0] / tokens[:, 0].sum())
    draws = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    data |= _intervals("mean_loss", loss, tokens, draws)
    data |= _intervals("mean_position_loss", place, by_place, draws)
    for end in ("", "_low", "_high"):
        data[f"perplexity{end}"] = np.exp(data[f"mean_loss{end}"])
    return make_result(
        PERPLEXITY_SWEEP,
        data,
        coords={
            "scheme": list(models),
            "run": np.arange(runs),
            "piece": np.arange(len(names)),
            "length": lengths,
            "position": ends,
        },
        attrs={
            "task": task.name,
            "source": task.source,
            "documents": json.dumps(names),
            "training_length": trained_lengths(models),
            "resamples": RESAMPLES,
            "seed": seed,
        },
    )


def loss_difference(
    sweep: xr.Dataset, reference: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> xr.Dataset:
    r"""Loss of every scheme less that of one, on the same pieces: d = mean_p (l_p - l_p^reference).

    Pieces differ far more from each other than schemes do; what is hard for one is hard for all,
    and leaves their difference.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `perplexity_sweep`.
    reference : str
        One of its schemes.
    resamples, seed : int
        Of the bootstrap.

    Returns
    -------
    xarray.Dataset
        Schema `loss_difference`: nats per token by scheme and length, runs averaged, with 95 %
        percentile bootstrap intervals over pieces. Below 0 is better than the reference.

    Raises
    ------
    TypeError
        If `sweep` is no perplexity sweep.
    ValueError
        If it lacks the reference, or resamples is below 1.

    Examples
    --------
    >>> from goatviz import load_shipped_result
    >>> difference = loss_difference(load_shipped_result("text-eltec"), "rope")
    >>> float(difference["difference"].sel(scheme="rope").max())
    0.0
    """
    check_result(sweep, PERPLEXITY_SWEEP)
    schemes = [str(scheme) for scheme in sweep["scheme"].values]
    if reference not in schemes:
        raise ValueError(f"reference must be one of {', '.join(schemes)}, got {reference!r}")
    if isinstance(resamples, bool) or not isinstance(resamples, int) or resamples < 1:
        raise ValueError(f"resamples must be an integer of at least 1, got {resamples!r}")
    known = ~np.isnan(sweep["loss"].values)
    with np.errstate(invalid="ignore"):
        each = np.nansum(sweep["loss"].values, axis=1) / known.sum(axis=1)
    apart = (each - each[schemes.index(reference)])[:, None]
    pieces = apart.shape[2]
    draws = np.random.default_rng(seed).integers(pieces, size=(resamples, pieces))
    return make_result(
        LOSS_DIFFERENCE,
        _intervals("difference", apart, sweep["tokens"].values, draws),
        coords={"scheme": schemes, "length": sweep["length"].values},
        attrs={"reference": reference, "resamples": resamples, "seed": seed, "pieces": pieces},
    )


def _chunk(model: CausalLM) -> int:
    return max(CHUNK, _LOGITS // model.config.vocab_size)


def _pieces(
    task: Text | DNA, length: int, per_document: int, most: int | None
) -> tuple[Tensor, tuple[str, ...]]:
    pieces, names = task.pieces(length, per_document=per_document)
    # What is masked throughout says nothing of any model.
    keep = [at for at, row in enumerate(counts(pieces, task)) if bool(row.any())]
    if most is not None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 2:
            raise ValueError(f"documents must be an integer of at least 2, got {most!r}")
        if len(keep) > most:
            keep = [keep[(2 * index + 1) * len(keep) // (2 * most)] for index in range(most)]
    if len(keep) < 2:
        raise ValueError(
            f"{task.source} must give two pieces of {length + 1} tokens at least, got {len(keep)}: "
            "raise per_document, or shorten lengths"
        )
    return pieces[keep], tuple(names[at] for at in keep)


def _cell(
    model: CausalLM,
    digest: str | None,
    piece: Tensor,
    counted: np.ndarray,
    length: int,
    ends: list[int],
    chunk: int,
    folder: Path | None,
) -> tuple[float, list[float]]:
    """Mean loss of the tokens that count, and means by position in the window, nats."""
    config = model.config
    if config.positions == "learned" and length > config.training_length:
        return np.nan, [np.nan] * len(ends)
    asked = [digest, piece.tolist(), counted.tolist(), length, ends]

    def measure() -> list:
        each = _losses(model, piece, length, chunk)
        places = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            within = counted[start:end]
            places.append(float(each[start:end][within].mean()) if within.any() else None)
        return [float(each[counted].mean()), places]

    mean, places = cached(folder, f"perplexity-{length}", asked, measure)
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


def _by_place(counted: np.ndarray, ends: list[int]) -> np.ndarray:
    """Tokens that count by position, shape (pieces, positions)."""
    return np.stack(
        [counted[:, start:end].sum(1) for start, end in zip([0, *ends[:-1]], ends, strict=True)],
        axis=1,
    )


def _intervals(
    name: str, loss: np.ndarray, tokens: np.ndarray, draws: np.ndarray
) -> dict[str, np.ndarray]:
    """Mean over runs and over the tokens of pieces, with its percentile interval over pieces."""
    missing = np.isnan(loss).all(axis=1)  # a run that is not there counts for nothing
    each = np.where(missing, 0.0, np.nansum(loss, axis=1))
    each = each / np.maximum((~np.isnan(loss)).sum(axis=1), 1)
    weight = np.where(missing, 0, tokens)
    sums, weights = each * weight, weight
    with np.errstate(invalid="ignore"):
        mean = sums.sum(axis=1) / weights.sum(axis=1)
        # How often each piece is drawn: (draws, pieces).
        drawn = np.stack([np.bincount(row, minlength=loss.shape[2]) for row in draws])
        means = np.einsum("bp,spl->bsl", drawn, sums) / np.einsum("bp,spl->bsl", drawn, weights)
    known = ~np.isnan(mean)
    low, high = np.full(mean.shape, np.nan), np.full(mean.shape, np.nan)
    low[known], high[known] = np.nanpercentile(means[:, known], [2.5, 97.5], axis=0)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
