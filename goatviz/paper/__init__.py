"""The figures and claims of the paper beside figures of our models, in one page.

`reproduce` writes it: `copy_mixture`, `retrieval` and `documents` make the exhibits, `page` the
document.
"""

from goatviz.paper.exhibit import Exhibit
from goatviz.paper.gallery import make_exhibits, reproduce
from goatviz.paper.page import gallery_page

__all__ = ["Exhibit", "gallery_page", "make_exhibits", "reproduce"]
