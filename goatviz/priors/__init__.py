"""Log-priors as objects: a function of positions, its low-rank lanes, and its named parts.

A prior gives its values for any window of positions and never stores a length x length array.
Priors can be added (`p + q`) and tempered (`0.5 * p`), and name their parts (`components()`).
Attention, analysis and plots know priors only through this interface.
"""

from goatviz.priors.base import Lanes, Prior, ScaledPrior, SumPrior, as_positions, grid_positions
from goatviz.priors.fixed import ALiBiPrior, BucketPrior, UniformPrior, alibi_slopes
from goatviz.priors.sink import RecencyPrior, SinkPrior
from goatviz.priors.spectral import SpectralPrior
from goatviz.priors.table import KeyTablePrior, LagTablePrior

__all__ = [
    "ALiBiPrior",
    "BucketPrior",
    "KeyTablePrior",
    "LagTablePrior",
    "Lanes",
    "Prior",
    "RecencyPrior",
    "ScaledPrior",
    "SinkPrior",
    "SpectralPrior",
    "SumPrior",
    "UniformPrior",
    "alibi_slopes",
    "as_positions",
    "grid_positions",
]
