"""The mathematics in plain float64 NumPy, written from the formulas alone: nothing of goatviz.

One head at a time: scores s (n, m) in nats, a log-prior K (n, m), the allowed pairs, and the logit
of a column without a key, if there is one.
"""

from __future__ import annotations

import math

import numpy as np


def lags(query_pos: np.ndarray, key_pos: np.ndarray) -> np.ndarray:
    """i - j."""
    return query_pos[:, None] - key_pos[None, :]


# --- log-priors ---


def alibi(slope: float, query_pos: np.ndarray, key_pos: np.ndarray) -> np.ndarray:
    """K_ij = -m (i - j)."""
    return -slope * lags(query_pos, key_pos)


def spectral(
    alpha: np.ndarray,
    beta: np.ndarray,
    query_pos: np.ndarray,
    key_pos: np.ndarray,
    base: float = 1e4,
) -> np.ndarray:
    """K_ij = sum_r alpha_r cos w_r (i - j) + beta_r sin w_r (i - j), w_r = base^(-r / (R - 1))."""
    rank = len(alpha)
    w = base ** (-np.arange(rank) / max(rank - 1, 1))
    phase = lags(query_pos, key_pos)[..., None] * w
    return (alpha * np.cos(phase) + beta * np.sin(phase)).sum(-1)


def sink(values: dict[str, np.ndarray], head: int, length: float, base: float, pos: np.ndarray):
    """u(j) = gain MLP([cos v_m j, sin v_m j, j / T, log(1 + j) / log(1 + T)]) + bump [j = 0]."""
    rank = (values["mlp.0.weight"].shape[1] - 2) // 2
    v = base ** (-np.arange(rank) / max(rank - 1, 1))
    phase = pos[:, None] * v
    features = np.concatenate(
        [np.cos(phase), np.sin(phase), (pos / length)[:, None]]
        + [(np.log1p(pos) / math.log1p(length))[:, None]],
        axis=1,
    )
    hidden = features @ values["mlp.0.weight"].T + values["mlp.0.bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    shared = (hidden @ values["mlp.2.weight"].T + values["mlp.2.bias"])[:, 0]
    return values["gain"][head] * shared + values["bump"][head] * (pos == 0)


# --- plans ---


def scores(q: np.ndarray, k: np.ndarray, scale: float, softcap: float | None) -> np.ndarray:
    """s_ij = scale <q_i, k_j>, under a softcap c: c tanh(s_ij / c)."""
    s = scale * q.astype(float) @ k.astype(float).T
    return s if softcap is None else softcap * np.tanh(s / softcap)


def plan(
    s: np.ndarray, log_prior: np.ndarray, allowed: np.ndarray, column: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of the keys, of the column, and log sum_j exp(s + K); rows without a key are NaN."""
    logits = np.where(allowed, s + log_prior, -np.inf)
    if column is not None:
        logits = np.concatenate([logits, np.full((len(s), 1), column)], axis=1)
    logits[~allowed.any(1)] = np.nan
    top = logits.max(1, keepdims=True)
    mass = np.exp(logits - top)
    total = mass.sum(1, keepdims=True)
    weights = mass / total
    outside = np.where(allowed.any(1), 0.0, np.nan) if column is None else weights[:, -1]
    return weights[:, : s.shape[1]], outside, (top + np.log(total))[:, 0]


def statistics(
    s: np.ndarray,
    log_prior: np.ndarray,
    allowed: np.ndarray,
    column: float | None,
    query_pos: np.ndarray,
    key_pos: np.ndarray,
    keys: tuple[int, ...],
    recent: int,
) -> dict[str, np.ndarray]:
    """Every statistic of every row, by the formula in its name."""
    p, outside, normaliser = plan(s, log_prior, allowed, column)
    prior, prior_outside, _ = plan(np.zeros_like(s), log_prior, allowed, column)
    lag = lags(query_pos, key_pos)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p, log_pi = np.log(p), np.log(prior)
        out_p, out_pi = np.log(outside), np.log(prior_outside)
        entropy = -_sum(p, log_p) - np.where(outside > 0, outside * out_p, 0.0)
        expected = _sum(p, log_pi) + np.where(outside > 0, outside * out_pi, 0.0)
        share = p.sum(1)
        mean = (p * lag).sum(1) / share
        spread = (p * (lag - mean[:, None]) ** 2).sum(1) / share
    # The token before each query, by default.
    own = np.where(lag == 1, p, 0.0).sum(1)
    own[~(lag == 1).any(1)] = np.nan
    inside = np.where(allowed, s, np.nan)
    empty = ~allowed.any(1)
    highest = np.where(allowed, s, -np.inf).max(1, initial=-np.inf)
    lowest = np.where(allowed, s, np.inf).min(1, initial=np.inf)
    out = {
        "log_normaliser": normaliser,
        "entropy": entropy,
        "expected_score": np.nansum(p * np.nan_to_num(inside), axis=1),
        "expected_log_prior": expected,
        "kl_to_prior": -entropy - expected,
        "key_mass": p[:, list(keys)],
        "recent_mass": (p * (np.abs(lag) < recent)).sum(1),
        "sink_mass": outside,
        "lag_mean": mean,
        "lag_std": np.sqrt(spread),
        "largest_weight": p.max(1),
        "content_range": np.where(empty, 0.0, highest - lowest),
        "gathered_mass": own[:, None],
    }
    for value in out.values():
        value[empty] = np.nan
    return out


def _sum(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """sum_j w_j v_j, where 0 times anything is 0."""
    return np.where(weights > 0, weights * np.where(weights > 0, values, 0.0), 0.0).sum(1)
