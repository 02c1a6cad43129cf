r"""Changes of a plan: hidden keys, capped masses, sink columns, windows, temperatures, ablations.

A `Change` edits the logits of some heads. `changed_output` computes what a call's kernel would have
returned with the new logits; `goatviz.intervene` puts that into a model's forward pass.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from goatviz import checks
from goatviz.priors.base import Prior
from goatviz.transport.call import AttentionCall
from goatviz.transport.statistics import incoming_of
from goatviz.transport.visibility import Visibility, entry_of

#: Logits that are held together, and the most rows among them.
_PAIRS, _ROWS = 2**20, 256


class Block(NamedTuple):
    """Consecutive rows of the heads that change, from which their plans follow.

    Attributes
    ----------
    rows : Tensor
        The queries, int64, shape (rows,).
    scores, log_prior : Tensor
        Shape (heads, rows, keys), nats; log_prior is -inf at forbidden pairs.
    column : Tensor
        Logit of the extra column, shape (heads, rows); -inf without one.
    """

    rows: Tensor
    scores: Tensor
    log_prior: Tensor
    column: Tensor

    @property
    def logits(self) -> Tensor:
        """Scores plus log-prior."""
        return self.scores + self.log_prior

    def weights(self) -> Tensor:
        """The plan over the keys, shape (heads, rows, keys); NaN in rows without any key."""
        return torch.cat([self.logits, self.column.unsqueeze(-1)], -1).softmax(-1)[..., :-1]


#: Changes one block; gets the blocks of a call in order, so that it can carry state.
Step = Callable[[Block], Block]


@dataclass(frozen=True)
class Change(ABC):
    """A change of the plans of some heads.

    Parameters
    ----------
    heads : sequence of int, optional
        Query heads that change; default all.
    """

    _: KW_ONLY
    heads: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.heads is not None:
            object.__setattr__(self, "heads", checks.places("heads", self.heads))
        self._check()

    def _check(self) -> None:  # noqa: B027 - most changes have something to check, not all
        """Raise an error for parameters that do not fit."""

    @abstractmethod
    def begin(self, call: AttentionCall, batch: int, heads: Tensor) -> Step:
        """The step that changes the rows of one sequence of a call, for the given heads."""


@dataclass(frozen=True)
class Hide(Change):
    """Forbid keys. A query that can use no other key keeps its plan.

    Parameters
    ----------
    keys : sequence of int, or "sinks"
        Tokens of the text, the first being 0; or the sinks of each head: the keys that get more
        than `threshold` of the mass, averaged over the queries that can use them.
    threshold : float
        epsilon of "sinks", in [0, 1).
    min_observers : int
        Fewest queries that must see a key for it to be a sink.
    """

    keys: Sequence[int] | str = (0,)
    threshold: float = 0.3
    min_observers: int = 16

    def _check(self) -> None:
        if self.keys != "sinks":
            object.__setattr__(self, "keys", checks.places("keys", self.keys))
        checks.number("threshold", self.threshold, low=0, below=1)
        checks.positive_int("min_observers", self.min_observers)

    def begin(self, call: AttentionCall, batch: int, heads: Tensor) -> Step:
        if self.keys == "sinks":
            hidden = self._sinks(call, batch)[heads]
        else:
            _check_keys(call, self.keys)
            hidden = _chosen_keys(call, batch, self.keys).expand(len(heads), -1)
        hidden = hidden.unsqueeze(1)
        return lambda block: block._replace(
            log_prior=block.log_prior.masked_fill(hidden, -math.inf)
        )

    def _sinks(self, call: AttentionCall, batch: int) -> Tensor:
        _whole(call, "Hide('sinks')")
        incoming = incoming_of(call)
        seen = incoming.observers >= self.min_observers
        return (incoming.importance > self.threshold)[batch] & seen[batch % len(seen)]


@dataclass(frozen=True)
class Cap(Change):
    """Lower the logits of some keys by a common amount, so that their mass is at most a limit.

    Parameters
    ----------
    mass : float
        Largest share of a query's mass that these keys get together, in (0, 1).
    keys : sequence of int
        Tokens of the text; default the first.
    """

    mass: float
    keys: Sequence[int] = (0,)

    def _check(self) -> None:
        checks.number("mass", self.mass, above=0, below=1)
        object.__setattr__(self, "keys", checks.places("keys", self.keys))

    def begin(self, call: AttentionCall, batch: int, heads: Tensor) -> Step:
        _check_keys(call, self.keys)
        capped = _chosen_keys(call, batch, self.keys)
        log_odds = math.log(self.mass) - math.log1p(-self.mass)

        def step(block: Block) -> Block:
            logits = block.logits
            these = logits.masked_fill(~capped, -math.inf).logsumexp(-1)
            others = logits.masked_fill(capped, -math.inf).logsumexp(-1)
            others = torch.logaddexp(others, block.column)
            # Where one side is empty there is nothing to move.
            move = (others + log_odds - these).clamp(max=0)
            move = torch.where(these.isfinite() & others.isfinite(), move, 0.0)
            return block._replace(log_prior=block.log_prior + move.unsqueeze(-1) * capped)

        return step


@dataclass(frozen=True)
class SinkColumn(Change):
    """Set the logit of the extra column, which takes mass but has no value, or remove it.

    Parameters
    ----------
    logit : float, sequence of float, or None
        Nats, one for all heads or one for each head of the model; 0 is softmax off by one (Miller
        2023). None removes the column.
    """

    logit: float | Sequence[float] | None

    def _check(self) -> None:
        if self.logit is None:
            return
        each = isinstance(self.logit, Sequence) and not isinstance(self.logit, str)
        values = tuple(
            checks.number("logit", one) for one in (self.logit if each else [self.logit])
        )
        object.__setattr__(self, "logit", values if each else values[0])

    def begin(self, call: AttentionCall, batch: int, heads: Tensor) -> Step:
        if self.logit is None:
            return lambda block: block._replace(column=torch.full_like(block.column, -math.inf))
        values = torch.as_tensor(self.logit, dtype=torch.float64, device=call.device)
        if values.ndim and len(values) != call.shape[1]:
            raise ValueError(
                f"logit must be one number, or one for each of {call.shape[1]} heads, "
                f"got {len(values)}"
            )
        values = values.expand(call.shape[1])[heads].unsqueeze(-1)
        return lambda block: block._replace(
            column=values.to(block.column).expand_as(block.column).clone()
        )


@dataclass(frozen=True)
class Streaming(Change):
    """Keep the newest and the first keys (StreamingLLM, Xiao et al. 2024).

    Positions remain those of the text, whereas StreamingLLM counts them within its cache.

    Parameters
    ----------
    window : int
        Newest keys that a query may use, its own included.
    sinks : int
        First tokens of the text that every query may use as well; 0 for a plain window.
    """

    window: int
    sinks: int = 4

    def _check(self) -> None:
        checks.positive_int("window", self.window)
        checks.integer("sinks", self.sinks, low=0)

    def begin(self, call: AttentionCall, batch: int, heads: Tensor) -> Step:
        lag = _lags(call)
        first = _chosen_keys(call, batch, range(self.sinks))

        def step(block: Block) -> Block:
            kept = (lag(block.rows) < self.window) | first
            return block._replace(log_prior=block.log_prior.masked_fill(~kept, -math.inf))

        return step


@dataclass(frozen=True)
class HeavyHitters(Change):
    """Keep the newest keys and those with the most mass so far (H2O, Zhang et al. 2023).

    After every query, older keys are evicted for good until `heavy` are left, those with the least
    mass from the queries so far first. Queries are processed one by one, as in decoding: slowly.

    Parameters
    ----------
    heavy : int
        Older keys that are kept, for each head.
    recent : int
        Newest keys that are kept, the query's own included.
    """

    heavy: int
    recent: int

    def _check(self) -> None:
        checks.integer("heavy", self.heavy, low=0)
        checks.positive_int("recent", self.recent)

    def begin(self, call: AttentionCall, batch: int, heads: Tensor) -> Step:
        _whole(call, "HeavyHitters")
        shape = len(heads), call.shape[3]
        mass = torch.zeros(shape, dtype=torch.float64, device=call.device)
        gone = torch.zeros(shape, dtype=torch.bool, device=call.device)
        lag = _lags(call)

        def step(block: Block) -> Block:
            older = lag(block.rows) >= self.recent
            log_prior = block.log_prior.clone()
            for at in range(len(block.rows)):
                log_prior[:, at].masked_fill_(gone, -math.inf)
                row = Block(
                    block.rows[at : at + 1],
                    block.scores[:, at : at + 1],
                    log_prior[:, at : at + 1],
                    block.column[:, at : at + 1],
                )
                mass.add_(row.weights()[:, 0].nan_to_num(0.0))
                held = older[at] & ~gone & (log_prior[:, at] > -math.inf)
                excess = int(held.sum(-1).max()) - self.heavy
                if excess > 0:
                    order = mass.masked_fill(~held, math.inf).argsort(dim=-1, stable=True)
                    leaves = torch.arange(shape[1], device=call.device) < (
                        held.sum(-1, keepdim=True) - self.heavy
                    )
                    gone.scatter_(1, order, leaves | gone.gather(1, order))
            return block._replace(log_prior=log_prior)

        return step


@dataclass(frozen=True)
class Temper(Change):
    """Divide the scores by tau; the log-prior stays.

    Parameters
    ----------
    tau : float
        Temperature, above 0; 1 changes nothing.
    """

    tau: float

    def _check(self) -> None:
        checks.number("tau", self.tau, above=0)

    def begin(self, call: AttentionCall, batch: int, heads: Tensor) -> Step:
        return lambda block: block._replace(scores=block.scores / self.tau)


@dataclass(frozen=True)
class Ablate(Change):
    """Subtract a prior from the logits.

    Parameters
    ----------
    prior : str or Prior
        A part of the layer's own prior by the name that `Prior.components` gives it, such as
        "sink", "relative" or "recency"; or any prior of 1 head, or one for each key-value or
        query head, such as those of `goatviz.fit_priors`.
    """

    prior: str | Prior

    def _check(self) -> None:
        checks.instance("prior", self.prior, (str, Prior), "the name of a part, or a goatviz Prior")

    def begin(self, call: AttentionCall, batch: int, heads: Tensor) -> Step:
        prior, count = self.prior, call.shape[1]
        if isinstance(prior, str):
            parts = {} if call.prior is None else call.prior.components()
            if prior not in parts:
                raise ValueError(
                    f"prior must be a part of this layer's prior ({', '.join(parts) or 'none'}), "
                    f"got {prior!r}"
                )
            prior = parts[prior]
        if count % prior.num_heads:
            raise ValueError(
                f"prior must have 1 or {call.kv_heads} or {count} heads, got {prior.num_heads}"
            )
        group = heads.cpu() // (count // prior.num_heads)

        def step(block: Block) -> Block:
            query = call.query_pos[block.rows.cpu()]
            values = prior.log_prior(query, call.key_pos)[group].to(block.scores)
            return block._replace(log_prior=block.log_prior - values)

        return step


@torch.no_grad()
def changed_output(call: AttentionCall, output: Tensor, changes: Sequence[Change]) -> Tensor:
    """What a kernel would have returned with changed plans in some heads.

    Parameters
    ----------
    call : AttentionCall
        The call, with its values.
    output : Tensor
        What the kernel returned, shape (batch, query heads, n_queries, d_v).
    changes : sequence of Change
        Applied one after the other.

    Returns
    -------
    Tensor
        Like `output`; heads without a change, and queries without a key, keep every bit.

    Raises
    ------
    ValueError
        If a change does not fit the call.

    Examples
    --------
    >>> q = k = torch.zeros(1, 1, 3, 2)
    >>> v = torch.tensor([[[[1.0], [2.0], [4.0]]]])
    >>> call = AttentionCall.from_tensors(q, k, v=v)
    >>> changed_output(call, torch.zeros(1, 1, 3, 1), [Hide([0])]).flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    count = call.shape[1]
    # In the order of the block's heads, and each once.
    each = [
        torch.arange(count)
        if one.heads is None
        else torch.tensor(checks.places("heads", one.heads, count), dtype=torch.long).unique()
        for one in changes
    ]
    heads = torch.cat([torch.zeros(0, dtype=torch.long), *each]).unique()
    result = output.clone()
    if not len(heads):
        return result
    kv = heads // (count // call.kv_heads)
    rows = max(1, min(_ROWS, _PAIRS // (len(heads) * call.shape[3])))
    has_keys = call.visibility.count() > 0
    for b in range(call.shape[0]):
        seen = entry_of(has_keys, b).expand(count, -1)[heads].unsqueeze(-1).to(output.device)
        steps = [
            (torch.searchsorted(heads, at), change.begin(call, b, at.to(call.device)))
            for change, at in zip(changes, each, strict=True)
        ]
        values = call.v[b].to(call.dtype)[kv]
        for start in range(0, call.shape[2], rows):
            before = _block(call, b, heads, range(call.shape[2])[start : start + rows])
            block = before
            for at, step in steps:
                block = _put(block, at, step(_take(block, at)))
            changed = (_with_keys(block, before).weights() @ values).to(output)
            place = slice(start, start + rows)
            unseen = output[b, heads, place]
            result[b, heads, place] = torch.where(seen[:, place], changed, unseen)
    return result


@torch.no_grad()
def changed_call(
    call: AttentionCall, batch: int, head: int, changes: Sequence[Change]
) -> AttentionCall:
    """One head of a call, with the plan that `changed_output` applies.

    Parameters
    ----------
    call : AttentionCall
        The call, with its queries and keys.
    batch, head : int
        Numbers of the sequence and of the query head.
    changes : sequence of Change
        Applied one after the other.

    Returns
    -------
    AttentionCall
        A call of one sequence and one head, with a dense log-prior: 4 or 8 bytes a pair.

    Raises
    ------
    ValueError
        If a change does not fit the call.

    Examples
    --------
    >>> q = k = torch.zeros(1, 1, 3, 2)
    >>> call = changed_call(AttentionCall.from_tensors(q, k), 0, 0, [Hide([0])])
    >>> call.plan().weights[2].tolist()
    [0.0, 0.5, 0.5]
    """
    heads = torch.tensor([checks.index("head", head, call.shape[1])])
    changes = [one for one in changes if one.heads is None or head in one.heads]
    steps = [one.begin(call, batch, heads.to(call.device)) for one in changes]
    log_priors, columns = [], []
    step = max(1, min(_ROWS, _PAIRS // call.shape[3]))
    for start in range(0, call.shape[2], step):
        before = _block(call, batch, heads, range(call.shape[2])[start : start + step])
        block = before
        for change in steps:
            block = change(block)
        log_priors.append(_with_keys(block, before).log_prior)
        columns.append(block.column)
    log_prior, column = torch.cat(log_priors, 1)[None], torch.cat(columns, 1)[None]
    # c tanh(s / c) / tau, of which the first factor is the new cap and s / tau the new score.
    tau = math.prod(one.tau for one in changes if isinstance(one, Temper))
    at, kv = slice(batch, batch + 1), head // (call.shape[1] // call.kv_heads)
    mask = call.query_mask
    return replace(
        call,
        shape=(1, 1, *call.shape[2:]),
        kv_heads=1,
        scale=call.scale / tau,
        softcap=None if call.softcap is None else call.softcap / tau,
        visibility=Visibility.from_mask(log_prior > -math.inf),
        q=call.q[at, head : head + 1],
        k=call.k[at, kv : kv + 1],
        v=None if call.v is None else call.v[at, kv : kv + 1],
        prior=None,
        bias=log_prior,
        biased=True,
        sink=column.double() if bool(column.isfinite().all()) else None,
        query_mask=None if mask is None else entry_of(mask, batch)[None],
    )


def _with_keys(block: Block, before: Block) -> Block:
    """The block, with rows that have lost all of their keys restored."""
    keyless = (block.log_prior.amax(-1) == -math.inf).unsqueeze(-1)
    if not bool(keyless.any()):
        return block
    return block._replace(
        scores=torch.where(keyless, before.scores, block.scores),
        log_prior=torch.where(keyless, before.log_prior, block.log_prior),
    )


def _block(call: AttentionCall, batch: int, heads: Tensor, rows: range) -> Block:
    """Rows of some heads before any change, in the precision of statistics."""
    at = slice(None) if len(heads) == call.shape[1] else heads.tolist()
    parts = call.logits(batch, at, slice(rows.start, rows.stop), lanes=True, dtype=call.dtype)
    hidden = ~parts.allowed
    column = parts.scores.new_full((len(heads), len(rows)), -math.inf)
    if call.sink is not None:
        column = call.sink_logits(batch, slice(None), slice(rows.start, rows.stop))
        column = column[heads.to(column.device)].to(parts.scores)
    return Block(
        torch.arange(rows.start, rows.stop, device=call.device),
        parts.scores,
        parts.log_prior.masked_fill(hidden, -math.inf),
        column,
    )


def _take(block: Block, at: Tensor) -> Block:
    if len(at) == len(block.scores):
        return block
    return Block(block.rows, *(part[at] for part in block[1:]))


def _put(block: Block, at: Tensor, part: Block) -> Block:
    if len(at) == len(block.scores):
        return part
    parts = []
    for old, new in zip(block[1:], part[1:], strict=True):
        old = old.clone()
        old[at] = new
        parts.append(old)
    return Block(block.rows, *parts)


def _check_keys(call: AttentionCall, keys: Sequence[int]) -> None:
    """Raise a ValueError for keys beyond the end of a whole text; decoding may yet reach them."""
    count = call.shape[3] + call.gone
    if call.shape[2] == call.shape[3] and max(keys, default=0) >= count:
        raise ValueError(f"keys must be tokens of the text, 0 .. {count - 1}, got {list(keys)}")


def _chosen_keys(call: AttentionCall, batch: int, keys: Sequence[int]) -> Tensor:
    """Which keys of the call are the given tokens of the text, booleans, shape (n_keys,)."""
    mask = call.query_mask
    if mask is not None and call.shape[2] == call.shape[3]:
        if not bool(entry_of(mask, batch)[0]):
            raise ValueError(
                "keys are tokens of the text, but this input is padded on the left, so that key 0 "
                "is padding"
            )
    places = [key - call.gone for key in keys if 0 <= key - call.gone < call.shape[3]]
    chosen = torch.zeros(call.shape[3], dtype=torch.bool, device=call.device)
    chosen[places] = True
    return chosen


def _lags(call: AttentionCall) -> Callable[[Tensor], Tensor]:
    """A function of rows: the lags of these queries from all keys, in tokens."""
    query, key = (at[:, 0].to(call.device) for at in (call.query_pos, call.key_pos))
    return lambda rows: query[rows].unsqueeze(-1) - key


def _whole(call: AttentionCall, change: str) -> None:
    if call.shape[2] != call.shape[3]:
        raise ValueError(
            f"{change} needs whole sequences, got {call.shape[2]} queries over {call.shape[3]} "
            "keys (cached decoding, or cross-attention)"
        )
