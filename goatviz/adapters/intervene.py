"""Change the plan of chosen layers and heads while a model's own forward pass runs.

`intervene` watches the calls that `goatviz.capture` does and replaces the output of the kernel,
before the output projection, by that of the changed plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from goatviz import checks
from goatviz.adapters.capture import (
    CapturedCall,
    Record,
    check_watchable,
    chosen_layers,
    named_errors,
    watching,
    without_output,
)
from goatviz.adapters.watch import Answer, Observe
from goatviz.transport.call import AttentionCall
from goatviz.transport.changes import Change, changed_output

#: One change, several in order, or either by layer.
Changes = Change | Sequence[Change] | Mapping[int | str, Change | Sequence[Change]]


@contextmanager
def intervene(
    model: nn.Module, changes: Changes, *, layers: Sequence[int | str] | int | str | None = None
) -> Iterator[None]:
    r"""Run your own forward pass with changed plans: hidden keys, capped sinks, windows, ablations.

    In the chosen layers the kernel's output :math:`\sum_j p_{ij} v_j` is replaced by that of the
    changed plan, computed from the layer's own queries, keys and values; later layers see the
    consequences. Heads without a change keep every bit of their output.

    Parameters
    ----------
    model : nn.Module
        A model with goatviz Attention or Hugging Face attention.
    changes : Change, sequence of Change, or mapping
        `Hide`, `Cap`, `SinkColumn`, `Streaming`, `HeavyHitters`, `Temper` or `Ablate`; several
        are applied in order. A mapping from layers (numbers or paths) gives each its own.
    layers : int, str or sequence of them, optional
        Attention layers to change, as in `goatviz.capture`; default all. Not with a mapping.

    Yields
    ------
    None
        The model is restored on exit, also after an exception.

    Raises
    ------
    TypeError
        If the model has no attention that can be watched, or `changes` holds other objects.
    ValueError
        If a layer, head or key does not exist, the output of a layer's kernel cannot be seen
        (goat-attention and torch.nn modules; `goatviz.convert` the former), or the model is
        already being captured; while it runs, if gradients are enabled, or a change does not fit.

    Notes
    -----
    Rows are recomputed in blocks, in float32 (float64 for float64 models), with at most 4 million
    logits at a time. The output carries no gradients, so run under `torch.no_grad()`. Attention
    weights that a model returns itself (output_attentions) are NaN in layers that change.

    Examples
    --------
    >>> from goatviz import Hide, load_pretrained
    >>> model, ids = load_pretrained("copy-mixture-1-goat").model, torch.arange(32)[None]
    >>> with torch.no_grad(), intervene(model, Hide([0])):
    ...     logits = model(ids)
    """
    paths, _ = check_watchable(model, any_layer=layers is None)
    by_path = _by_path(changes, layers, paths)
    with watching(model, by_path, _changing(model, by_path)):
        yield


@contextmanager
def capture_changed(
    model: nn.Module, changes: Changes
) -> Iterator[tuple[Record, dict[int, tuple[Change, ...]]]]:
    """`intervene`, and the calls of all layers as the changed model makes them.

    Yields
    ------
    record : Record
        As from `goatviz.capture` with keep="projections", without statistics: queries and keys
        feel the changes of earlier layers. The plan of a layer that changes itself is that of
        `goatviz.transport.changes.changed_call`.
    by_layer : dict of int to tuple of Change
        The changes of each layer that has any.

    Raises
    ------
    TypeError, ValueError
        As in `intervene`.
    """
    paths, skipped = check_watchable(model, any_layer=True)
    by_path = _by_path(changes, None, paths)
    record = Record(paths, skipped=skipped)
    change = _changing(model, by_path)

    def observe(path: str, q: Tensor, k: Tensor, **options: Any) -> Answer | None:
        gate = options.pop("gate", None)
        if gate is not None:
            raise ValueError(
                f"attention layer {path} multiplies its heads by gates, which the plan of a "
                "changed call does not hold"
            )
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False), named_errors(path):
            call = AttentionCall.from_tensors(q, k, **options)
        record.calls.append(CapturedCall(paths.index(path), path, call))
        return change(path, q, k, **options) if path in by_path else None

    with watching(model, paths, observe):
        yield record, {paths.index(path): each for path, each in by_path.items()}


def _changing(model: nn.Module, by_path: Mapping[str, tuple[Change, ...]]) -> Observe:
    """An observer that answers with the output of changed plans."""
    if hidden := without_output(model, by_path):
        raise ValueError(
            f"layers must have a kernel whose output can be seen, got {', '.join(hidden)}: "
            "goatviz.convert turns goat-attention's layers into goatviz layers"
        )

    def observe(path: str, q: Tensor, k: Tensor, gate: object = None, **options: Any) -> Answer:
        # The layer multiplies the changed output by its gate, too.
        if torch.is_grad_enabled() and q.requires_grad:
            raise ValueError(
                f"attention layer {path}: a changed plan carries no gradients: run the model "
                "under torch.no_grad()"
            )
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False), named_errors(path):
            call = AttentionCall.from_tensors(q, k, **options)

        def answer(output: Tensor) -> Tensor:
            with torch.autocast(q.device.type, enabled=False), named_errors(path):
                return changed_output(call, output, by_path[path])

        return answer

    return observe


def _by_path(
    changes: Changes, layers: Sequence[int | str] | int | str | None, paths: tuple[str, ...]
) -> dict[str, tuple[Change, ...]]:
    """The changes of each layer that has any, by path."""
    if not isinstance(changes, Mapping):
        return dict.fromkeys(chosen_layers(layers, paths), _as_changes(changes))
    checks.not_given("changes by layer", layers=layers)
    each = {layer: _as_changes(value) for layer, value in changes.items()}
    if not each:
        raise ValueError("changes must name at least one layer, got an empty mapping")
    by_path: dict[str, tuple[Change, ...]] = {}
    for layer, value in each.items():
        (path,) = chosen_layers([layer], paths)
        if path in by_path:
            raise ValueError(f"changes must name each layer once, got {path!r} twice")
        by_path[path] = value
    return by_path


def _as_changes(value: Change | Sequence[Change]) -> tuple[Change, ...]:
    many = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for one in many:
        checks.instance("changes", one, Change, "a Change such as goatviz.Hide([0])")
    return tuple(many)
