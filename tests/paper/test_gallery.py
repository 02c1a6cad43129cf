"""The gallery: every exhibit with its scale and provenance, whole or not at all."""

import dataclasses
import html

import pytest

from goatviz.paper import gallery
from goatviz.plots.schemes import SCHEMES
from goatviz.results import load_result
from goatviz.training import load_pretrained


@pytest.fixture
def quick(exhibits, monkeypatch):
    """`reproduce` without computing the exhibits again."""
    monkeypatch.setattr(gallery, "make_exhibits", lambda: exhibits)


def test_every_exhibit_says_scale_provenance_and_the_papers_claim(exhibits):
    assert len({e.slug for e in exhibits}) == len(exhibits) >= 6
    for exhibit in exhibits:
        assert exhibit.caption and exhibit.claim and exhibit.summary, exhibit.slug
        text = " ".join(exhibit.provenance)
        if exhibit.slug == "passkey-mass":
            said = ("passkey-goat", "steps, seed 0", "goatviz train ", "goatviz reproduce")
        elif exhibit.slug.startswith(("passkey", "needle", "novels", "wikitext2", "dna")):
            said = ("steps, ", "Seeds 0, 1 and 2", "goatviz train ", "goatviz sweep ")
        else:
            said = ("copy-mixture-", "steps, seed 0")
        for words in (*said, "CPU", "parameters"):
            assert words in text, (exhibit.slug, words)
        assert len(exhibit.figure.to_json()) < 2_000_000


def test_a_scheme_looks_the_same_in_every_figure(exhibits):
    looks = {}
    for exhibit in exhibits:
        for trace in exhibit.figure.to_dict()["data"]:
            name = trace.get("name")
            if name not in SCHEMES:
                continue
            marker = trace.get("marker", {})
            look = (trace.get("line", marker).get("color"), marker.get("symbol"))
            if not str(look[1]).endswith("-open"):
                looks.setdefault(name, {}).setdefault(look, []).append(exhibit.slug)
    assert {"goat", "rope", "rope-interpolated", "alibi", "sinusoidal", "none"} <= set(looks)
    assert {name: seen for name, seen in looks.items() if len(seen) > 1} == {}
    for name, (look,) in looks.items():
        assert look == (SCHEMES[name].color, SCHEMES[name].symbol)


def test_numbers_come_from_the_cards(exhibits):
    (losses,) = [e for e in exhibits if e.slug == "losses"]
    for offset in (1, 4):
        for kind in ("goat", "uniform"):
            card = load_pretrained(f"copy-mixture-{offset}-{kind}").card
            assert f"{card['losses']['held_out']:.4f}" in " ".join(losses.summary)
            assert f"{card['losses']['bayes_optimal']:.4f}" in " ".join(losses.summary)


def test_the_plan_on_show_is_confirmed_and_has_a_sink(exhibits):
    (plan,) = [e for e in exhibits if e.slug == "plan"]
    assert plan.summary[0] == "POT's verdict: agrees"


def test_reproduce_writes_one_page_and_the_profiles(quick, exhibits, tmp_path):
    out = tmp_path / "new" / "figures"
    page = gallery.reproduce(out)
    assert page == out / "index.html"
    text = page.read_text(encoding="utf-8")
    for exhibit in exhibits:
        assert f'id="{exhibit.slug}"' in text and f'href="#{exhibit.slug}"' in text
        for words in (exhibit.title, exhibit.caption, exhibit.claim, *exhibit.provenance):
            assert words in html.unescape(text)
    assert text.count("Plotly.newPlot(") >= len(exhibits)
    assert sorted(p.name for p in out.iterdir()) == [
        "copy-mixture-1-goat.nc",
        "copy-mixture-4-goat.nc",
        "index.html",
    ]
    assert load_result(out / "copy-mixture-1-goat.nc").attrs["schema"] == "prior_profile"
    page.write_text("old")
    assert gallery.reproduce(out).stat().st_size == len(text.encode())


def test_a_file_in_the_way_is_told(quick, tmp_path):
    target = tmp_path / "figures"
    target.write_text("something")
    with pytest.raises(ValueError, match="out must be a folder that can be written to, got"):
        gallery.reproduce(target)
    assert target.read_text() == "something"


def test_a_failure_leaves_the_old_page(quick, tmp_path, monkeypatch):
    (tmp_path / "index.html").write_text("old")

    def broken(_):
        raise RuntimeError("drawing failed")

    monkeypatch.setattr(gallery, "gallery_page", broken)
    with pytest.raises(RuntimeError, match="drawing failed"):
        gallery.reproduce(tmp_path)
    assert (tmp_path / "index.html").read_text() == "old"
    assert not list(tmp_path.glob("*.tmp")) and len(list(tmp_path.glob("*.html"))) == 1


@pytest.mark.parametrize("text", ["@@sections@@", "{{ x }}", "{% raw %}", "{slug}", "<!-- <b>"])
def test_text_that_looks_like_a_template_stays_text(exhibits, text):
    hostile = dataclasses.replace(exhibits[0], title=text, caption=text, summary=[text])
    page = gallery.gallery_page([hostile])
    assert page.count(html.escape(text)) >= 4
    assert page.count("Plotly.newPlot(") == gallery.gallery_page(exhibits[:1]).count(
        "Plotly.newPlot("
    )


def test_text_is_escaped(exhibits):
    hostile = dataclasses.replace(exhibits[0], title="<script>alert(1)</script>", claim="a < b & c")
    page = gallery.gallery_page([hostile])
    assert "<script>alert(1)" not in page and "a &lt; b &amp; c" in page
