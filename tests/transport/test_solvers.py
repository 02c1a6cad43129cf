"""Plans against POT: agreement, disagreement, and POT's own failures told from ours."""

import json
import math
import warnings

import numpy as np
import ot
import pytest
import torch

from goatviz.transport import (
    CrossCheck,
    TransportPlan,
    Verdict,
    cross_check,
    doubly_stochastic,
    solve_rows,
)


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def causal(seed, n, tau, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return solve_rows(
        (3 * normal(generator, n, n)).to(dtype),
        log_prior=(2 * normal(generator, n, n)).to(dtype),
        temperature=tau,
        mask=torch.ones(n, n, dtype=torch.bool).tril(),
        source_mass=(0.2 + torch.rand(n, generator=generator)).to(dtype),
    )


def with_log_weights(plan, log_weights):
    return TransportPlan.from_log_weights(
        torch.log_softmax(log_weights.masked_fill(~plan.allowed, -math.inf), -1),
        plan.scores,
        log_prior=plan.log_prior,
        temperature=plan.temperature,
        source_mass=plan.source_mass,
    )


def test_a_hundred_causal_problems_agree_to_ten_digits():
    generator = torch.Generator().manual_seed(0)
    for seed in range(100):
        n = int(torch.randint(2, 49, (), generator=generator))
        tau = 0.05 * 200 ** float(torch.rand((), generator=generator))
        check = cross_check(causal(seed, n, tau))
        assert [r.verdict for r in check] == ["agrees", "agrees"], check
        assert check["semi_relaxed"].largest_difference < 1e-10
        assert check["balanced"].largest_difference < 1e-10
        assert check["semi_relaxed"].source_error < 1e-12
        assert check["balanced"].target_error < 1e-12


@pytest.mark.parametrize("tau", [1e-2, 5e-3, 1e-3, 1e-4, 1e-6])
def test_low_temperature_never_gets_a_wrong_verdict(tau):
    for seed in range(6):
        check = cross_check(causal(seed, 24, tau), solver="all")
        for report in check:
            assert report.verdict is not Verdict.DISAGREES, check
        assert check.agrees, check


@pytest.mark.parametrize("tau", [0.05, 1.0, 10.0])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_a_perturbed_plan_is_a_disagreement(tau, size):
    plan = causal(1, 12, tau)
    noise = normal(torch.Generator().manual_seed(9), 12, 12)
    wrong = with_log_weights(plan, plan.log_weights + size * noise)
    check = cross_check(wrong, solver="semi_relaxed")
    assert check.verdict is Verdict.DISAGREES, check
    assert check["semi_relaxed"].objective_excess < 0
    balanced = cross_check(wrong, solver="balanced", max_iterations=2000)
    assert balanced.verdict is not Verdict.AGREES, balanced


def test_a_reweighting_of_keys_does_not_hide_in_the_balanced_check():
    # Its incoming mass is its own, so POT finds the very same plan: only the potential tells.
    plan = causal(4, 8, 2.0)
    tilt = normal(torch.Generator().manual_seed(3), 8)
    wrong = with_log_weights(plan, plan.log_weights + tilt)
    report = cross_check(wrong, solver="balanced", max_iterations=100_000)["balanced"]
    assert report.verdict is Verdict.DISAGREES, report
    assert report.largest_difference < 1e-10
    assert "potential" in report.reason


def test_the_balanced_check_from_a_cold_start_reaches_the_same_plan():
    plan = causal(2, 6, 5.0)
    check = cross_check(plan, solver="balanced", warm_start=False, max_iterations=50_000)
    assert check.agrees, check
    assert check["balanced"].iterations > 1
    short = cross_check(plan, solver="balanced", warm_start=False, max_iterations=3)
    assert short.verdict is Verdict.SOLVER_FAILED
    assert "marginal" in short["balanced"].reason
    assert "converge" in short["balanced"].reason


def test_float32_plans_agree_to_their_own_precision():
    for seed in range(10):
        for tau in (0.05, 1.0, 10.0):
            check = cross_check(causal(seed, 16, tau, dtype=torch.float32))
            assert check.tolerance == 1e-5
            assert [r.verdict for r in check] == ["agrees", "agrees"], check
    wrong = with_log_weights(plan := causal(0, 16, 1.0, dtype=torch.float32), plan.log_weights / 2)
    assert cross_check(wrong, solver="semi_relaxed").verdict is Verdict.DISAGREES


def test_temperatures_may_differ_between_queries():
    generator = torch.Generator().manual_seed(8)
    tau = torch.logspace(-3, 1, 10, dtype=torch.float64)
    plan = solve_rows(normal(generator, 10, 7), temperature=tau)
    assert [r.verdict for r in cross_check(plan)] == ["agrees", "agrees"]


def test_a_batch_reports_its_worst_element():
    generator = torch.Generator().manual_seed(6)
    plan = solve_rows(normal(generator, 2, 3, 5, 4))
    check = cross_check(plan, solver="all")
    assert check.agrees
    assert check.n_problems == 6
    tilted = plan.log_weights.clone()
    tilted[1, 2] += torch.arange(4.0)
    report = cross_check(with_log_weights(plan, tilted), solver="semi_relaxed")["semi_relaxed"]
    assert report.verdict is Verdict.DISAGREES
    assert report.index == (1, 2)
    assert "batch element (1, 2)" in report.reason


def test_keys_that_nobody_may_use_do_not_disturb_the_check():
    plan = solve_rows(torch.zeros(3, 4), mask=torch.tensor([True, False, True, False]))
    check = cross_check(plan, solver=("semi_relaxed", "balanced", "linear_programme"))
    assert check["semi_relaxed"].verdict is Verdict.AGREES
    assert check["balanced"].verdict is Verdict.AGREES
    # Equal scores leave the programme undetermined.
    assert check["linear_programme"].verdict is Verdict.NOT_APPLICABLE


def test_a_single_key_is_every_problem_at_once():
    check = cross_check(solve_rows(torch.zeros(3, 1, dtype=torch.float64)), solver="all")
    assert [r.verdict for r in check] == ["agrees"] * 3, check


def test_the_linear_programme_is_the_limit_of_low_temperature():
    scores = normal(torch.Generator().manual_seed(2), 8, 6)
    cold = cross_check(solve_rows(scores, temperature=1e-4), solver="linear_programme")
    assert cold.agrees, cold
    warm = cross_check(solve_rows(scores), solver="linear_programme")
    assert warm.verdict is Verdict.NOT_APPLICABLE
    upside_down = TransportPlan.from_weights(
        solve_rows(-scores, temperature=1e-4).weights, scores, temperature=1e-4
    )
    wrong = cross_check(upside_down, solver="linear_programme")
    assert wrong.verdict is Verdict.DISAGREES, wrong


def test_the_bounds_of_the_linear_programme_hold_at_every_temperature():
    for seed in range(10):
        for tau in (1e-3, 0.1, 1.0, 100.0):
            check = cross_check(causal(seed, 10, tau), solver="linear_programme")
            assert check.verdict in (Verdict.AGREES, Verdict.NOT_APPLICABLE), check


def test_underflow_inside_pot_is_pots_failure():
    # The prior of the winning key underflows in POT's arithmetic: its whole row becomes zero.
    scores = torch.tensor([[0.0, -1000.0], [0.0, 0.0]], dtype=torch.float64)
    log_prior = torch.tensor([[-800.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    plan = solve_rows(scores, log_prior=log_prior)
    check = cross_check(plan)
    assert check["semi_relaxed"].verdict is Verdict.SOLVER_FAILED
    assert check["balanced"].verdict is Verdict.AGREES
    assert check.verdict is Verdict.AGREES


def answer_with(monkeypatch, change):
    """Let POT's semi-relaxed solver pass its true plan through ``change``."""
    solver = ot.unbalanced.sinkhorn_unbalanced
    monkeypatch.setattr(
        ot.unbalanced, "sinkhorn_unbalanced", lambda *a, **k: change(solver(*a, **k))
    )


def warn_and_pass(plan):
    warnings.warn("Numerical errors at iteration 7", stacklevel=1)
    return plan


def fail(plan):
    raise AssertionError("weights should sum to one")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda plan: plan * np.nan, "not finite"),
        (lambda plan: plan * np.inf, "not finite"),
        (lambda plan: plan * (1 + 1e-6), "source marginal"),
        (lambda plan: plan * 0, "source marginal"),
        (warn_and_pass, "POT warned: Numerical errors at iteration 7"),
        (fail, "POT raised AssertionError"),
        # Feasible and finite, without a warning, and simply not the optimum.
        (lambda plan: np.roll(plan, 1, 1), "objective is the higher one"),
        (
            lambda plan: plan.sum(1, keepdims=True) * np.full_like(plan, 1 / plan.shape[1]),
            "objective is the higher one",
        ),
        (
            lambda plan: np.array([plan[0] + [1e-7, -1e-7, 0.0], *plan[1:]]),
            "objective is the higher one",
        ),
    ],
)
def test_a_broken_solver_is_never_a_disagreement(monkeypatch, change, reason):
    answer_with(monkeypatch, change)
    plan = solve_rows(normal(torch.Generator().manual_seed(1), 4, 3))
    check = cross_check(plan, solver="semi_relaxed")
    assert check.verdict is Verdict.SOLVER_FAILED, check
    assert reason in check["semi_relaxed"].reason


def test_a_broken_linear_programme_is_never_a_disagreement(monkeypatch):
    plan = solve_rows(normal(torch.Generator().manual_seed(1), 4, 3), temperature=1e-3)
    solver = ot.emd

    def rolled(*args, **kwargs):
        coupling, log = solver(*args, **kwargs)
        coupling[:-1] = np.roll(coupling[:-1], 1, 1)
        coupling[-1] = 1 - coupling[:-1].sum(0)
        return coupling, log

    monkeypatch.setattr(ot, "emd", rolled)
    check = cross_check(plan, solver="linear_programme")
    assert check.verdict is Verdict.SOLVER_FAILED, check
    assert "did not reach its optimum" in check["linear_programme"].reason


def test_a_check_reads_as_one_line_per_solver_and_as_json():
    check = cross_check(causal(0, 5, 1.0), solver="all")
    assert isinstance(check, CrossCheck)
    lines = str(check).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"semi relaxed (POT {ot.__version__}): agrees, ")
    again = json.loads(json.dumps(check.to_dict(), allow_nan=False))
    assert again["verdict"] == "agrees"
    assert [r["solver"] for r in again["reports"]] == [
        "semi_relaxed",
        "balanced",
        "linear_programme",
    ]


def test_bad_requests_are_named():
    plan = solve_rows(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="simplex"):
        cross_check(plan, solver="simplex")
    with pytest.raises(ValueError, match="solver must be"):
        cross_check(plan, solver=())
    with pytest.raises(TypeError, match="plan must be a TransportPlan, got Tensor"):
        cross_check(plan.weights)
    with pytest.raises(ValueError, match="tolerance"):
        cross_check(plan, tolerance=0.0)
    with pytest.raises(ValueError, match="marginal_tolerance"):
        cross_check(plan, marginal_tolerance=math.nan)
    with pytest.raises(ValueError, match="max_iterations"):
        cross_check(plan, max_iterations=0)
    with pytest.raises(ValueError, match="empty batch"):
        cross_check(solve_rows(torch.zeros(0, 2, 2)))
    with pytest.raises(KeyError, match="balanced"):
        cross_check(plan, solver="semi_relaxed")["balanced"]


def test_doubly_stochastic_has_both_marginals_and_the_balanced_form():
    generator = torch.Generator().manual_seed(4)
    scores, log_prior = normal(generator, 2, 6, 4), normal(generator, 6, 4)
    plan = solve_rows(scores, log_prior=log_prior, temperature=0.7)
    balanced = doubly_stochastic(plan, tolerance=1e-13)
    direct = doubly_stochastic(scores, log_prior=log_prior, temperature=0.7, tolerance=1e-13)
    assert torch.equal(balanced.weights, direct.weights)
    quarter = torch.full((2, 4), 0.25, dtype=torch.float64)
    torch.testing.assert_close(balanced.coupling.sum(-2), quarter, rtol=0, atol=1e-12)
    torch.testing.assert_close(balanced.target_mass, quarter)
    torch.testing.assert_close(balanced.coupling.sum(-1), balanced.source_mass)
    # log G = s / tau + log pi + row term + key term: its double differences are the data's.
    residual = balanced.coupling.log() - scores / 0.7 - log_prior
    residual = residual - residual[..., :1] - residual[..., :1, :] + residual[..., :1, :1]
    assert residual.abs().max() < 1e-11
    # The fixed target costs: the free one is the cheaper problem.
    fixed = TransportPlan.from_weights(
        balanced.weights, scores, log_prior=log_prior, temperature=0.7
    )
    assert (fixed.primal_value.sum(-1) > plan.primal_value.sum(-1)).all()
    assert balanced.source_error < 1e-13
    assert balanced.target_error < 1e-13
    assert balanced.n_excluded == 0


def test_doubly_stochastic_scales_with_the_source_mass():
    mass = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    plan = solve_rows(torch.eye(3, 4, dtype=torch.float64), source_mass=mass)
    balanced = doubly_stochastic(plan)
    torch.testing.assert_close(balanced.coupling.sum(-1), mass, rtol=0, atol=1e-7)
    torch.testing.assert_close(
        balanced.coupling.sum(0), torch.full((4,), 2.0, dtype=torch.float64), rtol=0, atol=1e-7
    )


def test_under_a_causal_mask_only_the_identity_is_doubly_stochastic():
    scores = normal(torch.Generator().manual_seed(0), 7, 7)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    balanced = doubly_stochastic(scores, mask=mask)
    torch.testing.assert_close(balanced.weights, torch.eye(7, dtype=torch.float64))
    assert balanced.n_excluded == 21


def test_a_mask_in_blocks_leaves_out_only_what_no_plan_can_use():
    # Block lower-triangular: the block below the diagonal can carry nothing, the others can.
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    balanced = doubly_stochastic(normal(torch.Generator().manual_seed(1), 4, 4), mask=mask)
    assert balanced.n_excluded == 4
    assert (balanced.weights[2:, :2] == 0).all()
    assert (balanced.weights[:2, :2] > 0).all()
    assert (balanced.weights[2:, 2:] > 0).all()


def test_bad_balanced_problems_are_named():
    scores = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"mask must admit.*uniform target.*0\.333"):
        doubly_stochastic(scores, mask=torch.tensor([True, True, False]))
    with pytest.raises(ValueError, match=r"max_iterations must suffice.*got 3:.*did not converge"):
        doubly_stochastic(10 * normal(torch.Generator().manual_seed(1), 9, 9), max_iterations=3)
    with pytest.raises(TypeError, match="temperature must not be given with a plan"):
        doubly_stochastic(solve_rows(scores), temperature=1.0)
    with pytest.raises(ValueError, match="temperature must be the same for every query"):
        doubly_stochastic(solve_rows(scores, temperature=torch.tensor([1.0, 2.0, 3.0])))
    with pytest.raises(ValueError, match="tolerance"):
        doubly_stochastic(scores, tolerance=0.0)
    with pytest.raises(ValueError, match="max_iterations"):
        doubly_stochastic(scores, max_iterations=0)
    with pytest.raises(TypeError, match="scores"):
        doubly_stochastic([[0.0]])
