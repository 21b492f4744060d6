"""Pages that say what is tested name tests that exist; what a page links to is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
PAGES = ["security.md", "operations.md", "governance.md"]
_LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)")
_NAMED = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def lines_of_tables(text: str) -> Iterator[str]:
    """Of all tables whose last column is headed `test`."""
    within = False
    for line in text.splitlines():
        if not line.startswith("|"):
            within = False
        elif line.rstrip().endswith("| test |"):
            within = True
        elif within and not set(line) <= set("|-"):
            yield line


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_is_named_exists(page: str) -> None:
    named = _NAMED.findall((DOCS / page).read_text())
    assert named
    for file, name in named:
        path = TESTS / file
        assert path.is_file(), file
        assert re.search(rf"^(async )?def {name}\(", path.read_text(), re.MULTILINE), name


@pytest.mark.parametrize("page", PAGES)
def test_every_line_names_its_test(page: str) -> None:
    lines = lines_of_tables((DOCS / page).read_text())
    assert [line for line in lines if not _NAMED.search(line)] == []


def test_every_risk_of_the_top_ten_is_there() -> None:
    text = (DOCS / "security.md").read_text()
    assert re.findall(r"^\| API(\d+) ", text, re.MULTILINE) == [str(n) for n in range(1, 11)]


def headings_of(page: Path) -> set[str]:
    """The names by which the headings of a page are linked to."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_every_link_leads_somewhere() -> None:
    pages = [*TESTS.parent.glob("*.md"), *DOCS.rglob("*.md")]
    broken = []
    for page in pages:
        for path, heading in _LINK.findall(page.read_text()):
            if path.startswith(("http:", "https:")):
                continue
            target = page.parent / path if path else page
            if not target.exists() or (heading and heading not in headings_of(target)):
                broken.append(f"{page.name}: {path}#{heading}")
    assert len(pages) > 20
    assert broken == []
