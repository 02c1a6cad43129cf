"""A learned prior, component by component: switches and scales, and what they make of its plan.

Numbers come from `goatviz.analysis.prior_mix`, pictures from `goatviz.plots.prior`.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import traitlets
import xarray as xr
from torch import nn

from goatviz import checks
from goatviz.analysis.prior import prior_sources
from goatviz.analysis.prior_curves import (
    PriorSource,
    Progress,
    component_names,
    part_of,
    prior_spectrum,
    require_sequence,
)
from goatviz.analysis.prior_mix import PriorMixer, mix_summary
from goatviz.explore.base import Explorer, Picture
from goatviz.explore.controls import Control
from goatviz.explore.jobs import Job
from goatviz.explore.selection import Selection
from goatviz.plots.base import Panel
from goatviz.plots.prior import MIX_PANELS
from goatviz.priors.base import Prior
from goatviz.training.checkpoint import Checkpoint

#: Tokens of the longest text.
MAX_LENGTH = 1_000_000
#: Ranges of the sliders: scales of components, content range and temperature.
SCALES = (0.0, 3.0)
CONTENT_RANGES = (0.0, 20.0)
TEMPERATURES = (0.01, 100.0)
#: Texts longer than this are computed beside the kernel's own work.
LONG = 32_768
#: Numbers of evaluated curves that are kept (32 MB).
_KEPT = 1 << 22
#: Most states of an exported page whose values nobody named.
_STATES = 32

_COMPONENTS = ("sink", "relative", "recency")
_MEANING = {
    "sink": "u(j), the part of a key that is the same for every query",
    "relative": "the kernel of the lag, without recency",
    "recency": "the slope that favours near keys",
}
#: Components that a panel depends on; besides layer, head and length, no other change redraws it.
_SCALES_OF = {
    "sink": ("sink",),
    "kernel": ("relative", "recency"),
    "spectrum": ("relative",),
    "plan": _COMPONENTS,
}


def explore_prior(
    source: Prior | nn.Module | Checkpoint,
    *,
    length: int | None = None,
    causal: bool | None = None,
    selection: Selection | None = None,
) -> PriorExplorer:
    r"""Explore a learned prior in JupyterLab: switch and scale its components, at any length.

    .. math:: K_{ij} = a\,u(j) + b\,\kappa(i - j) - c\,m\,(i - j), \qquad
              \pi_{ij} = e^{K_{ij}} / \sum_{j'} e^{K_{ij'}}

    Parameters
    ----------
    source : Prior, nn.Module or Checkpoint
        A prior; a model that contains goatviz `Attention` or goat-attention's modules; or a loaded
        checkpoint. Its parameters are read when a layer, head or length is first shown.
    length : int, optional
        Initial number of tokens, 1 to 1,000,000; default the training length, or 128.
    causal : bool, optional
        Overrides the layers' own setting; needed for a module that has none (default: causal).
    selection : Selection, optional
        Selection to share with other explorers.

    Returns
    -------
    PriorExplorer
        A widget; `draw(...)` makes the same pictures without a kernel.

    Raises
    ------
    TypeError
        If `source` has no explicit prior, or is a finished profile.
    ValueError
        For a prior on a grid or a length out of range.

    Notes
    -----
    The temperature is that of the content: in softmax(s / tau + K) it divides the scores s and
    not the log-prior, so it does not change a prior by itself. Together with a content range w it
    bounds how far *any* content can move the plan: log-odds by at most w / tau. To temper the
    prior itself, pi^(1/T), set all scales to 1/T.

    Examples
    --------
    >>> from goatviz import load_pretrained
    >>> explorer = explore_prior(load_pretrained("copy-mixture-1-goat"))
    >>> explorer.set(head=1, sink=False)
    >>> explorer.values()["sink"], list(explorer.panels)
    (False, ['sink', 'kernel', 'plan', 'last query', 'margin', 'spectrum'])
    >>> explorer.draw(sink_scale=2.0).layout.title.text
    'Learned prior'
    """
    return PriorExplorer(source, length=length, causal=causal, selection=selection)


class PriorExplorer(Explorer):
    """Layer, head, length, components and content of a learned prior; see `explore_prior`.

    Attributes
    ----------
    layer, head : int
        The head that is shown; heads are parameter sets (key-value heads under grouped queries).
    length : int
        Number of tokens, 1 to 1,000,000.
    sink, relative, recency : bool
        Whether the component counts; only those that some layer has can be switched.
    sink_scale, relative_scale, recency_scale : float
        Factor of the component in the log-prior, 0 to 3; 1 as learned.
    content_range : float
        w, the largest less the smallest content score of a query, 0 to 20.
    temperature : float
        tau of the content, 0.01 to 100: any content moves log-odds by at most w / tau. The prior
        does not depend on it.
    """

    layer = traitlets.Int(0).tag(sync=True)
    head = traitlets.Int(0).tag(sync=True)
    length = traitlets.Int(128).tag(sync=True)
    sink = traitlets.Bool(True).tag(sync=True)
    relative = traitlets.Bool(True).tag(sync=True)
    recency = traitlets.Bool(True).tag(sync=True)
    sink_scale = traitlets.Float(1.0).tag(sync=True)
    relative_scale = traitlets.Float(1.0).tag(sync=True)
    recency_scale = traitlets.Float(1.0).tag(sync=True)
    content_range = traitlets.Float(1.0).tag(sync=True)
    temperature = traitlets.Float(1.0).tag(sync=True)

    def __init__(
        self,
        source: Prior | nn.Module | Checkpoint,
        *,
        length: int | None = None,
        causal: bool | None = None,
        selection: Selection | None = None,
    ) -> None:
        if isinstance(source, xr.Dataset):
            raise TypeError(
                "source must be a Prior, a model or a checkpoint: a finished result cannot be "
                "recombined, draw it with goatviz.plot_prior"
            )
        source = source.model if isinstance(source, Checkpoint) else source
        if length is not None:
            length = _check_length(length)
        sources = prior_sources(source, causal=causal, length=length)
        for each in sources:
            require_sequence(each)
        if length is None:
            known = next((s.training_length for s in sources if s.training_length), 128)
            length = min(known, MAX_LENGTH)
        super().__init__()
        self.length = int(length)
        self._source, self._causal = source, causal
        self._heads = {layer: range(s.prior.num_heads) for layer, s in enumerate(sources)}
        self._parts = [component_names(s.prior) for s in sources]
        self._names = tuple(n for n in _COMPONENTS if any(n in parts for parts in self._parts))
        self._mixers: OrderedDict[tuple[int, int, int], PriorMixer] = OrderedDict()
        self._drawn: dict[str, tuple[tuple, Panel]] = {}
        self._lock = threading.Lock()
        self.shown = (
            "layer",
            "head",
            "length",
            *self._names,
            *(f"{name}_scale" for name in self._names),
            "content_range",
            "temperature",
        )
        there = {
            "sink": "sink" in self._names,
            "kernel": bool({"relative", "recency"} & set(self._names)),
            "spectrum": any(len(prior_spectrum(s.prior)[0]) for s in sources),
        }
        self.panels = {name: 340 for name in MIX_PANELS if there.get(name, True)}
        self._set_up(self._all_controls(sources), label="Learned prior", selection=selection)

    @traitlets.validate(*_COMPONENTS, *(f"{name}_scale" for name in _COMPONENTS))
    def _is_there(self, proposal: Any) -> Any:
        name = proposal["trait"].name
        if name.removesuffix("_scale") not in getattr(self, "_names", _COMPONENTS):
            raise traitlets.TraitError(f"{name} cannot be set: this prior has no such component")
        return proposal["value"]

    def reset(self) -> None:
        """Switch every component on, as learned, and set the content's temperature to 1."""
        self.set(
            **dict.fromkeys(self._names, True),
            **{f"{name}_scale": 1.0 for name in self._names},
            temperature=1.0,
        )

    def result(self, **values: Any) -> xr.Dataset:
        """The numbers behind the picture; values not given are the widget's own.

        Returns
        -------
        xarray.Dataset
            Schema "prior_mix" (`goatviz.results.PRIOR_MIX`).

        Raises
        ------
        ValueError
            If there is no such value.
        """
        return self._mix(self._merged(values), Job())

    # --- controls ---

    def _all_controls(self, sources: list[PriorSource]) -> list[Control]:
        controls = [
            Control(
                "layer", "Layer", options=[(n, f"{n} ({s.name})") for n, s in enumerate(sources)]
            ),
            Control(
                "head", "Head", hint="a set of parameters: a key-value head under grouped queries"
            ),
            Control(
                "length",
                "Length",
                "number",
                low=1,
                high=MAX_LENGTH,
                whole=True,
                hint=f"tokens, 1 to {MAX_LENGTH:,}",
            ),
        ]
        for name in self._names:
            controls += [
                Control(name, name.capitalize(), "toggle", hint=_MEANING[name]),
                Control(
                    f"{name}_scale",
                    f"{name.capitalize()} ×",
                    "slider",
                    low=SCALES[0],
                    high=SCALES[1],
                    step=0.05,
                    hint=f"factor of the {name} in the log-prior, 1 as learned",
                ),
            ]
        return [
            *controls,
            Control(
                "content_range",
                "Content range w",
                "slider",
                low=CONTENT_RANGES[0],
                high=CONTENT_RANGES[1],
                step=0.1,
                hint="largest less smallest content score of a query; any such content moves "
                "log-odds by at most w / temperature",
            ),
            Control(
                "temperature",
                "Content temperature τ",
                "slider",
                low=TEMPERATURES[0],
                high=TEMPERATURES[1],
                step=0.05,
                log=True,
                hint="divides the content scores in softmax(s/τ + K), not the log-prior; to temper "
                "the prior itself, scale all its components",
            ),
            Control("reset", "Reset to learned", "button"),
        ]

    def _changed_controls(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Disable the controls of components that the chosen layer lacks."""
        parts = self._parts[values["layer"]]
        return {
            control: {"disabled": name not in parts}
            for name in self._names
            for control in (name, f"{name}_scale")
        }

    def _pressed(self, button: str) -> None:
        if button == "reset":
            self.reset()

    # --- pictures ---

    def _check(self, values: Mapping[str, Any]) -> None:
        super()._check(values)
        _check_length(values["length"])
        ranges = {"content_range": CONTENT_RANGES, "temperature": TEMPERATURES}
        for name in self._names:
            checks.flag(name, values[name])
            ranges[f"{name}_scale"] = SCALES
        for name, (low, high) in ranges.items():
            checks.number(name, values[name], low=low, high=high)

    def _is_long(self, values: Mapping[str, Any]) -> bool:
        return values["length"] > LONG

    def _picture(self, values: Mapping[str, Any], job: Job) -> Picture:
        mix = self._mix(values, job)
        where = (values["layer"], values["head"], values["length"])
        scales = {name: mix.attrs.get(f"{name}_scale") for name in _COMPONENTS}
        figures = {}
        for name in self.panels:
            of = _SCALES_OF.get(name, _COMPONENTS)
            depends = (*where, *(scales[each] for each in of))
            if name not in _SCALES_OF:
                depends += (mix.attrs["reach"],)
            with self._lock:
                known, panel = self._drawn.get(name, (None, None))
            if known != depends:
                panel = MIX_PANELS[name](mix)
                with self._lock:
                    self._drawn[name] = depends, panel
            figures[name] = panel
        views = {name: f"{name} {values['length']}" for name in self.panels}
        return Picture(figures, mix_summary(mix), views)

    def _mix(self, values: Mapping[str, Any], job: Job) -> xr.Dataset:
        key = (values["layer"], values["head"], values["length"])
        with self._lock:
            mixer = self._mixers.get(key)
        begin = 0.0
        if mixer is None:
            begin = 0.4
            mixer = self._mixer(*key, part_of(job, 0.0, begin))
            with self._lock:
                self._mixers[key] = mixer
                while len(self._mixers) > 1 and self._held() > _KEPT:
                    self._mixers.popitem(last=False)
        scales = {name: values[name] * values[f"{name}_scale"] for name in self._names}
        return mixer.mix(
            **scales,
            content_range=values["content_range"],
            temperature=values["temperature"],
            progress=part_of(job, begin, 1.0),
        )

    def _held(self) -> int:
        return sum(mixer.size for mixer in self._mixers.values())

    def _mixer(self, layer: int, head: int, length: int, progress: Progress) -> PriorMixer:
        # Modules that normalise by the current length have a different prior at each length.
        source = prior_sources(self._source, causal=self._causal, length=length)[layer]
        return PriorMixer(source, head=head, length=length, layer=layer, progress=progress)

    # --- without a kernel, and the end ---

    def _default_vary(self) -> dict[str, list[Any]]:
        """Heads, the sink's switch and a few scales, as many of them as a page can hold."""
        vary: dict[str, list[Any]] = {}
        parts = [name for name in self._names if name in self._parts[self.layer]]
        wanted: dict[str, list[Any]] = {"head": list(self._heads[self.layer])}
        if "sink" in parts:
            wanted["sink"] = [True, False]
        wanted |= {f"{name}_scale": [0.0, 1.0, 2.0] for name in parts if name != "sink"}
        for name, options in wanted.items():
            if len(options) * math.prod(map(len, vary.values())) <= _STATES:
                vary[name] = options
        return vary

    def _forget(self) -> None:
        self._mixers.clear()
        self._drawn.clear()
        self._source = None


def _check_length(length: Any) -> int:
    return checks.integer("length", length, low=1, high=MAX_LENGTH)
