"""What claims and exhibits read: shipped results and weights, and what is measured from them here.

Every one is loaded or measured once. A result that is given takes the place of the shipped one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from goatviz.analysis.prior import prior_profile
from goatviz.analysis.signal import signal_correlation
from goatviz.analysis.sinks import sink_profile
from goatviz.examples import example_text
from goatviz.results import list_results, load_shipped_result
from goatviz.training.checkpoint import Checkpoint, list_pretrained, load_pretrained

if TYPE_CHECKING:
    import xarray as xr

#: Schemes of the text models that are compared.
TEXT_SCHEMES = ("goat", "alibi", "rope", "none")
#: Pieces of the example text that they read, and bytes of each: the length they were trained at.
TEXT_PIECES, PIECE_LENGTH = 32, 256
#: The four copy-mixture models by offset and kind.
COPY_MODELS = {
    (offset, kind): f"copy-mixture-{offset}-{kind}"
    for offset in (1, 4)
    for kind in ("goat", "uniform")
}
#: Shipped weights and results that the gallery reads.
CHECKPOINTS = (
    *COPY_MODELS.values(),
    *(f"passkey-{scheme}" for scheme in ("goat", "rope", "alibi", "sinusoidal")),
    *(f"text-{scheme}" for scheme in TEXT_SCHEMES),
    "needle-goat",
    "dna-goat",
)
RESULTS = (
    "passkey-sweep",
    "passkey-8-sweep",
    "needle-sweep",
    "needle-grid",
    "text-eltec",
    "text-wikitext2",
    "dna-sweep",
    "dna-cost",
    *(f"text-{scheme}-sink-effect" for scheme in TEXT_SCHEMES),
    "smollm2-sink-effect",
    "smollm2-last-layer-sinks",
    "smollm2-last-layer-prior",
    "smollm2-signal",
)


def text_pieces() -> Tensor:
    """The pieces of the example text that text models read, ids of shape (pieces, bytes)."""
    content = example_text().encode()[: TEXT_PIECES * PIECE_LENGTH]
    return torch.tensor(list(content)).view(TEXT_PIECES, PIECE_LENGTH)


class Evidence:
    """Results by name, and what is measured of checkpoints.

    Parameters
    ----------
    results : mapping of str to xarray.Dataset, optional
        Results that take the place of the shipped ones of the same name. Priors, sinks and signals
        of a checkpoint go by names such as "prior of text-goat".

    Examples
    --------
    >>> Evidence().result("passkey-sweep").sizes["run"]
    5
    """

    def __init__(self, results: Mapping[str, xr.Dataset] | None = None) -> None:
        self._kept: dict[str, Any] = dict(results or {})

    def load(self) -> Evidence:
        """Read everything that the gallery needs, so that what is missing is told at once.

        Raises
        ------
        ValueError
            If a checkpoint or result is missing or damaged.
        """
        for kind, wanted, known in (
            ("checkpoints", CHECKPOINTS, list_pretrained()),
            ("results", RESULTS, list_results()),
        ):
            if missing := [name for name in wanted if name not in known]:
                raise ValueError(
                    f"goatviz must come with the {kind} {', '.join(missing)}, which are missing: "
                    "install it again"
                )
        for name in CHECKPOINTS:
            self.checkpoint(name)
        for name in RESULTS:
            self.result(name)
        return self

    def result(self, name: str) -> xr.Dataset:
        """A shipped result."""
        return self._once(name, lambda: load_shipped_result(name))

    def checkpoint(self, name: str) -> Checkpoint:
        """Shipped weights and their card."""
        return self._once(f"weights of {name}", lambda: load_pretrained(name))

    def prior(self, name: str) -> xr.Dataset:
        """The prior profile of a checkpoint, at its training length."""
        return self._once(f"prior of {name}", lambda: prior_profile(self.checkpoint(name).model))

    def sinks(self, name: str) -> xr.Dataset:
        """The sink profile of a text model's last layer on the example text."""

        def measure() -> xr.Dataset:
            checkpoint = self.checkpoint(name)
            last = checkpoint.model.config.num_layers - 1
            return sink_profile(checkpoint, text_pieces(), layers=[last], batch_size=8)

        return self._once(f"sinks of {name}", measure)

    def signal(self, name: str) -> xr.Dataset:
        """How content range and the first key's mass go together in a text model's last layer."""
        return self._once(
            f"signal of {name}", lambda: signal_correlation(self.checkpoint(name), text_pieces())
        )

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]
