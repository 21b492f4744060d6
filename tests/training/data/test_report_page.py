"""The report of an extraction: its page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llm4ehr.store import CodeInfo
from llm4ehr.variables import VARIABLES
from tests.training.data.report_source import (
    EVENTS,
    EXPECTED,
    OBSERVATIONS,
    STAYS,
    WATERFALL,
    known_store,
)
from tests.training.data.report_store import stay, write_store
from training.data.extraction import Expected, Step
from training.data.report.build import build_report, write_report
from training.data.report.figures import decompensation, histogram
from training.data.report.scan import scan_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return known_store(tmp_path)


# The page


class _Page(HTMLParser):
    """Tags that are open, every attribute, and whether each figure is described."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _page(store: Path, expected: Expected = EXPECTED) -> str:
    folder = store.parent
    write_report(build_report(store, WATERFALL, expected), folder)
    json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_stands_alone(store: Path) -> None:
    text = _page(store)
    page = _Page(text)
    assert not page.open
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "form"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "style"):
            assert name not in attributes or str(attributes[name]).startswith("#")
    assert "url(" not in text
    assert "@import" not in text
    anchors = {str(a["href"])[1:] for tag, a in page.tags if tag == "a"}
    assert anchors <= {a.get("id") for _, a in page.tags}


def test_figures_have_a_title_and_a_description(store: Path) -> None:
    text = _page(store)
    drawn = re.findall(r'<svg class="figure".*?</svg>', text, flags=re.DOTALL)
    assert len(drawn) == 2  # of the two variables; there are too few stays for a curve
    assert all(re.search(r"<title>.+</title><desc>.+</desc>", figure) for figure in drawn)


def test_the_page_begins_with_the_verdict(store: Path) -> None:
    text = _page(store)
    verdict = text[text.index('class="verdict') : text.index('id="cohort"')]
    # Nine variables were never observed, and one of 15 rows could not be read.
    assert "2 of 8 gates failed" in verdict
    assert "The variable ph is not observed" in verdict
    furthest = ["mortality positive", "mean of hr", "share of stay-hours with hr"]
    assert sorted(furthest, key=verdict.index) == furthest
    assert "outside-limits" in verdict
    absent = frozenset(v.name for v in VARIABLES) - {"hr", "sbp"}
    other = write_store(store.parent / "other", STAYS, OBSERVATIONS, EVENTS)
    assert "All 8 gates passed" in _page(other, Expected(absent_variables=absent))


def test_the_page_escapes_what_it_is_told(tmp_path: Path) -> None:
    bad = "<script>alert('x')</script>&\""
    store = write_store(
        tmp_path / "s",
        [stay("1", split=bad, benchmark_split=bad, mortality=False, phenotypes=[bad], los_hours=9)],
        [("1", "hr", 1.0, None, 80.0)], [("1", bad, 1.0, None, 1.0)],
        codes={bad: CodeInfo(bad, bad)}, source=bad, licence=bad, citation=bad, created_by=bad,
        label_notes={bad: bad}, options={bad: bad},
        refused={f"{bad}:{bad}": 1}, repaired={f"{bad}:{bad}": 1},
    )  # fmt: skip
    report = build_report(
        store, (Step(bad, 1, 1),), Expected(tasks=frozenset({bad}), published={bad: 1.0})
    )
    write_report(report, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 15
    assert not _Page(text).open


def test_ids_of_patients_and_stays_are_nowhere(tmp_path: Path) -> None:
    rows = [
        stay(f"EPISODE{i}", subject_id="SUBJECT", split=str(i), age_years=30.0) for i in range(2)
    ]
    bad = [("EPISODE0", "hr", -1.0, -2.0, 80.0), ("EPISODE1", "hr", 99.0, None, 80.0)]
    store = write_store(tmp_path / "s", rows, bad)
    write_report(build_report(store, (), Expected()), tmp_path)
    for file in ("report.json", "report.html"):
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert "EPISODE" not in text
        assert "SUBJECT" not in text


def test_a_figure_of_nothing_is_empty() -> None:
    assert histogram({"histogram": None}) == ""
    assert decompensation([]) == ""


def test_bars_are_as_high_as_their_counts() -> None:
    variable = {"title": "Heart rate", "unit": "/min", "limits": [0, 350], "plausible": [20, 300]}
    drawn = histogram(
        variable | {"histogram": {"start": 59.5, "width": 1.0, "counts": [10, 0, 40]}}
    )
    found = re.findall(r'<rect[^>]* y="([\d.]+)"[^>]* height="([\d.]+)"', drawn)
    assert found == [("66.0", "18.0"), ("12.0", "72.0")]  # standing on 84
    assert '<line class="limits"' not in drawn  # too far away
    near = histogram(variable | {"histogram": {"start": -0.5, "width": 1.0, "counts": [1] * 40}})
    assert near.count('<line class="limits"') == near.count('<line class="plausible"') == 1


def test_the_curve_ends_where_few_stays_are_left() -> None:
    rows = [
        {"hour": h, "stays": 100 if h < 20 else 9, "positive": 1, "negative": 9, "share": 0.1}
        for h in range(5, 30)
    ]
    drawn = decompensation(rows)
    assert "<title>Decompensation by hour of stay</title>" in drawn
    assert "from hour 5 to 19;" in drawn


def test_the_scan_holds_no_more_than_counts(tmp_path: Path) -> None:
    """Ten times the stays with the same values give tables of the same size."""
    sizes = []
    for n in (10, 100):
        stays = [stay(f"{i:03d}", age_years=50.0) for i in range(n)]
        observations = [
            (s["episode_id"], "hr", 1.0, 1.5, 60.0 + i % 5) for i, s in enumerate(stays)
        ]
        events = [(s["episode_id"], "X/start", 1.0, None, None) for s in stays]
        scanned = scan_store(write_store(tmp_path / str(n), stays, observations, events))
        frames = (scanned.variables, scanned.values, scanned.delays, scanned.codes, scanned.faults)
        sizes.append([len(frame) for frame in frames])
    assert sizes[0] == sizes[1] == [1, 5, 1, 1, 0]
