"""The claims and figures of the paper beside ours, in one page that begins with verdicts.

`reproduce` writes it. `claims` holds what is claimed and the rules, `judging` and `verdicts` how a
rule judges numbers, `measures` the numbers, read from `evidence`; `copy_mixture`, `language_sinks`,
`retrieval` and `documents` make the exhibits, `page` the document.
"""

from goatviz.paper.claims import CLAIMS, claim_named, judge_claims
from goatviz.paper.exhibit import Exhibit
from goatviz.paper.gallery import make_exhibits, reproduce
from goatviz.paper.judging import Claim, Judged, claims_text
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
