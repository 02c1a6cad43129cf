"""Watch the attention calls of a model while its own forward pass runs, and keep what they show.

One context manager for goatviz, goat-attention, torch.nn and Hugging Face models alike; each
family's watcher lives beside this file. Outputs stay as they were, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from goatviz.adapters.goat_attention import find_goat_attention, watch_goat_attention
from goatviz.adapters.huggingface import (
    find_huggingface_attention,
    unwatchable_huggingface,
    watch_huggingface,
)
from goatviz.adapters.torch_attention import find_torch_attention, watch_torch_attention
from goatviz.attention.call import AttentionCall
from goatviz.attention.layer import Attention
from goatviz.priors.base import Prior
from goatviz.transport.fused import (
    IMPLEMENTATIONS,
    ROW_STATISTICS,
    IncomingMass,
    PlanWindow,
    Problem,
    RowStatistics,
    all_of,
    dense_window,
    incoming_of,
    make_problem,
    statistics_of,
)
from goatviz.transport.visibility import Visibility

#: What `capture` can keep of every call.
CAPTURE_STATISTICS = (*ROW_STATISTICS, "incoming_mass", "value_norm")

Observe = Callable[[str, AttentionCall], None]
Watch = Callable[[nn.Module, Mapping[str, nn.Module], Observe], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False, repr=False)
class CapturedCall:
    """One attention call of one layer.

    Attributes
    ----------
    layer : int
        Index among the model's attention layers, whether captured or not.
    name : str
        The layer's path in the module tree.
    rows : RowStatistics, optional
        Row statistics, as far as asked for.
    incoming : IncomingMass, optional
        Mass that each key receives from the real queries.
    query_mask : Tensor of bool, optional
        Shape (batch or 1, n_queries), False at padding; None where nothing is known of it.
    value_norm : Tensor, optional
        Norms of the values, shape (batch, key-value heads, n_keys).
    call : AttentionCall, optional
        The projections themselves, with keep="projections".
    shape : tuple of int
        (batch, query heads, n_queries, n_keys).
    prior : Prior, optional
        The layer's explicit prior.
    query_pos, key_pos : Tensor
        Its positions, as `goatviz.priors.as_positions` returns them.
    visibility : Visibility
        The allowed pairs.
    causal : bool
        Whether some query sees fewer keys than another one of its sequence.
    additive : bool
        Whether a dense bias was added to the logits, which is not kept with statistics only.
    """

    layer: int
    name: str
    rows: RowStatistics | None
    incoming: IncomingMass | None
    query_mask: Tensor | None
    value_norm: Tensor | None
    call: AttentionCall | None
    shape: tuple[int, int, int, int]
    prior: Prior | None
    query_pos: Tensor
    key_pos: Tensor
    visibility: Visibility
    causal: bool
    additive: bool

    def __repr__(self) -> str:
        batch, heads, queries, keys = self.shape
        return (
            f"CapturedCall(layer {self.layer} ({self.name}): batch {batch}, {heads} heads, "
            f"{queries} queries, {keys} keys)"
        )


@dataclass(eq=False, repr=False)
class Record:
    """What `capture` saw, in the order of the calls.

    Attributes
    ----------
    layers : tuple of str
        Paths of every attention layer of the model; a layer's number is its place here.
    calls : list of CapturedCall
        One for each call of each captured layer.
    """

    layers: tuple[str, ...]
    calls: list[CapturedCall] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.calls)

    def __repr__(self) -> str:
        seen = len({call.layer for call in self.calls})
        return f"Record({len(self.calls)} calls of {seen} of {len(self.layers)} layers)"

    def of(self, layer: int) -> list[CapturedCall]:
        """The calls of one layer, oldest first.

        Raises
        ------
        ValueError
            If nothing was captured, or nothing of this layer.
        """
        if not self.calls:
            raise ValueError(
                "record is empty: no attention call was seen. Run the model inside the with block"
            )
        found = [call for call in self.calls if call.layer == layer]
        if not found:
            seen = sorted({call.layer for call in self.calls})
            raise ValueError(f"layer must be one of the captured {seen}, got {layer!r}")
        return found

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
            The window; each row is normalised over all keys, whatever the window.
        call : int
            Which call of the layer; default the last.

        Returns
        -------
        PlanWindow
            Arrays of shape (queries, keys).

        Raises
        ------
        ValueError
            If the record is empty or holds statistics only, or the place does not exist.
        """
        calls = self.of(layer)
        if not -len(calls) <= call < len(calls):
            raise ValueError(f"call must be below {len(calls)}, got {call}")
        one = calls[call]
        if one.call is None:
            raise ValueError(
                "record holds statistics only; capture(..., keep='projections') keeps q and k"
            )
        for name, value, count in (("batch", batch, one.shape[0]), ("head", head, one.shape[1])):
            if not 0 <= value < count:
                raise ValueError(f"{name} must be in 0 .. {count - 1}, got {value!r}")
        return dense_window(
            problem_of(one.call), batch=batch, head=head, queries=queries, keys=keys
        )


def find_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Every attention layer that `capture` can watch, by path, in the order of the module tree."""
    found = {path for find, _ in _FAMILIES for path in find(model)}
    return {path: module for path, module in model.named_modules() if path in found}


@contextmanager
def capture(
    model: nn.Module,
    *,
    layers: Sequence[int | str] | int | None = None,
    statistics: Iterable[str] = CAPTURE_STATISTICS,
    keep: str = "statistics",
    keys: Sequence[int] = (0,),
    recent: int = 128,
    impl: str = "auto",
) -> Iterator[Record]:
    """Run your own forward pass and see what every attention call did, without any L x L array.

    Parameters
    ----------
    model : nn.Module
        With goatviz Attention, goat-attention's GoatAttention, torch.nn.MultiheadAttention
        (inside TransformerEncoder and its kin too) or Hugging Face attention inside, whatever
        implementation that runs on.
    layers : int, str or sequence of them, optional
        Which attention layers, by number or path; default all.
    statistics : iterable of str
        Out of `CAPTURE_STATISTICS`; default all. Computed while the model runs.
    keep : {"statistics", "projections"}
        Keep q, k and v too, which `Record.plan` needs: O(length) memory for each layer.
    keys, recent, impl
        As in `goatviz.row_statistics`; keys that a call does not have are left out.

    Yields
    ------
    Record
        Grows with every call. The model is as before on exit, also after an exception.

    Raises
    ------
    TypeError
        If the model has no attention that can be watched (the message lists what can), or an
        argument that should be a list is none.
    ValueError
        If an argument does not fit, the model is on the meta device, or (while it runs)
        attention has dropout in training mode or NaN or infinite queries or keys.

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
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if keep not in ("statistics", "projections"):
        raise ValueError(f"keep must be 'statistics' or 'projections', got {keep!r}")
    names = _names(statistics)
    keys = _checked(keys, recent, impl)
    found = find_attention(model)
    unwatchable = unwatchable_huggingface(model)
    if not found or (unwatchable and layers is None):
        which = f" ({', '.join(unwatchable)} cannot)" if unwatchable else ""
        rest = "; name layers= to capture the others alone" if found else ""
        raise TypeError(
            f"model {type(model).__name__} has attention that cannot be captured{which}; what can: "
            "goatviz Attention, goat-attention's GoatAttention, torch.nn.MultiheadAttention, and "
            f"Hugging Face models that dispatch through transformers' AttentionInterface{rest}"
        )
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ValueError("model is on the meta device, which holds no numbers; load its weights")
    paths = tuple(found)
    chosen = _chosen(layers, paths)
    record = Record(paths)

    def observe(path: str, call: AttentionCall) -> None:
        # Under the model's autocast, statistics would be of its low precision too.
        with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
            record.calls.append(
                _captured(paths.index(path), path, call, names, keep, keys, recent, impl)
            )

    with ExitStack() as stack:
        for find, watch in _FAMILIES:
            theirs = {path: module for path, module in find(model).items() if path in chosen}
            if theirs:
                stack.enter_context(watch(model, theirs, observe))
        yield record


def problem_of(call: AttentionCall) -> Problem:
    """A captured call as arguments of the diagnostics."""
    return make_problem(
        call.q,
        call.k,
        prior=call.prior,
        scale=call.scale,
        causal=False,
        visibility=call.visibility,
        bias=call.bias,
        sink=call.sink,
        softcap=call.softcap,
        query_pos=call.query_pos,
        key_pos=call.key_pos,
    )


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
        If one of them is being watched already.
    """
    busy = [path for path, module in modules.items() if module.observer is not None]
    if busy:
        raise ValueError(f"model is being captured already: {', '.join(busy)}")
    try:
        for path, module in modules.items():
            module.observer = lambda call, path=path: observe(path, call)
        yield
    finally:
        for module in modules.values():
            module.observer = None


_FAMILIES: tuple[tuple[Callable[[nn.Module], dict[str, nn.Module]], Watch], ...] = (
    (find_goatviz_attention, watch_goatviz_attention),
    (find_goat_attention, watch_goat_attention),
    (find_huggingface_attention, watch_huggingface),
    (find_torch_attention, watch_torch_attention),
)


def _captured(
    layer: int,
    path: str,
    call: AttentionCall,
    names: tuple[str, ...],
    keep: str,
    keys: Sequence[int],
    recent: int,
    impl: str,
) -> CapturedCall:
    try:
        problem = problem_of(call)
    except (TypeError, ValueError) as error:
        where = f"attention layer {path}" if path else "model"
        raise type(error)(f"{where}: {error}") from error
    row_names = [name for name in names if name in ROW_STATISTICS]
    options = {"keys": [key for key in keys if key < call.k.shape[2]], "recent": recent}
    query_mass = None if call.query_mask is None else call.query_mask.to(call.q.device).double()
    rows = incoming = None
    if "incoming_mass" in names and row_names:
        rows, incoming = all_of(problem, row_names, **options, query_mass=query_mass, impl=impl)
    elif "incoming_mass" in names:
        incoming = incoming_of(problem, query_mass=query_mass, impl=impl)
    elif row_names:
        rows = statistics_of(problem, row_names, **options, impl=impl)
    norm = None
    if "value_norm" in names and call.v is not None:
        norm = torch.linalg.vector_norm(call.v.float(), dim=-1)
    return CapturedCall(
        layer=layer,
        name=path,
        rows=rows,
        incoming=incoming,
        query_mask=call.query_mask,
        value_norm=norm,
        call=call if keep == "projections" else None,
        shape=(*call.q.shape[:3], call.k.shape[2]),
        prior=call.prior,
        query_pos=problem.query_pos,
        key_pos=problem.key_pos,
        visibility=problem.visibility,
        causal=_is_causal(problem),
        additive=call.bias is not None,
    )


def _is_causal(problem: Problem) -> bool:
    count = problem.visibility.count()
    real = torch.where(count > 0, count, count.amax(-1, keepdim=True))
    return bool((real != real[..., -1:]).any())


def _chosen(layers: Sequence[int | str] | int | str | None, paths: tuple[str, ...]) -> set[str]:
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


def _checked(keys: Sequence[int], recent: int, impl: str) -> tuple[int, ...]:
    """The chosen keys, when these options fit a call of some length: better now than inside it."""
    if not isinstance(keys, Iterable):
        raise TypeError(f"keys must be a list of places, got {keys!r}")
    keys = tuple(int(key) for key in keys)
    if any(key < 0 for key in keys):
        raise ValueError(f"keys must be at least 0, got {list(keys)}")
    if isinstance(recent, bool) or int(recent) != recent or recent < 1:
        raise ValueError(f"recent must be a positive number of tokens, got {recent!r}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    return keys


def _names(statistics: Iterable[str]) -> tuple[str, ...]:
    if isinstance(statistics, str) or not isinstance(statistics, Iterable):
        raise TypeError(f"statistics must be a list of names, got {statistics!r}")
    names = tuple(dict.fromkeys(statistics))
    unknown = [name for name in names if name not in CAPTURE_STATISTICS]
    if unknown:
        raise ValueError(
            f"statistics must be among {', '.join(CAPTURE_STATISTICS)}, got {', '.join(unknown)}"
        )
    return names
