"""What length does to answers and losses: `explore_length` shows a sweep by scheme and length.

The numbers are those of the result; where a picture needs others (depths pooled, losses paired with
a reference), `goatviz.analysis` computes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets

from goatviz import checks
from goatviz.analysis.length import farthest_scheme, over_depths
from goatviz.analysis.perplexity import loss_difference
from goatviz.explore.base import Explorer, Picture
from goatviz.explore.controls import Control
from goatviz.explore.jobs import Job
from goatviz.plots import style
from goatviz.plots.length import MEASURES, UNITS, accuracy_panel, depth_panel, map_panel
from goatviz.plots.mass import GROUPS, mass_panel
from goatviz.plots.perplexity import MEASURES as LOSSES
from goatviz.plots.perplexity import difference_panel, loss_panel
from goatviz.plots.schemes import OTHERS, Focus
from goatviz.results import (
    LENGTH_SWEEP,
    MASS_SWEEP,
    NEEDLE_GRID,
    PERPLEXITY_SWEEP,
    Schema,
    check_result,
    is_dataset,
)

if TYPE_CHECKING:
    import xarray as xr

#: Results that can be explored.
SCHEMAS = (LENGTH_SWEEP, NEEDLE_GRID, MASS_SWEEP, PERPLEXITY_SWEEP)
#: The choice of no single depth: all depths pooled, or those of the task.
ALL = "all"
_WIDTH = 340


def explore_length(
    result: xr.Dataset, *, grid: xr.Dataset | None = None, scheme: str | None = None
) -> LengthExplorer:
    """Explore a sweep over lengths in JupyterLab: schemes, lengths, depths, and single runs.

    Parameters
    ----------
    result : xarray.Dataset
        From `goatviz.length_sweep`, `needle_grid`, `mass_sweep` or `perplexity_sweep`.
    grid : xarray.Dataset, optional
        With a length sweep: a needle grid of the same task and schemes.
    scheme : str, optional
        The scheme chosen at first; default the one whose accuracy or loss is farthest from the mean
        of the others at the longest length.

    Returns
    -------
    LengthExplorer
        A widget; `draw(...)` makes the same pictures without a kernel, `save_html(...)` a page.

    Raises
    ------
    TypeError
        If `result` or `grid` is not such a result.
    ValueError
        If nothing was measured, a selection dropped a dimension, there is no such scheme, or the
        grid does not belong to the sweep.

    Examples
    --------
    >>> from goatviz import load_shipped_result
    >>> explorer = explore_length(load_shipped_result("passkey-sweep"))
    >>> explorer.set(scheme="rope", length=1024, others="hidden")
    >>> [trace.name for trace in explorer.draw(runs=False).data]
    ['rope', 'chance (0.0001)', 'chosen']
    """
    schema = result.attrs.get("schema") if is_dataset(result) else None
    if schema not in {each.name for each in SCHEMAS}:
        came = type(result).__name__ if schema is None else f"a {schema}"
        wanted = ", ".join(each.name for each in SCHEMAS)
        raise TypeError(f"result must be a Dataset of one of {wanted}, got {came}")
    if grid is not None and schema != LENGTH_SWEEP.name:
        raise TypeError(f"grid goes with a length_sweep only, got it with a {schema}")
    if schema == LENGTH_SWEEP.name:
        return AnswerExplorer(result, grid, scheme=scheme)
    if schema == NEEDLE_GRID.name:
        return AnswerExplorer(None, result, scheme=scheme)
    explorer = MassExplorer if schema == MASS_SWEEP.name else LossExplorer
    return explorer(result, scheme=scheme)


class LengthExplorer(Explorer):
    """A sweep over lengths with a chosen scheme and length; see `explore_length`.

    Attributes
    ----------
    scheme : str
        The chosen scheme; a click on its line chooses it, too.
    others : {"shown", "dimmed", "hidden"}
        How the other schemes are shown.
    length : int
        The chosen length, in tokens.
    runs : bool
        Whether single runs are shown.
    """

    scheme = traitlets.Unicode().tag(sync=True)
    others = traitlets.Unicode("shown").tag(sync=True)
    length = traitlets.Int().tag(sync=True)
    runs = traitlets.Bool(True).tag(sync=True)

    shown: tuple[str, ...] = ("scheme", "others", "length", "runs")

    def _begin_with(
        self,
        results: Sequence[xr.Dataset],
        count: str,
        *,
        scheme: str,
        controls: Sequence[Control] = (),
    ) -> None:
        """Choose a scheme and a length, and build the widgets.

        `count` names the field that tells which cells were measured: not 0 and not NaN.
        """
        self.schemes = [str(each) for each in results[0]["scheme"].values]
        self.lengths = _measured_lengths(results, count)
        self.scheme = checks.one_of("scheme", scheme, self.schemes)
        self.length = self.lengths[-1]
        self._training = f"trained at {results[0].attrs['training_length']} tokens"
        several = any(int(each.sizes.get("run", 1)) > 1 for each in results)
        shared = [
            Control(
                "scheme",
                "Scheme",
                options=[(each, each) for each in self.schemes],
                hint="by default the one farthest from the mean of the others at the longest "
                "length",
            ),
            Control(
                "others",
                "Others",
                options=[(each, each) for each in OTHERS],
                hint="how the other schemes are shown",
                disabled=len(self.schemes) == 1,
            ),
            Control("length", "Length", options=[(each, f"{each:,}") for each in self.lengths]),
            *controls,
            Control(
                "runs",
                "Single runs",
                "toggle",
                hint="a small mark for each training run",
                disabled=not several,
            ),
        ]
        self._set_up(shared, label=f"Length extrapolation: {results[0].attrs['task']}")

    def _focus(self, values: Mapping[str, Any]) -> Focus:
        return Focus(
            values["scheme"], values["others"], length=values["length"], runs=values["runs"]
        )

    def _check(self, values: Mapping[str, Any]) -> None:
        checks.one_of("scheme", values["scheme"], self.schemes)
        checks.one_of("others", values["others"], OTHERS)
        checks.one_of("length", values["length"], self.lengths)
        checks.flag("runs", values["runs"])

    def _default_vary(self) -> dict[str, list[Any]]:
        return {"scheme": list(self.schemes), "length": list(self.lengths)}

    # --- clicks ---

    def _clicked(self, panel: str, message: Mapping[str, Any]) -> None:
        """Choose the scheme and length of a point."""
        chosen = self._scheme_named(message["trace"])
        if "position" not in panel:
            chosen["length"] = self._length_at(float(message["x"]))
        self.set(**chosen)

    def _scheme_named(self, trace: str) -> dict[str, str]:
        """The scheme whose trace has this name, as a value to set; {} for chance and the like."""
        for scheme in self.schemes:
            if trace in (style.escape(scheme), f"{style.escape(scheme)}, each run"):
                return {"scheme": scheme}
        return {}

    def _length_at(self, place: float) -> int:
        """The length nearest to a place on a binary axis."""
        return min(self.lengths, key=lambda length: abs(float(np.log2(length)) - place))


class AnswerExplorer(LengthExplorer):
    """Accuracy of answers by length and depth; see `explore_length`.

    Parameters
    ----------
    sweep, grid : xarray.Dataset or None
        A length sweep, a needle grid, or both.
    scheme : str, optional
        The scheme chosen at first.

    Attributes
    ----------
    measure : {"strict", "token"}
        Whole answers, or their tokens.
    depth : float or "all"
        Depth in the grid: the share of the text that comes before the answer. "all" is the sweep,
        or all depths of the grid pooled.
    """

    measure = traitlets.Unicode("strict").tag(sync=True)
    depth = traitlets.Union([traitlets.Float(), traitlets.Unicode()], default_value=ALL).tag(
        sync=True
    )

    def __init__(
        self,
        sweep: xr.Dataset | None,
        grid: xr.Dataset | None = None,
        *,
        scheme: str | None = None,
    ) -> None:
        super().__init__()
        given = ((sweep, LENGTH_SWEEP), (grid, NEEDLE_GRID))
        results = [_whole(result, schema) for result, schema in given if result is not None]
        if len(results) == 2:
            _check_belongs(sweep, grid)
        self._sweep, self._grid = sweep, grid
        self.depths = [] if grid is None else [float(each) for each in grid["depth"].values]
        # A sweep has the depths of its task; without one, those of the grid are pooled.
        self._all = sweep if sweep is not None else over_depths(grid)
        self.shown = ("scheme", "others", "length", "measure", "runs")
        self.panels = {"accuracy by length": _WIDTH}
        controls = [
            Control(
                "measure", "Measure", options=[("strict", "whole answers"), ("token", "tokens")]
            )
        ]
        if grid is not None:
            self.shown = ("scheme", "others", "length", "depth", "measure", "runs")
            self.panels |= {"depth and length": _WIDTH, "accuracy by depth": _WIDTH}
            text = [(each, f"{100 * each:g} %") for each in self.depths]
            everything = "all" if sweep is None else "all of the task"
            controls.insert(0, Control("depth", "Depth", options=[(ALL, everything), *text]))
        if scheme is None:
            name = "mean_strict" if "mean_strict" in self._all else "strict"
            scheme = farthest_scheme(self._all[name])
        self._begin_with(results, "examples", scheme=scheme, controls=controls)

    def _check(self, values: Mapping[str, Any]) -> None:
        super()._check(values)
        checks.one_of("measure", values["measure"], MEASURES)
        if "depth" in values:
            checks.one_of("depth", values["depth"], [ALL, *self.depths])

    def _picture(self, values: Mapping[str, Any], job: Job) -> Picture:
        measure = values["measure"]
        depth = None if values.get("depth", ALL) == ALL else values["depth"]
        focus = replace(self._focus(values), depth=depth)
        result = self._all if depth is None else self._grid.sel(depth=depth)
        figures = {"accuracy by length": accuracy_panel(result, focus, measure=measure)}
        if self._grid is not None:
            cells = map_panel(self._grid, focus.scheme, focus, measure=measure)
            figures["depth and length"] = replace(cells, title=f"Depth and length: {focus.scheme}")
            figures["accuracy by depth"] = depth_panel(self._grid, focus, measure=measure)
        return Picture(figures, self._summary_of(result, values, depth))

    def _summary_of(
        self, result: xr.Dataset, values: Mapping[str, Any], depth: float | None
    ) -> str:
        scheme, length, measure = values["scheme"], values["length"], values["measure"]
        where = f"{scheme} at {length:,} tokens"
        if depth is not None:
            where += f", depth {100 * depth:g} %"
        elif "depth" in values:
            where += ", all depths" if self._sweep is None else ", the task's own depths"
        known = f"Chance {float(result.attrs[f'chance_{measure}']):.3g}; {self._training}."
        if length not in result["length"].values:
            return f"{where}: not measured. {known}"
        one, unit = result.sel(scheme=scheme, length=length), UNITS[measure]
        name = f"mean_{measure}" if "run" in one.dims else measure
        count = int(one[unit].sum())
        if not count:
            return f"{where}: not measured. {known}"
        runs = "all runs"
        if "run" in one.dims:
            runs = checks.count_text(int((one["examples"].values > 0).sum()), "run")
        return (
            f"{where}: {float(one[name]):.4f} of {MEASURES[measure]} (95 % interval "
            f"{float(one[f'{name}_low']):.4f} to {float(one[f'{name}_high']):.4f}; "
            f"n = {count:,} {unit}, {runs}). {known}"
        )

    def _clicked(self, panel: str, message: Mapping[str, Any]) -> None:
        if panel == "depth and length":
            column, row = (round(float(message[side])) for side in "xy")
            self.set(length=int(self._grid["length"].values[column]), depth=self.depths[row])
        elif panel == "accuracy by depth":
            place = float(message["x"]) / 100
            depth = min(self.depths, key=lambda each: abs(each - place))
            self.set(**self._scheme_named(message["trace"]), depth=depth)
        else:
            super()._clicked(panel, message)


class LossExplorer(LengthExplorer):
    """Loss on documents by length and position, and its difference from a reference.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.perplexity_sweep`.
    scheme : str, optional
        The scheme chosen at first.

    Attributes
    ----------
    measure : {"loss", "perplexity"}
        Loss in nats per token, or its exponential; differences stay in nats.
    reference : str
        The scheme that the others are compared with, on the same pieces.
    """

    measure = traitlets.Unicode("loss").tag(sync=True)
    reference = traitlets.Unicode().tag(sync=True)

    shown = ("scheme", "others", "length", "measure", "reference", "runs")
    panels = {"loss by length": _WIDTH, "loss by position": _WIDTH, "loss difference": _WIDTH}

    def __init__(self, sweep: xr.Dataset, *, scheme: str | None = None) -> None:
        super().__init__()
        self._sweep = _whole(sweep, PERPLEXITY_SWEEP)
        self._differences: dict[str, xr.Dataset] = {}
        schemes = [str(each) for each in sweep["scheme"].values]
        scheme = farthest_scheme(sweep["mean_loss"]) if scheme is None else scheme
        rivals = [each for each in schemes if each != scheme]
        # Position schemes are commonly compared with RoPE.
        self.reference = "rope" if "rope" in rivals else (rivals or schemes)[0]
        self._begin_with(
            [sweep],
            "mean_loss",
            scheme=scheme,
            controls=[
                Control("measure", "Measure", options=[(each, each) for each in LOSSES]),
                Control(
                    "reference",
                    "Reference",
                    options=[(each, each) for each in schemes],
                    hint="the scheme whose loss is subtracted in the loss difference",
                ),
            ],
        )

    def _check(self, values: Mapping[str, Any]) -> None:
        super()._check(values)
        checks.one_of("measure", values["measure"], LOSSES)
        checks.one_of("reference", values["reference"], self.schemes)

    def _difference(self, reference: str) -> xr.Dataset:
        if reference not in self._differences:
            self._differences[reference] = loss_difference(self._sweep, reference)
        return self._differences[reference]

    def _picture(self, values: Mapping[str, Any], job: Job) -> Picture:
        focus, measure = self._focus(values), values["measure"]
        difference = self._difference(values["reference"])
        figures = {
            "loss by length": loss_panel(self._sweep, focus, measure=measure),
            "loss by position": loss_panel(self._sweep, focus, kind="position", measure=measure),
            "loss difference": difference_panel(difference, focus),
        }
        return Picture(figures, self._summary_of(values, difference))

    def _summary_of(self, values: Mapping[str, Any], difference: xr.Dataset) -> str:
        scheme, length, reference = values["scheme"], values["length"], values["reference"]
        one = self._sweep.sel(scheme=scheme, length=length)
        where = f"{scheme} in windows of {length:,} tokens"
        if np.isnan(float(one["mean_loss"])):
            return f"{where}: not measured. {self._training.capitalize()}."
        runs = checks.count_text(int(one["run_loss"].notnull().sum()), "run")
        text = (
            f"{where}: loss {_interval(one, 'mean_loss')} nats/token, perplexity "
            f"{_interval(one, 'perplexity')} (n = {int(one['tokens'].sum()):,} tokens of "
            f"{one.sizes['piece']} pieces, {runs}; 95 % intervals over pieces)"
        )
        apart = difference.sel(scheme=scheme, length=length)
        if scheme != reference and not np.isnan(float(apart["difference"])):
            text += (
                f"; difference from {reference} on the same pieces: "
                f"{_interval(apart, 'difference', '+.4f')} nats"
            )
        return f"{text}. {self._training.capitalize()}."


class MassExplorer(LengthExplorer):
    """Accuracy of answers, and the attention mass on the answer, recent keys and the first key.

    Parameters
    ----------
    sweep : xarray.Dataset
        From `goatviz.mass_sweep`.
    scheme : str, optional
        The scheme chosen at first.
    """

    panels = {
        "accuracy by length": 420,
        "mass on the answer": 420,
        "mass on recent keys": 420,
        "mass on the first key": 420,
    }

    def __init__(self, sweep: xr.Dataset, *, scheme: str | None = None) -> None:
        super().__init__()
        self._sweep = _whole(sweep, MASS_SWEEP)
        scheme = farthest_scheme(sweep["mean_token"]) if scheme is None else scheme
        self._begin_with([sweep], "tokens", scheme=scheme)

    def _picture(self, values: Mapping[str, Any], job: Job) -> Picture:
        focus = self._focus(values)
        figures = {
            name: mass_panel(self._sweep, focus, of=of)
            for name, of in zip(self.panels, ("accuracy", *GROUPS), strict=True)
        }
        return Picture(figures, self._summary_of(values))

    def _summary_of(self, values: Mapping[str, Any]) -> str:
        scheme, length = values["scheme"], values["length"]
        sweep, where = self._sweep, f"{scheme} at {length:,} tokens"
        one = sweep.sel(scheme=scheme, length=length)
        known = f"Chance {float(sweep.attrs['chance_token']):.3g}; {self._training}."
        tokens = one["tokens"].values
        if not tokens.sum():
            return f"{where}: not measured. {known}"
        runs = checks.count_text(int((tokens > 0).sum()), "run")
        share, low, high = (float(one[f"mean_token{end}"]) for end in ("", "_low", "_high"))
        text = (
            f"{where}: {share:.4f} of answer tokens right (95 % intervals {low:.4f} to {high:.4f}; "
            f"n = {int(tokens.sum()):,} tokens, {runs})"
        )
        for group, title in GROUPS.items():
            if not np.isnan(float(one[f"mean_{group}_mass"])):
                name = title.format(recent=sweep.attrs["recent"]).lower()
                text += f"; {name} {_interval(one, f'mean_{group}_mass')}"
        return (
            f"{text}. Heads chosen at {int(sweep['reference_length']):,} tokens, "
            f"{sweep.attrs['examples']} examples a run. {known}"
        )


def _whole(result: xr.Dataset, schema: Schema) -> xr.Dataset:
    """Return the result; raise ValueError if a selection dropped one of its dimensions."""
    check_result(result, schema)
    dims = {dim for field in schema.fields.values() for dim in field.dims}
    dropped = sorted(dims - set(result.dims))
    if dropped:
        raise ValueError(
            f"{schema.name} lacks the dimension {', '.join(dropped)}: select a list, as in "
            f"sel({dropped[0]}=[...]), which keeps it"
        )
    return result


def _check_belongs(sweep: xr.Dataset, grid: xr.Dataset) -> None:
    """Raise ValueError unless both have the same task, training length and schemes."""
    for name in ("task", "training_length"):
        if str(sweep.attrs[name]) != str(grid.attrs[name]):
            raise ValueError(
                f"grid must have the sweep's {name}, {sweep.attrs[name]}, got {grid.attrs[name]}"
            )
    wanted, came = ([str(s) for s in each["scheme"].values] for each in (sweep, grid))
    if wanted != came:
        raise ValueError(
            f"grid must have the sweep's schemes, {', '.join(wanted)}, got {', '.join(came)}"
        )


def _measured_lengths(results: Sequence[xr.Dataset], count: str) -> list[int]:
    """Lengths at which any result has a measured cell."""
    lengths: set[int] = set()
    for result in results:
        values = result[count].fillna(0) != 0
        here = values.any([dim for dim in values.dims if dim != "length"])
        lengths |= {int(length) for length in result["length"].values[here.values]}
    if not lengths:
        raise ValueError(
            f"{results[0].attrs['schema']} must hold at least one measured cell, got none"
        )
    return sorted(lengths)


def _interval(one: xr.Dataset, name: str, form: str = ".4f") -> str:
    value, low, high = (float(one[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return f"{value:{form}} ({low:{form}} to {high:{form}})"
