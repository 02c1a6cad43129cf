"""Widgets for JupyterLab: explorers of plans, priors, sinks and lengths, and what they stand on.

State lives in traits; numbers come from `goatviz.analysis`, pictures from `goatviz.plots`.
"""

from goatviz.explore.length import LengthExplorer, explore_length
from goatviz.explore.plan import PlanExplorer, explore_plan
from goatviz.explore.plan_map import PlanMap
from goatviz.explore.prior import PriorExplorer, explore_prior
from goatviz.explore.selection import Selection

__all__ = [
    "LengthExplorer",
    "PlanExplorer",
    "PlanMap",
    "PriorExplorer",
    "Selection",
    "explore_length",
    "explore_plan",
    "explore_prior",
]
