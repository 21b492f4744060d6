"""`python -m service log`: verify, anchors, backup, restore, retention, in both databases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from service.__main__ import main
from service.core import Draft
from service.log import EventLog, Retired, SqliteLog
from tests.service.fakes import at
from tests.service.log.conftest import rows_of_file
from tests.service.log.drafts import ADMISSION, line, note

pytestmark = pytest.mark.anyio

Make = Callable[[], EventLog]
Tamper = Callable[[str], None]
Execute = Callable[[str], list[tuple]]
Command = Callable[..., tuple[int, str]]


def discharge(when: str | None) -> Draft:
    return Draft(kind="discharge", payload={"discharged_at": when})


@pytest.fixture
async def written(make_log: Make, anyio_backend: str) -> None:
    """Three stays of six entries, and lines of the audit trail."""
    log = make_log()
    await log.open()
    for name in ("a", "b", "c"):
        drafts = [ADMISSION, *(note(f"{name}-{i}") for i in range(4))]
        await log.append(name, drafts, at(1), 0, line("create", name))
        await log.append(name, [note()], at(2), 5, line("post", name))
    await log.record([line("read"), line("read")])
    await log.close()


def problems(output: str) -> list[tuple[str, str, int, str]]:
    found = [json.loads(text) for text in output.splitlines()]
    return [(f["table"], f["chain"], f["seq"], f["problem"]) for f in found]


@pytest.mark.usefixtures("written")
def test_a_log_that_is_as_it_was_written_passes(command: Command) -> None:
    assert command("verify") == (0, "")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("UPDATE log SET payload = '{}' WHERE episode_id = 'b' AND seq = 3", ("b", 3, "changed")),
        ("UPDATE log SET effective_at = 1 WHERE episode_id = 'b' AND seq = 6", ("b", 6, "changed")),
        ("UPDATE log SET hash = :h WHERE episode_id = 'c' AND seq = 6", ("c", 6, "changed")),
        ("DELETE FROM log WHERE episode_id = 'a' AND seq = 2", ("a", 2, "missing")),
        ("DELETE FROM log WHERE episode_id = 'a' AND seq = 1", ("a", 1, "missing")),
        ("INSERT INTO log SELECT episode_id, 7, kind, item_id, 0, 0, 0, NULL, payload, hash"
         " FROM log WHERE episode_id = 'a' AND seq = 6", ("a", 7, "changed")),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("written")
def test_what_was_changed_is_found(
    command: Command, tamper: Tamper, change: str, expected: tuple[str, int, str]
) -> None:
    tamper(change)
    status, output = command("verify")
    assert status == 1
    assert problems(output) == [("log", *expected)]


@pytest.mark.usefixtures("written")
def test_a_changed_audit_trail_is_found(command: Command, tamper: Tamper, execute: Execute) -> None:
    [(writer,)] = execute("SELECT DISTINCT writer FROM audit")
    tamper("UPDATE audit SET record = replace(record, 'ward-1', 'ward-2') WHERE seq = 4")
    assert problems(command("verify")[1]) == [("audit", writer, 4, "changed")]


@pytest.mark.usefixtures("written")
def test_anchors_find_what_a_chain_cannot_show(
    command: Command, tamper: Tamper, execute: Execute, tmp_path: Path
) -> None:
    [(writer,)] = execute("SELECT DISTINCT writer FROM audit")
    anchors, later = tmp_path / "anchors", tmp_path / "later"
    assert command("anchor", "--out", anchors)[0] == 0
    assert anchors.stat().st_mode & 0o777 == 0o600  # it names stays
    assert command("anchor", "--out", anchors)[0] == 1  # a file that is there is kept
    tamper("DELETE FROM log WHERE episode_id = 'a' AND seq > 4")
    tamper("DELETE FROM log WHERE episode_id = 'b'")
    tamper("DELETE FROM audit WHERE seq = 8")
    tamper("UPDATE log SET hash = :h WHERE episode_id = 'c' AND seq = 6")
    assert command("anchor", "--out", later)[0] == 0
    assert problems(command("verify")[1]) == [("log", "c", 6, "changed")]
    expected = [
        ("audit", writer, 8, "missing"),
        ("log", "a", 5, "missing"),
        ("log", "b", 1, "missing"),
        ("log", "c", 6, "changed"),
        ("log", "c", 6, "not-as-anchored"),
    ]
    for files in (["--anchors", anchors], ["--anchors", later, "--anchors", anchors]):
        status, output = command("verify", *files)
        assert (status, sorted(problems(output))) == (1, expected)
    assert command("verify", "--anchors", tmp_path / "none")[0] == 1


@pytest.mark.usefixtures("written")
async def test_a_log_grows_beyond_its_anchors(
    command: Command, make_log: Make, tmp_path: Path
) -> None:
    assert command("anchor", "--out", tmp_path / "anchors")[0] == 0
    log = make_log()
    await log.open()
    await log.append("a", [note()], at(3), 6, line())
    await log.append("new", [ADMISSION], at(3), 0)
    await log.close()
    assert command("verify", "--anchors", tmp_path / "anchors") == (0, "")


@pytest.mark.usefixtures("written")
async def test_a_backup_is_restored_to_the_last_byte(
    command: Command, make_log: Make, execute: Execute, tmp_path: Path, log_path: Path,
    database: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    assert command("retain", "--episode", "c")[0] == 0
    tables = ("log", "audit", "retired")
    before = {table: execute(f"SELECT * FROM {table} ORDER BY 1, 2") for table in tables}
    backup = tmp_path / "backup.sqlite"
    log = make_log()  # a backup needs no stop
    await log.open()
    assert command("backup", "--out", backup) == (0, "")
    assert command("backup", "--out", backup)[0] == 1
    assert command("restore", "--from", backup)[0] == 1  # into a log that is not empty, or in use
    await log.close()
    copy = SqliteLog(backup)  # it is a log by itself
    assert await copy.heads() == {"a": 6, "b": 6}
    await copy.close()

    assert {table: rows_of_file(backup, table) for table in tables} == before
    # Into an empty database of the other kind.
    monkeypatch.delenv("LLM4EHR_LOG_PATH", raising=False)
    monkeypatch.delenv("LLM4EHR_LOG_URL", raising=False)
    if log_path == Path(database):
        url = request.getfixturevalue("postgres_url")
        monkeypatch.setenv("LLM4EHR_LOG_URL", url)
        assert main(["log", "restore", "--from", str(backup)]) == 0
        with psycopg.connect(url) as db:
            for table in tables:
                rows = db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
                assert rows == before[table]
    else:
        monkeypatch.setenv("LLM4EHR_LOG_PATH", str(log_path))
        assert main(["log", "restore", "--from", str(backup)]) == 0
        assert {table: rows_of_file(log_path, table) for table in tables} == before


@pytest.mark.usefixtures("written")
def test_a_damaged_backup_is_restored_only_if_one_insists(
    command: Command, tamper: Tamper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper("UPDATE log SET payload = '{}' WHERE episode_id = 'b' AND seq = 3")
    backup = tmp_path / "backup.sqlite"
    status, output = command("backup", "--out", backup)
    assert (status, problems(output)) == (1, [("log", "b", 3, "changed")])
    monkeypatch.delenv("LLM4EHR_LOG_URL", raising=False)
    monkeypatch.setenv("LLM4EHR_LOG_PATH", str(tmp_path / "new.sqlite"))
    with pytest.raises(SystemExit):
        main(["log", "restore", "--from", str(backup)])
    assert rows_of_file(tmp_path / "new.sqlite", "log") == []
    with pytest.raises(SystemExit):
        main(["log", "restore", "--from", str(backup), "--damaged"])
    assert len(rows_of_file(tmp_path / "new.sqlite", "log")) == 18


async def test_stays_whose_time_is_over_are_removed_and_leave_a_trace(
    command: Command, make_log: Make, execute: Execute, tmp_path: Path
) -> None:
    log = make_log()
    await log.open()
    for name, drafts in {
        "old": [discharge("2020-01-01T00:00:00Z")],
        "recent": [discharge("2026-01-01T00:00:00Z")],
        "corrected": [discharge("2020-01-01T00:00:00Z"), discharge("2026-01-01T00:00:00Z")],
        "back": [discharge("2020-01-01T00:00:00Z"), discharge(None)],
        "deleted": [Draft(kind="deletion")],
        "open": [note()],
    }.items():
        await log.append(name, [ADMISSION, *drafts], at(1), 0)
    await log.close()
    command("anchor", "--out", tmp_path / "anchors")
    everything = execute("SELECT count(*) FROM log")
    status, output = command("retain", "--discharged-before", "2021-01-01", "--dry-run")
    assert (status, output) == (0, "1 episodes with 2 entries would be removed\n")
    assert execute("SELECT count(*) FROM log") == everything
    command("retain", "--discharged-before", "2021-01-01", "--reason", "five years")
    assert execute("SELECT episode_id, seq, reason FROM retired") == [("old", 2, "five years")]
    status, output = command("retain", "--discharged-before", "2026-03-02")
    assert (status, output) == (0, "3 episodes with 7 entries were removed\n")
    assert command("retain", "--episode", "open")[0] == 0
    assert command("retain", "--episode", "open")[0] == 1
    left = execute("SELECT DISTINCT episode_id FROM log")
    assert left == [("back",)]
    assert len(execute("SELECT * FROM audit")) == 5
    assert command("verify", "--anchors", tmp_path / "anchors") == (0, "")

    log = make_log()
    await log.open()
    with pytest.raises(Retired):
        await log.append("old", [ADMISSION], at(2), 0)
    await log.close()


async def test_a_file_in_use_is_not_written_by_commands(
    command: Command, database: str, tmp_path: Path
) -> None:
    if database.startswith("postgresql:"):
        pytest.skip("the lock is that of a file")
    log = SqliteLog(Path(database))
    for arguments in (
        ["migrate"],
        ["restore", "--from", tmp_path / "none"],
        ["retain", "--episode", "e"],
    ):
        assert command(*arguments)[0] == 1
    assert command("verify") == (0, "")
    await log.close()
