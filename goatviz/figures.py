"""The verbs a user types: each computes a result and passes it to the drawing of the same name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from goatviz import checks
from goatviz.adapters.capture import Record
from goatviz.analysis.explain import explain
from goatviz.analysis.implied import implied_prior
from goatviz.analysis.plan import plan_slice
from goatviz.analysis.prior import has_explicit_prior, prior_profile, prior_sources
from goatviz.analysis.sink_effect import sink_effect
from goatviz.analysis.sink_text import at_threshold
from goatviz.analysis.sinks import sink_profile
from goatviz.analysis.training import training_log
from goatviz.plots.explanation import draw_explanation
from goatviz.plots.figure import Figure
from goatviz.plots.length import draw_length, draw_needle
from goatviz.plots.mass import draw_mass
from goatviz.plots.perplexity import draw_perplexity
from goatviz.plots.plan import draw_plan
from goatviz.plots.prior import PRIOR_KINDS, draw_prior, prior_detail
from goatviz.plots.sink_effect import draw_sink_effect
from goatviz.plots.sinks import SINK_KINDS, draw_sinks
from goatviz.plots.training import draw_training
from goatviz.priors.base import Prior
from goatviz.results import SINK_PROFILE, check_result, is_dataset
from goatviz.training.checkpoint import Checkpoint, model_of
from goatviz.training.loop import TrainResult

if TYPE_CHECKING:
    import xarray as xr

_SINK_OPTIONS = (
    "min_observers",
    "recent",
    "tokenizer",
    "tokens",
    "maps",
    "norms",
    "spectra",
    "resamples",
    "seed",
    "batch_size",
    "cache",
    "progress",
    "execution",
)


def plot_prior(
    source: Prior | nn.Module | Checkpoint | Record | xr.Dataset,
    inputs: Any = None,
    *,
    kind: str = "decomposition",
    length: int | None = None,
    layers: Sequence[int] | int | None = None,
    heads: Sequence[int] | int | None = None,
    **options: Any,
) -> Figure:
    """Draw the prior of a model, explicit or implied: K_ij = kappa(i - j) + u(j), taken apart.

    Parameters
    ----------
    source : Prior, nn.Module, Checkpoint, Record or xarray.Dataset
        A prior; a goatviz model or layer; any model with goat-attention inside; a loaded
        checkpoint; a finished profile. A model without an explicit prior needs `inputs`, and the
        prior that its logits imply is drawn (`goatviz.implied_prior`), as for a record.
    inputs : Tensor, mapping, str, or sequence of them, optional
        Inputs of such a model; see `goatviz.sink_profile`.
    kind : {"decomposition", "heads", "kernel", "matrix"}
        See `goatviz.plots.draw_prior`.
    length : int, optional
        Length in tokens; default the training length, or that of the longest input. Only a window
        or a pooled view is evaluated, never the whole matrix, so that 1,000,000 is fine.
    layers, heads : int or sequence of int, optional
        Layers and heads to draw; default all. The more, the coarser; see
        `goatviz.plots.draw_prior`.
    **options
        Passed to `goatviz.prior_profile`: queries, keys, causal, resolution, points; and to
        `goatviz.implied_prior`: tokenizer, max_lag.

    Returns
    -------
    Figure
        One plotly Figure, below 2 MB; layer and head are chosen inside it.

    Raises
    ------
    TypeError
        If there is neither an explicit prior nor inputs, or if there are both.
    ValueError
        See `goatviz.prior_profile`.

    Examples
    --------
    >>> from goatviz.priors import ALiBiPrior
    >>> plot_prior(ALiBiPrior(2), length=32).layout.title.text
    'Learned prior'
    """
    checks.one_of("kind", kind, PRIOR_KINDS)
    given = {"length": length, "layers": layers, "heads": heads, **options}
    if is_dataset(source):
        checks.not_given("a finished profile", inputs=inputs, **given)
        return draw_prior(source, kind=kind)
    model = model_of(source)
    if isinstance(source, Record) or (inputs is not None and not has_explicit_prior(model)):
        # The number of heads is known only afterwards; drawing coarsens what is too fine.
        given = {name: value for name, value in given.items() if value is not None}
        return draw_prior(implied_prior(source, inputs, **given), kind=kind)
    sources = prior_sources(model, length=length, causal=options.get("causal"))
    of_implied = {name: options.pop(name, None) for name in ("tokenizer", "max_lag")}
    checks.not_given(
        "an explicit prior (goatviz.implied_prior fits a prior to the logits)",
        inputs=inputs,
        **of_implied,
    )
    count = _count(layers, len(sources))
    total = count * _count(heads, max(s.prior.num_heads for s in sources))
    cells, points = prior_detail(kind, total, count)
    # Without maps their last row is enough.
    cells = 2 if kind in ("heads", "kernel") else cells
    detail = {"resolution": cells, "points": points}
    options = {"length": length, "layers": layers, "heads": heads, **detail, **options}
    return draw_prior(prior_profile(model, **options), kind=kind)


def plot_plan(source: Any, inputs: Any = None, **slice_options: Any) -> Figure:
    """Draw one head's transport plan, with its certificates and POT's verdict in the caption.

    Parameters
    ----------
    source : TransportPlan, nn.Module, Checkpoint, Record, array or xarray.Dataset
        Anything that `goatviz.plan_slice` takes: a plan, a model with `inputs`, a record, or
        attention weights; or a finished plan slice.
    inputs : Tensor, mapping, str, or sequence of them, optional
        Inputs of a model.
    **slice_options
        Passed to `goatviz.plan_slice`: layer, head, batch, queries, keys, tokenizer, tokens, check.

    Returns
    -------
    Figure
        One plotly Figure, below 2 MB.

    Raises
    ------
    TypeError, ValueError
        As in `goatviz.plan_slice`.

    Examples
    --------
    >>> import torch
    >>> plot_plan(torch.full((4, 4), 0.25)).layout.title.text
    'A transport plan'
    """
    if is_dataset(source):
        checks.not_given("a finished plan slice", inputs=inputs, **slice_options)
        return draw_plan(source)
    return draw_plan(plan_slice(source, inputs, **slice_options))


def plot_sinks(
    source: nn.Module | Checkpoint | Record | xr.Dataset,
    inputs: Any = None,
    *,
    kind: str = "overview",
    threshold: float | None = None,
    layers: Sequence[int | str] | int | None = None,
    heads: Sequence[int] | int | None = None,
    **profile: Any,
) -> Figure:
    """Draw where a model's attention sinks are, how strong they are, and when they act.

    Parameters
    ----------
    source : nn.Module, Checkpoint, Record or xarray.Dataset
        A model that `goatviz.capture` can watch (goatviz, goat-attention, torch.nn or Hugging
        Face), with `inputs`; a record of its forward passes; or a finished sink profile.
    inputs : Tensor, mapping, str, or sequence of them, optional
        As in `goatviz.sink_profile`.
    kind : {"overview", "profile", "rate", "signal", "logits", "probabilities", "hidden"}
        Layers x heads; importance of every key; sink rate over the threshold; sink mass against
        content range with the collapse bounds; average maps, of logits or of probabilities; norms
        and spectra of hidden states by block.
    threshold : float, optional
        epsilon: a key is a sink if its importance exceeds it, strictly; default 0.3, or a
        finished profile's own.
    layers, heads : int or sequence of int, optional
        Layers and heads to draw; default all. Only these layers of a model are profiled; layers
        may be given by name.
    **profile
        Passed to `goatviz.sink_profile`: min_observers, recent, tokenizer, tokens, ...

    Returns
    -------
    Figure
        One plotly Figure, below 2 MB, whatever the length.

    Raises
    ------
    TypeError, ValueError
        As in `goatviz.sink_profile` and `goatviz.plots.draw_sinks`.

    Examples
    --------
    >>> import torch
    >>> from goatviz import load_pretrained
    >>> ids = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    >>> plot_sinks(load_pretrained("copy-mixture-1-goat"), ids).layout.title.text
    'Attention sinks'
    """
    checks.one_of("kind", kind, SINK_KINDS)
    if threshold is not None:
        threshold = checks.number("threshold", threshold, low=0, below=1)
    if is_dataset(source):
        check_result(source, SINK_PROFILE)
        checks.not_given("a finished profile", inputs=inputs, **profile)
        if threshold is not None:
            source = at_threshold(source, threshold)
    else:
        checks.some_of("options", profile, _SINK_OPTIONS)
        if threshold is not None:
            profile["threshold"] = threshold
        if kind in ("logits", "probabilities"):
            profile = {"maps": True, **profile}
        if kind == "hidden":
            profile = {"spectra": True, **profile}
        if not isinstance(source, Record):
            profile["layers"], layers = layers, None
        source = sink_profile(source, inputs, **profile)
    return draw_sinks(source, kind=kind, layers=layers, heads=heads)


def plot_sink_effect(source: Any, inputs: Any = None, **options: Any) -> Figure:
    """Draw what sinks, or any other change of its plans, cost a language model.

    Parameters
    ----------
    source : nn.Module, Checkpoint or xarray.Dataset
        A language model, with `inputs`; or a result of `goatviz.sink_effect`.
    inputs : Tensor, mapping, str, or sequence of them, optional
        Inputs of the model.
    **options
        Passed to `goatviz.sink_effect`: changes, layers, per_layer, budget, tokenizer, ...

    Returns
    -------
    Figure
        Loss increases with 95 % intervals, all layers at once and one layer at a time.

    Raises
    ------
    TypeError, ValueError
        As in `goatviz.sink_effect`.

    Examples
    --------
    >>> import torch
    >>> from goatviz import load_pretrained
    >>> ids = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    >>> plot_sink_effect(load_pretrained("copy-mixture-1-goat"), ids).layout.title.text
    'What sinks do for this model'
    """
    if is_dataset(source):
        checks.not_given("a finished result", inputs=inputs, **options)
        return draw_sink_effect(source)
    return draw_sink_effect(sink_effect(source, inputs, **options))


def plot_explanation(source: Any, inputs: Any = None, **options: Any) -> Figure:
    """Draw why a query attends where it does: the logits of its top keys, taken apart.

    Parameters
    ----------
    source : nn.Module, Checkpoint, Record, CapturedCall, AttentionCall or xarray.Dataset
        Anything that `goatviz.explain` takes, or a result of it.
    inputs : Tensor, mapping, str, or sequence of them, optional
        Inputs of a model.
    **options
        Passed to `goatviz.explain`: layer, head, query, batch, top, prior, tokenizer, tokens.

    Returns
    -------
    Figure
        Weights of the top keys, and the parts of their logits.

    Raises
    ------
    TypeError, ValueError
        As in `goatviz.explain`.

    Examples
    --------
    >>> import torch
    >>> from goatviz import load_pretrained
    >>> model = load_pretrained("copy-mixture-1-goat")
    >>> plot_explanation(model, torch.arange(24)[None], head=1).layout.title.text
    'Why this query attends there'
    """
    if is_dataset(source):
        checks.not_given("a finished explanation", inputs=inputs, **options)
        return draw_explanation(source)
    return draw_explanation(explain(source, inputs, **options))


def plot_length(sweep: xr.Dataset, *, measure: str = "strict") -> Figure:
    """Draw how accuracy changes with length, with chance and the training length marked.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.length_sweep`.
    measure : {"strict", "token"}
        Share of whole answers, or of their tokens, that are right.

    Returns
    -------
    Figure
        Lengths on a binary scale; whiskers are 95 % Wilson intervals, dots single runs.

    Raises
    ------
    TypeError, ValueError
        If `sweep` is not a length sweep or is empty, or the measure is unknown.

    Examples
    --------
    >>> from goatviz import CausalLM, ModelConfig, Needle, length_sweep
    >>> model = CausalLM(ModelConfig(vocab_size=128, training_length=32, embed_dim=32))
    >>> sweep = length_sweep({"goat": model}, Needle(), lengths=[32, 64], examples=2)
    >>> plot_length(sweep).layout.title.text
    'Length extrapolation: needle'
    """
    return draw_length(sweep, measure=measure)


def plot_extrapolation(sweep: xr.Dataset, *, measure: str = "strict") -> Figure:
    """The old name of `plot_length`, for one release.

    .. deprecated:: 0.2

    Examples
    --------
    >>> from goatviz import load_shipped_result
    >>> with warnings.catch_warnings(action="ignore"):
    ...     figure = plot_extrapolation(load_shipped_result("passkey-sweep"))
    """
    warnings.warn(
        "plot_extrapolation is now plot_length and will be removed in the next release",
        DeprecationWarning,
        stacklevel=2,
    )
    return draw_length(sweep, measure=measure)


def plot_needle(grid: xr.Dataset, *, measure: str = "token") -> Figure:
    """Draw accuracy over length and depth, one map for each scheme.

    Parameters
    ----------
    grid : xarray.Dataset
        From `goatviz.needle_grid`.
    measure : {"token", "strict"}
        Share of the answers' tokens, or of whole answers, that are right.

    Returns
    -------
    Figure
        Maps share one scale, which marks chance.

    Raises
    ------
    TypeError, ValueError
        If `grid` is not a needle grid or is empty, or the measure is unknown.

    Examples
    --------
    >>> from goatviz import CausalLM, ModelConfig, Needle, needle_grid
    >>> model = CausalLM(ModelConfig(vocab_size=128, training_length=32, embed_dim=32))
    >>> grid = needle_grid({"goat": model}, Needle(), lengths=[32], examples=2)
    >>> plot_needle(grid).layout.title.text
    'Depth and length: needle'
    """
    return draw_needle(grid, measure=measure)


def plot_mass(sweep: xr.Dataset) -> Figure:
    """Draw what an answer rests on as length grows, beside the share of answers that are right.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.mass_sweep`.

    Returns
    -------
    Figure
        Accuracy, and the mass on the answer, on the recent keys and on the first key, each in the
        head of a run that has most of it at the training length; open marks are its prior alone.
        Whiskers span the 95 % intervals of all runs.

    Raises
    ------
    TypeError, ValueError
        If `sweep` is not a mass sweep or is empty.

    Examples
    --------
    >>> from goatviz import Passkey, load_pretrained, mass_sweep
    >>> models = {"goat": load_pretrained("passkey-goat").model}
    >>> task = Passkey(length=64, value_length=4)
    >>> plot_mass(mass_sweep(models, task, lengths=[64], examples=2)).layout.title.text
    'What the answer rests on: passkey'
    """
    return draw_mass(sweep)


def plot_perplexity(sweep: xr.Dataset, *, kind: str = "length") -> Figure:
    """Draw how the loss on documents changes with length, or with the position in a window.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.perplexity_sweep`.
    kind : {"length", "position"}
        Mean loss in windows of each length, or loss by position in windows of the longest length.
        A mean hides what happens late behind early tokens, which have little context at any length.

    Returns
    -------
    Figure
        Nats per token on a binary scale of lengths; whiskers are 95 % bootstrap intervals over
        documents, dots single runs; perplexities on hover.

    Raises
    ------
    TypeError, ValueError
        If `sweep` is not a perplexity sweep, or the kind is unknown.

    Examples
    --------
    >>> from goatviz import load_shipped_result
    >>> plot_perplexity(load_shipped_result("text-eltec")).layout.title.text
    'Loss on documents: text'
    """
    return draw_perplexity(sweep, kind=kind)


def plot_training(
    runs: Checkpoint | TrainResult | Mapping[str, Checkpoint | TrainResult] | xr.Dataset,
) -> Figure:
    """Draw how training went: loss and learning rate by step, and the held-out loss.

    Parameters
    ----------
    runs : Checkpoint, TrainResult, mapping of str to them, or xarray.Dataset
        One run, several by name, or a finished training log.

    Returns
    -------
    Figure
        Losses above, learning rates below.

    Raises
    ------
    TypeError, ValueError
        As in `goatviz.training_log`.

    Examples
    --------
    >>> from goatviz import load_pretrained
    >>> plot_training(load_pretrained("copy-mixture-4-goat")).layout.title.text
    'Training'
    """
    return draw_training(runs if is_dataset(runs) else training_log(runs))


def _count(chosen: Sequence[int] | int | None, available: int) -> int:
    if chosen is None:
        return available
    return 1 if isinstance(chosen, int) else len(chosen)
