"""A sink profile in words: sentences stand beside its numbers, and drawings only place them.

The profile carries those that a figure shows (its sink rate, every head's margin), so that a saved
one is drawn with them and without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from goatviz.checks import count_text

if TYPE_CHECKING:
    import xarray as xr

#: Below this many tokens a uniform head looks like a sink (its first key has importance 0.34 at 8).
SHORTEST = 16


def at_threshold(profile: xr.Dataset, threshold: float) -> xr.Dataset:
    """The profile with another threshold, and its sink rate there in words.

    Examples
    --------
    >>> import torch
    >>> from goatviz import load_pretrained, sink_profile
    >>> ids = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    >>> profile = at_threshold(sink_profile(load_pretrained("copy-mixture-1-goat"), ids), 0.5)
    >>> profile.attrs["rate_text"]
    'sink rate 50.0 % [50.0, 50.0] at ε = 0.5 (first key, strict >; 2 heads, 4 inputs)'
    """
    return profile.assign_attrs(threshold=threshold, rate_text=rate_text(profile, threshold))


def rate_text(profile: xr.Dataset, threshold: float) -> str:
    """The model's sink rate at a threshold; off the profile's grid, counted without interval."""
    attrs = profile.attrs
    grid = profile["threshold"].values
    (at,) = np.nonzero(np.isclose(grid, threshold, rtol=0, atol=1e-6))
    if len(at):
        heads = attrs.get("n_heads")
        rate, low, high = (
            100 * float(np.atleast_1d(profile[f"model_sink_rate{end}"].values)[at[0]])
            for end in ("", "_low", "_high")
        )
    else:
        first = profile["first_importance"]
        known = first.where(profile["present"]).values
        known = known[np.isfinite(known)]
        heads = int(profile["present"].sum())
        rate, low, high = (
            100 * float(np.mean(known > np.float32(threshold))) if known.size else np.nan,
            np.nan,
            np.nan,
        )
    interval = f" [{low:.1f}, {high:.1f}]" if np.isfinite([low, high]).all() else ""
    counted = count_text(attrs["n_inputs"], "input")
    if heads is not None:
        counted = f"{count_text(heads, 'head')}, {counted}"
    return f"sink rate {rate:.1f} %{interval} at ε = {threshold:g} (first key, strict >; {counted})"


def margin_texts(margin: np.ndarray, protected: np.ndarray) -> np.ndarray:
    """What the margin law says of each head; "" where it has no prior.

    Parameters
    ----------
    margin : ndarray, shape (...)
        Lead of the prior's first key [nats]; NaN where there is no prior.
    protected : ndarray, shape (...)
        Length that it protects [tokens].

    Examples
    --------
    >>> margin_texts(np.array([3.0, np.nan]), np.array([21.1, np.nan])).tolist()
    ['margin δ = 3 nats protects about 21.1 tokens (margin law)', '']
    >>> margin_texts(np.array([0.0]), np.array([1.0])).tolist()
    ['margin δ = 0 nats protects about 1 token (margin law)']
    """
    return np.array(
        [_margin_text(*pair) for pair in zip(margin.ravel(), protected.ravel(), strict=True)]
    ).reshape(margin.shape)


def _margin_text(margin: float, protected: float) -> str:
    if np.isnan(margin):
        return ""
    text = f"margin δ = {_number(margin)} nats"
    if np.isnan(protected):
        return text
    length = _number(protected)
    return f"{text} protects about {length} token{'s' * (length != '1')} (margin law)"


def above_text(profile: xr.Dataset, key: int) -> str:
    """How many heads give a key more importance than the threshold."""
    threshold = profile.attrs["threshold"]
    values = profile["importance"].sel(key=key).values[profile["present"].values]
    above = np.count_nonzero(values > np.float32(threshold))
    return f"{above:,} of {count_text(len(values), 'head')} above ε = {threshold:g}"


def sink_sentence(profile: xr.Dataset, layer: int, head: int, key: int) -> str:
    """A profile and one head of it: the rate, the head's sink and margin, and a key's importance.

    Parameters
    ----------
    profile : xarray.Dataset
        A sink profile; its threshold is what importances are compared with.
    layer, head, key : int
        Labels of the profile.
    """
    attrs = profile.attrs
    threshold = attrs["threshold"]
    part = profile.sel(layer=layer, head=head)
    first = part["first_importance"].values
    first = first[~np.isnan(first)]
    sentences = [_sentence(attrs["rate_text"])]
    name = f"Layer {layer}, head {head} ({part['layer_name'].item()})"
    if len(first):
        mean = first.mean(dtype=np.float32)
        side = "above" if mean > np.float32(threshold) else "not above"
        count = np.count_nonzero(first > np.float32(threshold))
        sentences.append(
            f"{name}: importance of the first key {mean:.4g}, {side} ε = {threshold:g}; a sink in "
            f"{count:,} of {count_text(len(first), 'input')}."
        )
    else:
        sentences.append(f"{name}: its first key has no importance in any input.")
    if "margin_text" in part and (margin := part["margin_text"].item()):
        sentences.append(_sentence(margin))
    if key != attrs["first_key"]:
        sentences.append(_key_sentence(part, key))
    notes = [*attrs["notes"].split(" | "), shortness(profile)]
    return " ".join([*sentences, *(f"Note: {note}." for note in notes if note.strip())])


def _key_sentence(part: xr.Dataset, key: int) -> str:
    value, low, high = (
        float(part[f"importance{end}"].sel(key=key)) for end in ("", "_low", "_high")
    )
    if np.isnan(value):
        return f"Key {key:,}: no importance, too few queries see it."
    interval = f" [{low:.4g}, {high:.4g}]" if np.isfinite([low, high]).all() else ""
    return f"Key {key:,}: importance {value:.4g}{interval}."


def shortness(profile: xr.Dataset) -> str:
    """What is to be said of inputs too short to tell a sink from chance; "" where none is."""
    length = profile.attrs["length_min"]
    if length >= SHORTEST:
        return ""
    return (
        f"the shortest input has {length} tokens: below {SHORTEST} a uniform head "
        "has a false sink at the first key (importance 0.34 at 8 tokens)"
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _number(value: float) -> str:
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:,.0f}" if 100 <= abs(value) < 1e7 else f"{value:.3g}"
    return text.replace("-", "−")
