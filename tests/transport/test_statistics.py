"""Statistics without the plan: every implementation equals the dense float64 definition."""

import math
import random
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from goatviz.attention import attention_plan
from goatviz.models import goat_prior
from goatviz.priors import ALiBiPrior, BucketPrior, SpectralPrior, UniformPrior
from goatviz.transport import (
    CHEAP_STATISTICS,
    ROW_STATISTICS,
    AttentionCall,
    blockwise,
    incoming_mass,
    row_statistics,
    solve_rows,
)
from goatviz.transport.statistics import all_of


def random_prior(choice, heads):
    prior = None
    if choice < 0.2:
        prior = ALiBiPrior(heads)
    elif choice < 0.5:
        prior = goat_prior(heads, rank=3, sink_rank=2, training_length=64)
        for name, parameter in prior.named_parameters():
            if "raw_slope" in name:
                torch.nn.init.uniform_(parameter, -6.0, -0.5)
            else:
                torch.nn.init.normal_(parameter, std=0.7)
    elif choice < 0.6:
        prior = BucketPrior(heads)
        torch.nn.init.normal_(prior.table)
    elif choice < 0.7:
        prior = SpectralPrior(1, rank=2)
        torch.nn.init.normal_(prior.alpha)
    return None if prior is None else prior.double()


def random_mask(pick, batch, heads, n_queries, n_keys):
    choice = pick.random()
    if choice < 0.3:
        return torch.rand(batch, n_keys) < 0.7
    if choice < 0.4:
        return torch.rand(1, pick.choice([1, heads]), n_queries, n_keys) < 0.7
    if choice < 0.5:
        mask = torch.randn(batch, 1, n_queries, n_keys)
        return mask.masked_fill(torch.rand_like(mask) < 0.2, -math.inf)
    if choice < 0.6:
        mask = torch.ones(batch, n_keys, dtype=torch.bool)
        mask[0, : pick.randint(0, n_keys - 1)] = False
        return mask
    return None


def random_case(seed):
    torch.manual_seed(seed)
    pick = random.Random(seed)
    batch, kv_heads = pick.choice([1, 2]), pick.choice([1, 2])
    heads = kv_heads * pick.choice([1, 2])
    n_keys = pick.randint(1, 300)
    n_queries = pick.choice([n_keys, pick.randint(1, n_keys)])
    d = pick.choice([4, 16, 33])
    q = torch.randn(batch, heads, n_queries, d) * pick.choice([0.3, 1, 3])
    k = torch.randn(batch, kv_heads, n_keys, d)
    problem = {
        "causal": pick.random() < 0.7,
        "window": pick.choice([None, None, 1, 5, 100]),
        "mask": random_mask(pick, batch, heads, n_queries, n_keys),
        "prior": random_prior(pick.random(), kv_heads),
        "sink": torch.randn(heads) if pick.random() < 0.3 else None,
        "softcap": pick.choice([None, None, None, 5.0]),
    }
    query_mass = None
    if pick.random() < 0.5:
        query_mass = torch.rand(batch, n_queries) * (torch.rand(batch, n_queries) < 0.8)
    if problem["sink"] is not None and seed % 3:
        # A column of each query, of each sequence or of all.
        generator = torch.Generator().manual_seed(seed)
        each = torch.randn(pick.choice([1, batch]), heads, n_queries, generator=generator)
        problem["sink"] = problem["sink"][:, None] + each
    keys = sorted({0, n_keys // 2, n_keys - 1})
    return q, k, problem, {"keys": keys, "recent": pick.choice([1, 7, 128])}, query_mass


def check(found, wanted, tolerance, what, unit=1.0):
    found, wanted = found.double(), wanted.double()
    assert torch.equal(found.isnan(), wanted.isnan()), f"{what}: NaN in other places"
    error = ((found - wanted).abs() / (unit + wanted.abs())).nan_to_num(0.0)
    assert float(error.max()) < tolerance, f"{what}: off by {float(error.max()):.1e}"


def check_rows(found, wanted, tolerance, impl):
    for name, value in found.asked().items():
        unit = 1.0
        if name == "lag_mean":
            # It may cancel to nothing between keys on both sides: its unit is the spread.
            unit = 1.0 + wanted.lag_std.nan_to_num(0.0)
        if impl == "fused" and name in ("entropy", "expected_log_prior", "kl_to_prior"):
            # Differences of kernel outputs: their unit is the size of these.
            unit = 1.0 + wanted.expected_score.abs().nan_to_num(0.0)
        check(value, getattr(wanted, name), tolerance, f"{impl} {name}", unit)


@pytest.mark.parametrize("seed", range(200))
def test_every_implementation_is_the_definition(seed):
    q, k, problem, options, query_mass = random_case(seed)
    exact = {**problem, "impl": "reference"}
    wanted = row_statistics(q.double(), k.double(), **exact, **options)
    mass = incoming_mass(q.double(), k.double(), query_mass=query_mass, **exact)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        x, y = q.to(dtype), k.to(dtype)
        for impl, names in (("blockwise", ROW_STATISTICS), ("fused", CHEAP_STATISTICS)):
            chosen = {**problem, "impl": impl}
            try:
                found = row_statistics(x, y, **chosen, **options, statistics=names)
            except ValueError as error:
                assert impl == "fused" and "use impl='blockwise'" in str(error)
                continue
            assert found.impl == impl and found.log_normaliser.dtype == dtype
            assert torch.equal(found.visible, wanted.visible)
            check_rows(found, wanted, tolerance, impl)
            share = incoming_mass(x, y, query_mass=query_mass, **chosen)
            check(share.mass, mass.mass, tolerance, f"{impl} incoming mass")
            assert torch.equal(share.observers, mass.observers)


@pytest.mark.parametrize("seed", range(200, 240))
def test_rows_that_are_swept_twice_are_the_definition_too(seed, monkeypatch):
    monkeypatch.setattr(blockwise, "WIDEST_ROW", 16)
    monkeypatch.setattr(blockwise, "_BLOCK_CPU", (24 * 40, 24))
    q, k, problem, options, query_mass = random_case(seed)
    wanted = row_statistics(q.double(), k.double(), **problem, impl="reference", **options)
    mass = incoming_mass(q.double(), k.double(), query_mass=query_mass, **problem, impl="reference")
    found = row_statistics(q, k, **problem, impl="blockwise", **options)
    check_rows(found, wanted, 1e-5, "blockwise")
    share = incoming_mass(q, k, query_mass=query_mass, **problem, impl="blockwise")
    check(share.mass, mass.mass, 1e-5, "blockwise incoming mass")


def test_fused_is_taken_where_it_applies_and_the_result_says_so():
    q = k = torch.randn(1, 2, 40, 8)
    far = torch.randn(1, 2, 2048, 8)
    assert row_statistics(q, k, statistics=CHEAP_STATISTICS).impl == "blockwise"
    assert row_statistics(far, far, statistics=CHEAP_STATISTICS).impl == "fused"
    # Copies of all keys for a few queries would take longer than their blocks.
    assert row_statistics(far[:, :, 1:], far, statistics=["entropy"]).impl == "blockwise"
    assert row_statistics(far, far).impl == "blockwise"
    steep = ALiBiPrior(2, slopes=[4.0, 1.0])
    assert row_statistics(far, far, statistics=["entropy"], prior=steep).impl == "blockwise"
    assert row_statistics(far, far, statistics=["entropy"], window=9).impl == "blockwise"
    assert incoming_mass(far, far).impl == "blockwise"


@pytest.mark.parametrize(
    ("problem", "what"),
    [
        ({"window": 3}, "a window"),
        ({"softcap": 2.0}, "a softcap"),
        ({"prior": BucketPrior(1)}, "a prior without lanes"),
        ({"prior": ALiBiPrior(1, slopes=[9.0])}, "a prior of 14 nats"),
        ({"mask": torch.rand(1, 1, 4, 4)}, "an additive mask"),
        ({"mask": torch.eye(4, dtype=torch.bool)[None, None], "causal": False}, "a window"),
        ({"query_pos": torch.tensor([1.0, 1.0, 2.0, 3.0])}, "neither causal nor open"),
    ],
)
def test_fused_says_what_it_cannot_do(problem, what):
    q = k = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=f"impl='fused' cannot do .*{what}"):
        row_statistics(q, k, statistics=["entropy"], impl="fused", **problem)
    assert row_statistics(q, k, statistics=["entropy"], **problem).impl == "blockwise"
    with pytest.raises(ValueError, match="impl='fused' cannot do lag_mean"):
        row_statistics(q, k, impl="fused", statistics=["lag_mean"])


def test_the_definition_is_the_transport_plan():
    q, k = (torch.randn(1, 2, 9, 6, dtype=torch.float64) for _ in range(2))
    prior = goat_prior(2, rank=2, sink_rank=1, training_length=9).double()
    plan = attention_plan(q, k, prior=prior)
    for impl in ("reference", "blockwise"):
        rows = row_statistics(q, k, prior=prior, impl=impl, keys=range(9))
        torch.testing.assert_close(rows.entropy, plan.entropy)
        torch.testing.assert_close(rows.kl_to_prior, plan.kl_to_prior)
        torch.testing.assert_close(rows.expected_score, -plan.transport_cost)
        torch.testing.assert_close(rows.content_range, plan.content_range)
        torch.testing.assert_close(rows.key_mass, plan.weights)
        torch.testing.assert_close(rows.largest_weight, plan.weights.amax(-1))
        share = incoming_mass(q, k, prior=prior, impl=impl)
        torch.testing.assert_close(share.mass, plan.weights.sum(-2))


def test_kl_to_a_uniform_prior_is_what_entropy_lacks():
    q = k = torch.randn(1, 1, 50, 8)
    rows = row_statistics(q, k)
    torch.testing.assert_close(rows.kl_to_prior, rows.visible.log() - rows.entropy)
    same = row_statistics(q, k, prior=UniformPrior())
    torch.testing.assert_close(same.kl_to_prior, rows.kl_to_prior)


def test_the_extra_column_is_a_key_of_its_own():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    sink = torch.tensor([0.7])
    rows = row_statistics(q, k, sink=sink, causal=False, keys=range(5))
    scores = torch.cat([q[0, 0] @ k[0, 0].mT / 2, sink.expand(5, 1)], dim=-1)
    weights = scores.softmax(-1)
    torch.testing.assert_close(rows.sink_mass[0, 0], weights[:, -1])
    torch.testing.assert_close(rows.key_mass[0, 0], weights[:, :5])
    torch.testing.assert_close(rows.entropy[0, 0], solve_rows(scores.double()).entropy.float())
    total = rows.key_mass.sum(-1) + rows.sink_mass
    torch.testing.assert_close(total, torch.ones_like(total))


def test_mass_is_conserved():
    q, k = torch.randn(2, 4, 70, 8), torch.randn(2, 2, 70, 8)
    for impl in ("blockwise", "fused"):
        share = incoming_mass(q, k, impl=impl)
        torch.testing.assert_close(share.mass.sum(-1), torch.full((2, 4), 70.0))
        assert share.observers.flatten().tolist() == list(range(70, 0, -1))
        assert bool((share.importance <= 1).all())


def test_one_pass_yields_both():
    q, k = torch.randn(1, 2, 60, 8), torch.randn(1, 2, 60, 8)
    rows, share = all_of(AttentionCall.from_tensors(q, k))
    alone = row_statistics(q, k, impl="blockwise")
    for name, value in alone.asked().items():
        same = getattr(rows, name)
        torch.testing.assert_close(value, same, rtol=0, atol=0, equal_nan=True, msg=name)
    assert torch.equal(share.mass, incoming_mass(q, k, impl="blockwise").mass)


def test_a_sharp_head_at_great_length_keeps_its_spread():
    """Mean and spread of the lag do not cancel: a head that looks 3 back, 20,000 tokens in."""
    length, back = 20_000, 3
    index = torch.arange(length, dtype=torch.float64)
    angle = index.unsqueeze(-1) * torch.logspace(0, -4, 16, dtype=torch.float64)
    turned = angle - back * torch.logspace(0, -4, 16, dtype=torch.float64)
    k = 12 * torch.cat([angle.cos(), angle.sin()], -1)
    q = torch.cat([turned.cos(), turned.sin()], -1)[-64:]
    rows = row_statistics(q[None, None].float(), k[None, None].float(), scale=4.0)
    exact = row_statistics(q[None, None], k[None, None], scale=4.0)
    assert float((exact.lag_mean - back).abs().max()) < 1e-3
    torch.testing.assert_close(rows.lag_mean.double(), exact.lag_mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows.lag_std.double(), exact.lag_std, atol=2e-4, rtol=2e-3)


def test_steep_recency_at_great_length():
    length = 20_000
    prior = ALiBiPrior(1, slopes=[0.5]).double()
    q, k = torch.randn(1, 1, 300, 16), torch.randn(1, 1, length, 16)
    found = row_statistics(q, k, prior=prior)
    wanted = row_statistics(q.double(), k.double(), prior=prior, impl="reference")
    check_rows(found, wanted, 2e-5, "blockwise")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    q, k = torch.randn(1, 1, 40, 16).to(dtype), torch.randn(1, 1, 40, 16).to(dtype)
    for impl, names in (("blockwise", ROW_STATISTICS), ("fused", CHEAP_STATISTICS)):
        found = row_statistics(q, k, statistics=names, impl=impl)
        assert found.entropy.dtype == torch.float32
        check_rows(found, row_statistics(q.double(), k.double(), impl="reference"), 1e-5, dtype)


def test_cached_decoding_is_the_last_row():
    q, k = torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    for impl, names in (("blockwise", ROW_STATISTICS), ("fused", CHEAP_STATISTICS)):
        whole = row_statistics(q, k, statistics=names, impl=impl)
        for last in (1, 7):
            part = row_statistics(q[:, :, -last:], k, statistics=names, impl=impl)
            for name, value in part.asked().items():
                full = getattr(whole, name)[:, :, -last:]
                torch.testing.assert_close(value, full, atol=2e-5, rtol=1e-5)


def test_a_window_of_the_plan():
    q, k, sink = torch.randn(1, 4, 600, 8), torch.randn(1, 2, 600, 8), torch.randn(4)
    prior = goat_prior(2, rank=2, sink_rank=1, training_length=64)
    keep = torch.ones(1, 600, dtype=torch.bool)
    keep[0, :3] = False
    call = AttentionCall.from_tensors(q, k, prior=prior, mask=keep, sink=sink)
    whole = call.plan(head=3)
    window = call.plan(head=3, queries=slice(500, 520), keys=slice(4, 9))
    torch.testing.assert_close(window.weights, whole.weights[500:520, 4:9])
    assert bool(whole.weights[:3].isnan().all()) and not whole.allowed[:3].any()
    total = whole.weights[3:].sum(-1) + whole.sink_weight[3:]
    torch.testing.assert_close(total, torch.ones_like(total))
    rows = row_statistics(q, k, prior=prior, mask=keep, sink=sink, keys=[5])
    torch.testing.assert_close(rows.key_mass[0, 3, 3:, 0].double(), whole.weights[3:, 5])
    with pytest.raises(ValueError, match="non-empty window"):
        call.plan(queries=slice(5, 5))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.count = max(self.count, tensor.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("case", ["cheap", "full", "window", "padding", "goat", "incoming"])
def test_nothing_of_the_size_of_the_plan_is_made(case):
    length = 6000
    q, k = torch.randn(1, 1, length, 8), torch.randn(1, 1, length, 8)
    keep = torch.ones(1, length, dtype=torch.bool)
    keep[0, 50:60] = False
    prior = goat_prior(1, rank=2, sink_rank=1, training_length=64)
    with Largest() as largest:
        if case == "incoming":
            incoming_mass(q, k, impl="blockwise")
            incoming_mass(q, k, impl="fused")
        else:
            row_statistics(
                q,
                k,
                statistics=CHEAP_STATISTICS if case == "cheap" else ROW_STATISTICS,
                impl="fused" if case == "cheap" else "blockwise",
                window=100 if case == "window" else None,
                mask=keep if case == "padding" else None,
                prior=prior if case == "goat" else None,
            )
    assert largest.count < length * length / 15


def test_peak_memory_at_twenty_thousand_tokens():
    code = """
import torch
from goatviz.transport import row_statistics, incoming_mass, CHEAP_STATISTICS
def peak():
    # ru_maxrss would start from the parent's peak and hide everything below it.
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmHWM"].split()[0]) / 1024
small, large = (torch.randn(1, 1, n, 8) for n in (512, 20_000))
def work(x):
    row_statistics(x, x)
    row_statistics(x, x, statistics=CHEAP_STATISTICS, impl="fused")
    incoming_mass(x, x)
work(small)
before = peak()
work(large)
after = peak()
held = torch.ones(2**27)  # 512 MiB: the measure sees what is there
print(after - before, peak() - after)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    grown, seen = map(float, run.stdout.split())
    # The plan would take 1,526 MiB.
    assert grown < 150 and seen > 200


Q = torch.randn(1, 2, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, r"q must have shape \(batch, heads, length, d\)"),
        ({"q": Q.long()}, TypeError, "q must be floating point"),
        ({"q": Q.to("meta")}, ValueError, "q must hold numbers, got a tensor on the meta"),
        ({"q": Q.masked_fill(Q > 1, math.nan)}, ValueError, "q must be finite, got .* NaN"),
        (
            {"q": (Q * 1e6).half(), "k": Q.half()},
            ValueError,
            r"q must be finite, got .* \(float16 overflows above 65,504\)",
        ),
        ({"k": Q[:, :, :, :4]}, ValueError, "q and k must agree in batch and head size"),
        ({"k": Q.double()}, TypeError, "q and k must share a dtype"),
        ({"k": Q.repeat(1, 2, 1, 1)}, ValueError, "q must have a multiple of k's 4 heads, got 2"),
        ({"k": Q[:, :, :2]}, ValueError, "query_pos must be given for 4 queries over 2 keys"),
        ({"prior": 3}, TypeError, "prior must be a goatviz Prior, got int"),
        ({"prior": ALiBiPrior(3)}, ValueError, "prior must have 1 or 2 heads"),
        ({"scale": 0.0}, ValueError, "scale must be a finite number above 0, got 0.0"),
        ({"softcap": -1.0}, ValueError, "softcap must be a finite number above 0"),
        ({"v": Q.long()}, TypeError, "v must be floating point, got torch.int64"),
        ({"v": Q.numpy()}, TypeError, "v must be a Tensor, got ndarray"),
        ({"bias": torch.ones(4, 4).bool()}, TypeError, "bias must be floating point"),
        ({"window": 0}, ValueError, "window must be an integer of at least 1, got 0"),
        ({"recent": 0}, ValueError, "recent must be an integer of at least 1, got 0"),
        ({"keys": [4]}, ValueError, "keys must be an integer in 0 .. 3, got 4"),
        ({"sink": torch.zeros(3)}, ValueError, r"sink must hold finite logits of shape \(2,\)"),
        ({"mask": "all"}, TypeError, "mask must be a Tensor, got str"),
        ({"mask": torch.ones(1, 4)}, TypeError, "must be boolean, got torch.float32"),
        ({"mask": torch.ones(1, 5).bool()}, ValueError, r"mask must have shape \(1, 4\)"),
        ({"mask": torch.ones(4, 4).bool()}, ValueError, r"got \(4, 4\)"),
        ({"mask": torch.ones(1, 3, 4, 4).bool()}, ValueError, "mask must have shape"),
        ({"mask": torch.ones(1, 1, 4, 4).int()}, TypeError, "boolean or floating point"),
        ({"mask": torch.full((1, 1, 4, 4), math.nan)}, ValueError, "must not hold NaN"),
        ({"query_pos": torch.arange(3)}, ValueError, "query_pos must hold 4 positions, got 3"),
        ({"statistics": "entropy"}, TypeError, "statistics must be a list of names"),
        ({"statistics": ["rank"]}, ValueError, "statistics must be among .*; got 'rank'"),
        ({"impl": "flash"}, ValueError, "impl must be one of auto, blockwise"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        row_statistics(**{"q": Q, "k": Q, **arguments})


@pytest.mark.parametrize("impl", ["auto", "blockwise", "reference"])
@pytest.mark.parametrize("recent", [0, -1, 1.5, True])
def test_one_pass_names_a_bad_recent_window(recent, impl):
    with pytest.raises(
        (TypeError, ValueError), match="recent must be an integer of at least 1, got"
    ):
        all_of(AttentionCall.from_tensors(Q, Q), recent=recent, impl=impl)


@pytest.mark.parametrize("mass", [torch.ones(1, 3), torch.tensor([[1.0, -1, 1, 1]])])
def test_bad_query_mass(mass):
    with pytest.raises(ValueError, match="query_mass must"):
        incoming_mass(Q, Q, query_mass=mass)


def test_inputs_stay_as_they_were_and_carry_no_graph():
    q = Q.clone().requires_grad_()
    rows = row_statistics(q, Q)
    assert torch.equal(q.detach(), Q) and not rows.entropy.requires_grad


# --- extreme numbers ---


def all_implementations(q, k, **call):
    """Entropies, weights of the first key and incoming masses: {impl: values or the refusal}."""
    answers = {}
    for impl in ("reference", "blockwise", "fused"):
        try:
            rows = row_statistics(
                q, k, statistics=["entropy", "key_mass"], impl=impl, **call
            ).asked()
            mass = incoming_mass(q, k, impl=impl, **call).mass
            answers[impl] = torch.cat([x.flatten().double() for x in (*rows.values(), mass)])
        except ValueError as error:
            answers[impl] = str(error)
    return answers


def test_products_that_overflow_are_refused_by_name():
    q = torch.full((1, 1, 3, 4), 1e20)
    k = torch.tensor([1e20, 1e19, -1e20]).expand(4, 3).mT[None, None].contiguous()
    answers = all_implementations(q, k)
    assert answers["reference"].tolist() == [0, 0, 0, 1, 1, 1, 3, 0, 0]
    for impl in ("blockwise", "fused"):
        assert "scores below 1e+28, got up to 2.0e+40" in answers[impl]


@pytest.mark.parametrize("size", [1e3, 1e4, 1e5, 1e8, 1e20])
@pytest.mark.parametrize("padded", [False, True])
def test_large_scores_are_right_or_refused(size, padded):
    # Far below 0 and apart by 1 nat, or by as much as float32 tells apart at this size.
    apart = max(1.0, 64 * size * torch.finfo(torch.float32).eps)
    q = torch.ones(1, 1, 3, 1)
    k = -(size + apart * torch.arange(3.0)).view(1, 1, 3, 1)
    options = {"scale": 1.0, "causal": not padded}
    if padded:
        options["mask"] = torch.tensor([[True, True, False]])
    answers = all_implementations(q, k, **options)
    wanted = answers["reference"]
    for impl, largest in (("blockwise", 1e28), ("fused", 2**14)):
        if size + 2 * apart < largest:
            atol = 1e-6 * size if apart == 1 else 1e-6
            torch.testing.assert_close(answers[impl], wanted, rtol=0, atol=atol)
        else:
            assert "scores" in answers[impl], "answered without a word"
