"""The laws of one attention row as a transport problem, and the errors of its inputs."""

import dataclasses
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goatviz.transport import TransportPlan, solve_rows

lawful = settings(deadline=None, derandomize=True, max_examples=40)
seeds = st.integers(0, 2**31 - 1)
log_temperatures = st.floats(-2.0, 2.0)
EPS = torch.finfo(torch.float64).eps


def draw(seed, *, batch=(), masked=True, dtype=torch.float64):
    """Scores, log-prior, mask and source mass of a random problem; key 0 is always allowed."""
    generator = torch.Generator().manual_seed(seed)
    n, m = (int(x) for x in torch.randint(1, 9, (2,), generator=generator))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    scores, log_prior = 3 * normal(*batch, n, m), 2 * normal(*batch, n, m)
    mask = torch.rand(*batch, n, m, generator=generator) < 0.7
    mask[..., 0] = True
    if not masked:
        mask = torch.ones_like(mask)
    mass = 0.1 + torch.rand(*batch, n, generator=generator, dtype=torch.float64).to(dtype)
    return {"scores": scores, "log_prior": log_prior, "mask": mask, "source_mass": mass}


def solve(problem, **changes):
    problem = problem | changes
    return solve_rows(problem.pop("scores"), **problem)


def candidate(problem, log_weights, **changes):
    problem = problem | changes
    return TransportPlan.from_log_weights(log_weights, problem.pop("scores"), **problem)


@lawful
@given(seeds, log_temperatures)
def test_the_optimum_carries_its_certificates(seed, log_tau):
    plan = solve(draw(seed, batch=(2,)), temperature=10**log_tau)
    torch.testing.assert_close(plan.weights.sum(-1), torch.ones_like(plan.temperature))
    assert (plan.kkt_residual <= 4 * EPS * plan.kkt_scale).all()
    assert (plan.duality_gap.abs() <= 32 * EPS * plan.kkt_scale).all()
    torch.testing.assert_close(plan.primal_value, plan.potential, rtol=0, atol=1e-10)
    assert (plan.kl_to_prior >= 0).all()
    assert (plan.entropy >= 0).all()
    assert plan.weights[~plan.allowed].eq(0).all()


@lawful
@given(seeds, log_temperatures)
def test_the_plan_is_the_softmax_of_scores_over_temperature_plus_log_prior(seed, log_tau):
    problem, tau = draw(seed, batch=(2, 3)), 10**log_tau
    logits = problem["scores"] / tau + problem["log_prior"]
    wanted = torch.softmax(logits.masked_fill(~problem["mask"], -math.inf), -1)
    plan = solve(problem, temperature=tau)
    torch.testing.assert_close(plan.weights, wanted, rtol=1e-9, atol=1e-12)
    mass = problem["source_mass"]
    torch.testing.assert_close(plan.coupling, mass[..., None] * plan.weights)
    torch.testing.assert_close(plan.coupling.sum(-1), mass)
    torch.testing.assert_close(plan.incoming_mass, plan.coupling.sum(-2))
    torch.testing.assert_close(plan.incoming_mass.sum(-1), mass.sum(-1))
    torch.testing.assert_close(plan.total_free_energy, (mass * plan.potential).sum(-1))
    assert torch.equal(plan.free_energy, plan.potential)


@lawful
@given(seeds, log_temperatures, st.floats(1e-6, 2.0))
def test_no_candidate_is_cheaper_than_the_potential(seed, log_tau, amount):
    problem, tau = draw(seed), 10**log_tau
    best = solve(problem, temperature=tau)
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(best.scores.shape, generator=generator, dtype=torch.float64)
    log_weights = torch.log_softmax(best.log_weights + amount * noise, -1)
    plan = candidate(problem, log_weights, temperature=tau)
    slack = 32 * EPS * plan.kkt_scale
    assert (plan.primal_value >= best.potential - slack).all()
    # The gap is tau KL(candidate || optimum), here summed on its own.
    ratio = torch.where(best.allowed, log_weights - best.log_weights, 0.0)
    wanted = tau * (log_weights.exp() * ratio).sum(-1)
    torch.testing.assert_close(plan.duality_gap, wanted, rtol=1e-6, atol=float(slack.max()))
    # Wherever it differs from the optimum the optimality condition breaks in proportion.
    spread = torch.where(best.allowed, ratio, 0.0).abs().amax(-1) * tau
    torch.testing.assert_close(plan.kkt_residual, spread, rtol=1e-6, atol=float(slack.max()))
    torch.testing.assert_close(plan.potential, best.potential)


@lawful
@given(seeds, log_temperatures)
def test_the_gradient_of_the_potential_is_minus_the_plan(seed, log_tau):
    problem = draw(seed)
    problem["scores"].requires_grad_()
    plan = solve(problem, temperature=10**log_tau)
    (slope,) = torch.autograd.grad(plan.potential.sum(), problem["scores"])
    torch.testing.assert_close(slope, -plan.weights.detach(), rtol=1e-10, atol=1e-13)


@lawful
@given(seeds, log_temperatures)
def test_a_uniform_prior_makes_relative_entropy_log_n_minus_entropy(seed, log_tau):
    problem = draw(seed)
    plan = solve(problem, log_prior=None, temperature=10**log_tau)
    count = problem["mask"].sum(-1).double()
    torch.testing.assert_close(plan.kl_to_prior, count.log() - plan.entropy, rtol=0, atol=1e-13)
    torch.testing.assert_close(plan.log_prior.exp().sum(-1), torch.ones_like(count))
    assert (plan.margin == torch.where(count == 1, math.inf, 0.0)).all()


@lawful
@given(seeds, st.floats(-50, 50), st.floats(-50, 50))
def test_constants_along_a_row_change_nothing_but_the_potential(seed, up, lift):
    problem = draw(seed)
    plan = solve(problem)
    n = problem["scores"].shape[0]
    ramp = torch.arange(1.0, n + 1, dtype=torch.float64)[:, None]
    moved = solve(
        problem,
        scores=problem["scores"] + up * ramp,
        log_prior=problem["log_prior"] + lift * ramp,
    )
    torch.testing.assert_close(moved.weights, plan.weights, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(moved.log_prior, plan.log_prior, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moved.potential, plan.potential - up * ramp[:, 0])


@lawful
@given(seeds)
def test_a_permutation_of_keys_permutes_the_plan(seed):
    problem = draw(seed, masked=True)
    order = torch.randperm(
        problem["scores"].shape[-1], generator=torch.Generator().manual_seed(seed)
    )
    plan = solve(problem)
    keyed = {name: problem[name][:, order] for name in ("scores", "log_prior", "mask")}
    other = solve(problem, **keyed)
    torch.testing.assert_close(other.weights, plan.weights[:, order])
    torch.testing.assert_close(other.potential, plan.potential)
    torch.testing.assert_close(other.incoming_mass, plan.incoming_mass[order])


@lawful
@given(seeds, st.sampled_from(["mask", "scores", "log_prior"]))
def test_forbidden_keys_are_as_if_they_were_not_there(seed, means):
    problem = draw(seed, masked=False)
    m = problem["scores"].shape[-1]
    keep = torch.arange(m) % 3 != 1
    if means == "mask":
        barred = solve(problem, mask=keep)
    else:
        barred = solve(problem, **{means: problem[means].masked_fill(~keep, -math.inf)})
    keyed = {name: problem[name][:, keep] for name in ("scores", "log_prior", "mask")}
    fewer = solve(problem, **keyed)
    torch.testing.assert_close(barred.weights[:, keep], fewer.weights)
    assert (barred.weights[:, ~keep] == 0).all()
    names = "potential", "transport_cost", "entropy", "kl_to_prior", "content_range", "margin"
    for name in names:
        torch.testing.assert_close(getattr(barred, name), getattr(fewer, name))


@lawful
@given(seeds)
def test_a_batch_is_a_loop(seed):
    problem = draw(seed, batch=(2, 3))
    temperature = 0.5 + torch.rand(2, 3, 1, dtype=torch.float64)
    plan = solve(problem, temperature=temperature)
    names = [
        "weights", "log_weights", "coupling", "potential", "free_energy", "total_free_energy",
        "transport_cost", "entropy", "kl_to_prior", "primal_value", "incoming_mass",
        "kkt_residual", "kkt_scale", "duality_gap", "content_range", "margin", "margin_key",
    ]  # fmt: skip
    for i in range(2):
        for j in range(3):
            part = {name: value[i, j] for name, value in problem.items()}
            one = solve(part, temperature=float(temperature[i, j]))
            for name in names:
                torch.testing.assert_close(
                    getattr(plan, name)[i, j], getattr(one, name), rtol=1e-12, atol=1e-13
                )


def test_low_temperature_gives_the_best_key_and_high_temperature_the_prior():
    problem = draw(3, batch=(4,), masked=True)
    cold, hot = solve(problem, temperature=1e-6), solve(problem, temperature=1e9)
    best = problem["scores"].masked_fill(~problem["mask"], -math.inf).argmax(-1)
    wanted = torch.nn.functional.one_hot(best, problem["scores"].shape[-1]).double()
    torch.testing.assert_close(cold.weights, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(hot.weights, hot.log_prior.exp(), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
@pytest.mark.parametrize("tau", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_extreme_scales_stay_finite_and_certified(dtype, scale, tau):
    generator = torch.Generator().manual_seed(7)
    scores = (2 * torch.rand(3, 16, 16, generator=generator, dtype=torch.float64) - 1) * scale
    log_prior = 3 * torch.randn(16, 16, generator=generator, dtype=torch.float64)
    problem = {
        "scores": scores.to(dtype),
        "log_prior": log_prior.to(dtype),
        "mask": torch.ones(16, 16, dtype=torch.bool).tril(),
    }
    plan = solve(problem, temperature=tau)
    eps = torch.finfo(dtype).eps
    for name in ("weights", "potential", "entropy", "kl_to_prior", "transport_cost"):
        assert torch.isfinite(getattr(plan, name)).all(), name
    assert (plan.kkt_residual <= 4 * eps * plan.kkt_scale).all()
    # The gap is summed without the terms in tau log p, so content range alone sets its rounding.
    assert (plan.duality_gap.abs() <= 64 * eps * plan.content_range).all()

    exact = solve(
        {name: value.double() if name != "mask" else value for name, value in problem.items()},
        temperature=float(plan.temperature[0, 0]),
    )
    torch.testing.assert_close(plan.weights.double(), exact.weights, rtol=1e-4, atol=8 * eps)
    torch.testing.assert_close(
        plan.potential.double(), exact.potential, rtol=0, atol=32 * eps * scale
    )
    torch.testing.assert_close(
        plan.kl_to_prior.double(), exact.kl_to_prior, rtol=256 * eps, atol=1e-30
    )


@pytest.mark.parametrize("tau", [1e-6, 1e-2, 1.0, 30.0, 1e3, 1e6])
def test_relative_entropy_and_potential_match_fifty_digits(tau):
    generator = torch.Generator().manual_seed(11)
    scores = torch.randn(1, 12, generator=generator, dtype=torch.float64)
    log_prior = 2 * torch.randn(1, 12, generator=generator, dtype=torch.float64)
    plan = solve_rows(scores, log_prior=log_prior, temperature=tau)
    with mpmath.workdps(50):
        s = [mpmath.mpf(x) for x in scores[0].tolist()]
        prior = [mpmath.exp(mpmath.mpf(x)) for x in log_prior[0].tolist()]
        prior = [x / mpmath.fsum(prior) for x in prior]
        partition = mpmath.fsum(
            x * mpmath.exp(y / mpmath.mpf(tau)) for x, y in zip(prior, s, strict=True)
        )
        weights = [
            x * mpmath.exp(y / mpmath.mpf(tau)) / partition for x, y in zip(prior, s, strict=True)
        ]
        divergence = mpmath.fsum(p * mpmath.log(p / x) for p, x in zip(weights, prior, strict=True))
        potential = -mpmath.mpf(tau) * mpmath.log(partition)
    assert plan.kl_to_prior.item() == pytest.approx(float(divergence), rel=1e-12)
    assert plan.potential.item() == pytest.approx(float(potential), rel=1e-13)
    assert plan.weights[0].tolist() == pytest.approx([float(p) for p in weights], rel=1e-12)


def test_derivatives_pass_gradcheck():
    # Dense and generic: masks are below, where numeric differences of -inf mean nothing.
    generator = torch.Generator().manual_seed(5)

    def leaf(*shape, shift=0.0):
        value = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (value.abs() + shift if shift else value).requires_grad_()

    inputs = leaf(2, 3, 4), leaf(2, 3, 4), leaf(2, 3, shift=0.5), leaf(2, 3, shift=0.5)
    mask = torch.ones(3, 4, dtype=torch.bool).tril(1)

    def run(scores, log_prior, temperature, mass):
        plan = solve_rows(
            scores, log_prior=log_prior, temperature=temperature, mask=mask, source_mass=mass
        )
        return (
            plan.weights, plan.coupling, plan.potential, plan.total_free_energy,
            plan.transport_cost, plan.entropy, plan.kl_to_prior, plan.primal_value,
            plan.incoming_mass, plan.margin, plan.content_range,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(
        lambda scores: solve_rows(scores, mask=mask).potential, inputs[:1]
    )


@pytest.mark.parametrize("tau", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_finite_whatever_is_masked(tau, dtype):
    problem = draw(21, batch=(2,), dtype=dtype)
    with torch.no_grad():
        problem["scores"][..., 1::3] = -math.inf
        problem["log_prior"][..., 2::3] = -math.inf
    temperature = torch.tensor(tau, dtype=dtype, requires_grad=True)
    leaves = [problem[name].requires_grad_() for name in ("scores", "log_prior", "source_mass")]
    names = [
        "weights", "coupling", "potential", "transport_cost", "entropy", "kl_to_prior",
        "primal_value", "incoming_mass", "duality_gap", "kkt_residual", "kkt_scale",
        "content_range", "total_free_energy",
    ]  # fmt: skip
    for name in names:
        plan = solve(problem, temperature=temperature)
        value = getattr(plan, name)
        assert torch.isfinite(value).all(), name
        slopes = torch.autograd.grad(
            value.square().sum(), [*leaves, temperature], allow_unused=True
        )
        for slope in slopes:
            assert slope is None or torch.isfinite(slope).all(), name
        for slope in slopes[:2]:
            assert slope is None or (slope[~plan.allowed] == 0).all(), name


def test_derivatives_of_a_candidate_with_zeros_are_finite():
    weights = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    for name in ("entropy", "kl_to_prior", "transport_cost", "duality_gap"):
        plan = TransportPlan.from_weights(weights, scores)
        (slope,) = torch.autograd.grad(getattr(plan, name).sum(), weights)
        assert torch.isfinite(slope).all(), name
    assert plan.entropy.item() == pytest.approx(math.log(2))
    assert plan.kl_to_prior.item() == pytest.approx(math.log(1.5))
    # An allowed key with no weight is never optimal: the condition there is infinitely violated.
    assert plan.kkt_residual.item() == math.inf
    assert 0 < plan.duality_gap.item() < math.inf


def test_a_replaced_weight_is_seen_by_every_certificate():
    plan = solve(draw(2))
    shifted = torch.log_softmax(plan.log_weights + 0.1 * torch.arange(plan.n_keys), -1)
    other = dataclasses.replace(plan, log_weights=shifted)
    assert other.kkt_residual.max() > 1e-2
    assert other.duality_gap.max() > 1e-5
    assert not torch.equal(other.kl_to_prior, plan.kl_to_prior)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.scores = plan.scores


def test_margin_names_the_key_the_prior_prefers():
    log_prior = torch.tensor([[4.0, 1.0, 2.0], [0.0, 7.0, 9.0], [1.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    plan = solve_rows(torch.zeros(3, 3), log_prior=log_prior, mask=mask)
    torch.testing.assert_close(plan.margin, torch.tensor([2.0, 7.0, 0.0]))
    assert plan.margin_key.tolist() == [0, 1, 0]
    assert solve_rows(torch.zeros(1, 1)).margin.item() == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_and_returned_in_float32(dtype):
    scores = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    log_prior = torch.linspace(-2, 2, 4).to(dtype)
    plan = solve_rows(scores, log_prior=log_prior)
    assert plan.weights.dtype == torch.float32
    wide = solve_rows(scores.float(), log_prior=log_prior.float())
    assert torch.equal(plan.weights, wide.weights)
    TransportPlan.from_weights(wide.weights.to(dtype), scores, log_prior=log_prior)


def test_dtype_follows_scores_and_prior_and_never_the_temperature():
    scores = torch.zeros(2, 2)
    assert solve_rows(scores, temperature=np.float64(2.0)).weights.dtype == torch.float32
    assert solve_rows(scores, temperature=torch.tensor(2.0).double()).weights.dtype == torch.float32
    wide = solve_rows(scores, log_prior=torch.zeros(2, dtype=torch.float64))
    assert wide.weights.dtype == torch.float64


def test_defaults_are_unit_temperature_and_equal_queries():
    plan = solve_rows(torch.zeros(2, 4, 3))
    assert plan.temperature.eq(1).all()
    assert plan.source_mass.eq(0.25).all()
    assert (plan.n_queries, plan.n_keys, plan.batch_shape) == (4, 3, (2,))


def test_each_query_can_have_its_own_temperature():
    scores = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    tau = torch.tensor([0.5, 1.0, 2.0])
    plan = solve_rows(scores, temperature=tau)
    for i, value in enumerate(tau.tolist()):
        one = solve_rows(scores, temperature=value)
        torch.testing.assert_close(plan.weights[:, i], one.weights[:, i])
        torch.testing.assert_close(plan.potential[:, i], one.potential[:, i])


GOOD = torch.zeros(2, 3)
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scores": torch.tensor([[0.0, NAN], [INF, 0.0]])}, ValueError, r"2 values.*\[0, 1\]"),
        ({"scores": torch.tensor([[0.0, INF]])}, ValueError, r"scores must .*1 value .*\[0, 1\]"),
        ({"scores": torch.zeros(3)}, ValueError, "at least two dimensions"),
        ({"scores": torch.zeros(0, 3)}, ValueError, "scores must have at least one query"),
        ({"scores": torch.zeros(3, 0)}, ValueError, "scores must have at least one query"),
        ({"scores": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "scores must .*int64"),
        ({"scores": torch.zeros(2, 3, dtype=torch.complex64)}, TypeError, "scores must .*complex"),
        ({"scores": np.zeros((2, 3))}, TypeError, "scores must .*got ndarray"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive .*got 0 "),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": NAN}, ValueError, "temperature"),
        ({"temperature": INF}, ValueError, "temperature"),
        ({"temperature": 1e-60}, ValueError, "temperature must .*in torch.float32"),
        ({"temperature": torch.tensor([1.0, -2.0])}, ValueError, r"temperature.*got -2 .*\[1\]"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature must broadcast"),
        ({"temperature": torch.ones(2, 1)}, ValueError, "temperature must broadcast"),
        ({"temperature": "warm"}, TypeError, "temperature must .*got str"),
        ({"temperature": True}, TypeError, "temperature must .*got bool"),
        ({"temperature": torch.tensor(True)}, TypeError, "temperature"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask.*boolean"),
        ({"mask": [[True] * 3] * 2}, TypeError, "mask must .*got list"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError, r"mask must .*\(3, 3\)"),
        ({"mask": torch.ones(1, 2, 3, dtype=torch.bool)}, ValueError, "mask must broadcast"),
        ({"mask": torch.tensor([[True], [False]])}, ValueError, r"mask must .*1 query .*\[1\]"),
        ({"scores": torch.full((2, 3), -INF)}, ValueError, r"mask must .*2 queries .*\[0\]"),
        ({"log_prior": torch.full((3,), -INF)}, ValueError, "log_prior must .*2 queries"),
        (
            {"log_prior": torch.tensor([0.0, -INF]), "mask": torch.tensor([False, True]),
             "scores": torch.zeros(1, 2)},
            ValueError,
            "log_prior must .*1 query",
        ),
        ({"log_prior": torch.tensor([0.0, NAN, 0.0])}, ValueError, r"log_prior.*\[1\]"),
        ({"log_prior": torch.tensor([0.0, INF, 0.0])}, ValueError, "log_prior"),
        ({"log_prior": torch.zeros(2)}, ValueError, r"log_prior must .*got shape \(2,\)"),
        ({"log_prior": torch.zeros(3, dtype=torch.int64)}, TypeError, "log_prior"),
        ({"log_prior": [0.0, 0.0, 0.0]}, TypeError, "log_prior must .*got list"),
        ({"log_prior": torch.tensor([3e38, -3e38, 0.0])}, ValueError, "log_prior must .*range"),
        ({"source_mass": torch.tensor([1.0, 0.0])}, ValueError, r"source_mass.*\[1\]"),
        ({"source_mass": torch.tensor([1.0, NAN])}, ValueError, "source_mass"),
        ({"source_mass": torch.ones(3)}, ValueError, "source_mass must broadcast"),
        (
            {"scores": torch.tensor([[0.0, 1.0, 2.0]]), "temperature": 1e-40},
            ValueError,
            "overflow of torch.float32",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments, error, message):
    arguments = {"scores": GOOD} | arguments
    scores = arguments.pop("scores")
    with pytest.raises(error, match=message):
        solve_rows(scores, **arguments)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (
            torch.tensor([[0.4, 0.5, 0.0]] * 2),
            ValueError,
            r"weights must sum to 1 .*2 queries.*0.9",
        ),
        (
            torch.tensor([[0.5, 0.5, 0.0], [1.5, -0.5, 0.0]]),
            ValueError,
            "weights must be finite and at least 0.*1 value",
        ),
        (torch.tensor([[0.5, 0.5, 0.0], [NAN, 1.0, 0.0]]), ValueError, "weights must be finite"),
        (
            torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]),
            ValueError,
            r"weights must be 0 .*\[1, 2\]",
        ),
        (torch.full((3,), 1 / 3), ValueError, "shape"),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, "weights"),
    ],
)
def test_a_bad_candidate_is_named(weights, error, message):
    with pytest.raises(error, match=message):
        TransportPlan.from_weights(weights, GOOD, mask=torch.tensor([True, True, False]))


def test_bad_log_weights_are_named():
    with pytest.raises(ValueError, match="log_weights must .*6 values"):
        TransportPlan.from_log_weights(torch.full((2, 3), NAN), GOOD)
