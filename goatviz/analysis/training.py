"""Losses and learning rates of training runs, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from goatviz import checks
from goatviz.results import TRAINING_LOG, make_result
from goatviz.training import Checkpoint, TrainResult

if TYPE_CHECKING:
    import xarray as xr


def training_log(
    runs: Checkpoint | TrainResult | Mapping[str, Checkpoint | TrainResult],
) -> xr.Dataset:
    """The history of one training run or of several, by name.

    Parameters
    ----------
    runs : Checkpoint, TrainResult, or mapping of str to them
        A loaded checkpoint, whose card holds the history; a result of `train`; or several of them
        by name.

    Returns
    -------
    xarray.Dataset
        Schema `training_log`: the loss of one training batch and the learning rate by step, NaN
        where a run did not log that step; and the held-out loss. Losses are in nats per token.

    Raises
    ------
    TypeError
        If a run is neither a checkpoint nor a training result.
    ValueError
        If there is no run, or a run has no history.

    Examples
    --------
    >>> from goatviz import load_pretrained
    >>> log = training_log(load_pretrained("copy-mixture-4-goat"))
    >>> int(log["step"][-1])
    2000
    """
    if isinstance(runs, Checkpoint | TrainResult):
        runs = {_name(runs): runs}
    wanted = "a checkpoint, a training result, or a mapping of names to them"
    if not checks.instance("runs", runs, Mapping, wanted):
        raise ValueError(f"runs must be {wanted}, got an empty mapping")
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
    wanted = "a checkpoint or a training result"
    checks.instance(f"runs[{name!r}]", run, (Checkpoint, TrainResult), wanted)
    if isinstance(run, Checkpoint):
        history, losses = run.card.get("history"), run.card.get("losses", {})
        loss = losses.get("held_out", math.nan)
        error = losses.get("held_out_standard_error", math.nan)
    else:
        history = run.history
        loss, error = (math.nan, math.nan) if run.held_out is None else run.held_out[:2]
    if not history:
        raise ValueError(f"runs[{name!r}] must have a history, got none")
    return history, loss, error
