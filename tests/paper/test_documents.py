"""Exhibits of losses: their tables are those of the results, in both units."""

import numpy as np
import pytest

from goatviz.paper.documents import dna
from goatviz.paper.evidence import Evidence
from goatviz.results import load_shipped_result


def test_bits_per_base_stand_beside_nats():
    sweep = load_shipped_result("dna-sweep")
    rows = {name: cells for name, *cells in dna(Evidence()).table.rows}
    for scheme in sweep["scheme"].values:
        loss = sweep["mean_loss"].sel(scheme=scheme).values
        for name, wanted in ((scheme, loss), (f"{scheme}, bits per base", loss / np.log(2))):
            shown = [float(cell.split()[0]) for cell in rows[name]]
            assert shown == pytest.approx(wanted.tolist(), abs=5e-5)
