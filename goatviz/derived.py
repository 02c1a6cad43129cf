"""Fields of results that are derived from other fields, when a result is made or loaded.

Files of earlier versions lack some of these fields; `completed` adds them. Each function takes
arrays by field name (with the schema's dimensions), coordinates and attributes, and returns the
derived fields. It needs numpy alone, so that it works without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from goatviz import bins

if TYPE_CHECKING:
    import xarray as xr

Arrays = Mapping[str, Any]


def leading_masses(data: Arrays, coords: Arrays, attrs: Arrays) -> dict[str, np.ndarray]:
    """Means over the runs of a mass sweep; masses are those of each run's leading head.

    A group's leading head is the one with the most mass on that group at the reference length:
    the training length, or the shortest one if that was not measured. The same head is followed
    at all lengths, so that it is the model's behaviour that varies with length, not the choice of
    head. The interval of a mean spans the intervals of all runs.
    """
    lengths = [int(length) for length in coords["length"]]
    trained = str(attrs["training_length"])
    known = trained.isdigit() and int(trained) in lengths
    reference = int(trained) if known else min(lengths)
    fields = {"reference_length": np.array(reference)}
    fields |= _over_runs("mean_token", *(data[f"token{end}"] for end in ("", "_low", "_high")))
    for group in ("answer", "first", "recent"):
        at_reference = data[f"{group}_mass"][:, :, lengths.index(reference)]
        flat = at_reference.reshape(*at_reference.shape[:2], -1)
        measured = ~np.isnan(flat).all(axis=-1)
        best = np.where(np.isnan(flat), -np.inf, flat).argmax(axis=-1)
        layer, head = np.unravel_index(best, at_reference.shape[2:])
        for dim, places in (("layer", layer), ("head", head)):
            fields[f"{group}_{dim}"] = np.where(measured, np.asarray(coords[dim])[places], -1)
        for plan in ("", "prior_"):
            ends = []
            for end in ("", "_low", "_high"):
                values = data[f"{plan}{group}_mass{end}"]
                flat = values.reshape(*values.shape[:3], -1)
                led = np.take_along_axis(flat, best[:, :, None, None], axis=-1)[..., 0]
                ends.append(np.where(measured[:, :, None], led, np.nan))
            fields[f"run_{plan}{group}_mass"] = ends[0]
            fields |= _over_runs(f"mean_{plan}{group}_mass", *ends)
    return fields


def perplexities(data: Arrays, coords: Arrays, attrs: Arrays) -> dict[str, np.ndarray]:
    """Perplexities exp(loss) of a sweep's losses: of means over runs, and of each run."""
    fields = {"run_perplexity": np.exp(data["run_loss"])}
    for end in ("", "_low", "_high"):
        fields[f"perplexity{end}"] = np.exp(data[f"mean_loss{end}"])
        fields[f"position_perplexity{end}"] = np.exp(data[f"mean_position_loss{end}"])
    return fields


#: Functions that derive the fields of a schema, by its name.
DERIVED: dict[str, Callable[[Arrays, Arrays, Arrays], dict[str, np.ndarray]]] = {
    "mass_sweep": leading_masses,
    "perplexity_sweep": perplexities,
}


def completed(dataset: xr.Dataset, schema: Any) -> xr.Dataset:
    """Add to a result the derived fields that it lacks.

    Parameters
    ----------
    dataset : xarray.Dataset
        As read from a file; dimensions that a selection dropped stay dropped.
    schema : Schema
        The schema of the result.
    """
    import xarray as xr

    derive = DERIVED.get(schema.name)
    if derive is None or all(name in dataset.variables for name in schema.fields):
        return dataset
    data = {}
    for name, field in schema.fields.items():
        if name in dataset.variables:
            array = dataset[name]
            dropped = [dim for dim in field.dims if dim not in array.dims]
            data[name] = array.expand_dims(dropped).transpose(*field.dims).values
    dims = {dim for field in schema.fields.values() for dim in field.dims}
    coords = {
        dim: np.atleast_1d(dataset[dim].values) if dim in dataset.coords else np.arange(1)
        for dim in dims
    }
    try:
        derived = derive(data, coords, dataset.attrs)
    except KeyError:
        # A damaged file; `check_result` names what it lacks.
        return dataset
    added = {}
    for name, values in derived.items():
        field = schema.fields[name]
        array = xr.DataArray(
            values, dims=field.dims, attrs={"units": field.units, "long_name": field.long_name}
        )
        dropped = [dim for dim in field.dims if dim not in dataset.dims]
        added[name] = array.squeeze(dropped, drop=True)
    return dataset.assign({name: array for name, array in added.items() if name not in dataset})


def _over_runs(
    name: str, values: np.ndarray, low: np.ndarray, high: np.ndarray
) -> dict[str, np.ndarray]:
    """Mean over the runs that were measured, with the lowest and highest ends; NaN without any."""
    mean = bins.mean_of_finite(values, axis=1)
    missing = np.isnan(mean)
    lowest = np.where(np.isnan(low), np.inf, low).min(axis=1)
    highest = np.where(np.isnan(high), -np.inf, high).max(axis=1)
    return {
        name: mean,
        f"{name}_low": np.where(missing, np.nan, lowest),
        f"{name}_high": np.where(missing, np.nan, highest),
    }
