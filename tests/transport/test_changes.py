"""Changed plans against plain float64 formulas, written row by row."""

import math

import pytest
import torch

from goatviz.priors import ALiBiPrior, KeyTablePrior, LagTablePrior
from goatviz.transport import (
    Ablate,
    AttentionCall,
    Cap,
    HeavyHitters,
    Hide,
    SinkColumn,
    Streaming,
    Temper,
)
from goatviz.transport.changes import changed_call, changed_output

LENGTH, HEADS = 40, 4


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def call_of(**options):
    q, k, v = (draw(2, heads, LENGTH, 8, seed=heads + i) for i, heads in enumerate((HEADS, 2, 2)))
    return AttentionCall.from_tensors(q, k, v=v, **options)


#: A plain call, and one with everything that an AttentionCall can hold.
CALLS = {
    "plain": {},
    "rich": {
        "prior": ALiBiPrior(2),
        "window": 25,
        "softcap": 3.0,
        "sink": draw(HEADS, seed=9),
        "mask": torch.arange(LENGTH).expand(2, -1) < torch.tensor([[LENGTH], [30]]),
        "query_mask": torch.arange(LENGTH).expand(2, -1) < torch.tensor([[LENGTH], [30]]),
    },
}
TABLE = KeyTablePrior(draw(HEADS, LENGTH, seed=5)) + LagTablePrior(draw(1, LENGTH, seed=6))


def row_of(call, batch, head, query):
    """Scores, log-prior (-inf where forbidden) and the column's logit of one row."""
    parts = call.logits(batch, head, slice(query, query + 1))
    log_prior = torch.where(parts.allowed, parts.log_prior, -math.inf)[0]
    column = torch.tensor(-math.inf) if call.sink is None else call.sink[head]
    return parts.scores[0], log_prior, column.double()


def weights_of(scores, log_prior, column):
    """The plan of one row over its keys, without the column."""
    logits = torch.cat([scores + log_prior, column[None]])
    return (logits - logits.logsumexp(0)).exp()[:-1]


def expected(call, change, batch, head):
    """The output of one head under a change, from its definition."""
    rows, mass = [], torch.zeros(LENGTH, dtype=torch.float64)
    alive = torch.ones(LENGTH, dtype=torch.bool)
    importance, count = importances(call, batch, head)
    for i in range(LENGTH):
        scores, log_prior, column = before = row_of(call, batch, head, i)
        lag = i - torch.arange(LENGTH)
        match change:
            case Hide(keys="sinks"):
                hidden = (importance > change.threshold) & (count >= change.min_observers)
                log_prior = torch.where(hidden, -math.inf, log_prior)
            case Hide():
                log_prior = log_prior.clone()
                log_prior[list(change.keys)] = -math.inf
            case Cap():
                weights = weights_of(scores, log_prior, column)
                capped = torch.zeros(LENGTH, dtype=torch.bool)
                capped[list(change.keys)] = True
                share = weights[capped].sum()
                if change.mass < share < 1:
                    odds = change.mass / (1 - change.mass) / (share / (1 - share))
                    log_prior = log_prior + capped * odds.log()
            case SinkColumn(logit=None):
                column = torch.tensor(-math.inf, dtype=torch.float64)
            case SinkColumn():
                each = change.logit if isinstance(change.logit, tuple) else [change.logit] * HEADS
                column = torch.tensor(each[head], dtype=torch.float64)
            case Streaming():
                kept = (lag < change.window) | (torch.arange(LENGTH) < change.sinks)
                log_prior = torch.where(kept, log_prior, -math.inf)
            case HeavyHitters():
                log_prior = torch.where(alive, log_prior, -math.inf)
                mass = mass + weights_of(scores, log_prior, column).nan_to_num(0.0)
                older = (lag >= change.recent) & alive & (log_prior > -math.inf)
                leaving = mass.masked_fill(~older, math.inf).argsort()
                alive[leaving[: max(int(older.sum()) - change.heavy, 0)]] = False
            case Temper():
                scores = scores / change.tau
            case Ablate():
                prior = change.prior
                prior = call.prior.components()[prior] if isinstance(prior, str) else prior
                at = head // (HEADS // prior.num_heads)
                log_prior = log_prior - prior.log_prior([i], range(LENGTH))[at, 0]
        if not (log_prior > -math.inf).any():
            scores, log_prior, _ = before
        rows.append(weights_of(scores, log_prior, column) @ call.v[batch, head // 2])
    return torch.stack(rows)


def importances(call, batch, head):
    """Mean mass of each key over the real queries that can use it, and how many those are."""
    total, count = torch.zeros(LENGTH, dtype=torch.float64), torch.zeros(LENGTH)
    for i in range(LENGTH):
        if call.query_mask is not None and not call.query_mask[batch, i]:
            continue
        row = row_of(call, batch, head, i)
        total += weights_of(*row).nan_to_num(0.0)
        count += row[1] > -math.inf
    return total / count, count


CHANGES = {
    "hide": Hide([0, 3]),
    "sinks": Hide("sinks", threshold=0.08, min_observers=4),
    "cap": Cap(0.02, [0, 1]),
    "column": SinkColumn(0.5),
    "columns": SinkColumn([0.5, -1.0, 2.0, 3.0]),
    "no column": SinkColumn(None),
    "streaming": Streaming(6, sinks=2),
    "window": Streaming(1, sinks=0),
    "heavy": HeavyHitters(heavy=3, recent=5),
    "temper": Temper(2.5),
    "table": Ablate(TABLE),
}


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", CHANGES)
def test_definition(kind, name):
    call, change = call_of(**CALLS[kind]), CHANGES[name]
    kernel = draw(2, HEADS, LENGTH, 8, seed=7)
    output = changed_output(call, kernel, [change])
    for batch in range(2):
        for head in range(HEADS):
            seen = call.has_keys(batch, head)
            wanted = expected(call, change, batch, head)
            torch.testing.assert_close(output[batch, head][seen], wanted[seen])
            # The same plan as a call of its own.
            changed = changed_call(call, batch, head, [change])
            weights = changed.plan().weights[seen]
            values = call.v[batch, head // 2].double()
            torch.testing.assert_close(weights @ values, wanted[seen], atol=1e-5, rtol=1e-5)
            # A query that sees no key keeps what the kernel made of it.
            assert torch.equal(output[batch, head][~seen], kernel[batch, head][~seen])


def test_part_of_a_prior():
    call = call_of(prior=ALiBiPrior(2))
    name = call.prior.name
    without = changed_output(call, call.v.repeat_interleave(2, 1), [Ablate(name)])
    plain = changed_output(call_of(), call.v.repeat_interleave(2, 1), [Temper(1.0)])
    torch.testing.assert_close(without, plain)


def test_heads_and_order():
    call, kernel = call_of(), draw(2, HEADS, LENGTH, 8, seed=7)
    output = changed_output(call, kernel, [Hide([0], heads=[2]), Temper(3.0, heads=[3, 2])])
    assert torch.equal(output[:, :2], kernel[:, :2])
    both = changed_output(call, kernel, [Hide([0]), Temper(3.0)])
    torch.testing.assert_close(output[:, 2], both[:, 2])
    torch.testing.assert_close(output[:, 3], changed_output(call, kernel, [Temper(3.0)])[:, 3])


def test_a_changed_call_keeps_heads_without_a_change_and_the_order():
    call = call_of(softcap=3.0)
    hidden = changed_call(call, 1, 2, [Hide([0], heads=[2]), Temper(3.0, heads=[3, 2])])
    both = changed_call(call, 1, 2, [Hide([0]), Temper(3.0)])
    torch.testing.assert_close(hidden.plan().weights, both.plan().weights)
    scores = call.logits(1, 2).scores
    torch.testing.assert_close(both.logits().scores, scores / 3)
    same = changed_call(call, 1, 0, [Hide([0], heads=[2])])
    torch.testing.assert_close(same.plan().weights, call.plan(1, 0).weights)
    with pytest.raises(ValueError, match="head must be an integer in 0 .. 3, got 4"):
        changed_call(call, 0, 4, [])


@pytest.mark.parametrize("heads", [[3, 2, 1, 0], [2, 2], [3, 0, 3]])
def test_heads_in_any_order_and_named_twice(heads):
    call, kernel = call_of(**CALLS["rich"]), draw(2, HEADS, LENGTH, 8, seed=7)
    for change in (SinkColumn, Ablate):
        given = [0.5, -1.0, 2.0, 3.0] if change is SinkColumn else TABLE
        output = changed_output(call, kernel, [change(given, heads=heads)])
        plain = changed_output(call, kernel, [change(given)])
        for head in range(HEADS):
            assert torch.equal(output[:, head], (plain if head in heads else kernel)[:, head])


def test_a_query_keeps_its_only_key():
    call = call_of()
    output = changed_output(call, torch.zeros(2, HEADS, LENGTH, 8), [Hide([0])])
    torch.testing.assert_close(output[:, :, 0], call.v.repeat_interleave(2, 1)[:, :, 0].float())


def test_blocks_of_rows_do_not_matter(monkeypatch):
    call, kernel = call_of(**CALLS["rich"]), torch.zeros(2, HEADS, LENGTH, 8, dtype=torch.float64)
    changes = [HeavyHitters(3, 5), Hide("sinks", threshold=0.1, min_observers=4)]
    whole = changed_output(call, kernel, changes)
    monkeypatch.setattr("goatviz.transport.changes._ROWS", 7)
    torch.testing.assert_close(changed_output(call, kernel, changes), whole)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Hide([-1]), ValueError, "keys must be"),
        (lambda: Hide(0), TypeError, "keys must be a list of integers, got 0"),
        (lambda: Hide("first"), TypeError, "keys must be a list of integers, got 'first'"),
        (lambda: Hide("sinks", threshold=1.0), ValueError, "threshold must be"),
        (lambda: Cap(0.0), ValueError, "mass must be"),
        (lambda: Cap("0.3"), TypeError, "mass must be"),
        (lambda: SinkColumn("0"), TypeError, "logit must be"),
        (lambda: SinkColumn(math.nan), ValueError, "logit must be"),
        (lambda: Streaming(0), ValueError, "window must be"),
        (lambda: Streaming(4, sinks=-1), ValueError, "sinks must be"),
        (lambda: HeavyHitters(-1, 4), ValueError, "heavy must be"),
        (lambda: Temper(0), ValueError, "tau must be"),
        (lambda: Ablate(3), TypeError, "prior must be the name of a part, or a goatviz Prior"),
        (lambda: Hide([0], heads=1), TypeError, "heads must be a list of integers, got 1"),
    ],
)
def test_bad_changes(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Hide([0], heads=[HEADS]), "heads must be an integer in 0 .. 3, got 4"),
        (Hide([0, LENGTH]), r"keys must be tokens of the text, 0 .. 39, got \[0, 40\]"),
        (Cap(0.3, [LENGTH]), r"keys must be tokens of the text, 0 .. 39, got \[40\]"),
        (SinkColumn([1.0, 2.0]), "logit must be one number, or one for each of 4 heads, got 2"),
        (Ablate("sink"), r"prior must be a part of this layer's prior \(none\), got 'sink'"),
        (Ablate(ALiBiPrior(3)), "prior must have 1 or 2 or 4 heads, got 3"),
    ],
)
def test_changes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        changed_output(call_of(), torch.zeros(2, HEADS, LENGTH, 8), [change])


@pytest.mark.parametrize("change", [HeavyHitters(3, 4), Hide("sinks")])
def test_sequences_must_be_whole(change):
    q, k = draw(1, HEADS, 1, 8), draw(1, 2, LENGTH, 8)
    call = AttentionCall.from_tensors(q, k, v=k)
    with pytest.raises(ValueError, match="whole sequences, got 1 queries over 40 keys"):
        changed_output(call, q, [change])


def test_left_padding_has_no_first_token():
    mask = torch.arange(LENGTH).expand(2, -1) >= 3
    call = call_of(mask=mask, query_mask=mask)
    with pytest.raises(ValueError, match="padded on the left"):
        changed_output(call, torch.zeros(2, HEADS, LENGTH, 8), [Hide([0])])
