"""The mathematics of one attention head as entropic optimal transport.

``rows`` solves attention exactly and certifies plans, ``solvers`` checks them with an independent
solver, ``bounds`` has the inequalities. ``call`` is one call of a layer, ``changes`` edits its
plan, and ``statistics`` measures it at any length. Nothing here depends on models or figures.
"""

from goatviz.transport.bounds import (
    CollapseBound,
    collapse_bound,
    off_sink_bound,
    protected_length,
    required_margin,
)
from goatviz.transport.call import AttentionCall, PlanWindow
from goatviz.transport.changes import (
    Ablate,
    Cap,
    Change,
    HeavyHitters,
    Hide,
    SinkColumn,
    Streaming,
    Temper,
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
from goatviz.transport.statistics import (
    CHEAP_STATISTICS,
    ROW_STATISTICS,
    IncomingMass,
    RowStatistics,
    incoming_mass,
    row_statistics,
)

__all__ = [
    "CHEAP_STATISTICS",
    "ROW_STATISTICS",
    "Ablate",
    "AttentionCall",
    "BalancedPlan",
    "Cap",
    "Change",
    "CollapseBound",
    "CrossCheck",
    "HeavyHitters",
    "Hide",
    "IncomingMass",
    "PlanWindow",
    "RowStatistics",
    "SinkColumn",
    "SolverReport",
    "Streaming",
    "Temper",
    "TransportPlan",
    "Verdict",
    "collapse_bound",
    "cross_check",
    "doubly_stochastic",
    "incoming_mass",
    "off_sink_bound",
    "protected_length",
    "required_margin",
    "row_statistics",
    "solve_rows",
]
