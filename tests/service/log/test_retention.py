"""What is removed, what is left, and that nothing but a removal looks like one."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterable
from pathlib import Path

import apsw
import psycopg
import pytest

from service.core import Draft
from service.log import EventLog, LogUnavailable, retention, tables
from service.log.retention import discharged_before, retire, with_heads
from service.log.tables import Tables, open_tables
from service.settings import Settings
from tests.service.fakes import at
from tests.service.log.drafts import ADMISSION, line, note
from tests.service.log.test_commands import Command, Execute, Make, Tamper, discharge, problems

OLD = discharge("2020-01-01T00:00:00Z")


@pytest.fixture
def add(make_log: Make) -> Callable[..., None]:
    """`add(episode, seq, draft, ...)`: what the service would write."""

    async def write(log: EventLog, episode: str, seq: int, drafts: Iterable[Draft]) -> None:
        await log.open()
        await log.append(episode, list(drafts), at(1), seq, line("post", episode))
        await log.close()

    def run(episode: str, seq: int, *drafts: Draft) -> None:
        asyncio.run(write(make_log(), episode, seq, drafts))

    return run


@pytest.fixture
def opened(database: str) -> Callable[..., Tables]:
    def run(*, writes: bool = False) -> Tables:
        if database.startswith("postgresql:"):
            return open_tables(Settings(log_url=database), writes=writes)
        return open_tables(Settings(log_path=Path(database)), writes=writes)

    return run


def test_a_stay_that_is_reopened_while_it_is_judged_is_not_removed(
    add: Callable[..., None], opened: Callable[..., Tables], monkeypatch: pytest.MonkeyPatch
) -> None:
    add("back", 0, ADMISSION, OLD)
    add("over", 0, ADMISSION, OLD)

    def late(tables: Tables, episodes: Iterable[str]) -> dict[str, int]:
        add("back", 2, discharge(None))
        return with_heads(tables, episodes)

    monkeypatch.setattr(retention, "with_heads", late)
    with opened() as judged:
        due = discharged_before(judged, at(0))
    assert due == ({"back": 2, "over": 2}, [])
    with opened(writes=True) as target:
        assert list(retire(target, due.heads, "x")) == [0, 2]
        assert with_heads(target, ["back"]) == {"back": 3}
        assert list(retire(target, due.heads, "x")) == [0, 0]  # by somebody else meanwhile


def test_one_transaction_removes_so_many_entries(
    add: Callable[..., None], opened: Callable[..., Tables], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_ENTRIES", 5)
    monkeypatch.setattr(retention, "_EPISODES", 3)
    sizes = {"a": 2, "b": 3, "c": 7, "d": 1, "e": 1, "f": 1, "g": 1}
    for name, size in sizes.items():
        add(name, 0, *[note()] * size)
    with opened(writes=True) as target:
        left = []
        for n in retire(target, sizes, "x"):
            left.append((n, target.count("log")))
    assert left == [(2, 11), (3, 11), (7, 4), (1, 1), (1, 1), (1, 1), (1, 0)]


@pytest.mark.parametrize("payload", ["{", '{"discharged_at": 7}', "{}"])
def test_a_damaged_stay_is_named_and_the_others_are_removed(
    add: Callable[..., None], command: Command, tamper: Tamper, execute: Execute,
    capsys: pytest.CaptureFixture[str], payload: str,
) -> None:  # fmt: skip
    for name in ("a", "b", "c"):
        add(name, 0, ADMISSION, OLD)
    tamper(f"UPDATE log SET payload = '{payload}' WHERE episode_id = 'b' AND seq = 2")
    capsys.readouterr()
    status, output = command("retain", "--discharged-before", "2021-01-01", "--dry-run")
    assert (status, output) == (1, "2 episodes with 4 entries would be removed\n")
    assert command("retain", "--discharged-before", "2021-01-01")[0] == 1
    assert execute("SELECT DISTINCT episode_id FROM log") == [("b",)]
    assert command("retain", "--episode", "b")[0] == 0  # who says so knows


def test_text_that_is_none_stops_nothing(
    add: Callable[..., None], command: Command, tamper: Tamper, database: str, tmp_path: Path,
    execute: Execute,
) -> None:  # fmt: skip
    if database.startswith("postgresql:"):
        pytest.skip("PostgreSQL takes no such text")
    for name in ("a", "b", "c", "d"):
        add(name, 0, ADMISSION, OLD)
    tamper("UPDATE log SET payload = CAST(x'7bff7d' AS TEXT) WHERE episode_id = 'b'")
    tamper("UPDATE log SET episode_id = CAST(x'63ff' AS TEXT) WHERE episode_id = 'c'")
    expected = [("log", "b", 1, "unreadable"), ("log", "b", 2, "unreadable"),
                ("log", "c\\xff", 1, "unreadable"), ("log", "c\\xff", 2, "unreadable")]  # fmt: skip
    assert problems(command("verify")[1]) == expected
    assert problems(command("backup", "--out", tmp_path / "backup")[1]) == expected
    copy = apsw.Connection(str(tmp_path / "backup"))
    assert copy.execute("SELECT DISTINCT episode_id FROM log").fetchall() == [
        ("a",), ("b",), ("c\\xff",), ("d",)
    ]  # fmt: skip
    copy.close()
    status, output = command("retain", "--discharged-before", "2021-01-01")
    assert (status, output) == (1, "2 episodes with 4 entries were removed\n")
    assert execute("SELECT episode_id FROM retired") == [("a",), ("d",)]


def test_who_only_says_that_a_stay_was_removed_is_found(
    add: Callable[..., None], command: Command, execute: Execute
) -> None:
    for name in ("a", "b"):
        add(name, 0, ADMISSION, note())
    assert command("retain", "--episode", "a")[0] == 0
    assert command("verify") == (0, "")
    execute("INSERT INTO retired SELECT episode_id, seq, hash, 0, 'x' FROM log WHERE seq = 2")
    execute("DELETE FROM log WHERE episode_id = 'b'")
    assert problems(command("verify")[1]) == [("retired", "b", 2, "not-told")]


def test_anchors_hold_what_was_removed(
    add: Callable[..., None], command: Command, tamper: Tamper, tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        add(name, 0, ADMISSION, note())
        command("retain", "--episode", name)
    for name in ("d", "e"):
        add(name, 0, ADMISSION, note())
    anchors = tmp_path / "anchors"
    assert command("anchor", "--out", anchors)[0] == 0
    assert command("verify", "--anchors", anchors) == (0, "")
    command("retain", "--episode", "d")
    assert command("verify", "--anchors", anchors) == (0, "")
    tamper("DELETE FROM retired WHERE episode_id = 'a'")
    tamper("UPDATE retired SET hash = :h WHERE episode_id = 'b'")
    assert problems(command("verify")[1]) == []
    assert problems(command("verify", "--anchors", anchors)[1]) == [
        ("retired", "a", 2, "missing"),
        ("retired", "b", 2, "not-as-anchored"),
    ]


def test_a_command_waits_for_writers_only_so_long(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_LOCK_TIMEOUT", "50ms")
    with (
        psycopg.connect(postgres_url) as writer,
        open_tables(Settings(log_url=postgres_url)) as target,
    ):
        writer.execute("LOCK TABLE log IN ROW EXCLUSIVE MODE")
        with pytest.raises(LogUnavailable, match="lock timeout"):
            list(retire(target, {"e": 1}, "x"))
        writer.rollback()
        assert list(retire(target, {"e": 1}, "x")) == [0]


def test_what_a_command_writes_is_on_disk_whatever_the_database_says(postgres_url: str) -> None:
    name = postgres_url.rpartition("/")[2]
    with psycopg.connect(postgres_url, autocommit=True) as db:
        db.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    with open_tables(Settings(log_url=postgres_url), writes=True) as target, target.transaction():
        assert target.execute("SHOW synchronous_commit") == [("on",)]


def test_a_database_of_another_schema_is_let_go(empty_postgres_url: str) -> None:
    with pytest.raises(LogUnavailable, match="log migrate"):
        open_tables(Settings(log_url=empty_postgres_url))
    gc.collect()  # a connection that is left open is a warning
    with psycopg.connect(empty_postgres_url) as db:
        others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        assert db.execute(others).fetchone() == (1,)
