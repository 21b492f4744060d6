"""The chain of hashes: whatever is changed in a row is found."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from service.core import Draft
from service.log.rows import FIRST, AuditChain, Row, from_audit_row, from_rows, number, to_rows
from service.log.verify import Chains, Finding
from service.trail.record import AuditRecord
from tests.service.fakes import at

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
VALUES = (
    st.none()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers()
    | st.text()
)

DRAFTS = st.lists(
    st.builds(
        Draft,
        kind=st.sampled_from(["observation", "event", "withdrawal"]),
        item_id=st.none() | TEXT,
        effective_at=st.none() | st.integers(0, 10**6).map(lambda n: at(n / 1000)),
        target=st.none() | TEXT,
        payload=st.dictionaries(st.text(), VALUES, max_size=3),
    ),
    min_size=1,
    max_size=6,
)


def rows_of(episode: str, drafts: Sequence[Draft]) -> list[Row]:
    return to_rows(number(episode, 0, drafts, at(1)), FIRST)


def findings(rows: Sequence[Row]) -> list[Finding]:
    chains = Chains("log")
    list(chains.follow(rows))
    return chains.end({})


@given(TEXT, DRAFTS)
def test_what_was_written_is_read_and_verifies(episode: str, drafts: list[Draft]) -> None:
    rows = rows_of(episode, drafts)
    assert findings(rows) == []
    again = from_rows(episode, 0, [row[1:-1] for row in rows])
    assert again == number(episode, 0, drafts, at(1))


@given(DRAFTS, st.data())
def test_any_change_of_any_value_of_any_row_is_found(
    drafts: list[Draft], data: st.DataObject
) -> None:
    rows = rows_of("e", drafts)
    i = data.draw(st.integers(0, len(rows) - 1))
    column = data.draw(st.integers(0, 9))
    old: Any = rows[i][column]
    new: st.SearchStrategy[Any]
    if isinstance(old, bytes):
        new = st.binary(min_size=32, max_size=32)
    else:
        new = TEXT if column in (0, 2, 3, 7, 8) else st.integers()
        if column in (3, 4, 5, 7):  # where the schema allows it
            new |= st.none()
    changed = data.draw(new.filter(lambda value: value != old))
    rows[i] = (*rows[i][:column], changed, *rows[i][column + 1 :])
    assert findings(rows)


@given(DRAFTS.filter(lambda drafts: len(drafts) > 2), st.data())
def test_rows_removed_swapped_or_put_in_between_are_found(
    drafts: list[Draft], data: st.DataObject
) -> None:
    rows = rows_of("e", drafts)
    i = data.draw(st.integers(0, len(rows) - 2))
    removed = rows[:i] + rows[i + 1 :]
    assert [f.problem for f in findings(removed)] == ["missing"]
    assert findings(removed)[0].seq == i + 1
    # Removed, and those behind it given new numbers.
    renumbered = [(row[0], n, *row[2:]) for n, row in enumerate(removed, start=1)]
    assert findings(renumbered)
    numbers, contents = [row[1] for row in rows], [row[2:] for row in rows]
    contents[i], contents[i + 1] = contents[i + 1], contents[i]
    assert findings([("e", n, *rest) for n, rest in zip(numbers, contents, strict=True)])
    longer = [*rows[: i + 1], *rows[i:]]
    assert findings([("e", n, *row[2:]) for n, row in enumerate(longer, start=1)])


def test_one_change_is_one_finding() -> None:
    rows = [row for e in ("a", "b") for row in rows_of(e, [Draft(kind="event")] * 5)]
    rows[6] = (*rows[6][:8], '{"value":1}', rows[6][9])
    assert findings(rows) == [Finding("log", "b", 2, "changed")]


def test_a_chain_begins_with_zeros_and_is_what_it_is_said_to_be() -> None:
    """The rule is written down here once more, for those who check it by other means."""
    [row] = rows_of("é", [Draft(kind="event", item_id="i", payload={"value": 0.1, "unit": "µg"})])
    text = (
        r'["\u00e9",1,"event","i",null,null,1772355600000000,null,'
        r'"{\"value\":0.1,\"unit\":\"\\u00b5g\"}"]'
    )
    assert row[-1] == hashlib.sha256(bytes(32) + text.encode()).digest()


@given(st.lists(TEXT, max_size=3), TEXT)
def test_lines_of_the_audit_trail_come_back(episodes: list[str], text: str) -> None:
    record = AuditRecord(
        at_us=7, principal=text, method=text, operation=text, action="read",
        episodes=tuple(episodes), outcome="refused", request_id=text, address=text,
    )  # fmt: skip
    rows, chain = AuditChain("w").to_rows([record, record])
    assert [from_audit_row(row) for row in rows] == [record, record]
    more, _ = chain.to_rows([record])
    chains = Chains("audit")
    list(chains.follow(rows + more))
    assert chains.end({}) == []
    assert chains.heads["w"].seq == 3
