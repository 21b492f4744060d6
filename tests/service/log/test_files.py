"""The file of a SQLite log: who may have it, under which name, and a disk that fails."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from service.__main__ import main
from service.log import LogUnavailable, SequenceConflict, SqliteLog, Unconfirmed, sqlite_file
from service.log.backup import back_up
from service.log.sqlite_file import FileLock, open_reader
from service.log.tables import NotOverwritten, SqliteTables, open_tables
from service.settings import Settings
from tests.service.fakes import T0
from tests.service.log.drafts import ADMISSION, line, note

pytestmark = pytest.mark.anyio

_ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

_HOLDER = """
import sys, time
from pathlib import Path
from service.log import SqliteLog
log = SqliteLog(Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(600)
"""


async def test_a_second_process_is_refused_until_the_first_is_gone(log_path: Path) -> None:
    holder = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", _HOLDER, str(log_path)],
        stdout=subprocess.PIPE, text=True, env=_ENVIRONMENT,
    )  # fmt: skip
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(LogUnavailable, match="another process"):
            SqliteLog(log_path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    log = SqliteLog(log_path)
    assert (await log.append("e", [ADMISSION], T0, 0))[0].seq == 1
    await log.close()


async def test_a_link_is_the_file_it_leads_to(
    log_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "links" / "log"
    link.parent.mkdir()
    link.symlink_to(log_path)
    log = SqliteLog(link)
    await log.append("e", [ADMISSION], T0, 0)
    for path in (link, log_path):
        with pytest.raises(LogUnavailable, match="another process"):
            SqliteLog(path)
        with pytest.raises(LogUnavailable, match="another process"):
            open_tables(Settings(log_path=path), writes=True)
    await log.close()
    monkeypatch.setenv("LLM4EHR_LOG_PATH", str(link))
    assert main(["log", "migrate"]) == 0
    assert os.listdir(link.parent) == ["log"]


def test_a_link_that_leads_to_itself_is_no_log(tmp_path: Path) -> None:
    link = tmp_path / "log"
    link.symlink_to(link)
    with pytest.raises(LogUnavailable, match="cannot open"):
        SqliteLog(link)


async def test_a_log_that_cannot_be_opened_is_left_free(
    log_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(self: object) -> None:
        raise OSError(errno.EIO, "the disk")

    with monkeypatch.context() as patch:
        patch.setattr(sqlite_file.OpenFiles, "_look", look)
        with pytest.raises(LogUnavailable, match="the disk"):
            SqliteLog(log_path)
    await SqliteLog(log_path).close()


async def test_who_lost_the_lock_writes_no_more(log_path: Path) -> None:
    first = SqliteLog(log_path)
    await first.append("e", [ADMISSION], T0, 0)
    log_path.with_name("log.sqlite.lock").unlink()
    second = SqliteLog(log_path)
    with pytest.raises(LogUnavailable):
        await first.append("e", [note()], T0, 1)
    assert (await second.append("e", [note()], T0, 1))[0].seq == 2
    await first.close()
    await second.close()


def test_a_lock_on_a_file_that_was_removed_is_none(
    log_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = sqlite_file.fcntl.flock

    def late(file: int, how: int) -> None:
        os.unlink(f"{log_path}.lock")
        flock(file, how)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite_file.fcntl, "flock", late)
        with pytest.raises(LogUnavailable, match="another process"):
            FileLock(log_path)
    FileLock(log_path).release()


class FailingCommit:
    """A connection whose next COMMIT ends in an error."""

    def __init__(self, db: apsw.Connection, error: apsw.Error) -> None:
        self._db, self._error = db, [error]

    def execute(self, statement: str, *values: Any) -> Any:
        if statement == "COMMIT" and self._error:
            raise self._error.pop()
        return self._db.execute(statement, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def __enter__(self) -> Any:
        return self._db.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self._db.__exit__(*error)


@pytest.mark.parametrize(
    ("error", "told"),
    [(apsw.IOError("fsync"), Unconfirmed), (apsw.FullError("full"), LogUnavailable)],
)
async def test_a_commit_that_fails_on_the_disk_may_be_recorded(
    log_path: Path, error: apsw.Error, told: type[Exception]
) -> None:
    log = SqliteLog(log_path)
    await log.append("e", [ADMISSION], T0, 0, line())
    log._writer = FailingCommit(log._writer, error)  # type: ignore[assignment]
    with pytest.raises(LogUnavailable) as raised:
        await log.append("e", [note()], T0, 1, line())
    assert type(raised.value) is told
    assert not log.available()
    assert (await log.append("e", [note()], T0, 1, line()))[0].seq == 2
    with pytest.raises(SequenceConflict):
        await log.append("e", [note()], T0, 1)
    await log.close()


def holds(path: Path, text: bytes) -> bool:
    return text in path.read_bytes()


async def test_what_a_reader_still_sees_is_not_yet_overwritten(
    log_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_MS", 1)
    monkeypatch.setenv("LLM4EHR_LOG_PATH", str(log_path))
    log = SqliteLog(log_path)
    await log.append("e", [ADMISSION, note("planted-value")], T0, 0)
    await log.close()
    reader = apsw.Connection(str(log_path))
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM log").fetchall()
    assert main(["log", "retain", "--episode", "e"]) == 1
    assert "not yet overwritten" in capsys.readouterr().err
    assert holds(log_path, b"planted-value")
    reader.close()
    assert main(["log", "migrate"]) == 0
    assert not holds(log_path, b"planted-value")
    assert main(["log", "verify"]) == 0


class NoCheckpoint:
    """A connection to a disk on which nothing more fits."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def execute(self, statement: str, *values: Any) -> Any:
        if "checkpoint" in statement:
            raise apsw.FullError("full")
        return self._db.execute(statement, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


def test_a_checkpoint_that_fails_leaves_nothing_open(
    log_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> SqliteTables:
        tables = open_tables(Settings(log_path=log_path), writes=True)
        assert isinstance(tables, SqliteTables)
        monkeypatch.setattr(tables, "_db", NoCheckpoint(tables._db))
        return tables

    with pytest.raises(NotOverwritten, match="full"), opened():
        pass
    with pytest.raises(KeyError), opened():  # what went wrong first is what is told
        raise KeyError
    FileLock(log_path).release()


async def test_a_backup_that_cannot_be_begun_leaves_nothing(
    log_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await SqliteLog(log_path).close()
    folder = tmp_path / "backups"
    folder.mkdir()

    def full(db: apsw.Connection) -> None:
        raise apsw.FullError("full")

    monkeypatch.setattr("service.log.backup.migrate_file", full)
    with SqliteTables(open_reader(log_path)) as source, pytest.raises(LogUnavailable, match="full"):
        back_up(source, folder / "backup", lambda n: None)
    assert os.listdir(folder) == []


def test_a_backup_of_an_older_version_says_how_it_is_brought_up(
    log_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], old_log: Callable[[Path], None],
) -> None:  # fmt: skip
    backup = tmp_path / "old backup"
    old_log(backup)
    monkeypatch.setenv("LLM4EHR_LOG_PATH", str(log_path))
    assert main(["log", "restore", "--from", str(backup)]) == 1
    error = capsys.readouterr().err
    assert str(backup) in error
    assert "LLM4EHR_LOG_PATH=COPY python -m service log migrate" in error


_KILLED = """
import os, signal, sys
import apsw
from service.log.migrate import migrate_file
seen = []
def advance():
    seen.append(None)
    if len(seen) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
db = apsw.Connection(sys.argv[1])
db.pragma("cache_size", 1)  # spills into the file
migrate_file(db, advance)
"""


async def test_bringing_a_file_up_survives_kill_9(
    log_path: Path, old_log: Callable[[Path], None]
) -> None:
    old_log(log_path)
    killed = subprocess.run(  # noqa: ASYNC221
        [sys.executable, "-c", _KILLED, str(log_path)], env=_ENVIRONMENT, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    log = SqliteLog(log_path)
    assert await log.heads() == {"stay-a": 4, "stay-b": 7}
    for episode in ("stay-a", "stay-b"):
        await log.verify(episode)
    await log.close()


@pytest.fixture
def everybody_may_read() -> Iterator[None]:
    """Whoever started the process lets others read what it makes."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("everybody_may_read")
async def test_its_owner_alone_may_read_what_is_recorded(log_path: Path, tmp_path: Path) -> None:
    log = SqliteLog(log_path)
    await log.append("e", [ADMISSION], T0, 0)
    backup = tmp_path / "backup.sqlite"
    with SqliteTables(open_reader(log_path)) as source:
        back_up(source, backup, lambda _: None)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in os.listdir(tmp_path)}
    ours = (f"{log_path.name}{end}" for end in ("", "-wal", "-shm", ".lock"))
    assert modes == {**dict.fromkeys(ours, 0o600), backup.name: 0o600}
    await log.close()
