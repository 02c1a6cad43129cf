"""Numbers about priors and plans, as results. Nothing here draws.

`prior.prior_profile` takes a learned prior apart, `plan.plan_slice` shows a window of a plan,
`thumbnails.plan_thumbnails` all of them and `compare.PlanDifference` how two differ,
`sinks.sink_profile` finds attention sinks, `implied.implied_prior` fits the prior inside logits,
`length.length_sweep` asks models for answers at many lengths, `mass.mass_sweep` measures where
their attention goes, and `explain.explain` says why a query attends where it does.
"""

from goatviz.analysis.compare import PlanDifference
from goatviz.analysis.explain import explain
from goatviz.analysis.generation import generation_steps, generation_thumbnails
from goatviz.analysis.heads import heads_table, sink_table
from goatviz.analysis.implied import fit_priors, implied_prior
from goatviz.analysis.intervals import wilson_interval
from goatviz.analysis.length import join_sweeps, length_sweep, needle_grid
from goatviz.analysis.levels import PlanLevels, colour_decades, colour_scale
from goatviz.analysis.mass import mass_sweep
from goatviz.analysis.perplexity import loss_difference, perplexity_sweep
from goatviz.analysis.plan import plan_slice
from goatviz.analysis.prior import (
    PriorSource,
    prior_profile,
    prior_sources,
    prior_summary,
)
from goatviz.analysis.runs import Runs, load_runs
from goatviz.analysis.sink_effect import sink_effect
from goatviz.analysis.sink_passes import SINK_STATISTICS
from goatviz.analysis.sinks import sink_profile
from goatviz.analysis.thumbnails import plan_thumbnails, prior_thumbnails, structured_head
from goatviz.analysis.training import training_log

__all__ = [
    "SINK_STATISTICS",
    "PlanDifference",
    "PlanLevels",
    "PriorSource",
    "Runs",
    "colour_decades",
    "colour_scale",
    "heads_table",
    "explain",
    "fit_priors",
    "generation_steps",
    "generation_thumbnails",
    "implied_prior",
    "join_sweeps",
    "length_sweep",
    "load_runs",
    "loss_difference",
    "mass_sweep",
    "needle_grid",
    "perplexity_sweep",
    "plan_slice",
    "plan_thumbnails",
    "prior_profile",
    "prior_sources",
    "prior_summary",
    "prior_thumbnails",
    "sink_effect",
    "sink_profile",
    "sink_table",
    "structured_head",
    "training_log",
    "wilson_interval",
]
