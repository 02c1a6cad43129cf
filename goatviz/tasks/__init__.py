"""Tasks: seeded sources of token sequences, of any length, with what the best predictor reaches.

A task knows its data and its optimum; training knows neither.
"""

from goatviz.tasks.copy_mixture import CopyMixture

__all__ = ["CopyMixture"]
