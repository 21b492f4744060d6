"""Logs in both databases."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import apsw
import psycopg
import pytest

from service.__main__ import main
from service.log import EventLog, SqliteLog
from service.log.postgres import PostgresLog

_OLD = Path(__file__).parents[2] / "fixtures" / "log" / "schema_1.db"


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "log.sqlite"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, log_path: Path) -> str:
    """Where a log is: the path of a file that is not there yet, or the URL of an empty database."""
    if request.param == "sqlite":
        return str(log_path)
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def make_log(database: str) -> Callable[[], EventLog]:
    """A log in the database; it may be opened again after it was closed."""
    if database.startswith("postgresql:"):
        return lambda: PostgresLog(database)
    return lambda: SqliteLog(Path(database))


@pytest.fixture
async def log(make_log: Callable[[], EventLog], anyio_backend: str) -> AsyncIterator[EventLog]:
    log = make_log()
    await log.open()
    yield log
    await log.close()


@pytest.fixture
def execute(database: str) -> Iterator[Callable[[str], list[tuple]]]:
    """Run a statement in the database as one who owns it, beside the service."""
    if database.startswith("postgresql:"):
        with psycopg.connect(database, autocommit=True) as db:

            def run(statement: str) -> list[tuple]:
                cursor = db.execute(statement)
                return cursor.fetchall() if cursor.description else []

            yield run
    else:
        yield lambda statement: apsw.Connection(database).execute(statement).fetchall()


@pytest.fixture
def tamper(database: str, execute: Callable[[str], list[tuple]]) -> Callable[[str], None]:
    """Change what is written, as only one who owns the database can: the triggers out of the way.

    `:h` in the statement stands for 32 bytes.
    """
    postgres = database.startswith("postgresql:")

    def run(statement: str) -> None:
        text = statement.replace(":h", f"'\\x{'ab' * 32}'" if postgres else f"x'{'ab' * 32}'")
        if postgres:
            for table in ("log", "audit", "retired"):
                execute(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
        else:
            for (name,) in execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'"):
                execute(f"DROP TRIGGER {name}")
        execute(text)

    return run


@pytest.fixture
def command(
    database: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """`command("verify", ...)`: run `python -m service log` on the database; its exit status and
    standard output.
    """

    def run(*arguments: object) -> tuple[int, str]:
        name = "URL" if database.startswith("postgresql:") else "PATH"
        monkeypatch.setenv(f"LLM4EHR_LOG_{name}", database)
        capsys.readouterr()
        try:
            status = main(["log", *map(str, arguments)])
        except SystemExit as end:
            status = int(str(end.code))
        return status, capsys.readouterr().out

    return run


@pytest.fixture
def old_log() -> Callable[[Path], None]:
    """Makes a file that the last version without hashes wrote: stays of 4 and 7 entries."""
    return lambda path: shutil.copy(_OLD, path) and None


def rows_of_file(path: Path, table: str) -> list[tuple]:
    """All rows of a table of a SQLite file."""
    return apsw.Connection(str(path)).execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
