"""Watch the attention calls of a model while its own forward pass runs, and measure them.

One context manager serves goatviz, goat-attention, torch.nn and Hugging Face models; each family
has a watcher in a module of its own. Outputs stay the same, bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goatviz import checks
from goatviz.adapters.goat_attention import find_goat_attention, watch_goat_attention
from goatviz.adapters.huggingface import (
    find_huggingface_attention,
    unwatchable_huggingface,
    watch_huggingface,
)
from goatviz.adapters.inline_attention import find_inline_attention, watch_inline_attention
from goatviz.adapters.torch_attention import find_torch_attention, watch_torch_attention
from goatviz.adapters.watch import Answer, Observe
from goatviz.attention.layer import Attention
from goatviz.transport.call import AttentionCall, PlanWindow
from goatviz.transport.statistics import (
    IMPLEMENTATIONS,
    ROW_STATISTICS,
    IncomingMass,
    RowStatistics,
    all_of,
    incoming_of,
    statistics_of,
)

#: What `capture` can measure of every call.
CAPTURE_STATISTICS = (*ROW_STATISTICS, "incoming_mass", "value_norm")

Watch = Callable[[nn.Module, Mapping[str, nn.Module], Observe], AbstractContextManager[None]]

#: Entries of a plan at keys that have left the cache.
_GONE = {
    "scores": math.nan,
    "log_prior": -math.inf,
    "logits": -math.inf,
    "weights": 0.0,
    "allowed": False,
}


@dataclass(frozen=True, eq=False, repr=False)
class CapturedCall:
    """One attention call of one layer, with what was measured while the model ran.

    Attributes
    ----------
    layer : int
        Index among the model's attention layers, whether captured or not.
    name : str
        The layer's path in the module tree.
    call : AttentionCall
        The call itself; with keep="statistics", without its q, k, v and bias.
    rows : RowStatistics, optional
        The row statistics that were requested.
    incoming : IncomingMass, optional
        Mass that each key of the call (`call.key_pos`) receives from queries other than padding.
    value_norm : Tensor, optional
        Norms of the values, shape (batch, key-value heads, n_keys).
    residual : float, optional
        With certify=: distance of the kernel's own output from the plan times the values, relative
        to the largest value; see `AttentionCall.residual`.
    gate : Tensor, optional
        Where the layer multiplies each head's output by sigmoid(gate): logits, shape (batch, query
        heads, n_queries). That is the mass of each row, and `call.sink` takes the rest.
    """

    layer: int
    name: str
    call: AttentionCall
    rows: RowStatistics | None = None
    incoming: IncomingMass | None = None
    value_norm: Tensor | None = None
    residual: float | None = None
    gate: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, query heads, n_queries, n_keys)."""
        return self.call.shape

    @property
    def projections(self) -> AttentionCall:
        """The call with its queries and keys.

        Raises
        ------
        ValueError
            If they were not kept.
        """
        if self.call.q is None:
            raise ValueError(
                f"layer {self.layer} ({self.name}) must be captured with its projections, got "
                "statistics only: capture(..., keep='projections') keeps q and k"
            )
        return self.call

    @property
    def kind(self) -> str:
        """What queries may use, and whether channels turn with position, as far as that is known.

        "causal", "window of 128 tokens" (where the text is longer), or "bidirectional", of whole
        sequences alone; then "rotary" or "no rotation", and "gated heads".
        """
        parts = []
        visibility = self.call.visibility
        if self.shape[2] == self.shape[3] and not self.call.causal:
            parts.append("bidirectional")
        elif self.shape[2] == self.shape[3]:
            widest = int(visibility.count().max())
            # Padding is no key that a window hides.
            keys = int((visibility.observers() > 0).sum(-1).max())
            parts.append(f"window of {widest} tokens" if widest < keys else "causal")
        if self.call.rotary is not None:
            parts.append("rotary" if bool(self.call.rotary.any()) else "no rotation")
        if self.gate is not None:
            parts.append("gated heads")
        return ", ".join(parts)

    def __repr__(self) -> str:
        batch, heads, queries, keys = self.shape
        gone = f" after {self.call.gone} that have left the cache" if self.call.gone else ""
        kind = f", {self.kind}" if self.kind else ""
        certified = "" if self.residual is None else f", residual {self.residual:.1e}"
        return (
            f"CapturedCall(layer {self.layer} ({self.name}): batch {batch}, {heads} heads, "
            f"{queries} queries, {keys} keys{gone}{kind}{certified})"
        )


@dataclass(eq=False, repr=False)
class Record:
    """What `capture` recorded, in the order of the calls.

    Attributes
    ----------
    layers : tuple of str
        Paths of every attention layer of the model; a layer's number is its place here.
    calls : list of CapturedCall
        One for each call of each captured layer.
    skipped : tuple of str
        Paths of the layers that have no plan: linear attention, delta rules, state spaces.
    """

    layers: tuple[str, ...]
    calls: list[CapturedCall] = field(default_factory=list)
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.calls)

    def __repr__(self) -> str:
        seen = len({call.layer for call in self.calls})
        skipped = ", ".join(self.skipped[:3]) + (", ..." if len(self.skipped) > 3 else "")
        skipped = f"; skipped {len(self.skipped)} without a plan: {skipped}" if skipped else ""
        return f"Record({len(self.calls)} calls of {seen} of {len(self.layers)} layers{skipped})"

    def check_calls(self) -> list[CapturedCall]:
        """Every call, oldest first.

        Raises
        ------
        ValueError
            If there are no calls.
        """
        if not self.calls:
            raise ValueError(
                "record must hold an attention call, got an empty one: run the model inside the "
                "with block"
            )
        return self.calls

    def of(self, layer: int) -> list[CapturedCall]:
        """The calls of one layer, oldest first.

        Raises
        ------
        ValueError
            If there are no calls, or none of this layer.
        """
        seen = sorted({call.layer for call in self.check_calls()})
        checks.one_of("layer", layer, seen)
        return [call for call in self.calls if call.layer == layer]

    def residuals(self) -> dict[str, float]:
        """The largest residual of every captured layer, by path: do the plans match the kernel?

        Raises
        ------
        ValueError
            If there are no calls, or they were captured without certify=.
        """
        largest: dict[str, float] = {}
        for call in self.check_calls():
            if call.residual is None:
                raise ValueError("record must hold residuals: capture(..., certify=16)")
            largest[call.name] = max(largest.get(call.name, 0.0), call.residual)
        return largest

    def plan(
        self,
        *,
        layer: int = 0,
        head: int = 0,
        batch: int = 0,
        queries: slice = slice(None),
        keys: slice = slice(None),
        call: int = -1,
    ) -> PlanWindow:
        """A dense window of one head's plan, recomputed in float64 from its projections.

        Parameters
        ----------
        layer, head, batch : int
            Which query head of which layer and sequence.
        queries, keys : slice
            The window: queries of the call, and tokens of the text as keys. Each row is normalised
            over all keys, whatever the window. Keys that have left a sliding window's cache are
            not allowed, have weight 0 and score NaN.
        call : int
            Which call of the layer; default the last.

        Returns
        -------
        PlanWindow
            Arrays of shape (queries, keys).

        Raises
        ------
        ValueError
            If the record is empty or holds statistics only, or the window does not exist.
        """
        calls = self.of(layer)
        number = checks.integer("call", call, low=-len(calls), high=len(calls) - 1)
        kept = calls[number].projections
        checks.index("batch", batch, kept.shape[0])
        checks.index("head", head, kept.shape[1])
        if not kept.gone:
            return kept.plan(batch, head, queries, keys)
        places = torch.arange(kept.gone + kept.shape[3])[keys]
        if not len(places):
            raise ValueError(
                f"keys must be a non-empty window of {kept.gone + kept.shape[3]} tokens, got {keys}"
            )
        window = kept.plan(batch, head, queries)._asdict()
        for name, fill in _GONE.items():
            window[name] = F.pad(window[name], (kept.gone, 0), value=fill)[:, places]
        return PlanWindow(**window)


def find_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Every attention layer that `capture` can watch, by path, in the order of the module tree."""
    watchable = {path for find, _ in _FAMILIES for path in find(model)}
    return {path: module for path, module in model.named_modules() if path in watchable}


@contextmanager
def capture(
    model: nn.Module,
    *,
    layers: Sequence[int | str] | int | None = None,
    statistics: Iterable[str] = CAPTURE_STATISTICS,
    keep: str = "statistics",
    keys: Sequence[int] = (0,),
    recent: int = 128,
    at: Callable[[AttentionCall], Tensor] | None = None,
    impl: str = "auto",
    certify: int | None = None,
) -> Iterator[Record]:
    """Run your own forward pass and measure every attention call, without any L x L array.

    Parameters
    ----------
    model : nn.Module
        A model with goatviz Attention, goat-attention's GoatAttention,
        torch.nn.MultiheadAttention (also inside TransformerEncoder and the like) or Hugging Face
        attention, whatever its implementation.
    layers : int, str or sequence of them, optional
        Attention layers to capture, by number or path; default all. Layers without a plan (linear
        attention, delta rules, state spaces) are skipped and named in the record.
    statistics : iterable of str
        From `CAPTURE_STATISTICS`; default all. Computed while the model runs.
    keep : {"statistics", "projections"}
        "projections" also keeps q, k and v, which `Record.plan` needs: O(length) memory per layer.
    keys : sequence of int
        Tokens of the text whose weight is kept (`rows.keys`). The weight is 0 for tokens that have
        left a sliding window's cache; tokens that a call does not have yet are left out.
    recent, impl
        As in `goatviz.row_statistics`.
    at : callable, optional
        at(call) returns keys of each query of an `AttentionCall` whose weight is kept
        (`rows.gathered_mass`), as in `goatviz.row_statistics`; default the key before the query.
    certify : int, optional
        Compare the output of the model's own kernel, at this many queries of every call, with the
        plan recomputed in float64 times the values: `Record.residuals`. For layers of goatviz and
        of Hugging Face, whose kernel output can be seen before the output projection.

    Yields
    ------
    Record
        Grows with every call of the forward pass; recomputation of checkpointed activations in a
        backward pass does not count. Positions of cached steps continue those before. Positions
        include padding on the left, for queries and keys alike, so that lags are those of the
        text. Calls from several threads are in the order in which they happened. The model is
        restored on exit, also after an exception.

    Raises
    ------
    TypeError
        If the model has no attention that can be watched (the message lists what can be), or an
        argument that should be a list is not.
    ValueError
        If an argument does not fit, the model is on the meta device, or (while it runs) attention
        applies dropout or has NaN or infinite queries or keys.

    Examples
    --------
    >>> import torch
    >>> from goatviz import Attention
    >>> layer = Attention(8, 2)
    >>> with capture(layer) as record:
    ...     _ = layer(torch.zeros(1, 4, 8))
    >>> record.calls[0].rows.entropy.exp().round()[0, 0].tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    checks.one_of("keep", keep, ("statistics", "projections"))
    wanted = _Wanted(
        checks.some_of("statistics", statistics, CAPTURE_STATISTICS),
        keep == "projections",
        checks.places("keys", keys),
        checks.positive_int("recent", recent),
        at,
        checks.one_of("impl", impl, IMPLEMENTATIONS),
        None if certify is None else checks.positive_int("certify", certify),
    )
    paths, skipped = check_watchable(model, any_layer=layers is None)
    chosen = chosen_layers(layers, paths)
    record = Record(paths, skipped=skipped)

    def observe(
        path: str, q: Tensor, k: Tensor, gate: Tensor | None = None, **options: Any
    ) -> Answer | None:
        if torch._C._current_graph_task_id() != -1:
            # A backward pass recomputes activations that a checkpoint did not keep.
            return None
        # Under the model's autocast, statistics would have its low precision too.
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            with named_errors(path):
                call = AttentionCall.from_tensors(q, k, **options)
            call = call if gate is None else _gated(call, gate, wanted.impl)
            measured = _measured(paths.index(path), path, call, wanted)
            measured = replace(measured, gate=gate)
        if wanted.certify is None:
            record.calls.append(measured)
            return None

        def certified(output: Tensor) -> None:
            with torch.autocast(q.device.type, enabled=False):
                if gate is not None:
                    output = output * gate.sigmoid().unsqueeze(-1)
                residual = call.residual(output, wanted.certify)
            record.calls.append(replace(measured, residual=residual))

        return certified

    if certify is not None and (hidden := without_output(model, chosen)):
        raise ValueError(
            f"certify must be None for {', '.join(hidden)}: the output of the kernel is seen "
            "only after the output projection"
        )
    with watching(model, chosen, observe):
        yield record


@contextmanager
def watching(model: nn.Module, paths: Collection[str], observe: Observe) -> Iterator[None]:
    """Report every call of these layers to `observe`, until the block ends."""
    with ExitStack() as stack:
        for find, watch in _FAMILIES:
            watched = {path: module for path, module in find(model).items() if path in paths}
            if watched:
                stack.enter_context(watch(model, watched, observe))
        yield


def without_output(model: nn.Module, paths: Collection[str]) -> list[str]:
    """Those of the given layers whose kernel's output cannot be seen."""
    return [
        path
        for find, watch in _FAMILIES
        if watch not in _CERTIFIED
        for path in find(model)
        if path in paths
    ]


def check_watchable(
    model: nn.Module, *, any_layer: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of a model's attention layers that can be watched, and of those without a plan.

    Raises
    ------
    TypeError
        If `model` is not a module, has no layer that can be watched or, with `any_layer`, has
        attention that cannot be.
    ValueError
        If `model` is on the meta device.
    """
    checks.instance("model", model, nn.Module, "an nn.Module")
    modules = find_attention(model)
    refused, skipped = unwatchable_huggingface(model, modules)
    if not modules or (refused and any_layer):
        which, names = "cannot", dict.fromkeys(refused.values() or skipped.values())
        which = which if refused else "has no plan whose rows are a softmax"
        which = f" ({', '.join(names)} {which})" if names else ""
        rest = "; name layers= to capture the others alone" if modules else ""
        raise TypeError(
            f"model {type(model).__name__} has attention that cannot be captured{which}; what can: "
            "goatviz Attention, goat-attention's GoatAttention, torch.nn.MultiheadAttention, and "
            "Hugging Face models that dispatch through transformers' AttentionInterface, or whose "
            f"own products are known (such as Bloom, DeBERTa, Falcon, GPT-J, MPT, Swin v2){rest}"
        )
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ValueError("model is on the meta device, which holds no numbers; load its weights")
    return tuple(modules), tuple(skipped)


@contextmanager
def named_errors(path: str) -> Iterator[None]:
    """Prefix errors in the block with a layer's path."""
    try:
        yield
    except (TypeError, ValueError) as error:
        where = f"attention layer {path}" if path else "model"
        raise type(error)(f"{where}: {error}") from error


def find_goatviz_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Every goatviz Attention layer, by path."""
    return {path: child for path, child in model.named_modules() if isinstance(child, Attention)}


@contextmanager
def watch_goatviz_attention(
    model: nn.Module, modules: Mapping[str, nn.Module], observe: Observe
) -> Iterator[None]:
    """Report every call of these layers to `observe`.

    Raises
    ------
    ValueError
        If a layer is already being watched.
    """
    busy = [path for path, module in modules.items() if module.observer is not None]
    if busy:
        raise ValueError(f"model is being captured already: {', '.join(busy)}")
    try:
        for path, module in modules.items():
            module.observer = functools.partial(observe, path)
        yield
    finally:
        for module in modules.values():
            module.observer = None


_FAMILIES: tuple[tuple[Callable[[nn.Module], dict[str, nn.Module]], Watch], ...] = (
    (find_goatviz_attention, watch_goatviz_attention),
    (find_goat_attention, watch_goat_attention),
    (find_huggingface_attention, watch_huggingface),
    (find_inline_attention, watch_inline_attention),
    (find_torch_attention, watch_torch_attention),
)


#: Watchers that pass the kernel's output to what `observe` returned.
_CERTIFIED = (watch_goatviz_attention, watch_huggingface, watch_inline_attention)


class _Wanted(NamedTuple):
    """What to measure and keep of every call."""

    statistics: tuple[str, ...]
    projections: bool
    keys: tuple[int, ...]
    recent: int
    at: Callable[[AttentionCall], Tensor] | None
    impl: str
    certify: int | None


def _measured(layer: int, path: str, call: AttentionCall, wanted: _Wanted) -> CapturedCall:
    names = [name for name in wanted.statistics if name in ROW_STATISTICS]
    keys = [key for key in wanted.keys if key < call.gone + call.shape[3]]
    options = {
        "keys": [key - call.gone for key in keys if key >= call.gone],
        "recent": wanted.recent,
        "at": wanted.at,
        "impl": wanted.impl,
    }
    rows = incoming = norm = None
    if "incoming_mass" in wanted.statistics and names:
        rows, incoming = all_of(call, names, **options)
    elif "incoming_mass" in wanted.statistics:
        incoming = incoming_of(call, impl=wanted.impl)
    elif names:
        rows = statistics_of(call, names, **options)
    if rows is not None and call.gone:
        rows = _with_gone(rows, keys, call.gone)
    if "value_norm" in wanted.statistics and call.v is not None:
        norm = torch.linalg.vector_norm(call.v.float(), dim=-1)
    kept = call if wanted.projections else call.without_tensors()
    return CapturedCall(layer, path, kept, rows, incoming, norm)


def _gated(call: AttentionCall, gate: Tensor, impl: str) -> AttentionCall:
    """The call with a column without key that takes what its gate keeps from each row.

    sigmoid(gate) times the output is the output of the plan whose extra column has the logit
    log-normaliser - gate.
    """
    lse = statistics_of(call, ["log_normaliser"], impl=impl).log_normaliser
    return replace(call, sink=torch.where(lse.isfinite(), lse, 0.0).double() - gate.double())


def _with_gone(rows: RowStatistics, keys: Sequence[int], gone: int) -> RowStatistics:
    """Row statistics for tokens of the text as keys; those that left the cache have weight 0."""
    mass = rows.key_mass
    if mass is not None:
        held = torch.tensor([key >= gone for key in keys], dtype=torch.bool, device=mass.device)
        full = mass.new_zeros(*mass.shape[:3], len(keys))
        full[..., held] = mass
        mass = full.masked_fill((rows.visible == 0).unsqueeze(-1), math.nan)
    return replace(rows, keys=tuple(keys), key_mass=mass)


def chosen_layers(
    layers: Sequence[int | str] | int | str | None, paths: tuple[str, ...]
) -> set[str]:
    """Paths of layers given by number or path; default all.

    Raises
    ------
    TypeError, ValueError
        If a layer is of another kind or does not exist, or no layer is given.
    """
    if layers is None:
        return set(paths)
    if isinstance(layers, int | str):
        layers = [layers]
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers must be numbers or paths, got {layers!r}")
    chosen = set()
    for layer in layers:
        if isinstance(layer, str) and layer in paths:
            chosen.add(layer)
        elif isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < len(paths):
            chosen.add(paths[layer])
        else:
            raise ValueError(
                f"layers must be numbers in 0 .. {len(paths) - 1} or paths such as "
                f"{paths[0]!r}, got {layer!r}"
            )
    if not chosen:
        raise ValueError("layers must name at least one layer, got none")
    return chosen
