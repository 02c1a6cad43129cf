"""The sinks of SmolLM2-135M at 8,000 tokens: the result "smollm2-sinks-8000" of notebook 03.

Run with ``python docs/long_sinks.py`` (a minute and a half on one core); it reads the example text
once and writes the result, of the first `KEYS` keys, into goatviz/checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import xarray as xr
from torch import Tensor, nn

import goatviz

RESULT = Path(goatviz.__file__).parent / "checkpoints" / "smollm2-sinks-8000.nc"
LENGTH, KEYS = 8000, 32


def long_sinks(model: nn.Module, ids: Tensor, length: int = LENGTH) -> xr.Dataset:
    """Sink profile of the first `length` tokens of a text, (tokens,), read as one input.

    To be small it leaves out all keys but the first `KEYS`, and bounds and sums of the signal.
    """
    profile = goatviz.sink_profile(model, ids[None, :length], progress=True)
    derived = [name for name in profile if name.startswith(("layer_signal", "signal_lower"))]
    return profile.sel(key=slice(0, KEYS - 1)).drop_vars([*derived, "signal_upper"])


def main() -> None:
    """Measure and save."""
    model, tokenizer = goatviz.load_example()
    ids = tokenizer(goatviz.example_text(), return_tensors="pt").input_ids[0]
    goatviz.save_result(long_sinks(model, ids), RESULT)


if __name__ == "__main__":
    main()
