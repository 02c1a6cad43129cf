"""The mathematics of one attention head as entropic optimal transport.

``rows`` solves attention exactly and carries the certificates, ``solvers`` holds it against an
independent solver, ``bounds`` has the inequalities. Nothing here knows of models or figures.
"""

from goatviz.transport.bounds import (
    CollapseBound,
    collapse_bound,
    off_sink_bound,
    protected_length,
    required_margin,
)
from goatviz.transport.rows import TransportPlan, solve_rows
from goatviz.transport.solvers import (
    BalancedPlan,
    CrossCheck,
    SolverReport,
    Verdict,
    cross_check,
    doubly_stochastic,
)

__all__ = [
    "BalancedPlan",
    "CollapseBound",
    "CrossCheck",
    "SolverReport",
    "TransportPlan",
    "Verdict",
    "collapse_bound",
    "cross_check",
    "doubly_stochastic",
    "off_sink_bound",
    "protected_length",
    "required_margin",
    "solve_rows",
]
