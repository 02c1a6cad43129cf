"""Widgets for JupyterLab: `explore_plan` so far, and the map that it is built on.

State lives in traits; numbers come from `goatviz.analysis`, pictures from `goatviz.plots`.
"""

from goatviz.explore.length import LengthExplorer, explore_length
from goatviz.explore.plan import PlanExplorer, explore_plan
from goatviz.explore.plan_map import PlanMap

__all__ = ["LengthExplorer", "PlanExplorer", "PlanMap", "explore_length", "explore_plan"]
