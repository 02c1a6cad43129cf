"""What a figure of sinks shows: which heads, pooled to how much, and said in which words.

A `View` is a sink profile with all its dimensions and how to look at it. Here are its numbers and
texts, and no plotly; `goatviz.plots.sinks` draws them.
"""

from __future__ import annotations

from dataclasses import dataclass
from unicodedata import east_asian_width

import numpy as np
import xarray as xr

from goatviz.plots import style
from goatviz.plots.menus import MAX_CHOICES
from goatviz.results import SINK_PROFILE

#: Keys along one side of a map that still have room for their token.
MAX_MAP_TOKENS = 32
#: Bins along one side of a density.
MAX_BINS = 64


@dataclass(frozen=True)
class View:
    """What is asked for: a profile with all its dimensions, and how to look at it."""

    profile: xr.Dataset
    threshold: float
    layer: int | None

    @property
    def present(self) -> np.ndarray:
        """Which layer has which head, shape (layers, heads)."""
        return self.profile["present"].values.astype(bool)

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Indices of the heads that are present, in order."""
        return [(int(a), int(b)) for a, b in np.argwhere(self.profile["present"].values)]


@dataclass(frozen=True)
class Choice:
    """One entry of a menu: some heads (indices) of one layer, drawn as one."""

    label: str
    name: str
    layer: int
    heads: tuple[int, ...]


# --- selections ---


def with_all_dimensions(profile: xr.Dataset) -> xr.Dataset:
    """The profile with the dimensions that a selection dropped, each of length 1."""
    fields = {name: f for name, f in SINK_PROFILE.fields.items() if name in profile.variables}
    coords, data = {}, {}
    for name, field in fields.items():
        array = profile[name]
        missing = tuple(at for at, dim in enumerate(field.dims) if dim not in array.dims)
        data[name] = (field.dims, np.expand_dims(array.values, missing))
        for dim, size in zip(field.dims, data[name][1].shape, strict=True):
            given = profile.coords.get(dim)
            coords[dim] = np.arange(size) if given is None else np.atleast_1d(given.values)
    return xr.Dataset(data, coords=coords, attrs=profile.attrs)


def choices_of(view: View) -> tuple[list[Choice], list[str]]:
    """The heads to choose from, and what the caption says of those left out."""
    profile = view.profile
    layers = profile["layer"].values
    counts = view.present.sum(axis=1)
    first = len(layers) - 1
    while first > 0 and counts[first - 1 :].sum() <= MAX_CHOICES:
        first -= 1
    kept = [pair for pair in view.heads if pair[0] >= first][:MAX_CHOICES]
    if not kept:
        kept = view.heads[-MAX_CHOICES:]
    lines = []
    if len(kept) < len(view.heads):
        shown = sorted({layer for layer, _ in kept})
        if len(kept) < counts[shown].sum():
            lines.append(
                f"menu: {len(kept)} of {counts[shown].sum()} heads of layer "
                f"{listed(layers[shown])} (select others from the profile)"
            )
        if len(shown) < np.count_nonzero(counts):
            what = "layer" if len(shown) == 1 else "layers"
            lines.append(
                f"menu: {what} {listed(layers[shown])} of {listed(layers)} "
                "(choose another with layer=)"
            )
    return [choice_of(profile, layer, head) for layer, head in kept], lines


def choice_of(profile: xr.Dataset, layer: int, head: int) -> Choice:
    """One head, by its indices in the profile."""
    return Choice(
        f"layer {profile['layer'].values[layer]}, head {profile['head'].values[head]}",
        str(profile["layer_name"].values[layer]),
        layer,
        (head,),
    )


def listed(values: np.ndarray) -> str:
    """Numbers as a sentence holds them: `3`, `0 to 11`, `0, 4, 5`."""
    if len(values) > 2 and np.all(np.diff(values) == 1):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(str(value) for value in values)


def first_importance(view: View) -> np.ndarray:
    """Importance of the first key, mean over the inputs, shape (layers, heads)."""
    return mean_of_finite(view.profile["first_importance"].values)


def key_importance(view: View, key: int) -> np.ndarray:
    """Importance of a key, mean over the inputs, shape (layers, heads)."""
    if key == view.profile.attrs["first_key"]:
        return first_importance(view)
    return view.profile["importance"].sel(key=key).values


# --- pooling for display ---


def mean_of_finite(values: np.ndarray, axis: int | tuple[int, ...] = 0) -> np.ndarray:
    """The mean over what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(finite, values, 0.0).sum(axis) / finite.sum(axis)


def even_bins(count: int, most: int) -> np.ndarray:
    """Edges, as indices, of at most `most` bins of about equal width."""
    return np.unique(np.linspace(0, count, min(count, most) + 1).round().astype(int))


def log_bins(keys: np.ndarray, most: int) -> np.ndarray:
    """Edges, as indices, of at most `most` bins, equal on an axis logarithmic in key + 1."""
    if len(keys) <= most:
        return np.arange(len(keys) + 1)
    inner = np.searchsorted(keys + 1, np.geomspace(keys[0] + 1, keys[-1] + 2, most + 1)[1:-1])
    return np.unique(np.concatenate([[0], inner, [len(keys)]]))


def largest(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """In each bin, the index of the largest value that is a number; else of its first."""
    ranked = np.where(np.isnan(values), -np.inf, values)
    return np.array([a + np.argmax(ranked[a:b]) for a, b in zip(edges, edges[1:], strict=False)])


def pooled_mean(
    values: np.ndarray, allowed: np.ndarray, rows: np.ndarray, cols: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the allowed cells of each bin, and which bins hold any."""

    def total(cells: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.add.reduceat(cells, rows[:-1], axis=0), cols[:-1], axis=1)

    seen = total(allowed.astype(np.float64))
    with np.errstate(invalid="ignore"):
        return total(np.where(allowed, values, 0.0)) / seen, seen > 0


@dataclass(frozen=True)
class _RangeBins:
    """Which range bins are drawn, pooled `step` by `step`, between which edges."""

    count: int
    step: int
    edges: np.ndarray


@dataclass(frozen=True)
class Signal:
    """The density, means and bounds of one menu entry."""

    range_edges: np.ndarray
    mass_edges: np.ndarray
    centres: np.ndarray
    count: np.ndarray
    first: np.ndarray
    largest: np.ndarray
    recent: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def _range_bins(profile: xr.Dataset, choice: Choice) -> _RangeBins:
    """Range bins up to the last that this entry has queries in."""
    counts = profile["signal_count"].values[choice.layer, list(choice.heads)]
    used = (np.nan_to_num(counts) > 0).any(axis=(0, 2))
    count = int(used.nonzero()[0].max(initial=0)) + 1
    edges = _edges(profile["range_bin"].values, profile["range_stop"].values)[: count + 1]
    step = -(-count // MAX_BINS)
    return _RangeBins(count, step, np.append(edges[:-1:step], edges[-1]))


def _edges(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Edges of adjoining bins; an open last bin is drawn as wide as the one before."""
    edges = np.append(start, stop[-1]).astype(np.float64)
    if not np.isfinite(edges[-1]):
        edges[-1] = edges[-2] + (edges[-2] - edges[-3] if len(edges) > 2 else 1.0)
    return edges


def signal_of(profile: xr.Dataset, choice: Choice) -> Signal:
    """An entry's queries by content range and mass, and the means and bounds over the range.

    Of several heads the counts are summed, means weighted by them, and bounds the outermost.
    """
    heads = list(choice.heads)
    bins = _range_bins(profile, choice)

    def taken(name: str) -> np.ndarray:
        return profile[name].values[choice.layer, heads].astype(np.float64)

    starts = np.arange(0, bins.count, bins.step)
    counts = np.nan_to_num(taken("signal_count")[:, : bins.count])
    queries = counts.sum(axis=-1)
    count = np.add.reduceat(counts.sum(axis=0), starts, axis=0)
    step = -(-count.shape[1] // MAX_BINS)
    masses = np.arange(0, count.shape[1], step)
    mass_edges = _edges(profile["mass_bin"].values, profile["mass_stop"].values)

    def mean(name: str) -> np.ndarray:
        values = taken(name)[:, : bins.count]
        weights = np.where(np.isfinite(values), queries, 0.0)
        total = np.add.reduceat((weights * np.nan_to_num(values)).sum(axis=0), starts)
        with np.errstate(invalid="ignore"):
            return total / np.add.reduceat(weights.sum(axis=0), starts)

    centres = (bins.edges[:-1] + bins.edges[1:]) / 2
    low, high = taken("prior_first_low"), taken("prior_first_high")
    return Signal(
        bins.edges,
        np.append(mass_edges[:-1:step], mass_edges[-1]),
        centres,
        np.add.reduceat(count, masses, axis=1),
        mean("signal_first_mass"),
        mean("signal_largest_mass"),
        mean("signal_recent_mass"),
        _bound(np.min(low), -centres),
        _bound(np.max(high), centres),
    )


def _bound(prior: float, shift: np.ndarray) -> np.ndarray:
    """The mass whose log-odds are the prior's, shifted: sigmoid(logit(prior) + shift)."""
    with np.errstate(divide="ignore", over="ignore"):
        return 1.0 / (1.0 + np.exp(-shift - (np.log(prior) - np.log1p(-prior))))


def uniform_importance(keys: np.ndarray, length: int, *, causal: bool) -> np.ndarray:
    """Importance of keys under uniform attention: mean of 1/(i + 1) over i = j … n − 1, or 1/n."""
    length = max(length, int(keys[-1]) + 1)
    if not causal:
        return np.full(len(keys), 1.0 / length)
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, length + 1))])
    return (harmonic[length] - harmonic[keys]) / (length - keys)


# --- texts ---


def rate_text(view: View) -> str:
    """The model's sink rate at the threshold: off the profile's grid, counted without interval."""
    profile = view.profile
    inputs = inputs_text(profile.attrs["n_inputs"])
    end = f"at ε = {view.threshold:g} ({first_key_text(view)}, strict >, {inputs})"
    if view.layer is not None:
        end += ", all layers"
    (at,) = np.nonzero(np.isclose(profile["threshold"].values, view.threshold, rtol=0, atol=1e-6))
    if len(at) == 0:
        heads = profile["present"].values.astype(bool)
        values = profile["first_importance"].values[:, heads]
        values = values[np.isfinite(values)]
        rate = np.mean(values > view.threshold) if values.size else np.nan
        return f"sink rate of the heads drawn {100 * rate:.1f} % {end}"
    rate, low, high = (
        100 * float(profile[f"model_sink_rate{end}"].values[at[0]]) for end in ("", "_low", "_high")
    )
    interval = f" [{low:.1f}, {high:.1f}]" if np.isfinite([low, high]).all() else ""
    return f"sink rate {rate:.1f} %{interval} {end}"


def first_key_text(view: View) -> str:
    """What the key is called whose importance makes a sink."""
    first = view.profile.attrs["first_key"]
    return "first key" if first == 0 else f"key {first}"


def key_text(view: View, key: int) -> str:
    """`first key`, `key 17`."""
    return "first key" if key == view.profile.attrs["first_key"] == 0 else f"key {key:,}"


def head_text(choice: Choice) -> str:
    """`layer 2, head 3 (blocks.2.attention)`."""
    return f"{choice.label} ({choice.name})"


def overview_lines(view: View, key: int) -> list[str]:
    """How many heads are above the threshold, and how often the first key is a sink."""
    values = key_importance(view, key)[view.present]
    above = np.count_nonzero(np.nan_to_num(values.astype(np.float32)) > view.threshold)
    heads = "1 head" if len(values) == 1 else f"{len(values):,} heads"
    return [f"{above:,} of {heads} above ε = {view.threshold:g}", rate_text(view)]


def sink_sentence(view: View, choice: Choice, key: int) -> str:
    """A view in words: the rate, one head's sink and margin, and what the threshold says of it."""
    profile = view.profile
    layer, head = choice.layer, choice.heads[0]
    first = profile["first_importance"].values[:, layer, head]
    first = first[~np.isnan(first)]
    rate = rate_text(view)
    said = [f"{rate[0].upper()}{rate[1:]}."]
    name = f"{choice.label[0].upper()}{choice.label[1:]} ({choice.name})"
    if len(first):
        mean = first_importance(view)[layer, head]
        side = "above" if mean > view.threshold else "not above"
        count = int(np.count_nonzero(first > view.threshold))
        said.append(
            f"{name}: importance of the {first_key_text(view)} {mean:.4g}, {side} "
            f"ε = {view.threshold:g}; a sink in {count:,} of {inputs_text(len(first))}."
        )
    else:
        said.append(f"{name}: its {first_key_text(view)} has no importance in any input.")
    if margin := margin_text(profile, choice):
        said.append(f"{margin[0].upper()}{margin[1:]}.")
    if key != profile.attrs["first_key"]:
        data = profile.isel(layer=layer, head=head).sel(key=key)
        value, low, high = (float(data[f"importance{end}"]) for end in ("", "_low", "_high"))
        if np.isnan(value):
            said.append(f"Key {key:,}: no importance, too few queries see it.")
        else:
            interval = f" [{low:.4g}, {high:.4g}]" if np.isfinite([low, high]).all() else ""
            said.append(f"Key {key:,}: importance {value:.4g}{interval}.")
    said += [f"Note: {note}." for note in profile.attrs["notes"].split(" | ") if note.strip()]
    return " ".join(said)


def margin_text(profile: xr.Dataset, choice: Choice) -> str:
    """What the margin law says of an entry; nothing where it has no prior."""
    margin, protected = (
        profile[name].values[choice.layer, list(choice.heads)].astype(np.float64)
        for name in ("margin", "protected_length")
    )
    margin = margin[~np.isnan(margin)]
    if not len(margin):
        return ""
    if len(choice.heads) > 1:
        return f"margins δ = {_number(margin.min())} to {_number(margin.max())} nats"
    text = f"margin δ = {_number(margin[0])} nats"
    if np.isnan(protected[0]):
        return text
    return f"{text} protects about {_number(protected[0])} tokens (margin law)"


def _number(value: float) -> str:
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:,.0f}" if 100 <= abs(value) < 1e7 else f"{value:.3g}"
    return text.replace("-", "−")


def inputs_text(count: int) -> str:
    """`1 input`, `1,000 inputs`."""
    return "1 input" if count == 1 else f"{count:,} inputs"


def interval_text(view: View) -> str:
    """What the intervals are, or why there are none."""
    if view.profile.attrs["n_inputs"] == 1:
        return "one input: no interval"
    return f"interval: {confidence_text(view)}, over the inputs"


def confidence_text(view: View) -> str:
    """The intervals' confidence in percent."""
    return f"{100 * view.profile.attrs['confidence']:g} %"


def cell_texts(z: np.ndarray) -> list[list[str]]:
    """Two decimals in three characters, so that twelve cells in a row have room for them."""

    def text(value: float) -> str:
        if np.isnan(value):
            return ""
        return "1" if value >= 0.995 else f"{value:.2f}".removeprefix("0")

    return [[text(value) for value in row] for row in z]


def shortened(token: object) -> str:
    """A token as a hover text holds it: escaped, of at most 40 characters."""
    text = str(token)
    return style.escape(text if len(text) <= 40 else f"{text[:39]}…")


def token_room(tokens: np.ndarray) -> int:
    """Pixels that upright tokens need below an axis."""
    wide = {"W": 2, "F": 2}
    longest = max(sum(wide.get(east_asian_width(c), 1) for c in str(t)) for t in tokens)
    return max(0, 6 * longest - 12)


def token_ticks(at: np.ndarray, tokens: np.ndarray, pixels: int) -> dict[str, object]:
    """Integer axes with token texts: repeated labels would hide keys, tags would be markup."""
    return {
        "tickvals": at.tolist(),
        "ticktext": [style.escape(token) for token in tokens],
        "title_standoff": 10,
        "tickfont_size": 11 if len(at) <= 400 // pixels else 9,
    }


def map_tokens(
    profile: xr.Dataset, queries: np.ndarray, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens of both sides of a map, if they are known and have room."""
    if "token" not in profile or max(len(queries), len(keys)) > MAX_MAP_TOKENS:
        return None
    known = profile["token"].to_series()
    if not (np.isin(queries, known.index).all() and np.isin(keys, known.index).all()):
        return None
    return known.loc[queries].to_numpy(), known.loc[keys].to_numpy()


# --- places of cells, and ticks ---


def places(ids: np.ndarray) -> np.ndarray:
    """Places of cells: the ids themselves where they follow one another, else their order."""
    return ids if np.all(np.diff(ids) == 1) else np.arange(len(ids))


def id_ticks(at: np.ndarray, ids: np.ndarray) -> dict[str, object]:
    """Ticks at every id, or at every second, fourth, … such that at most twelve are left."""
    step = 1
    while len(ids) > 12 * step:
        step *= 2
    return {"tickvals": at[::step].tolist(), "ticktext": [str(i) for i in ids[::step]]}


def log_ticks(keys: np.ndarray) -> np.ndarray:
    """Keys to name on a logarithmic axis: decades, and between them 2 and 5 if there is room."""
    steps = (1, 2, 5) if keys[-1] <= 20_000 else (1,)
    wanted = np.array([0, *(s * 10**d for d in range(10) for s in steps)])
    return wanted[(wanted >= keys[0]) & (wanted <= keys[-1])]
