"""Widgets for JupyterLab: a plan's map so far.

State lives in traits; numbers come from `goatviz.analysis`.
"""

from goatviz.explore.plan_map import PlanMap

__all__ = ["PlanMap"]
