"""The claims and figures of the paper beside ours, in one page that begins with verdicts.

`reproduce` writes it. `claims` holds what is claimed and the rules, `verdicts` how a rule judges
numbers, `measures` the numbers; `copy_mixture`, `language_sinks`, `retrieval` and `documents` make
the exhibits, `page` the document.
"""

from goatviz.paper.claims import CLAIMS, Claim, Judged, claim_named, claims_text, judge_claims
from goatviz.paper.exhibit import Exhibit
from goatviz.paper.gallery import make_exhibits, reproduce
from goatviz.paper.page import gallery_page
from goatviz.paper.verdicts import Criterion, Measured, Outcome, Verdict, judge

__all__ = [
    "CLAIMS",
    "Claim",
    "Criterion",
    "Exhibit",
    "Judged",
    "Measured",
    "Outcome",
    "Verdict",
    "claim_named",
    "claims_text",
    "gallery_page",
    "judge",
    "judge_claims",
    "make_exhibits",
    "reproduce",
]
