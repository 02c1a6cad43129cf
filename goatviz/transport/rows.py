"""Rows of attention as exact transport plans, in closed form and in the log domain.

Here live ``solve_rows`` and the ``TransportPlan`` it returns: weights, potentials, cost, entropy,
relative entropy, incoming mass, and the two certificates (KKT residual, duality gap) that tell
whether *any* candidate plan solves the problem. Everything is differentiable and batched.
Iterative solvers live in ``goatviz.transport.solvers``, inequalities in
``goatviz.transport.bounds``.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field

import torch
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# |x| below which (x - 1) e^x + 1 is summed as a series: above it the direct form loses few bits.
_SERIES_RADIUS = 0.3
# Coefficients 1 / (k (k - 2)!) of x^k for k = 2 .. 17: beyond double precision at the radius.
_SERIES = tuple(1.0 / (k * math.factorial(k - 2)) for k in range(2, 18))


@dataclass(frozen=True, eq=False)
class TransportPlan:
    r"""A plan for the rows of one attention problem, with the certificates of its optimality.

    The problem of row ``i``, over the simplex on its allowed keys, is

    .. math::
        \min_p \; -\langle p, s_i\rangle + \tau_i \, \mathrm{KL}(p \,\|\, \pi_i),

    and the plan as a coupling of ``n_queries`` sources with a free target is ``diag(a) P``.
    Make one with `solve_rows` (the optimum), or with `from_weights` / `from_log_weights` (any
    candidate, so that its certificates can be read). Properties are computed on access and carry
    gradients; entries of keys that are not allowed are exact zeros (``-inf`` in logs).

    Attributes
    ----------
    scores : Tensor, shape (..., n_queries, n_keys)
        Content scores :math:`s_{ij}`, in float32 or float64.
    log_prior : Tensor, shape (..., n_queries, n_keys)
        Log-prior in nats, normalised over the allowed keys of each row.
    temperature : Tensor, shape (..., n_queries)
        Temperature :math:`\tau_i`, in units of the scores.
    source_mass : Tensor, shape (..., n_queries)
        Mass :math:`a_i` of each query, as given (not normalised).
    allowed : Tensor of bool, shape (..., n_queries, n_keys)
        Which keys each query may use.
    log_weights : Tensor, shape (..., n_queries, n_keys)
        Log of the weights :math:`p_{ij}`, in nats.

    Notes
    -----
    Costs, potentials, the duality gap and the KKT residual are in units of the scores; entropy
    and relative entropy in nats.

    References
    ----------
    .. [1] Litman, Scaled-Dot-Product Attention as One-Sided Entropic Optimal Transport,
       arXiv 2508.08369.
    .. [2] Litman and Guo, You Need Better Attention Priors, arXiv 2601.15380.
    """

    scores: Tensor
    log_prior: Tensor
    temperature: Tensor
    source_mass: Tensor
    allowed: Tensor
    log_weights: Tensor
    # Set by solve_rows: log(p / pi) then has a form free of the cancellation in log_weights -
    # log_prior. Not an argument of the constructor, so dataclasses.replace cannot carry it over.
    _solved: bool = field(default=False, init=False, repr=False)

    @classmethod
    def from_weights(
        cls,
        weights: Tensor,
        scores: Tensor,
        *,
        log_prior: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        mask: Tensor | None = None,
        source_mass: Tensor | None = None,
        tolerance: float | None = None,
    ) -> TransportPlan:
        """Wrap any feasible candidate weights, so that their certificates can be evaluated.

        Parameters
        ----------
        weights : Tensor, shape (..., n_queries, n_keys)
            Non-negative, zero on keys that are not allowed, each row summing to one.
        scores, log_prior, temperature, mask, source_mass
            The problem, as in `solve_rows`.
        tolerance : float, optional
            Largest accepted deviation of a row sum from one; by default 1e-10, 1e-5 or 1e-2 for
            weights in float64, float32 or half precision.

        Returns
        -------
        TransportPlan
            A weight of exactly zero on an allowed key makes the row's KKT residual ``inf``: the
            optimum has none. Where zeros are underflow, use `from_log_weights`, or read the
            duality gap, which is finite.

        Raises
        ------
        ValueError
            If a weight is negative, not finite or on a key that is not allowed, if a row does
            not sum to one, or for any fault of the problem itself.
        TypeError
            If an argument has the wrong type.

        Examples
        --------
        >>> import torch
        >>> from goatviz.transport.rows import TransportPlan
        >>> scores = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
        >>> half = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
        >>> round(TransportPlan.from_weights(half, scores).duality_gap.item(), 4)
        0.1201
        """
        _check_floating("weights", weights)
        bad = ~(torch.isfinite(weights) & (weights >= 0))
        if bad.any():
            raise ValueError(
                f"weights must be finite and at least 0, got {_count(bad)} that are not"
            )
        positive = weights > 0
        # log(1) in place of log(0) keeps the gradient of the untaken branch finite.
        log_weights = torch.where(positive, weights, 1.0).log()
        log_weights = torch.where(positive, log_weights, -math.inf)
        return cls.from_log_weights(
            log_weights,
            scores,
            log_prior=log_prior,
            temperature=temperature,
            mask=mask,
            source_mass=source_mass,
            tolerance=tolerance,
        )

    @classmethod
    def from_log_weights(
        cls,
        log_weights: Tensor,
        scores: Tensor,
        *,
        log_prior: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        mask: Tensor | None = None,
        source_mass: Tensor | None = None,
        tolerance: float | None = None,
    ) -> TransportPlan:
        """Wrap any feasible candidate given by its log-weights; see `from_weights`.

        Parameters
        ----------
        log_weights : Tensor, shape (..., n_queries, n_keys)
            In nats; ``-inf`` where a weight is zero.
        scores, log_prior, temperature, mask, source_mass, tolerance
            As in `from_weights`.

        Returns
        -------
        TransportPlan

        Raises
        ------
        ValueError, TypeError
            As in `from_weights`.
        """
        problem = _Problem.build(scores, log_prior, temperature, mask, source_mass)
        _check_floating("log_weights", log_weights)
        _check_device("log_weights", log_weights, scores)
        if log_weights.shape != scores.shape:
            raise ValueError(
                f"log_weights must have the shape of scores, {tuple(scores.shape)}, "
                f"got {tuple(log_weights.shape)}"
            )
        bad = _not_below_infinity(log_weights)
        if bad is not None:
            raise ValueError(f"log_weights must be below +inf, got NaN or +inf in {_count(bad)}")
        if tolerance is None:
            tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(log_weights.dtype, 1e-2)
        log_weights = log_weights.to(problem.scores.dtype)
        stray = (log_weights > -math.inf) & ~problem.allowed
        if stray.any():
            raise ValueError(
                "weights must be 0 where mask is False, scores are -inf or log_prior is -inf, "
                f"got {_count(stray)} above 0"
            )
        sums = log_weights.detach().exp().sum(-1)
        off = (sums - 1).abs() > tolerance
        if off.any():
            first = _first(off)
            raise ValueError(
                f"weights must sum to 1 within {tolerance:g} in each row, got "
                f"{_count(off, 'query')} where they do not: the first sums to "
                f"{sums[first].item():.6g} (if the model drops a sink column after the softmax, "
                "pass the sink as one more key)"
            )
        return problem.plan(log_weights)

    @property
    def n_queries(self) -> int:
        """Number of queries."""
        return self.scores.shape[-2]

    @property
    def n_keys(self) -> int:
        """Number of keys, allowed or not."""
        return self.scores.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the leading dimensions (batch, heads, ...)."""
        return self.scores.shape[:-2]

    @property
    def weights(self) -> Tensor:
        """Attention weights :math:`p_{ij}`, shape (..., n_queries, n_keys); rows sum to one."""
        return self.log_weights.exp()

    @property
    def coupling(self) -> Tensor:
        """Transport plan ``G = diag(a) P``, shape (..., n_queries, n_keys)."""
        return self.source_mass.unsqueeze(-1) * self.weights

    @property
    def incoming_mass(self) -> Tensor:
        r"""Target marginal :math:`b_j = \sum_i a_i p_{ij}`, shape (..., n_keys)."""
        return self.coupling.sum(-2)

    @property
    def potential(self) -> Tensor:
        r"""Row potential :math:`F_i = -\tau_i \log \sum_j \pi_{ij} e^{s_{ij}/\tau_i}`.

        Shape (..., n_queries), in units of the scores. It is the optimal value of row ``i``, so
        a lower bound for every candidate; it depends on the problem and not on the weights.
        """
        centre, _, log_partition = self._centred()
        return -centre.squeeze(-1) - self.temperature * log_partition

    @property
    def free_energy(self) -> Tensor:
        """Free energy of each row, shape (..., n_queries): the same number as `potential`."""
        return self.potential

    @property
    def total_free_energy(self) -> Tensor:
        r"""Optimal value :math:`\sum_i a_i F_i` of the whole problem, shape (...)."""
        return (self.source_mass * self.potential).sum(-1)

    @property
    def transport_cost(self) -> Tensor:
        r"""Expected cost :math:`-\sum_j p_{ij} s_{ij}` of each row, shape (..., n_queries)."""
        centre, shifted, _ = self._centred()
        return -centre.squeeze(-1) - (self.weights * shifted).sum(-1)

    @property
    def entropy(self) -> Tensor:
        r"""Entropy :math:`-\sum_j p_{ij}\log p_{ij}` of each row in nats, with 0 log 0 = 0."""
        finite = torch.where(self.log_weights > -math.inf, self.log_weights, 0.0)
        return -(self.weights * finite).sum(-1)

    @property
    def kl_to_prior(self) -> Tensor:
        r"""Relative entropy :math:`\mathrm{KL}(p_i \| \pi_i)` of each row in nats.

        Summed as :math:`\sum_j \pi_{ij}\,\varphi(\log p_{ij}/\pi_{ij})` with
        :math:`\varphi(r) = (r-1)e^r + 1 \ge 0`, so that it keeps its relative precision where the
        plan is close to the prior.
        """
        if self._solved:
            _, shifted, log_partition = self._centred()
            ratio = shifted / self.temperature.unsqueeze(-1) - log_partition.unsqueeze(-1)
        else:
            ratio = self.log_weights - self._allowed_prior
        ratio = torch.where(self.allowed & (self.log_weights > -math.inf), ratio, 0.0)
        weights, prior = self.weights, self.log_prior.exp()
        # An allowed key with weight zero belongs to the direct branch, where it adds pi.
        near = (ratio.abs() < _SERIES_RADIUS) & (self.log_weights > -math.inf)
        small = torch.where(near, ratio, 0.0)
        series = torch.zeros_like(small)
        for coefficient in reversed(_SERIES):
            series = series * small + coefficient
        direct = weights * ratio - weights + prior
        return torch.where(near, prior * series * small * small, direct).sum(-1)

    @property
    def primal_value(self) -> Tensor:
        """Objective of each row, ``transport_cost + temperature * kl_to_prior``."""
        return self.transport_cost + self.temperature * self.kl_to_prior

    @property
    def duality_gap(self) -> Tensor:
        r"""Primal value minus potential of each row, shape (..., n_queries).

        It equals :math:`\tau_i \mathrm{KL}(p_i \| p_i^*)`: zero at the optimum and positive
        elsewhere, up to rounding of about ``eps`` times `content_range`.
        """
        # The row's maximum is left out of both terms: it would cancel, but for its rounding.
        _, shifted, log_partition = self._centred()
        content = (self.weights * shifted).sum(-1)
        return self.temperature * (self.kl_to_prior + log_partition) - content

    @property
    def kkt_residual(self) -> Tensor:
        r"""Largest violation of the optimality condition in each row, in units of the scores.

        :math:`\max_j |-s_{ij} + \tau_i(\log p_{ij} - \log\pi_{ij}) - F_i|` over the allowed
        keys, from the stored log-weights, the prior and the independently summed potential.
        Compare it with ``eps *`` `kkt_scale`: below a few of those it is rounding.
        """
        _, shifted, log_partition = self._centred()
        # Filled before the product with tau, whose gradient would otherwise be 0 * inf.
        ratio = torch.where(self.allowed, self.log_weights - self._allowed_prior, 0.0)
        deviation = self.temperature.unsqueeze(-1) * (ratio + log_partition.unsqueeze(-1)) - shifted
        return torch.where(self.allowed, deviation, 0.0).abs().amax(-1)

    @property
    def kkt_scale(self) -> Tensor:
        r"""Size of the terms that cancel in `kkt_residual`, shape (..., n_queries).

        :math:`\max_j \tau_i(1 + |\log p_{ij}| + |\log\pi_{ij}|)` over the allowed keys with a
        positive weight, plus `content_range`; in units of the scores. Machine epsilon times this
        is what rounding alone can leave.
        """
        seen = self.allowed & (self.log_weights > -math.inf)
        logs = torch.where(seen, self.log_weights, 0.0).abs()
        logs = logs + torch.where(seen, self.log_prior, 0.0).abs()
        return self.temperature * (1 + logs.amax(-1)) + self.content_range

    @property
    def content_range(self) -> Tensor:
        r"""Range :math:`w_i = \max_j s_{ij} - \min_j s_{ij}` over the allowed keys."""
        top = self.scores.masked_fill(~self.allowed, -math.inf).amax(-1)
        return top - self.scores.masked_fill(~self.allowed, math.inf).amin(-1)

    @property
    def margin(self) -> Tensor:
        """Top log-prior of each row minus the runner-up, in nats, shape (..., n_queries).

        Over the allowed keys; zero in a tie, ``inf`` where a single key is allowed.
        """
        if self.n_keys == 1:
            return torch.full_like(self.temperature, math.inf)
        top = self.log_prior.topk(2, dim=-1).values
        return top[..., 0] - top[..., 1]

    @property
    def margin_key(self) -> Tensor:
        """Index of the key with the top log-prior in each row (the first, in a tie)."""
        return self.log_prior.argmax(-1)

    @property
    def _allowed_prior(self) -> Tensor:
        return torch.where(self.allowed, self.log_prior, 0.0)

    def _centred(self) -> tuple[Tensor, Tensor, Tensor]:
        return _log_partition(self.scores, self.log_prior, self.allowed, self.temperature)


def solve_rows(
    scores: Tensor,
    *,
    log_prior: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    source_mass: Tensor | None = None,
) -> TransportPlan:
    r"""Solve every row of an attention problem exactly, as one-sided entropic transport.

    .. math::
        p_i = \arg\min_{p \in \Delta(A_i)} -\langle p, s_i\rangle
              + \tau_i \, \mathrm{KL}(p \,\|\, \pi_i)
            = \mathrm{softmax}_j\!\left(s_{ij}/\tau_i + \log \pi_{ij}\right)

    with :math:`A_i` the allowed keys of query ``i``. The coupling ``diag(a) P`` has the source
    marginal ``a`` and a free target marginal.

    Parameters
    ----------
    scores : Tensor, shape (..., n_queries, n_keys)
        Content scores; ``-inf`` forbids a key. Half precision is computed, and returned, in
        float32.
    log_prior : Tensor, optional
        Log-prior in nats, broadcastable to `scores`, normalised or not: a constant along a row
        changes nothing. ``-inf`` forbids a key. By default uniform on the allowed keys.
    temperature : float or Tensor, optional
        Positive, in units of the scores; a tensor must be broadcastable to (..., n_queries), so
        one temperature per head of scores (heads, n, n) has shape (heads, 1).
    mask : Tensor of bool, optional
        True where a key is allowed (the convention of ``scaled_dot_product_attention``),
        broadcastable to `scores`.
    source_mass : Tensor, optional
        Positive mass of each query, broadcastable to (..., n_queries); by default
        ``1 / n_queries``.

    Returns
    -------
    TransportPlan
        With `log_prior` normalised over the allowed keys of each row.

    Raises
    ------
    ValueError
        If scores are NaN or +inf, a prior is NaN or +inf, a temperature or a source mass is not
        positive and finite, a query has no allowed key or no prior mass on its allowed keys,
        shapes do not fit, a dimension is empty, or scores / temperature overflows.
    TypeError
        If scores or log_prior are not floating-point tensors, or mask is not boolean.

    References
    ----------
    Litman, arXiv 2508.08369 (attention as one-sided entropic optimal transport); Litman and Guo,
    arXiv 2601.15380 (the prior).

    Examples
    --------
    >>> import torch
    >>> from goatviz.transport.rows import solve_rows
    >>> plan = solve_rows(torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64))
    >>> [round(weight, 4) for weight in plan.weights[0].tolist()]
    [0.2689, 0.7311]
    >>> bool(plan.kkt_residual.max() < 1e-15)
    True
    """
    problem = _Problem.build(scores, log_prior, temperature, mask, source_mass)
    plan = problem.plan(torch.log_softmax(problem.logits, dim=-1))
    object.__setattr__(plan, "_solved", True)
    return plan


@dataclass(frozen=True, eq=False)
class _Problem:
    """The validated data of one problem, in one floating type, at full shape."""

    scores: Tensor
    log_prior: Tensor
    temperature: Tensor
    source_mass: Tensor
    allowed: Tensor
    logits: Tensor  # scores / temperature + log_prior, up to a constant along each row

    @classmethod
    def build(
        cls,
        scores: Tensor,
        log_prior: Tensor | None,
        temperature: float | Tensor,
        mask: Tensor | None,
        source_mass: Tensor | None,
    ) -> _Problem:
        _check_scores(scores)
        dtype = scores.dtype
        if log_prior is not None:
            _check_floating("log_prior", log_prior)
            _check_device("log_prior", log_prior, scores)
            bad = _not_below_infinity(log_prior)
            if bad is not None:
                raise ValueError(
                    "log_prior must be finite, or -inf where a key has no prior mass, "
                    f"got NaN or +inf in {_count(bad)}"
                )
            dtype = torch.promote_types(dtype, log_prior.dtype)
        if dtype in (torch.bfloat16, torch.float16):
            dtype = torch.float32
        rows = scores.shape[:-1]
        allowed = _allowed(scores, mask)
        if log_prior is None:
            prior = torch.zeros((), dtype=dtype, device=scores.device).expand(scores.shape)
        else:
            prior = _expand("log_prior", log_prior.to(dtype), scores.shape)
            allowed = allowed & (prior > -math.inf)
            empty = ~allowed.any(-1)
            if empty.any():
                raise ValueError(
                    "log_prior must be finite on some allowed key of each query, "
                    f"got {_count(empty, 'query')} without prior mass"
                )
        # log_softmax is logsumexp-stable and its gradient is exact zero on the filled entries.
        prior = torch.log_softmax(prior.masked_fill(~allowed, -math.inf), dim=-1)
        if (torch.isinf(prior) & allowed).any():
            raise ValueError(
                f"log_prior must have finite differences along a row, got a range beyond {dtype}"
            )
        scores = scores.to(dtype)
        mass = 1.0 / scores.shape[-2] if source_mass is None else source_mass
        tau = _positive("temperature", temperature, rows, scores)
        logits = _centre(scores, allowed)[1] / tau.unsqueeze(-1) + prior
        if (torch.isinf(logits) & allowed).any():
            raise ValueError(
                "temperature must keep scores / temperature + log_prior finite, got an overflow "
                f"of {dtype}: use float64 scores, or a smaller range"
            )
        return cls(
            scores=scores,
            log_prior=prior,
            temperature=tau,
            source_mass=_positive("source_mass", mass, rows, scores),
            allowed=allowed,
            logits=logits,
        )

    def plan(self, log_weights: Tensor) -> TransportPlan:
        return TransportPlan(
            scores=self.scores,
            log_prior=self.log_prior,
            temperature=self.temperature,
            source_mass=self.source_mass,
            allowed=self.allowed,
            log_weights=log_weights,
        )


def _check_scores(scores: Tensor) -> None:
    _check_floating("scores", scores)
    if scores.ndim < 2:
        raise ValueError(
            "scores must have at least two dimensions (..., n_queries, n_keys), "
            f"got shape {tuple(scores.shape)}"
        )
    if 0 in scores.shape[-2:]:
        raise ValueError(
            f"scores must have at least one query and one key, got shape {tuple(scores.shape)}"
        )
    bad = _not_below_infinity(scores)
    if bad is not None:
        raise ValueError(
            "scores must be finite, or -inf where a key is not allowed, "
            f"got NaN or +inf in {_count(bad)}"
        )


def _allowed(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Where scores and mask allow a key; every query has one."""
    allowed = scores > -math.inf
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"mask must be a boolean tensor, True where a key is allowed, got {came}"
            )
        _check_device("mask", mask, scores)
        allowed = allowed & _expand("mask", mask, scores.shape)
    empty = ~allowed.any(-1)
    if empty.any():
        raise ValueError(
            "mask must leave each query a key that scores also allow, "
            f"got {_count(empty, 'query')} without one"
        )
    return allowed


def _centre(scores: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Row maximum over the allowed keys, without gradient, and scores minus it.

    Keys that are not allowed get zero. No result depends on the maximum, so it needs no gradient.
    """
    centre = scores.detach().masked_fill(~allowed, -math.inf).amax(-1, keepdim=True)
    return centre, torch.where(allowed, scores - centre, 0.0)


def _log_partition(
    scores: Tensor, log_prior: Tensor, allowed: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Row maximum c, scores - c (zero where not allowed), and log sum_j pi_j exp((s_j - c)/tau).

    The logarithm is non-positive. Where the sum is near one, it is log1p of a sum of expm1, which
    keeps the relative precision that a high temperature needs; elsewhere it is the ordinary
    log-sum-exp.
    """
    centre, shifted = _centre(scores, allowed)
    content = shifted / temperature.unsqueeze(-1)
    deficit = (log_prior.exp() * torch.expm1(content)).sum(-1)
    near = deficit > -0.5
    by_deficit = torch.log1p(torch.where(near, deficit, 0.0))
    by_logits = torch.logsumexp(content + log_prior, dim=-1)
    return centre, shifted, torch.where(near, by_deficit, by_logits)


def _not_below_infinity(values: Tensor) -> Tensor | None:
    """Where values are NaN or +inf; None if nowhere, which one pass of amax can tell."""
    if values.numel() == 0 or values.amax() < math.inf:
        return None
    return torch.isnan(values) | (values == math.inf)


def _first(bad: Tensor) -> tuple[int, ...]:
    return tuple(bad.nonzero()[0].tolist())


def _count(bad: Tensor, noun: str = "value") -> str:
    many = int(bad.sum())
    nouns = {"query": "queries"}.get(noun, noun + "s")
    if bad.ndim == 0:
        return f"1 {noun}"
    index = ", ".join(map(str, _first(bad)))
    return f"{many} {noun if many == 1 else nouns} (first at index [{index}])"


def _check_floating(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a floating-point tensor, got {type(value).__name__}")
    if value.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be of float64, float32, bfloat16 or float16, got {value.dtype}"
        )


def _check_device(name: str, value: Tensor, scores: Tensor) -> None:
    if value.device != scores.device:
        raise ValueError(f"{name} must be on {scores.device} like scores, got {value.device}")


def _expand(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    # Compared by hand, because torch reports a misfit without naming the argument.
    fits = value.ndim <= len(shape) and all(
        have in (1, want)
        for have, want in zip(reversed(value.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must broadcast to {tuple(shape)}, got shape {tuple(value.shape)}")
    return value.expand(shape)


def _positive(name: str, value: float | Tensor, rows: torch.Size, scores: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.dtype.is_complex:
            raise TypeError(f"{name} must hold real numbers, got {value.dtype}")
        if value.ndim:
            _check_device(name, value, scores)
        tensor = value.to(device=scores.device, dtype=scores.dtype)
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        tensor = torch.tensor(float(value), dtype=scores.dtype, device=scores.device)
    else:
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    bad = ~(torch.isfinite(tensor) & (tensor > 0))
    if bad.any():
        worst = tensor if tensor.ndim == 0 else tensor[_first(bad)]
        raise ValueError(
            f"{name} must be positive and finite in {scores.dtype}, got {worst.item():g} "
            f"({_count(bad)})"
        )
    return _expand(name, tensor, rows)
