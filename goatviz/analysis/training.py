"""How training went: losses and learning rates of several runs, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import xarray as xr

from goatviz.results import TRAINING_LOG, make_result
from goatviz.training import Checkpoint, TrainResult


def training_log(
    runs: Checkpoint | TrainResult | Mapping[str, Checkpoint | TrainResult],
) -> xr.Dataset:
    """The history of one run or of several, by name.

    Parameters
    ----------
    runs : Checkpoint, TrainResult, or mapping of str to them
        A loaded checkpoint (its card holds the history), or what `train` returned.

    Returns
    -------
    xarray.Dataset
        Schema `training_log`: loss (what training minimised, on one batch) and learning rate by
        step, NaN where a run did not log that step; and the held-out loss, nats per token.

    Raises
    ------
    ValueError
        If there is no run, or a run has no history.
    TypeError
        If a run is neither a checkpoint nor a result.

    Examples
    --------
    >>> from goatviz import load_pretrained
    >>> log = training_log(load_pretrained("copy-mixture-4-goat"))
    >>> int(log["step"][-1])
    2000
    """
    if isinstance(runs, Checkpoint | TrainResult):
        runs = {_name(runs): runs}
    if not isinstance(runs, Mapping) or not runs:
        raise ValueError(
            "runs must be a checkpoint, a training result, or a mapping of names to them, "
            f"got {type(runs).__name__}"
        )
    histories, held_out = [], []
    for name, run in runs.items():
        history, loss, error = _read(name, run)
        histories.append({int(entry["step"]): entry for entry in history})
        held_out.append((loss, error))
    steps = sorted(set().union(*histories))
    values = {
        key: np.array(
            [[float(h[s][key]) if s in h else math.nan for s in steps] for h in histories]
        )
        for key in ("loss", "learning_rate")
    }
    values["held_out"], values["held_out_standard_error"] = np.array(held_out, dtype=float).T
    return make_result(
        TRAINING_LOG, values, coords={"run": [str(name) for name in runs], "step": steps}
    )


def _name(run: Checkpoint | TrainResult) -> str:
    return run.name if isinstance(run, Checkpoint) else run.config.positions


def _read(name: str, run: Checkpoint | TrainResult) -> tuple[list[dict[str, float]], float, float]:
    """History, held-out loss and its standard error."""
    if isinstance(run, Checkpoint):
        history, losses = run.card.get("history"), run.card.get("losses", {})
        found = losses.get("held_out", math.nan), losses.get("held_out_standard_error", math.nan)
    elif isinstance(run, TrainResult):
        history, held_out = run.history, run.held_out
        found = (math.nan, math.nan) if held_out is None else held_out[:2]
    else:
        raise TypeError(
            f"runs[{name!r}] must be a checkpoint or a training result, got {type(run).__name__}"
        )
    if not history:
        raise ValueError(f"runs[{name!r}] has no history")
    return history, *found
