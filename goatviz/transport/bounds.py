"""Inequalities that follow from a prior: collapse to the prior, and the margin law.

Here live ``collapse_bound`` and the margin law ``off_sink_bound`` with its two inverses,
``protected_length`` and ``required_margin``, which take numbers, NumPy arrays or tensors and
return the same kind. Plans come from ``goatviz.transport.rows``; nothing here measures a model.
"""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from goatviz import checks
from goatviz.transport.rows import TransportPlan

Values = float | np.ndarray | Tensor


class CollapseBound(NamedTuple):
    """Bounds on every attention weight, each of shape (..., n_queries, n_keys)."""

    lower: Tensor
    upper: Tensor


def collapse_bound(
    prior: TransportPlan | Tensor,
    content_range: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
) -> CollapseBound:
    r"""Bound attention weights by the prior and the content range alone.

    .. math::
        \pi_{ij} e^{-w_i/\tau} \le p_{ij} \le \min(1, \pi_{ij} e^{w_i/\tau}),
        \qquad w_i = \max_j s_{ij} - \min_j s_{ij}

    A query with little content range returns the prior.

    Parameters
    ----------
    prior : TransportPlan, or Tensor of shape (..., n_queries, n_keys)
        A plan, which has a content range and temperature of its own; or a log-prior in nats,
        ``-inf`` where a key is not allowed, which is normalised along each row here.
    content_range : float or Tensor of shape (..., n_queries), optional
        :math:`w_i \ge 0` in units of the scores; required with a log-prior.
    temperature : float or Tensor of shape (..., n_queries), optional
        :math:`\tau > 0`, 1 by default; only with a log-prior.

    Returns
    -------
    CollapseBound
        ``lower`` and ``upper``; the upper bound is capped at one.

    Raises
    ------
    ValueError
        If a log-prior comes without a content range, or values are out of range.
    TypeError
        If `prior` is neither a plan nor a floating-point tensor, or a plan comes with a content
        range or temperature.

    References
    ----------
    Litman and Guo, arXiv 2601.15380 (low-signal queries return the prior).

    Examples
    --------
    >>> import torch
    >>> from goatviz.transport.bounds import collapse_bound
    >>> lower, upper = collapse_bound(torch.tensor([[0.0, 0.0]]), 0.1)
    >>> round(lower[0, 0].item(), 3), round(upper[0, 0].item(), 3)
    (0.452, 0.553)
    """
    if isinstance(prior, TransportPlan):
        checks.not_given("a plan", content_range=content_range, temperature=temperature)
        log_prior = prior.log_prior
        spread = prior.content_range / prior.temperature
    elif isinstance(prior, Tensor) and prior.is_floating_point():
        if content_range is None:
            raise ValueError("content_range must be given with a log-prior, got none")
        if prior.ndim < 2:
            raise ValueError(
                f"prior must have shape (..., n_queries, n_keys), got {tuple(prior.shape)}"
            )
        unusable = torch.isnan(prior) | (prior == math.inf)
        if unusable.any() or (prior == -math.inf).all(-1).any():
            raise ValueError("prior must have mass in every row, got NaN, +inf or a row of -inf")
        log_prior = torch.log_softmax(prior, dim=-1)
        width = torch.as_tensor(content_range, dtype=prior.dtype, device=prior.device)
        tau = torch.as_tensor(
            1.0 if temperature is None else temperature, dtype=prior.dtype, device=prior.device
        )
        if not bool((width >= 0).all()):
            raise ValueError("content_range must be at least 0, got negative values or NaN")
        if not bool((torch.isfinite(tau) & (tau > 0)).all()):
            raise ValueError("temperature must be positive and finite, got other values")
        spread = width / tau
        try:
            spread = spread.expand(prior.shape[:-1])
        except RuntimeError as fault:
            raise ValueError(
                f"content_range and temperature must broadcast to {tuple(prior.shape[:-1])}, "
                f"got {tuple(spread.shape)}"
            ) from fault
    else:
        came = prior.dtype if isinstance(prior, Tensor) else type(prior).__name__
        raise TypeError(f"prior must be a TransportPlan or a floating-point tensor, got {came}")
    spread = spread.unsqueeze(-1)
    barred = log_prior == -math.inf
    # -inf + inf, for a key without prior mass under an infinite content range, would be NaN.
    raised = torch.where(barred, log_prior, log_prior + spread)
    return CollapseBound((log_prior - spread).exp(), raised.clamp(max=0.0).exp())


def off_sink_bound(margin: Values, length: Values) -> Values:
    r"""Largest mass that flat content leaves off a key with a given margin: the margin law.

    .. math:: \Psi(\delta, L) = \frac{L - 1}{e^{\delta} + L - 1}

    where the log-prior of one key exceeds that of each of the :math:`L - 1` others by at least
    :math:`\delta`. With a uniform prior, :math:`\delta = 0`, it tends to one as :math:`L` grows.
    For content of range ``w`` at temperature ``tau`` the law holds with ``margin - w / tau``.

    Parameters
    ----------
    margin : float, numpy.ndarray or Tensor
        :math:`\delta` in nats, of either sign; ``inf`` gives zero.
    length : float, numpy.ndarray or Tensor
        Number of allowed keys :math:`L \ge 1`; broadcasts against `margin`.

    Returns
    -------
    float, numpy.ndarray or Tensor
        In [0, 1]: a tensor if either argument is one, else an array if either is one. Computed
        in float64 as a logistic function of ``log(L - 1) - margin``, without overflow.

    Raises
    ------
    ValueError
        If a margin is NaN or a length is below one or not finite.
    TypeError
        If an argument is not a number, an array or a tensor.

    References
    ----------
    Litman and Guo, arXiv 2601.15380 (margin law).

    Examples
    --------
    >>> from goatviz.transport.bounds import off_sink_bound
    >>> off_sink_bound(0.0, 1024)
    0.9990234375
    >>> off_sink_bound(10_000.0, 1_000_000_000)
    0.0
    """
    (delta, count), answer = _as_tensors(margin=margin, length=length)
    _refuse("margin", torch.isnan(delta), "a number of nats")
    _check_length(count)
    return answer(torch.sigmoid(torch.log(count - 1) - delta))


def protected_length(margin: Values, off_mass: Values = 0.5) -> Values:
    r"""Longest context over which a margin keeps the mass off its key below a limit.

    .. math:: L = 1 + \frac{\psi}{1 - \psi} \, e^{\delta},

    the solution of ``off_sink_bound(margin, L) == off_mass``; with half the mass, about
    :math:`e^\delta` keys.

    Parameters
    ----------
    margin : float, numpy.ndarray or Tensor
        :math:`\delta` in nats.
    off_mass : float, numpy.ndarray or Tensor
        :math:`\psi`, strictly between 0 and 1.

    Returns
    -------
    float, numpy.ndarray or Tensor
        In tokens, as a real number: round down for a count. ``inf`` above about 709 nats, where
        the length exceeds float64 (88 nats for a float32 tensor).

    Raises
    ------
    ValueError
        If a margin is NaN or `off_mass` is not strictly between 0 and 1.
    TypeError
        If an argument is not a number, an array or a tensor.

    References
    ----------
    Litman and Guo, arXiv 2601.15380 (margin law, solved for the length).

    Examples
    --------
    >>> from goatviz.transport.bounds import protected_length
    >>> protected_length(0.0)
    2.0
    >>> round(protected_length(8.0))
    2982
    """
    (delta, psi), answer = _as_tensors(margin=margin, off_mass=off_mass)
    _refuse("margin", torch.isnan(delta), "a number of nats")
    _check_off_mass(psi)
    return answer(1 + torch.exp(delta + torch.logit(psi)))


def required_margin(length: Values, off_mass: Values = 0.5) -> Values:
    r"""Margin that keeps the mass off its key at a limit for a given length.

    .. math:: \delta = \log(L - 1) - \log\frac{\psi}{1 - \psi},

    the solution of ``off_sink_bound(margin, length) == off_mass``.

    Parameters
    ----------
    length : float, numpy.ndarray or Tensor
        Number of allowed keys :math:`L \ge 1`.
    off_mass : float, numpy.ndarray or Tensor
        :math:`\psi`, strictly between 0 and 1.

    Returns
    -------
    float, numpy.ndarray or Tensor
        In nats; ``-inf`` for a single key, which needs no margin.

    Raises
    ------
    ValueError
        If a length is below one or not finite, or `off_mass` is not strictly between 0 and 1.
    TypeError
        If an argument is not a number, an array or a tensor.

    References
    ----------
    Litman and Guo, arXiv 2601.15380 (margin law, solved for the margin).

    Examples
    --------
    >>> from goatviz.transport.bounds import required_margin
    >>> round(required_margin(1025), 4)
    6.9315
    """
    (count, psi), answer = _as_tensors(length=length, off_mass=off_mass)
    _check_length(count)
    _check_off_mass(psi)
    return answer(torch.log(count - 1) - torch.logit(psi))


def _as_tensors(**values: Values):
    """Return the values as float64 tensors, and a function that restores their kind."""
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    device = tensors[0].device if tensors else None
    converted = []
    for name, value in values.items():
        numeric = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
        array = isinstance(value, np.ndarray) and value.dtype.kind in "fiu"
        tensor = isinstance(value, Tensor) and value.dtype != torch.bool
        if (tensor and value.dtype.is_complex) or not (numeric or array or tensor):
            raise TypeError(
                f"{name} must be a real number, or an array or tensor of numbers, "
                f"got {type(value).__name__}"
            )
        if array:
            value = value.astype(np.float64)
        converted.append(torch.as_tensor(value, dtype=torch.float64, device=device))
    try:
        torch.broadcast_shapes(*(item.shape for item in converted))
    except RuntimeError as fault:
        shapes = ", ".join(
            f"{name} {tuple(item.shape)}" for name, item in zip(values, converted, strict=True)
        )
        raise ValueError(f"{' and '.join(values)} must broadcast, got {shapes}") from fault

    if tensors:
        floating = [value.dtype for value in tensors if value.is_floating_point()]
        dtype = floating[0] if floating else torch.float64
        for other in floating[1:]:
            dtype = torch.promote_types(dtype, other)
        return converted, lambda result: result.to(dtype)
    if any(isinstance(value, np.ndarray) for value in values.values()):
        return converted, lambda result: result.numpy()
    return converted, lambda result: result.item()


def _refuse(name: str, bad: Tensor, wanted: str) -> None:
    if bad.any():
        raise ValueError(
            f"{name} must be {wanted}, got {int(bad.sum())} of {bad.numel()} values that are not"
        )


def _check_length(count: Tensor) -> None:
    _refuse("length", ~(torch.isfinite(count) & (count >= 1)), "finite and at least 1")


def _check_off_mass(psi: Tensor) -> None:
    _refuse("off_mass", ~((psi > 0) & (psi < 1)), "strictly between 0 and 1")
