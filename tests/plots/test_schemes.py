"""A scheme looks the same wherever it is drawn, and is told apart from the others."""

import itertools

import numpy as np
import pytest
import xarray as xr

from goatviz.models import POSITION_SCHEMES
from goatviz.plots import style
from goatviz.plots.schemes import (
    SCHEMES,
    Focus,
    ends_of,
    interval_line,
    length_axis,
    scheme_look,
    spread,
)

UNKNOWN = ["my scheme", "<b>rope</b>", "goat v2", ""]


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_every_position_scheme_has_its_look():
    assert set(POSITION_SCHEMES) | {"uniform"} == set(SCHEMES)


def test_looks_differ_in_colour_or_in_both_dash_and_marker():
    for one, other in itertools.combinations(SCHEMES.values(), 2):
        assert one.color != other.color or (one.dash != other.dash and one.symbol != other.symbol)
        assert one.symbol != other.symbol


def test_goat_is_the_most_prominent():
    goat, *others = SCHEMES.values()
    assert goat is scheme_look("goat") and goat.dash == "solid"
    assert all(goat.width > look.width and goat.size > look.size for look in others)
    assert all(look.dash != "solid" for look in others)


@pytest.mark.parametrize("name", [*SCHEMES, *UNKNOWN])
def test_every_look_is_seen_on_light_and_dark_pages(name):
    color = scheme_look(name).color
    assert color in style.LINES
    for ground in style.GROUND.values():
        lighter, darker = sorted((luminance(color), luminance(ground)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 3


def test_a_name_alone_decides_how_an_unknown_scheme_looks():
    before = [scheme_look(name) for name in UNKNOWN]
    assert [scheme_look(name) for name in reversed(UNKNOWN)] == before[::-1]
    assert len(set(before)) == len(UNKNOWN)
    # The checksum of the name, and no hash that differs from one Python to the next.
    look = before[0]
    assert (look.color, look.dash, look.symbol) == ("#9a6b53", "longdash", "bowtie")
    assert not {(look.color, look.symbol) for look in before} & {
        (look.color, look.symbol) for look in SCHEMES.values()
    }


def test_whiskers_stand_beside_each_other_within_their_step():
    places = np.log2([24, 32, 64])
    moved = np.array([spread(places, at, 5) for at in range(5)])
    assert (np.diff(moved, axis=0) > 0).all()
    assert np.abs(moved - places).max() < 0.25 * np.log2(32 / 24)
    low, high = ends_of(places)
    assert low < moved.min() and moved.max() < high


def test_lengths_are_binary_with_multiples_of_one_training_length():
    axis = length_axis(np.array([32, 48, 64, 1024]), "32")
    np.testing.assert_allclose(axis["tickvals"], np.log2([32, 48, 64, 1024]))
    assert axis["ticktext"] == ["32", "48", "64<br>2×", "1,024<br>32×"]
    assert "×" not in "".join(length_axis(np.array([32, 64]), "16, 32")["ticktext"])


def test_a_focus_strengthens_one_scheme_and_dims_or_hides_the_others():
    values = np.array([0.2, 0.5])
    one = xr.Dataset({f"loss{end}": ("length", values) for end in ("", "_low", "_high")})

    def line(scheme, focus):
        return interval_line(scheme, values, one, "loss", focus, hover="", detail=[values])

    plain, chosen = (line("rope", focus) for focus in (Focus(), Focus("rope")))
    assert chosen["line"]["width"] > plain["line"]["width"]
    assert chosen["line"]["color"] == plain["line"]["color"]
    assert line("goat", Focus("rope", "dimmed"))["opacity"] < 1
    assert "opacity" not in line("rope", Focus("rope", "dimmed"))
    assert not Focus("rope", "hidden").shows("goat") and Focus("rope", "hidden").shows("rope")
