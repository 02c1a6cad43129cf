"""The paper's claims, figures and tables, from checkpoints trained for goatviz, in one page.

Every exhibit gives its own scale and provenance, from the card of its checkpoint, beside the claim
of the paper. Where the paper's number is not known here, the claim is in words only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from goatviz import checks
from goatviz.files import whole_files
from goatviz.paper import copy_mixture, documents, language_sinks, retrieval
from goatviz.paper.claims import judge_claims
from goatviz.paper.evidence import Evidence
from goatviz.paper.exhibit import Exhibit
from goatviz.paper.judging import claims_text
from goatviz.paper.page import MARK, gallery_page
from goatviz.results import load_result, save_result

#: Checkpoints whose prior profiles are written beside the page.
_PROFILES = ("copy-mixture-1-goat", "copy-mixture-4-goat")


def reproduce(
    out: str | os.PathLike = "figures", *, tell: Callable[[str], object] | None = None
) -> Path:
    """Judge the paper's claims, draw every exhibit, and write index.html with two profiles.

    Parameters
    ----------
    out : path-like
        Folder to write to, made if it does not exist. All files are written whole or none is, and
        nothing is replaced that an earlier call did not write.
    tell : callable, optional
        Called with the table of verdicts as text, for example `print`.

    Returns
    -------
    Path
        Path of index.html: one file with plotly.js inside, which needs no network. It begins with
        the table of claims, see `goatviz.paper.judge_claims`.

    Raises
    ------
    ValueError
        If `out` is not a folder that can be written to or holds other files of these names, or a
        shipped checkpoint or result is missing or damaged; all that before anything is computed.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     reproduce(folder).name
    'index.html'
    """
    with checks.output_folder("out", out) as folder:
        page, *profiles = (folder / name for name in _files())
        _check_ours(page, profiles)
        evidence = Evidence().load()
        judged = judge_claims(evidence)
        text = gallery_page(make_exhibits(evidence), judged)
        with whole_files(page, *profiles) as (whole_page, *whole_profiles):
            whole_page.write_text(text, encoding="utf-8")
            for name, path in zip(_PROFILES, whole_profiles, strict=True):
                save_result(evidence.prior(name), path)
    if tell is not None:
        tell(claims_text(judged))
    return page


def _files() -> list[str]:
    return ["index.html", *(f"{name}.nc" for name in _PROFILES)]


def _check_ours(page: Path, profiles: list[Path]) -> None:
    """Raise a ValueError for a file in the way that `reproduce` did not write."""
    for path in (page, *profiles):
        if not os.path.lexists(path):
            continue
        try:
            if path == page:
                ours = MARK in path.read_text(encoding="utf-8")
            else:
                ours = load_result(path).attrs["schema"] == "prior_profile"
        except (OSError, ValueError):
            ours = False
        if not ours:
            raise ValueError(
                f"out must hold no {path.name} but one that goatviz reproduce wrote, got another "
                f"in {path.parent}: name another folder"
            )


def make_exhibits(evidence: Evidence | None = None) -> list[Exhibit]:
    """Compute every exhibit."""
    evidence = evidence or Evidence()
    rooms = (copy_mixture, language_sinks, retrieval, documents)
    return [exhibit for room in rooms for exhibit in room.exhibits(evidence)]
