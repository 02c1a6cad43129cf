"""The gallery: every exhibit with its scale and provenance, whole or not at all."""

import dataclasses
import html
import re

import pytest

from goatviz.paper import claim_named, evidence, gallery, judge_claims
from goatviz.paper.exhibit import PAPER_SCALES, Table
from goatviz.paper.page import MARK
from goatviz.plots.schemes import SCHEMES
from goatviz.results import load_result, load_shipped_result
from goatviz.training import load_pretrained


@pytest.fixture
def quick(exhibits, judged, monkeypatch):
    """`reproduce` without computing the exhibits and judging the claims again."""
    monkeypatch.setattr(gallery, "make_exhibits", lambda evidence: exhibits)
    monkeypatch.setattr(gallery, "judge_claims", lambda evidence: judged)


@pytest.fixture
def idle(monkeypatch):
    """`reproduce` that must not begin to compute."""

    def worked(*given):
        raise AssertionError("the work began")

    monkeypatch.setattr(gallery, "make_exhibits", worked)
    monkeypatch.setattr(gallery, "judge_claims", worked)


def test_every_exhibit_says_scale_provenance_and_the_papers_claim(exhibits):
    assert len({e.slug for e in exhibits}) == len(exhibits) >= 6
    for exhibit in exhibits:
        assert exhibit.caption and exhibit.claim and exhibit.scale, exhibit.slug
        assert exhibit.summary or exhibit.table, exhibit.slug
        assert exhibit.paper_scale in PAPER_SCALES
        if exhibit.table:
            assert {len(row) for row in exhibit.table.rows} == {len(exhibit.table.header)}
        text = " ".join(exhibit.provenance)
        if exhibit.slug == "passkey-mass":
            said = ("passkey-goat", "steps, seed 0", "goatviz train ", "goatviz reproduce")
        elif exhibit.slug.startswith("language"):
            said = ("steps, ", "of seed 0", "SmolLM2-135M", "goatviz train ", "Measure: ")
        elif exhibit.slug.startswith(("passkey", "needle", "novels", "wikitext2", "dna")):
            said = ("steps, ", "Seeds 0 to ", "goatviz train ", "goatviz sweep ")
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
            cells = " ".join(cell for row in losses.table.rows for cell in row)
            assert f"{card['losses']['held_out']:.4f}" in cells
            assert f"{card['losses']['bayes_optimal']:.4f}" in cells


def test_the_plan_on_show_is_confirmed_and_has_a_sink(exhibits):
    (plan,) = [e for e in exhibits if e.slug == "plan"]
    assert plan.summary[0] == "POT's verdict: agrees"


def test_reproduce_writes_one_page_and_the_profiles(quick, exhibits, judged, tmp_path):
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
    for one in judged:
        assert f'id="claim-{one.claim.slug}"' in text
        for number in one.numbers():
            for words in (number.limit, number.value, *number.intervals, number.count):
                assert words in html.unescape(text), one.claim.slug
    page.write_text(f"{MARK} of an earlier version")
    assert gallery.reproduce(out).stat().st_size == len(text.encode())


def test_a_file_in_the_way_is_told(quick, tmp_path):
    target = tmp_path / "figures"
    target.write_text("something")
    with pytest.raises(ValueError, match="out must be a folder that can be written to, got"):
        gallery.reproduce(target)
    assert target.read_text() == "something"


@pytest.mark.parametrize("name", ["index.html", "copy-mixture-4-goat.nc"])
@pytest.mark.parametrize("kind", ["file", "binary", "folder"])
def test_what_goatviz_did_not_write_is_kept_and_named(idle, tmp_path, name, kind):
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"my own page" if kind == "file" else b"\xff\xfe\x00")
    before = path.is_dir() or path.read_bytes()
    with pytest.raises(ValueError, match=f"out must hold no {name} but one that goatviz reproduce"):
        gallery.reproduce(tmp_path)
    assert (path.is_dir() or path.read_bytes()) == before
    assert [each.name for each in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("kind", "known", "missing"),
    [
        ("checkpoints", "list_pretrained", ["text-rope"]),
        ("results", "list_results", ["dna-sweep", "smollm2-signal"]),
    ],
)
def test_what_is_missing_is_named_before_the_work(
    idle, tmp_path, monkeypatch, kind, known, missing
):
    names = [name for name in getattr(evidence, known)() if name not in missing]
    monkeypatch.setattr(evidence, known, lambda: names)
    with pytest.raises(ValueError, match=f"must come with the {kind} {', '.join(missing)}, which"):
        gallery.reproduce(tmp_path / "new" / "figures")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["text-goat", "passkey-sweep"])
def test_what_is_damaged_is_named_before_the_work(idle, tmp_path, monkeypatch, name):
    def damaged(asked):
        if asked == name:
            raise ValueError(f"{asked} was damaged")

    monkeypatch.setattr(evidence, "load_pretrained", damaged)
    monkeypatch.setattr(evidence, "load_shipped_result", damaged)
    with pytest.raises(ValueError, match=f"{name} was damaged"):
        gallery.reproduce(tmp_path / "figures")
    assert not list(tmp_path.iterdir())


def test_a_verdict_on_the_page_follows_the_results():
    sweep = load_shipped_result("dna-sweep").copy(deep=True)
    for field in ("loss", "run_loss"):
        sweep[field].loc[{"scheme": "goat"}] -= 0.1
    claim = claim_named("dna-rope")
    for given, verdict in (({}, "not reproduced"), ({"dna-sweep": sweep}, "reproduced")):
        page = gallery.gallery_page([], judge_claims(given, [claim]))
        assert re.findall(r'class="verdict" data-verdict="([^"]+)"', page) == [verdict]


def test_a_failure_leaves_the_old_page(quick, tmp_path, monkeypatch):
    (tmp_path / "index.html").write_text(f"old {MARK}")

    def broken(*_):
        raise RuntimeError("drawing failed")

    monkeypatch.setattr(gallery, "gallery_page", broken)
    with pytest.raises(RuntimeError, match="drawing failed"):
        gallery.reproduce(tmp_path)
    assert (tmp_path / "index.html").read_text() == f"old {MARK}"
    assert not list(tmp_path.glob("*.tmp")) and len(list(tmp_path.glob("*.html"))) == 1


@pytest.mark.parametrize("text", ["@@sections@@", "{{ x }}", "{% raw %}", "{slug}", "<!-- <b>"])
def test_text_that_looks_like_a_template_stays_text(exhibits, text):
    hostile = dataclasses.replace(
        exhibits[0], title=text, caption=text, summary=[text], table=Table([text], [[text]])
    )
    page = gallery.gallery_page([hostile], [])
    assert page.count(html.escape(text)) >= 4
    assert page.count("Plotly.newPlot(") == gallery.gallery_page(exhibits[:1], []).count(
        "Plotly.newPlot("
    )


def test_text_is_escaped(exhibits):
    hostile = dataclasses.replace(exhibits[0], title="<script>alert(1)</script>", claim="a < b & c")
    page = gallery.gallery_page([hostile], [])
    assert "<script>alert(1)" not in page and "a &lt; b &amp; c" in page
