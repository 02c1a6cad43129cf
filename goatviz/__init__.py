"""goatviz: attention as entropic optimal transport, its learned priors, and pictures of both.

The names below are resolved when they are first used, so that `import goatviz` stays light: it
loads neither torch nor plotly. Start with `plot_prior(load_pretrained("copy-mixture-1-goat"))`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ALiBiPrior": "goatviz.priors",
    "Ablate": "goatviz.transport",
    "Attention": "goatviz.attention",
    "BucketPrior": "goatviz.priors",
    "Cap": "goatviz.transport",
    "CausalLM": "goatviz.models",
    "CopyMixture": "goatviz.tasks",
    "DNA": "goatviz.tasks",
    "Execution": "goatviz.training",
    "HeavyHitters": "goatviz.transport",
    "Hide": "goatviz.transport",
    "ImageClassifier": "goatviz.models",
    "Images": "goatviz.tasks",
    "KeyTablePrior": "goatviz.priors",
    "LagTablePrior": "goatviz.priors",
    "ModelConfig": "goatviz.models",
    "Needle": "goatviz.tasks",
    "Passkey": "goatviz.tasks",
    "Prior": "goatviz.priors",
    "RecencyPrior": "goatviz.priors",
    "Selection": "goatviz.explore",
    "SinkColumn": "goatviz.transport",
    "SinkPrior": "goatviz.priors",
    "SpectralPrior": "goatviz.priors",
    "Streaming": "goatviz.transport",
    "Temper": "goatviz.transport",
    "Text": "goatviz.tasks",
    "TrainConfig": "goatviz.training",
    "TransportPlan": "goatviz.transport",
    "UniformPrior": "goatviz.priors",
    "attention_plan": "goatviz.attention",
    "capture": "goatviz.adapters",
    "convert": "goatviz.adapters",
    "cross_check": "goatviz.transport",
    "doubly_stochastic": "goatviz.transport",
    "example_text": "goatviz.examples",
    "explain": "goatviz.analysis",
    "explore_generation": "goatviz.explore",
    "explore_length": "goatviz.explore",
    "explore_plan": "goatviz.explore",
    "explore_prior": "goatviz.explore",
    "explore_sinks": "goatviz.explore",
    "fit_priors": "goatviz.analysis",
    "goat_prior": "goatviz.models",
    "heads_table": "goatviz.analysis",
    "implied_prior": "goatviz.analysis",
    "incoming_mass": "goatviz.transport",
    "judge_claims": "goatviz.paper",
    "info": "goatviz.environment",
    "interpolate_positions": "goatviz.models",
    "intervene": "goatviz.adapters",
    "join_sweeps": "goatviz.analysis",
    "length_sweep": "goatviz.analysis",
    "list_pretrained": "goatviz.training",
    "list_results": "goatviz.results",
    "load_checkpoint": "goatviz.training",
    "load_example": "goatviz.examples",
    "load_pretrained": "goatviz.training",
    "load_result": "goatviz.results",
    "load_runs": "goatviz.analysis",
    "load_shipped_result": "goatviz.results",
    "loss_difference": "goatviz.analysis",
    "mass_sweep": "goatviz.analysis",
    "needle_grid": "goatviz.analysis",
    "perplexity_sweep": "goatviz.analysis",
    "plan_slice": "goatviz.analysis",
    "plot_explanation": "goatviz.figures",
    "plot_extrapolation": "goatviz.figures",
    "plot_length": "goatviz.figures",
    "plot_mass": "goatviz.figures",
    "plot_needle": "goatviz.figures",
    "plot_perplexity": "goatviz.figures",
    "plot_plan": "goatviz.figures",
    "plot_prior": "goatviz.figures",
    "plot_sink_effect": "goatviz.figures",
    "plot_sinks": "goatviz.figures",
    "plot_training": "goatviz.figures",
    "prior_attention": "goatviz.attention",
    "prior_profile": "goatviz.analysis",
    "prior_summary": "goatviz.analysis",
    "reproduce": "goatviz.paper",
    "row_statistics": "goatviz.transport",
    "save_checkpoint": "goatviz.training",
    "save_html": "goatviz.plots",
    "save_result": "goatviz.results",
    "sink_effect": "goatviz.analysis",
    "sink_profile": "goatviz.analysis",
    "sink_table": "goatviz.analysis",
    "solve_rows": "goatviz.transport",
    "train": "goatviz.training",
    "training_log": "goatviz.analysis",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'goatviz' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
