"""The schema: made from nothing, and brought up from what older versions wrote."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import apsw
import psycopg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from service.__main__ import main
from service.log import LogUnavailable, SqliteLog, migrate
from service.log.migrate import SCHEMA, migrate_file, migrate_postgres, revision_of_postgres
from service.log.sqlite_file import open_reader
from service.log.tables import SqliteTables
from service.log.verify import verify
from tests.service.fakes import at
from tests.service.log.drafts import line, note

OldLog = Callable[[Path], None]

_ROWS = (
    "SELECT episode_id, seq, kind, item_id, effective_at, available_at, recorded_at, target,"
    " payload FROM log ORDER BY episode_id, seq"
)


def test_this_version_knows_the_last_step() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrate.__file__).parent / "migrations"))
    script = ScriptDirectory.from_config(config)
    assert script.get_heads() == [SCHEMA]


def test_a_database_is_made_in_one_go(empty_postgres_url: str) -> None:
    migrate_postgres(empty_postgres_url)
    migrate_postgres(empty_postgres_url)
    with psycopg.connect(empty_postgres_url) as db:
        assert revision_of_postgres(db) == SCHEMA


def test_two_that_bring_a_database_up_at_once_do_it_once(empty_postgres_url: str) -> None:
    command = [sys.executable, "-m", "service", "log", "migrate"]
    environment = {**os.environ, "LLM4EHR_LOG_URL": empty_postgres_url}
    with psycopg.connect(empty_postgres_url) as db:
        db.execute("SELECT pg_advisory_xact_lock(7306085371920384)")
        processes = [subprocess.Popen(command, env=environment) for _ in range(2)]
        deadline = time.monotonic() + 60
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        while db.execute(waiting).fetchone() != (2,):
            assert time.monotonic() < deadline
    assert [process.wait() for process in processes] == [0, 0]
    with psycopg.connect(empty_postgres_url) as db:
        assert revision_of_postgres(db) == SCHEMA


def test_a_step_that_fails_leaves_the_database_as_it_was(empty_postgres_url: str) -> None:
    with psycopg.connect(empty_postgres_url, autocommit=True) as db:
        db.execute("CREATE TABLE retired (mine int)")
    with pytest.raises(LogUnavailable, match="migrated"):
        migrate_postgres(empty_postgres_url)
    with psycopg.connect(empty_postgres_url) as db:
        assert revision_of_postgres(db) is None
        tables = db.execute("SELECT relname FROM pg_stat_user_tables").fetchall()
        assert tables == [("retired",)]


def test_a_database_of_another_encoding_is_refused(postgres_server: str) -> None:
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as db:
        db.execute("DROP DATABASE IF EXISTS latin")
        db.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(LogUnavailable, match="UTF8"):
        migrate_postgres(f"{postgres_server}/latin")


@pytest.mark.anyio
async def test_a_file_from_before_the_hashes_is_brought_up_where_it_stands(
    log_path: Path, old_log: OldLog
) -> None:
    old_log(log_path)
    before = apsw.Connection(str(log_path)).execute(_ROWS).fetchall()
    assert len(before) == 11
    log = SqliteLog(log_path)
    assert list((await log.heads()).items()) == [("stay-a", 4), ("stay-b", 7)]
    assert [e.kind for e in await log.entries("stay-a")] == [
        "admission", "event", "withdrawal", "discharge"
    ]  # fmt: skip
    await log.append("stay-b", [note("new")], at(5), 7, line())
    await log.close()
    with SqliteTables(open_reader(log_path)) as tables:
        assert tables.execute(_ROWS)[:11] == before
        assert verify(tables, {}, lambda n: None) == []
        assert tables.execute("PRAGMA user_version") == [(2,)]  # older versions refuse it
        assert tables.execute("PRAGMA integrity_check") == [("ok",)]
    log = SqliteLog(log_path)
    assert len(await log.entries("stay-b")) == 8
    await log.close()


def test_the_command_brings_a_file_up(
    log_path: Path, old_log: OldLog, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    old_log(log_path)
    monkeypatch.setenv("LLM4EHR_LOG_PATH", str(log_path))
    assert main(["log", "verify"]) == 1
    assert main(["log", "migrate"]) == 0
    assert SCHEMA in capsys.readouterr().out
    main(["log", "verify"])
    assert main(["log", "migrate", "--grant", "somebody"]) == 1


def test_bringing_a_file_up_is_all_or_nothing(log_path: Path, old_log: OldLog) -> None:
    old_log(log_path)
    seen: list[None] = []

    def advance() -> None:
        seen.append(None)
        if len(seen) == 8:
            raise OSError("no space left")

    db = apsw.Connection(str(log_path))
    before = db.execute("SELECT sql FROM sqlite_schema ORDER BY sql").fetchall()
    with pytest.raises(OSError, match="no space"):
        migrate_file(db, advance)
    assert db.execute("SELECT sql FROM sqlite_schema ORDER BY sql").fetchall() == before
    assert db.execute(_ROWS).fetchall()
    migrate_file(db)
    assert migrate.revision_of_file(db) == SCHEMA
    db.close()


def test_a_new_and_an_old_file_have_the_same_schema(
    log_path: Path, tmp_path: Path, old_log: OldLog
) -> None:
    old = tmp_path / "old.sqlite"
    old_log(old)
    schemas = []
    for path in (log_path, old):
        db = apsw.Connection(str(path))
        migrate_file(db)
        schemas.append(
            db.execute("SELECT type, name, coalesce(sql, '') FROM sqlite_schema").fetchall()
        )
        db.close()
    assert schemas[0] == schemas[1]


def test_readers_do_not_bring_a_file_up(log_path: Path, old_log: OldLog) -> None:
    old_log(log_path)
    with pytest.raises(LogUnavailable, match="service log migrate"):
        open_reader(log_path)
    with pytest.raises(LogUnavailable, match="cannot open"):
        open_reader(log_path.with_name("none.sqlite"))
