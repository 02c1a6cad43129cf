"""What the gallery shows of sinks in language models that is too slow to measure when it is drawn.

Run with ``python docs/language_sinks.py`` (a few minutes on two cores); it writes results into
goatviz/checkpoints: what hidden keys cost each text model, and the last layer of SmolLM2-135M.
"""

from __future__ import annotations

from pathlib import Path

import goatviz
from goatviz.analysis.signal import signal_correlation
from goatviz.paper.evidence import PIECE_LENGTH, TEXT_SCHEMES, text_pieces

FOLDER = Path(goatviz.__file__).parent / "checkpoints"
#: Pieces of the example text that SmolLM2 reads, those of docs/sink_effect.py.
PIECES = 16
#: Number of its last layer.
LAST_LAYER = 29


def main() -> None:
    """Measure and save."""
    for scheme in TEXT_SCHEMES:
        checkpoint = goatviz.load_pretrained(f"text-{scheme}")
        effect = goatviz.sink_effect(checkpoint, text_pieces(), per_layer=False, progress=True)
        goatviz.save_result(effect, FOLDER / f"text-{scheme}-sink-effect.nc")
    model, tokenizer = goatviz.load_example()
    ids = tokenizer(goatviz.example_text(), return_tensors="pt").input_ids[0]
    pieces = ids[: PIECES * PIECE_LENGTH].view(PIECES, PIECE_LENGTH)
    last = goatviz.sink_profile(model, pieces, batch_size=4, layers=[LAST_LAYER])
    implied = goatviz.implied_prior(model, pieces.split(4), layers=[LAST_LAYER], resolution=2)
    strongest = last["importance"].isel(layer=0, key=0).values.argmax()
    for name, result in (
        ("last-layer-sinks", last),
        ("last-layer-prior", implied.isel(head=[strongest])),
        ("signal", signal_correlation(model, pieces)),
    ):
        goatviz.save_result(result, FOLDER / f"smollm2-{name}.nc")


if __name__ == "__main__":
    main()
