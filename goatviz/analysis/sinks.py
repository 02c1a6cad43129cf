"""Attention sinks: how much mass single keys receive, in which heads, and when.

Statistics come from `goatviz.capture`, so no plan is ever formed and any model that can be
captured can be profiled. Importance follows Gu et al. 2025 (arXiv 2410.10781): the mean weight
of a key over the queries that see it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Generator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm.auto import tqdm

from goatviz import checks
from goatviz.adapters.capture import Record, find_attention
from goatviz.analysis.cells import check_cache
from goatviz.analysis.inputs import Pass, check_fits, forward_passes, named_model, token_texts
from goatviz.analysis.sink_cells import SinkRun, from_all, processes, together
from goatviz.analysis.sink_fields import profile_of
from goatviz.analysis.sink_passes import HIDDEN, Gathered, gather_record
from goatviz.analysis.sink_text import shortness
from goatviz.training.checkpoint import Checkpoint
from goatviz.training.execution import Execution

if TYPE_CHECKING:
    import xarray as xr


def sink_profile(
    source: nn.Module | Checkpoint | Record,
    inputs: Any = None,
    *,
    threshold: float = 0.3,
    min_observers: int = 16,
    recent: int = 128,
    layers: Sequence[int | str] | int | None = None,
    tokenizer: Any = None,
    tokens: Sequence[str] | None = None,
    maps: bool | int = False,
    norms: bool = False,
    spectra: bool = False,
    resamples: int = 400,
    seed: int = 0,
    certify: int | None = None,
    batch_size: int | None = None,
    cache: str | os.PathLike | None = None,
    progress: bool = False,
    execution: Execution | None = None,
) -> xr.Dataset:
    r"""Where a model's attention sinks are: importance_j = mean over i that see j of p_ij.

    Parameters
    ----------
    source : nn.Module, Checkpoint or Record
        A model that `goatviz.capture` can watch; or a record of whole sequences, captured with
        at least `SINK_STATISTICS`, whose every call of a layer is one more forward pass.
    inputs : Tensor, mapping, str, or sequence of them
        What the model is called with: token ids or anything else batch first, keyword arguments
        such as a tokenizer's output, or texts (then `tokenizer` is needed). Every sequence is
        one input; padding by an attention_mask is taken away before the model runs.
    threshold : float
        epsilon, in [0, 1): a key is a sink of a head if its importance exceeds this, strictly.
    min_observers : int
        Keys that fewer queries see have importance NaN: the last key of a causal head is seen by
        one query, and an identity head would make it a sink.
    recent : int
        Tokens of the recent window; a record has its own.
    layers : int, str or sequence of them, optional
        Which attention layers, as in `goatviz.capture`; default all. Not with a record.
    tokenizer : callable, optional
        tokenizer(text, return_tensors="pt") gives keyword arguments of the model.
    tokens : sequence of str, optional
        One text for each key, for a single input; default read from `tokenizer` if it can.
    maps : bool or int
        Also average the logits and weights of the first so many tokens (True: 64) over inputs.
    norms : bool
        Also norms of values and hidden states, and massive activations: above 100 and above
        1,000 medians of the block's output; and `norm_ratio`, the first token's norm over the mean
        of the others'. Hooks are put on the blocks for it.
    spectra : bool
        Also all of `norms`, and the matrix entropy and anisotropy of hidden states (see
        `goatviz.analysis.sink_passes.spectrum_of`): an eigendecomposition a block and input.
    resamples, seed : int
        Resamples and seed of the bootstrap over inputs that gives 95 % intervals.
    certify : int, optional
        Compare the output of the model's own kernel with the plan at this many queries of every
        call, as in `goatviz.capture`: the largest distance of each layer is `residual`, and that of
        all is an attribute, which captions tell. A record has its own.
    batch_size : int, optional
        Most sequences of a forward pass: those of equal length run together, never padded, and
        the profile is the same up to rounding. Default: as they were given.
    cache : path-like, optional
        Existing folder that keeps what every forward pass left, so that a run that was stopped
        goes on where it was; the profile is the same bit for bit.
    progress : bool
        Whether to show a progress bar.
    execution : Execution, optional
        Share the forward passes among the processes that accelerate or torchrun launched, each
        with its model on its own device; every process returns the whole profile, equal to that
        of one process. Default: this process alone.

    Returns
    -------
    xarray.Dataset
        Schema "sink_profile" (`goatviz.results.SINK_PROFILE`). Queries that see one key only, or
        not the first, count in importance (as in the definition) and not in the signal's density.

    Raises
    ------
    TypeError
        If the model cannot be captured or has quantised weights that do not run, or inputs are
        missing, texts without a tokenizer, or of another kind.
    ValueError
        If an argument is out of range, the model is on the meta device, inputs hold more tokens
        than it has positions or ids that it has no embeddings of, or a record is empty, padded on
        the left, lacks a statistic, or holds cached decoding.

    Warns
    -----
    UserWarning
        If an input is shorter than 16 tokens.

    Notes
    -----
    The sink rate is the share of (input, layer, head) whose first key is a sink; inputs whose
    first key has no importance count nowhere. `margin` is that of the longest input.

    Examples
    --------
    >>> import torch
    >>> from goatviz import load_pretrained
    >>> ids = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    >>> profile = sink_profile(load_pretrained("copy-mixture-1-goat"), ids)
    >>> profile["sink_rate"].sel(threshold=0.3).values.shape
    (1, 2)
    """
    steps = sink_profile_steps(
        source,
        inputs,
        threshold=threshold,
        min_observers=min_observers,
        recent=recent,
        layers=layers,
        tokenizer=tokenizer,
        tokens=tokens,
        maps=maps,
        norms=norms,
        spectra=spectra,
        resamples=resamples,
        seed=seed,
        certify=certify,
        batch_size=batch_size,
        cache=cache,
        progress=progress,
        execution=execution,
    )
    profile = _finished(steps)
    if too_short := shortness(profile):
        warnings.warn(too_short, stacklevel=2)
    return profile


def sink_profile_steps(
    source: nn.Module | Checkpoint | Record,
    inputs: Any = None,
    *,
    threshold: float = 0.3,
    min_observers: int = 16,
    recent: int = 128,
    layers: Sequence[int | str] | int | None = None,
    tokenizer: Any = None,
    tokens: Sequence[str] | None = None,
    maps: bool | int = False,
    norms: bool = False,
    spectra: bool = False,
    resamples: int = 400,
    seed: int = 0,
    certify: int | None = None,
    batch_size: int | None = None,
    cache: str | os.PathLike | None = None,
    progress: bool = False,
    execution: Execution | None = None,
    first: Callable[[Record], Any] | None = None,
) -> Generator[float, None, xr.Dataset]:
    """`sink_profile` in steps of one forward pass: yields the share that is done, in [0, 1].

    The first step checks what was given and runs nothing; the profile is what the generator
    returns. Parameters and errors are those of `sink_profile`; short inputs give no warning.
    `first` is called with the record of a model's first forward pass, projections kept.

    Examples
    --------
    >>> import torch
    >>> from goatviz import load_pretrained
    >>> inputs = [torch.zeros(1, 64, dtype=torch.long)] * 2
    >>> list(sink_profile_steps(load_pretrained("copy-mixture-1-goat"), inputs))
    [0.0, 0.5, 1.0]
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold!r}")
    min_observers = checks.positive_int("min_observers", min_observers)
    recent = checks.positive_int("recent", recent)
    resamples = checks.positive_int("resamples", resamples)
    hidden = HIDDEN[: 2 if checks.flag("spectra", spectra) else int(checks.flag("norms", norms))]
    wanted = "True, False or a positive number of tokens"
    if not isinstance(maps, Integral):
        raise TypeError(f"maps must be {wanted}, got {maps!r}")
    size = 64 if maps is True else int(maps)
    if size < 0:
        raise ValueError(f"maps must be {wanted}, got {maps!r}")
    if certify is not None:
        certify = checks.positive_int("certify", certify)
    if batch_size is not None:
        batch_size = checks.positive_int("batch_size", batch_size)
    folder = check_cache(cache)
    if isinstance(source, Record):
        if inputs is not None:
            raise TypeError("inputs must not be given with a Record: it has seen its own")
        if layers is not None:
            raise TypeError("layers must not be given with a Record: capture them alone")
        if hidden:
            raise ValueError(
                f"{hidden[-1]} needs the model and inputs: a record holds no hidden states"
            )
        checks.not_given("a Record", certify=certify, batch_size=batch_size, cache=cache)
        yield 0.0
        gathered = Gathered(map_size=size)
        gather_record(gathered, source)
        names, name = source.layers, "record"
    else:
        name, model = named_model(source)
        names = tuple(find_attention(model))
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            raise ValueError(
                "model must hold numbers, got one on the meta device; load its weights"
            )
        passes = forward_passes(inputs, tokenizer, batch_size)
        for one in passes:
            check_fits(model, one.arguments)
        yield 0.0
        run = SinkRun(model, layers, recent, hidden, size, certify, folder)
        parts = yield from _measured(run, passes, progress, execution, first)
        gathered = together(parts, passes)
        if tokens is None and tokenizer is not None and len(passes) == 1:
            sequences = gathered.sequences[min(gathered.sequences)]
            tokens = token_texts(tokenizer, passes[0].arguments) if len(sequences) == 1 else None
    return profile_of(
        gathered,
        names,
        name=name,
        threshold=threshold,
        min_observers=min_observers,
        tokens=tokens,
        resamples=resamples,
        seed=seed,
    )


def _measured(
    run: SinkRun,
    passes: Sequence[Pass],
    progress: bool,
    execution: Execution | None,
    first: Callable[[Record], Any] | None,
) -> Generator[float, None, list[Gathered]]:
    """What every forward pass leaves; with several processes, each runs its own share of them."""
    with processes(execution, run.model) as engine:
        numbers, parts, error = range(len(passes)), {}, None
        if engine is not None:
            numbers = numbers[engine.accelerator.process_index :: engine.processes]
            progress = progress and engine.is_main
        try:
            for number in tqdm(numbers, desc="sinks", unit="pass", disable=not progress):
                arguments = passes[number].arguments
                if first is not None and not parts:
                    parts[number], record = run.run(arguments, "projections")
                    first(record)
                else:
                    parts[number] = run.measure(arguments)
                yield len(parts) / len(numbers)
        except Exception as problem:
            if engine is None:
                raise
            error = problem
        return list(parts.values()) if engine is None else from_all(parts, error, engine)


def _finished(steps: Generator[float, None, xr.Dataset]) -> xr.Dataset:
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
