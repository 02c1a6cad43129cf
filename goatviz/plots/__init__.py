"""Drawing results: each `draw_*` takes a result and returns a plotly Figure; none computes results.

Figures need no network, and this package never imports torch: results can be drawn on a machine
without it.
"""

from goatviz.plots.explanation import draw_explanation
from goatviz.plots.figure import CONFIG, Figure, save_html
from goatviz.plots.length import draw_extrapolation, draw_length, draw_needle
from goatviz.plots.mass import draw_mass
from goatviz.plots.perplexity import draw_perplexity
from goatviz.plots.plan import draw_plan
from goatviz.plots.prior import PRIOR_KINDS, draw_prior
from goatviz.plots.sink_effect import draw_sink_effect
from goatviz.plots.sinks import SINK_KINDS, draw_sinks
from goatviz.plots.training import draw_losses, draw_training

__all__ = [
    "CONFIG",
    "PRIOR_KINDS",
    "SINK_KINDS",
    "Figure",
    "draw_explanation",
    "draw_extrapolation",
    "draw_length",
    "draw_losses",
    "draw_mass",
    "draw_needle",
    "draw_perplexity",
    "draw_plan",
    "draw_prior",
    "draw_sink_effect",
    "draw_sinks",
    "draw_training",
    "save_html",
]
