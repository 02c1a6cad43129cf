"""What sinks do for SmolLM2-135M: the README's table, and the result "smollm2-sink-effect".

Run with ``python docs/sink_effect.py`` (a quarter of an hour on two cores); it writes the result
into goatviz/checkpoints and prints the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import xarray as xr
from torch import Tensor, nn

import goatviz

RESULT = Path(goatviz.__file__).parent / "checkpoints" / "smollm2-sink-effect.nc"
#: Pieces of the example text that are predicted, pieces that implied priors are fitted to, and
#: tokens of a piece.
PIECES, FITTED, LENGTH = 16, 8, 256


def changes(model: nn.Module, fitted: Tensor) -> dict[str, object]:
    """What is done to the model, by name; implied priors are fitted to other text."""
    priors = goatviz.fit_priors(model, fitted)

    def without(part: str) -> dict[int, goatviz.Ablate]:
        return {layer: goatviz.Ablate(one.components()[part]) for layer, one in priors.items()}

    return {
        "first key hidden": goatviz.Hide([0]),
        "sinks hidden": goatviz.Hide("sinks"),
        "first key gets at most 0.3": goatviz.Cap(0.3),
        "softmax off by one": goatviz.SinkColumn(0.0),
        "newest 64 keys": goatviz.Streaming(64, sinks=0),
        "newest 60 keys and first 4": goatviz.Streaming(60, sinks=4),
        "newest 32 keys and 32 heavy hitters": goatviz.HeavyHitters(heavy=32, recent=32),
        "temperature 1.5": goatviz.Temper(1.5),
        "implied sink u(j) ablated": without("sink"),
        "implied kernel ablated": without("relative"),
    }


def laboratory(model: nn.Module, ids: Tensor, length: int = LENGTH) -> xr.Dataset:
    """Effects of all changes at once in all layers, and of hidden keys in each layer alone.

    Parameters
    ----------
    model : nn.Module
        A language model.
    ids : Tensor
        Token ids, shape (tokens,): those of `PIECES` pieces are predicted, then priors are fitted
        to those of `FITTED`.
    length : int
        Tokens of a piece.
    """
    pieces = ids[: (PIECES + FITTED) * length].view(-1, length)
    batches = list(pieces[:PIECES].split(4))
    every = changes(model, pieces[PIECES:])
    whole = goatviz.sink_effect(model, batches, changes=every, per_layer=False, progress=True)
    hidden = {name: every[name] for name in ("first key hidden", "sinks hidden")}
    layers = goatviz.sink_effect(model, batches, changes=hidden, progress=True)
    layers = layers.reindex(change=whole["change"])
    parts = {name: layers[name] for name in layers.data_vars if name.startswith("layer")}
    return whole.assign_coords(layer=layers["layer"]).assign(parts)


def table(effect: xr.Dataset) -> Iterator[str]:
    """Lines of a Markdown table: what was changed, and how much worse the model predicts."""
    yield "| changed in all layers | loss increase, nats/token | 95 % |"
    yield "| --- | --- | --- |"
    for at, name in enumerate(effect["change"].values):
        mean, low, high = (
            float(effect[f"mean_increase{end}"][at]) for end in ("", "_low", "_high")
        )
        yield f"| {name} | {mean:+.3f} | {low:+.3f} to {high:+.3f} |"


def main() -> None:
    """Measure, save and print."""
    model, tokenizer = goatviz.load_example()
    ids = tokenizer(goatviz.example_text(), return_tensors="pt").input_ids[0]
    effect = laboratory(model, ids)
    goatviz.save_result(effect, RESULT)
    print("\n".join(table(effect)))


if __name__ == "__main__":
    main()
