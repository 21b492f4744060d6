"""The log: what it acknowledges is durable, numbered, and never changes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path

import apsw
import pytest

from service.core import Draft
from service.log import LogUnavailable, SequenceConflict, SqliteLog, sqlite, sqlite_file
from tests.service.fakes import T0
from tests.service.log.drafts import ADMISSION, note

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("statement", ["UPDATE log SET payload = '{}'", "DELETE FROM log"])
async def test_the_database_itself_refuses_to_change_entries(
    log_path: Path, statement: str
) -> None:
    log = SqliteLog(log_path)
    written = await log.append("e", [ADMISSION], T0, 0)
    other = apsw.Connection(str(log_path))
    with pytest.raises(apsw.ConstraintError, match="append-only"):
        other.execute(statement)
    other.close()
    assert await log.entries("e") == written
    await log.close()


async def test_appends_that_wait_are_committed_together(
    log_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    commit = SqliteLog._commit

    def counted(self: SqliteLog, group: list[object]) -> None:
        groups.append(len(group))
        commit(self, group)  # type: ignore[arg-type]

    monkeypatch.setattr(SqliteLog, "_commit", counted)
    log = SqliteLog(log_path)
    results = await asyncio.gather(
        *(log.append(f"e{i}", [ADMISSION, note()], T0, 0) for i in range(600))
    )
    assert all([e.seq for e in r] == [1, 2] for r in results)
    assert sum(groups) == 600
    assert max(groups) > 1
    assert max(groups) <= sqlite.MAX_GROUP
    await log.close()
    log = SqliteLog(log_path)
    assert len(await log.heads()) == 600
    await log.close()


async def test_a_failing_append_leaves_its_neighbours_alone(log_path: Path) -> None:
    log = SqliteLog(log_path)
    await log.append("e", [ADMISSION, note("a")], T0, 0)
    naive = datetime(2026, 3, 1)  # noqa: DTZ001
    good, conflict, naive_time, bad_payload, clash, also_good = await asyncio.gather(
        log.append("g1", [ADMISSION], T0, 0),
        log.append("e", [note("b")], T0, 0),
        log.append("e", [note("c")], naive, 2),
        log.append("e", [Draft(kind="event", payload={"value": float("nan")})], T0, 2),
        log.append("e", [note("d"), note("a")], T0, 2),
        log.append("g2", [ADMISSION], T0, 0),
        return_exceptions=True,
    )
    assert isinstance(conflict, SequenceConflict)
    assert isinstance(naive_time, TypeError)
    assert isinstance(bad_payload, ValueError)
    assert isinstance(clash, SequenceConflict)
    assert await log.entries("g1") == good
    assert await log.entries("g2") == also_good
    assert [e.item_id for e in await log.entries("e")] == [None, "a"]
    await log.close()


async def test_nothing_is_acknowledged_when_the_disk_fails(log_path: Path) -> None:
    log = SqliteLog(log_path)
    await log.append("e", [ADMISSION], T0, 0)

    def refuse() -> bool:
        return True  # makes SQLite turn the COMMIT into a ROLLBACK

    log._writer.set_commit_hook(refuse)
    with pytest.raises(LogUnavailable):
        await log.append("e", [note("a")], T0, 1)
    assert not log.available()
    assert len(await log.entries("e")) == 1
    log._writer.set_commit_hook(None)
    assert (await log.append("e", [note("a")], T0, 1))[0].seq == 2
    assert log.available()
    await log.close()


async def test_a_log_that_is_well_again_says_so_without_a_write(
    log_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_TRY_AGAIN_S", 0.001)
    log = SqliteLog(log_path)
    commits, full = threading.Semaphore(0), threading.Event()
    full.set()

    def refuse() -> bool:
        commits.release()
        return full.is_set()

    log._writer.set_commit_hook(refuse)
    with pytest.raises(LogUnavailable):
        await log.append("e", [ADMISSION], T0, 0)
    for _ in range(3):  # it is tried, and goes on failing
        assert await asyncio.to_thread(commits.acquire, timeout=60)
    assert not log.available()
    full.clear()
    async with asyncio.timeout(60):
        while not log.available():  # noqa: ASYNC110 - it happens on another thread
            await asyncio.sleep(0.001)
    assert await log.entries("e") == []
    assert (await log.append("e", [ADMISSION], T0, 0))[0].seq == 1
    await log.close()


async def test_a_log_held_by_another_writer_says_so(
    log_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_MS", 1)
    log = SqliteLog(log_path)
    other = apsw.Connection(str(log_path))
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LogUnavailable):
        await log.append("e", [ADMISSION], T0, 0)
    other.execute("ROLLBACK")
    other.close()
    assert (await log.append("e", [ADMISSION], T0, 0))[0].seq == 1
    await log.close()


def test_an_old_sqlite_library_is_refused(log_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apsw, "sqlite_lib_version", lambda: "3.51.2")
    with pytest.raises(LogUnavailable, match=r"3\.51\.3"):
        SqliteLog(log_path)
    assert not log_path.exists()


def test_a_file_of_another_schema_is_refused(log_path: Path) -> None:
    db = apsw.Connection(str(log_path))
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LogUnavailable, match="99"):
        SqliteLog(log_path)


def test_a_file_that_is_no_database_is_refused(log_path: Path) -> None:
    log_path.write_text("not a database, but long enough to look at" * 100)
    with pytest.raises(LogUnavailable):
        SqliteLog(log_path)


async def test_the_writer_is_as_durable_as_sqlite_can_be(log_path: Path) -> None:
    log = SqliteLog(log_path)
    full = 2
    assert log._writer.execute("PRAGMA synchronous").get == full
    assert log._writer.execute("PRAGMA journal_mode").get == "wal"
    with pytest.raises(apsw.ReadOnlyError):
        log._reader.execute("INSERT INTO log VALUES ('e', 1, 'event', 1, 1, 1, 1, 1, '{}', x'')")
    await log.close()


_ENDLESS_WRITER = """
import asyncio, sys
from pathlib import Path
from service.core import Draft
from service.log import SqliteLog
from tests.service.fakes import T0

async def main():
    log = SqliteLog(Path(sys.argv[1]))
    async def write(name):
        seq = 0
        while True:
            entries = await log.append(name, [Draft(kind="event", item_id=f"{seq}")], T0, seq)
            seq = entries[-1].seq
            print(name, seq, flush=True)
    await asyncio.gather(*(write(f"e{i}") for i in range(8)))

asyncio.run(main())
"""


async def test_kill_9_loses_nothing_that_was_acknowledged(log_path: Path) -> None:
    writer = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", _ENDLESS_WRITER, str(log_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert writer.stdout is not None
    acknowledged: dict[str, int] = {}
    for _ in range(300):
        name, seq = writer.stdout.readline().split()
        acknowledged[name] = int(seq)
    writer.send_signal(signal.SIGKILL)
    rest = writer.stdout.read()
    writer.stdout.close()
    writer.wait()
    for line in rest.splitlines():
        if len(parts := line.split()) == 2:
            acknowledged[parts[0]] = int(parts[1])
    log = SqliteLog(log_path)
    for name, seq in acknowledged.items():
        numbers = [entry.seq for entry in await log.entries(name)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) >= seq
    await log.close()
