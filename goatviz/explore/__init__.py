"""Widgets for notebooks: explorers of plans, priors, sinks and lengths, and what they stand on.

State lives in traits; numbers come from `goatviz.analysis`, pictures from `goatviz.plots`.
"""

from goatviz.explore.generation import GenerationExplorer, explore_generation
from goatviz.explore.length import LengthExplorer, explore_length
from goatviz.explore.page import Page, Place
from goatviz.explore.plan import PlanExplorer, explore_plan
from goatviz.explore.plan_map import PlanMap, ShownPlan
from goatviz.explore.prior import PriorExplorer, explore_prior
from goatviz.explore.selection import Selection
from goatviz.explore.sinks import SinkExplorer, explore_sinks

__all__ = [
    "GenerationExplorer",
    "LengthExplorer",
    "Page",
    "Place",
    "PlanExplorer",
    "PlanMap",
    "PriorExplorer",
    "Selection",
    "ShownPlan",
    "SinkExplorer",
    "explore_generation",
    "explore_length",
    "explore_plan",
    "explore_prior",
    "explore_sinks",
]
