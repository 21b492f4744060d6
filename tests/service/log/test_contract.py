"""What a log promises, in either database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

import apsw
import psycopg
import pytest

from service.core import Draft
from service.log import EventLog, LogCorrupt, LogUnavailable, Retired, SequenceConflict
from service.log.rows import from_audit_row
from tests.service.fakes import T0, at
from tests.service.log.drafts import ADMISSION, line, note

pytestmark = pytest.mark.anyio

Make = Callable[[], EventLog]
Execute = Callable[[str], list[tuple]]

REFUSED = (apsw.ConstraintError, psycopg.Error)


async def test_entries_survive_reopening_unchanged(make_log: Make) -> None:
    log = make_log()
    await log.open()
    written = await log.append("e", [ADMISSION, note("a"), note()], at(1), 0)
    assert [e.seq for e in written] == [1, 2, 3]
    assert await log.entries("e") == written
    await log.close()

    log = make_log()
    await log.open()
    assert await log.entries("e") == written
    assert await log.entries("e", after_seq=2) == written[2:]
    assert await log.entries("nobody") == []
    assert (await log.append("e", [note("b")], at(2), 3))[0].seq == 4
    await log.close()


async def test_times_keep_their_microseconds_and_come_back_in_utc(log: EventLog) -> None:
    local = datetime.fromisoformat("2026-07-01T12:00:00.000001+05:30")
    await log.append("e", [ADMISSION], local, None)
    [entry] = await log.entries("e")
    assert entry.recorded_at == local
    assert str(entry.recorded_at) == "2026-07-01 06:30:00.000001+00:00"


async def test_episodes_are_listed_by_latest_activity(log: EventLog) -> None:
    for name, hours in (("b", 1), ("a", 3), ("c", 2), ("d", 2)):
        await log.append(name, [ADMISSION], at(hours), 0)
    assert list(await log.heads()) == ["a", "c", "d", "b"]
    await log.append("b", [note(), note()], at(9), 1)
    assert list((await log.heads()).items()) == [("b", 3), ("a", 1), ("c", 1), ("d", 1)]


async def test_an_empty_log_has_no_episodes(log: EventLog) -> None:
    assert await log.heads() == {}
    assert log.available()


async def test_a_second_writer_is_told(log: EventLog) -> None:
    await log.append("e", [ADMISSION], T0, 0)
    for expected in (0, 2):
        with pytest.raises(SequenceConflict):
            await log.append("e", [note()], T0, expected)
    assert len(await log.entries("e")) == 1
    await log.append("e", [note()], T0, None)
    assert len(await log.entries("e")) == 2


async def test_an_item_id_is_taken_once_an_episode(log: EventLog) -> None:
    await log.append("e", [ADMISSION, note("a"), note(), note()], T0, 0)
    with pytest.raises(SequenceConflict):
        await log.append("e", [note("b"), note("a")], T0, None)
    with pytest.raises(SequenceConflict):
        await log.append("new", [note("a"), note("a")], T0, 0)
    assert [e.item_id for e in await log.entries("e")] == [None, "a", None, None]
    await log.append("other", [ADMISSION, note("a")], T0, 0)


async def test_of_writers_at_once_one_wins(log: EventLog) -> None:
    await log.append("e", [ADMISSION], T0, 0)
    results = await asyncio.gather(
        *(log.append("e", [note(f"{i}")], T0, 1) for i in range(20)), return_exceptions=True
    )
    assert sum(isinstance(r, SequenceConflict) for r in results) == 19
    assert [e.seq for e in await log.entries("e")] == [1, 2]


async def test_thousands_of_entries_go_in_one_piece(log: EventLog) -> None:
    drafts = [ADMISSION, *(note(f"{i}") for i in range(5_000))]
    written = await log.append("e", drafts, T0, 0, line())
    assert await log.entries("e") == written
    assert await log.heads() == {"e": 5_001}
    await log.verify("e")


async def test_what_cannot_be_written_is_refused_and_harms_nothing(log: EventLog) -> None:
    naive = datetime(2026, 3, 1)  # noqa: DTZ001
    with pytest.raises(ValueError, match="nothing"):
        await log.append("e", [], T0, 0)
    with pytest.raises(TypeError):
        await log.append("e", [ADMISSION], naive, 0)
    with pytest.raises(ValueError, match="JSON"):
        await log.append("e", [Draft(kind="event", payload={"value": float("nan")})], T0, 0)
    for text in ("a\0b", "\ud800"):
        with pytest.raises(ValueError, match=r"NUL|surrogates"):
            await log.append("e", [note(text)], T0, 0)
    assert log.available()
    assert await log.heads() == {}


async def test_a_write_and_its_line_of_the_audit_trail_stand_or_fall_together(
    log: EventLog, execute: Execute
) -> None:
    await log.append("e", [ADMISSION], T0, 0, line("put_episode"))
    with pytest.raises(SequenceConflict):
        await log.append("e", [note()], T0, 0, line("lost"))
    await log.append("e", [note()], T0, 1, line("post"))
    await log.record([line("read"), replace(line("read"), episodes=("e", "f"))])
    rows = execute("SELECT * FROM audit ORDER BY writer, seq")
    assert [row[1] for row in rows] == [1, 2, 3, 4]
    lines = [from_audit_row(row) for row in rows]
    assert lines[:3] == [line("put_episode"), line("post"), line("read")]
    assert lines[3].episodes == ("e", "f")


@pytest.mark.parametrize("table", ["log", "audit", "retired"])
async def test_the_database_itself_refuses_to_change_what_is_written(
    log: EventLog, execute: Execute, database: str, table: str
) -> None:
    written = await log.append("e", [ADMISSION, note("a")], T0, 0, line())
    await log.append("gone", [ADMISSION], T0, 0)
    execute("INSERT INTO retired SELECT episode_id, seq, hash, 0, 'x' FROM log"
            " WHERE episode_id = 'gone'")  # fmt: skip
    changes = [f"UPDATE {table} SET seq = seq + 7", f"DELETE FROM {table} WHERE seq > 0"]
    if database.startswith("postgresql:"):
        changes.append(f"TRUNCATE {table}")
    else:
        changes.append(f"INSERT OR REPLACE INTO {table} SELECT * FROM {table}")
    for change in changes:
        with pytest.raises(REFUSED, match=r"append-only|stays so|is there|is retired"):
            execute(change)
    assert await log.entries("e") == written


async def test_a_retired_episode_may_be_deleted_and_never_comes_back(
    log: EventLog, execute: Execute
) -> None:
    await log.append("e", [ADMISSION, note()], T0, 0)
    await log.append("other", [ADMISSION], T0, 0)
    execute("INSERT INTO retired SELECT episode_id, seq, hash, 0, 'x' FROM log WHERE seq = 2")
    execute("DELETE FROM log WHERE episode_id = 'e'")
    assert list(await log.heads()) == ["other"]
    with pytest.raises(Retired):
        await log.append("e", [ADMISSION], T0, 0)
    assert log.available()
    await log.append("other", [note()], T0, 1)


@pytest.mark.parametrize(
    "row",
    [
        "(SELECT max(seq) + 1 FROM log), 'event', NULL, 0, 0, 0, NULL, '{'",
        "(SELECT max(seq) + 1 FROM log), 'event', NULL, 0, 0, 0, NULL, '[]'",
        "(SELECT max(seq) + 1 FROM log), 'nonsense', NULL, 0, 0, 0, NULL, '{}'",
        "(SELECT max(seq) + 2 FROM log), 'event', NULL, 0, 0, 0, NULL, '{}'",
    ],
)
async def test_an_episode_that_cannot_be_read_is_told_from_a_log_that_cannot(
    log: EventLog, execute: Execute, row: str
) -> None:
    await log.append("secret-id", [ADMISSION], T0, 0)
    good = await log.append("other", [ADMISSION], T0, 0)
    execute(f"INSERT INTO log SELECT 'secret-id', {row}, hash FROM log WHERE episode_id = 'other'")
    with pytest.raises(LogCorrupt) as told:
        await log.entries("secret-id")
    assert "secret" not in str(told.value)
    assert await log.entries("other") == good
    assert log.available()


async def test_an_episode_is_verified_by_its_hashes(
    log: EventLog, tamper: Callable[[str], None]
) -> None:
    for name in ("a", "b"):
        await log.append(name, [ADMISSION, note("x"), note("y")], T0, 0)
    await log.verify("a")
    await log.verify("nobody")
    tamper("UPDATE log SET target = 'other' WHERE episode_id = 'a' AND seq = 2")
    with pytest.raises(LogCorrupt):
        await log.verify("a")
    await log.verify("b")


async def test_nothing_is_done_after_the_end(make_log: Make) -> None:
    log = make_log()
    await log.open()
    accepted = [asyncio.create_task(log.append(f"e{i}", [ADMISSION], T0, 0)) for i in range(50)]
    await asyncio.sleep(0)
    await log.close()
    await log.close()
    assert all(len(entries) == 1 for entries in await asyncio.gather(*accepted))
    assert not log.available()
    with pytest.raises(LogUnavailable):
        await log.append("e", [ADMISSION], T0, 0)
    with pytest.raises(LogUnavailable):
        await log.entries("e")
    with pytest.raises(LogUnavailable):
        await log.record([line()])


async def test_a_write_whose_caller_goes_away_is_carried_out(log: EventLog) -> None:
    task = asyncio.create_task(log.append("e", [ADMISSION], T0, 0))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    async with asyncio.timeout(60):
        while not await log.heads():  # noqa: ASYNC110 - it happens elsewhere
            await asyncio.sleep(0.001)
    assert [e.seq for e in await log.entries("e")] == [1]
