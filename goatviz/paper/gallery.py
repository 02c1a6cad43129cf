"""The paper's figures and tables, from checkpoints trained for goatviz, in one page.

Every exhibit says its own scale and provenance, from the checkpoint's card, beside what the paper
states. Where the paper's number is not known here, the claim stands in words and no number is
invented.
"""

from __future__ import annotations

import os
from pathlib import Path

from goatviz import checks
from goatviz.analysis.prior import prior_profile
from goatviz.files import whole_file
from goatviz.paper import copy_mixture, documents, retrieval
from goatviz.paper.exhibit import Exhibit
from goatviz.paper.page import gallery_page
from goatviz.results import save_result
from goatviz.training.checkpoint import load_pretrained


def reproduce(out: str | os.PathLike = "figures") -> Path:
    """Draw every exhibit and write index.html, with the profiles behind it as netCDF.

    Parameters
    ----------
    out : path-like
        A folder; made if it is not there. The page is replaced whole.

    Returns
    -------
    Path
        The page, index.html: one file with plotly.js inside, which asks the network for nothing.

    Raises
    ------
    ValueError
        If `out` is no folder that can be written to, or a shipped checkpoint is damaged.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     reproduce(folder).name
    'index.html'
    """
    with checks.output_folder("out", out) as out:
        exhibits = make_exhibits()
        for name in ("copy-mixture-1-goat", "copy-mixture-4-goat"):
            save_result(prior_profile(load_pretrained(name).model), out / f"{name}.nc")
        page = out / "index.html"
        with whole_file(page) as temporary:
            temporary.write_text(gallery_page(exhibits), encoding="utf-8")
    return page


def make_exhibits() -> list[Exhibit]:
    """Every figure of the paper that goatviz has so far, computed now."""
    checkpoints = {
        (offset, kind): load_pretrained(f"copy-mixture-{offset}-{kind}")
        for offset in (1, 4)
        for kind in ("goat", "uniform")
    }
    return [
        *copy_mixture.exhibits(checkpoints),
        *retrieval.exhibits(),
        *documents.exhibits(),
    ]
