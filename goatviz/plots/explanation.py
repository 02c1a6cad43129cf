"""The logits of one query, taken apart, beside the weights of its top keys."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from goatviz.plots import marks, style
from goatviz.plots.base import Panel, Words, grid
from goatviz.plots.figure import Figure
from goatviz.plots.plan import residual_sentence
from goatviz.results import EXPLANATION, check_result

if TYPE_CHECKING:
    import xarray as xr


def draw_explanation(why: xr.Dataset) -> Figure:
    """Draw why a query attends to its top keys: their weights, and the parts of their logits.

    Parameters
    ----------
    why : xarray.Dataset
        From `goatviz.explain`.

    Returns
    -------
    Figure
        One bar a key, by falling weight; parts to the right of 0 draw attention to the key,
        those to the left turn it away.

    Raises
    ------
    TypeError
        If `why` is not a result of `explain`.
    """
    check_result(why, EXPLANATION)
    attrs = why.attrs
    token = f" “{marks.cut(attrs['query_token'])}”" if "query_token" in attrs else ""
    shown = f"{why.sizes['place']} of {attrs['n_keys']:,} keys"
    caption = ["Logits are less their mean over the keys that the query may use."]
    caption += [f"Other keys get {attrs['rest_weight']:.3f} of the mass."]
    # Results of earlier versions hold no temperature.
    if attrs.get("temperature", 1.0) != 1:
        caption.append(f"Scores are divided by the temperature {attrs['temperature']:.3g}.")
    if attrs["column_weight"]:
        caption.append(f"A column without a key gets {attrs['column_weight']:.3f}.")
    caption += [
        f"{str(part)}: {str(text)}."
        for part, text in zip(why["part"].values, why["part_text"].values, strict=True)
        if not str(text).startswith("log-prior")
    ]
    caption += residual_sentence(why)
    words = Words(
        "Why this query attends there",
        f"{attrs['source']}, query {attrs['query']:,}{token}; {shown}",
        caption,
    )
    return grid([weight_panel(why), parts_panel(why)], words)


def _keys(why: xr.Dataset) -> dict[str, object]:
    """The axis of keys, the heaviest on top."""
    texts = [f"{key:,}" for key in why["key"].values]
    if "key_token" in why.variables:
        texts = [
            f"{marks.shortened(str(token))}  {text}"
            for token, text in zip(why["key_token"].values, texts, strict=True)
        ]
    places = why["place"].values
    return {
        "title": "key [tokens]",
        "tickvals": places.tolist(),
        "ticktext": texts,
        "range": [len(places) - 0.5, -0.5],
    }


def weight_panel(why: xr.Dataset) -> Panel:
    """Weights of the top keys."""
    trace = marks.bars(
        why["weight"].values,
        why["place"].values,
        name="weight",
        color=style.LINES[0],
        hover="key %{customdata:,}<br>weight %{x:.4f}",
        orientation="h",
        customdata=why["key"].values,
        showlegend=False,
    )
    return Panel(
        "Weight",
        [trace],
        {"title": "weight [probability]", "rangemode": "tozero"},
        _keys(why),
        height=60 + 22 * why.sizes["place"],
    )


def parts_panel(why: xr.Dataset) -> Panel:
    """Parts of the logits of the top keys, which add up to the diamonds."""
    places, traces = why["place"].values, []
    for at, part in enumerate(why["part"].values):
        traces.append(
            marks.bars(
                why["value"].values[at],
                places,
                name=style.escape(part),
                color=style.LINES[(at + 1) % len(style.LINES)],
                hover=f"{style.escape(part)}, key %{{customdata:,}}<br>%{{x:+.3f}} nats",
                orientation="h",
                customdata=why["key"].values,
            )
        )
    traces.append(
        marks.points(
            why["logit"].values,
            places,
            name="logit",
            color=style.INK,
            symbol="diamond",
            size=7,
            hover="key %{customdata:,}<br>logit %{x:+.3f} nats",
            customdata=why["key"].values,
        )
    )
    return Panel(
        "What the logit is made of",
        traces,
        {"title": "centred logit [nats]"},
        _keys(why),
        shapes=[marks.upright(0.0, dash="solid")],
        height=60 + 22 * why.sizes["place"],
    )


def why_panel(why: xr.Dataset) -> Panel:
    """`parts_panel` by itself, beside the plan of its query."""
    attrs = why.attrs
    note = (
        f"{why.sizes['place']} of {attrs['n_keys']:,} keys, by falling weight; the others get "
        f"{attrs['rest_weight']:.3f} of the mass"
    )
    if attrs["column_weight"]:
        note += f", a column without a key {attrs['column_weight']:.3f}"
    title = f"Why query {attrs['query']:,} attends there"
    return replace(parts_panel(why), title=title, note=note)
