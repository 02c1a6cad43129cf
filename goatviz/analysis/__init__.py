"""Numbers about priors and plans, as results. Nothing here draws.

`prior.prior_profile` takes a learned prior apart, `plan.plan_slice` looks at a window of a plan.
"""

from goatviz.analysis.plan import plan_slice
from goatviz.analysis.prior import (
    PriorSource,
    prior_profile,
    prior_sources,
    prior_summary,
)

__all__ = ["PriorSource", "plan_slice", "prior_profile", "prior_sources", "prior_summary"]
