"""A prior, component by component: switches and scales, and what they make of its plan.

Numbers come from `goatviz.analysis.prior_mix`, pictures from `goatviz.plots.prior`.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import traitlets
from torch import nn

from goatviz import checks
from goatviz.adapters.capture import Record
from goatviz.analysis.implied import implied_prior
from goatviz.analysis.implied_sources import implied_sources, is_implied
from goatviz.analysis.prior import has_explicit_prior, prior_sources
from goatviz.analysis.prior_curves import (
    PriorSource,
    Progress,
    component_names,
    part_of,
    prior_spectrum,
    require_sequence,
)
from goatviz.analysis.prior_mix import PriorMixer, mix_summary
from goatviz.analysis.thumbnails import prior_thumbnails, structured_head
from goatviz.explore.base import Explorer, Picture
from goatviz.explore.controls import Control
from goatviz.explore.heads import HeadsView
from goatviz.explore.jobs import Job
from goatviz.explore.page import Place
from goatviz.explore.plan import RULE as STRUCTURED
from goatviz.explore.plan import SINK
from goatviz.explore.selection import Selection
from goatviz.plots.base import Panel
from goatviz.plots.prior import MIX_PANELS, explained_text
from goatviz.priors.base import Prior
from goatviz.results import PRIOR_PROFILE, is_dataset, with_all_dimensions
from goatviz.training.checkpoint import Checkpoint, model_of

if TYPE_CHECKING:
    import xarray as xr

#: Which head is opened first, in words.
RULE = (
    "Opened first: the head whose prior has the least entropy relative to uniform attention, on "
    "average over queries."
)
#: Rows and columns of a thumbnail, and log-priors that are evaluated for all of them.
_CELLS, _PAIRS = 32, 1 << 24
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
    source: Prior | nn.Module | Checkpoint | Record | xr.Dataset,
    inputs: Any = None,
    *,
    length: int | None = None,
    causal: bool | None = None,
    tokenizer: Any = None,
    selection: Selection | None = None,
) -> PriorExplorer:
    r"""Explore a prior in JupyterLab, learned or implied: switch and scale its components.

    .. math:: K_{ij} = a\,u(j) + b\,\kappa(i - j) - c\,m\,(i - j), \qquad
              \pi_{ij} = e^{K_{ij}} / \sum_{j'} e^{K_{ij'}}

    Parameters
    ----------
    source : Prior, nn.Module, Checkpoint, Record or xarray.Dataset
        A prior; a model that contains goatviz `Attention` or goat-attention's modules; or a loaded
        checkpoint. Its parameters are read when a layer, head or length is first shown. A profile
        from `goatviz.implied_prior`, or a record or model without an explicit prior: then kappa and
        u are those that its logits imply.
    inputs : Tensor, mapping, str, or sequence of them, optional
        Inputs of a model without an explicit prior; see `goatviz.sink_profile`.
    length : int, optional
        Initial number of tokens, 1 to 1,000,000; default the training length, or 128. An implied
        prior goes no further than the keys and lags that inputs have shown, its default.
    causal : bool, optional
        Overrides the layers' own setting; needed for a module that has none (default: causal). Not
        for an implied prior.
    tokenizer : callable, optional
        Tokenizer of texts among the inputs.
    selection : Selection, optional
        Selection to share with other explorers.

    Returns
    -------
    PriorExplorer
        A widget; `draw(...)` makes the same pictures without a kernel.

    Raises
    ------
    TypeError
        If `source` has no explicit prior and there are no inputs, if there are both, or if it is
        a finished profile of a learned prior.
    ValueError
        For a prior on a grid, a length out of range, or a profile whose curves are means in bins.

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
    model = model_of(source)
    if isinstance(model, Record) or (inputs is not None and not has_explicit_prior(model)):
        # No key or lag is pooled, and maps are not looked at.
        exact = {"points": MAX_LENGTH, "resolution": 2}
        source = implied_prior(model, inputs, tokenizer=tokenizer, **exact)
    else:
        checks.not_given("an explicit prior or a profile", inputs=inputs, tokenizer=tokenizer)
    return PriorExplorer(source, length=length, causal=causal, selection=selection)


class PriorExplorer(Explorer):
    """Layer, head, length, components and content of a prior; see `explore_prior`.

    Attributes
    ----------
    layer, head : int
        The head that is shown; heads are parameter sets (key-value heads under grouped queries).
    length : int
        Number of tokens, 1 to 1,000,000, or to the last that an implied prior knows.
    sink, relative, recency : bool
        Whether the component counts; only those that some layer has can be switched.
    sink_scale, relative_scale, recency_scale : float
        Factor of the component in the log-prior, 0 to 3; 1 as learned or fitted.
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
        source: Prior | nn.Module | Checkpoint | xr.Dataset,
        *,
        length: int | None = None,
        causal: bool | None = None,
        selection: Selection | None = None,
    ) -> None:
        if length is not None:
            length = _check_length(length)
        profile, source = _opened(source, causal)
        sources = _by_number(prior_sources(source, causal=causal, length=length))
        for each in sources.values():
            require_sequence(each)
        super().__init__()
        self._profile, self._source, self._causal = profile, source, causal
        self._heads = {layer: list(s.heads) for layer, s in sources.items()}
        self._longest = {n: s.fitted_length or MAX_LENGTH for n, s in sources.items()}
        self.layer, longest = next(iter(sources)), max(self._longest.values())
        if length is None:
            trained = next(filter(None, (s.training_length for s in sources.values())), 128)
            length = min(trained, longest) if profile is None else longest
        self.length = _check_length(length, longest)
        places = self._thumbnails(sources)
        self._parts = {layer: component_names(s.prior) for layer, s in sources.items()}
        parts = self._parts.values()
        self._names = tuple(n for n in _COMPONENTS if any(n in each for each in parts))
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
            "spectrum": any(s.rotary or len(prior_spectrum(s.prior)[0]) for s in sources.values()),
        }
        self.panels = {name: 340 for name in MIX_PANELS if there.get(name, True)}
        self._set_up(
            self._all_controls(sources),
            label="Learned prior" if profile is None else "Implied prior",
            places=places | self.panels,
            selection=selection,
        )

    def _thumbnails(self, sources: Mapping[int, PriorSource]) -> dict[str, Place]:
        """The place of pictures of all heads, if there are several; opens one of them."""
        total = sum(map(len, self._heads.values()))
        if total < 2:
            return {}
        length = min(self.length, max(1, _PAIRS // (_CELLS * total)))
        thumbnails = prior_thumbnails(list(sources.values()), length=length, cells=_CELLS)
        # The implied prior of a perfect sink is one column, which shows nothing else.
        sink, rule = (None, RULE) if self._profile is None else (SINK, STRUCTURED)
        with suppress(ValueError):
            # Single tokens, and numbers that are not finite, have no entropy to choose by.
            self.layer, self.head = structured_head(thumbnails, sink)
        title = f"Priors of all heads at {checks.count_text(length, 'token')}"
        return {"heads": Place(HeadsView(thumbnails, title=title, rule=rule), wide=True)}

    @traitlets.validate(*_COMPONENTS, *(f"{name}_scale" for name in _COMPONENTS))
    def _is_there(self, proposal: Any) -> Any:
        name = proposal["trait"].name
        if name.removesuffix("_scale") not in getattr(self, "_names", _COMPONENTS):
            raise traitlets.TraitError(f"{name} cannot be set: this prior has no such component")
        return proposal["value"]

    def reset(self) -> None:
        """Switch every component on, unscaled, and set the content's temperature to 1."""
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

    def _all_controls(self, sources: Mapping[int, PriorSource]) -> list[Control]:
        learned = self._profile is None
        origin = "learned" if learned else "fitted"
        names = [(n, f"{n} ({s.name})") for n, s in sources.items()]
        heads = "a set of parameters: a key-value head under grouped queries"
        controls = [
            Control("layer", "Layer", options=names),
            Control("head", "Head", hint=heads if learned else "a query head"),
            Control(
                "length",
                "Length",
                "number",
                low=1,
                high=MAX_LENGTH,
                whole=True,
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
                    hint=f"factor of the {name} in the log-prior, 1 as {origin}",
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
            Control("reset", f"Reset to {origin}", "button"),
        ]

    def _changed_controls(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Disable the controls of components that the chosen layer lacks, and end its length."""
        parts, longest = self._parts[values["layer"]], self._longest[values["layer"]]
        hint = f"tokens, 1 to {longest:,}"
        if self._profile is not None:
            hint += ": no input shows keys or lags beyond"
        return {"length": {"high": longest, "hint": hint}} | {
            control: {"disabled": name not in parts}
            for name in self._names
            for control in (name, f"{name}_scale")
        }

    def _follow_layer(self) -> None:
        super()._follow_layer()
        if self.layer in self._longest:
            with self._quietly():
                self.length = min(self.length, self._longest[self.layer])

    def _pressed(self, button: str) -> None:
        if button == "reset":
            self.reset()

    # --- pictures ---

    def _check(self, values: Mapping[str, Any]) -> None:
        super()._check(values)
        _check_length(values["length"], self._longest[values["layer"]])
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
        return Picture(figures, mix_summary(mix) + self._fit_of(values), views)

    def _fit_of(self, values: Mapping[str, Any]) -> str:
        """What is known of how well an implied prior fits this head."""
        if self._profile is None:
            return ""
        head = self._profile.sel(layer=values["layer"], head=values["head"])
        longest = self._longest[values["layer"]]
        known = f"Keys and lags are known to {longest:,} tokens; nothing is extrapolated."
        text = explained_text(head)
        return f" The prior {text}. {known}" if text else f" {known}"

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
        source = _by_number(prior_sources(self._source, causal=self._causal, length=length))[layer]
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
        self._source = self._profile = None


def _opened(source: Any, causal: bool | None) -> tuple[xr.Dataset | None, Any]:
    """The profile of an implied prior or None, and what `prior_sources` makes of the source."""
    if not is_dataset(source):
        return None, model_of(source)
    if not is_implied(source):
        raise TypeError(
            "source must be a Prior, a model, a checkpoint or an implied prior: a finished profile "
            "of a learned prior cannot be recombined, draw it with goatviz.plot_prior"
        )
    checks.not_given("an implied prior", causal=causal)
    return with_all_dimensions(source, PRIOR_PROFILE), implied_sources(source)


def _by_number(sources: list[PriorSource]) -> dict[int, PriorSource]:
    """Sources by the number of their layer."""
    return {at if s.layer is None else s.layer: s for at, s in enumerate(sources)}


def _check_length(length: Any, longest: int = MAX_LENGTH) -> int:
    return checks.integer("length", length, low=1, high=longest)
