"""Rows of the log and of the audit trail, damaged within what their columns can hold."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from service.entries import Draft, Entry
from service.log.base import LogCorrupt
from service.log.rows import AuditChain, from_audit_row, from_rows, number, to_rows
from service.memory import Memory
from service.trail.fhir import audit_event
from service.trail.record import AuditRecord
from tests.fuzz.hostile import damaged, json_texts, marked
from tests.fuzz.house import attempt, examples, tried
from tests.service.fakes import T0, at
from tests.service.log.drafts import ADMISSION

_RECORD = AuditRecord(
    at_us=1, principal="feed", method="api-key", operation="postObservations", action="create",
    episodes=("e",), outcome="success", request_id="r", address="127.0.0.1",
)  # fmt: skip


def _observation(item_id: str, value: float) -> Draft:
    payload = {"variable": "hr", "value": value, "priority": 0, "unit_inferred": False}
    payload |= {"original": {"value": value, "unit": None}, "flags": [], "content": item_id}
    return Draft(kind="observation", item_id=item_id, effective_at=at(0.5), payload=payload)


_ENTRIES = number("e", 0, [ADMISSION, _observation("a", 80), _observation("b", 90)], at(1))
_ROWS = [row[1:-1] for row in to_rows(_ENTRIES, bytes(32))]
_TEXTS = marked | st.sampled_from(["observation", "event", "withdrawal", "deletion", "a", "t"])
_INTEGERS = st.integers(-(2**63), 2**63 - 1)
# By column: seq, kind, item id, three times, target, payload.
_COLUMNS = [
    _INTEGERS, _TEXTS, _TEXTS | st.none(), _INTEGERS | st.none(), _INTEGERS | st.none(), _INTEGERS,
    _TEXTS | st.none(), json_texts,
]  # fmt: skip


@st.composite
def rows(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    """The rows of a stay, one of whose columns is another value; or one is gone, or twice."""
    changed = [list(row) for row in _ROWS]
    i, column = draw(st.integers(0, 2)), draw(st.integers(0, 8))
    if column == 8:
        changed[i : i + 1] = draw(st.sampled_from([[], [changed[i], changed[i]]]))
    elif column == 7 and draw(st.booleans()):
        text = draw(damaged(changed[i][7].encode()))
        changed[i][7] = text.decode("utf-8", "replace")
    elif column == 7 and draw(st.booleans()):
        payload = json.loads(changed[i][7])
        name = draw(st.sampled_from([*payload, "value", "flags"]))
        payload[name] = draw(st.none() | st.booleans() | _INTEGERS | marked | st.just({}))
        changed[i][7] = json.dumps(payload)
    else:
        changed[i][column] = draw(_COLUMNS[column])
    return [tuple(row) for row in changed]


class Stored:
    """Enough of a log to read a stay from it."""

    shared = False

    def __init__(self, stored: Sequence[Sequence[Any]]) -> None:
        self._stored = stored

    async def entries(self, episode_id: str, after_seq: int = 0) -> list[Entry]:
        return from_rows(episode_id, after_seq, self._stored)


@examples(300)
@example([tuple(row) for row in _ROWS])
@given(rows())
def test_rows_of_a_stay(stored: list[tuple[Any, ...]]) -> None:
    """They make a stay that can be looked at, or the stay is corrupt."""
    tried("rows")
    memory = Memory(Stored(stored), 1000)  # type: ignore[arg-type]
    state = attempt(LogCorrupt, lambda: asyncio.run(memory.load("e")))
    if state is not None and not isinstance(state, LogCorrupt):
        assert state.view.seq == len(stored)
        assert state.view.admitted_at == T0
        assert isinstance(state.view.recorded_at, datetime)
    if [tuple(row) for row in _ROWS] == stored:
        assert not isinstance(state, LogCorrupt)


_AUDIT = AuditChain("w").to_rows([_RECORD])[0][0]
_TOLD = json.loads(_AUDIT[3])
_told = st.tuples(st.sampled_from([*_TOLD, "more"]), json_texts)


@examples(300)
@given(
    damaged(_AUDIT[3].encode()).map(lambda text: text.decode("utf-8", "replace"))
    | json_texts
    | _told.map(
        lambda pair: json.dumps(_TOLD | {pair[0]: "\x01hole"}).replace('"\\u0001hole"', pair[1])
    ),
    _INTEGERS,
)
def test_lines_of_the_audit_trail(text: str, at_us: int) -> None:
    """They are exported, or the trail is corrupt."""
    tried("audit rows")
    row = (_AUDIT[0], 1, at_us, text, _AUDIT[4])
    attempt(LogCorrupt, lambda: json.dumps(audit_event("id", from_audit_row(row), "service")))
