"""The paper's figures and tables, from checkpoints trained for goatviz, in one page.

Every exhibit gives its own scale and provenance, from the card of its checkpoint, beside the claim
of the paper. Where the paper's number is not known here, the claim is in words only.
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
    """Draw every exhibit and write index.html, with two of the profiles behind it as netCDF.

    Parameters
    ----------
    out : path-like
        Folder to write to, made if it does not exist. The page is written whole or not at all.

    Returns
    -------
    Path
        Path of index.html: one file with plotly.js inside, which needs no network.

    Raises
    ------
    ValueError
        If `out` is not a folder that can be written to, or a shipped checkpoint is damaged.

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
    """Compute every exhibit."""
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
