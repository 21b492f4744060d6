"""What goes wrong between the service and PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from service.__main__ import main
from service.log import LogUnavailable, PostgresLog, SequenceConflict, Unconfirmed, postgres
from service.log import postgres_lanes as lanes
from service.log.migrate import SCHEMA, migrate_postgres
from service.log.postgres_lanes import Lane
from service.log.retention import retire, with_heads
from service.log.tables import PostgresTables
from service.log.verify import verify
from tests.end_to_end.server import free_port
from tests.postgres import Cluster
from tests.replicas.proxy import Proxy
from tests.service.fakes import T0, at
from tests.service.log.drafts import ADMISSION, line, note

pytestmark = pytest.mark.anyio


@pytest.fixture
async def log(postgres_url: str, anyio_backend: str) -> AsyncIterator[PostgresLog]:
    log = PostgresLog(postgres_url)
    await log.open()
    yield log
    await log.close()


@pytest.fixture
def own_server(postgres: Cluster, postgres_url: str) -> Iterator[Cluster]:
    """A server that may be stopped and paused; it runs again afterwards."""
    if f":{postgres.port}/" not in postgres_url:
        pytest.skip("the server of LLM4EHR_TEST_POSTGRES is not ours to stop")
    try:
        yield postgres
    finally:
        postgres.require()


def terminate_others(url: str) -> int:
    """Kill every other connection to the database, as a failing network would."""
    with psycopg.connect(url, autocommit=True) as db:
        return len(
            db.execute(
                "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            ).fetchall()
        )


async def becomes_available(log: PostgresLog) -> None:
    async with asyncio.timeout(60):
        while not log.available():  # noqa: ASYNC110 - a task finds it out
            await asyncio.sleep(0.01)


async def test_connections_that_were_lost_while_idle_are_made_again_unseen(
    log: PostgresLog, postgres_url: str
) -> None:
    await asyncio.gather(*(log.append(f"e{i}", [ADMISSION], T0, 0) for i in range(8)))
    assert terminate_others(postgres_url) > 1
    await asyncio.gather(*(log.append(f"e{i}", [note()], T0, 1) for i in range(8)))
    assert terminate_others(postgres_url) > 0
    assert len(await log.entries("e1")) == 2
    assert log.available()


async def test_a_server_that_crashed_is_found_again_without_a_write(
    log: PostgresLog, own_server: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "_TRY_AGAIN_S", 0.05)
    await log.append("e", [ADMISSION], T0, 0)
    own_server.stop()
    with pytest.raises(LogUnavailable):
        await log.append("e", [note()], T0, 1)
    with pytest.raises(LogUnavailable):
        await log.entries("e")
    assert not log.available()
    own_server.start()
    await becomes_available(log)
    assert [e.seq for e in await log.append("e", [note()], T0, 1)] == [2]


async def test_a_server_that_hangs_holds_nobody_up(
    log: PostgresLog, own_server: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "_TRY_AGAIN_S", 0.05)
    await log.append("e", [ADMISSION], T0, 0)
    own_server.pause()
    with monkeypatch.context() as patch:
        patch.setattr(lanes, "PATIENCE_S", 0.5)
        with pytest.raises(LogUnavailable):
            await log.append("e", [note()], T0, 1)
        assert not log.available()
    own_server.resume()
    await becomes_available(log)
    assert (await log.append("e", [note()], T0, None))[0].seq >= 2


async def test_a_way_that_stalls_once_a_connection_stands_holds_nobody_up(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = urlsplit(postgres_url)
    assert server.port is not None
    connect = psycopg.AsyncConnection.connect

    with Proxy(server.port) as proxy:
        log = PostgresLog(postgres_url.replace(f":{server.port}/", f":{proxy.port}/"))
        await log.open()
        await log._lanes.drop_idle()

        async def stalled(*arguments: Any, **how: Any) -> Any:
            db = await connect(*arguments, **how)
            proxy.turn("stalled")
            return db

        monkeypatch.setattr(psycopg.AsyncConnection, "connect", stalled)
        monkeypatch.setattr(lanes, "PATIENCE_S", 1.0)
        async with asyncio.timeout(60):
            with pytest.raises(LogUnavailable):
                await log.append("e", [ADMISSION], T0, 0)
            proxy.turn("open")
            with pytest.raises(psycopg.Error):
                await log._lanes.listen()
            await log.close()


async def test_a_log_that_is_busy_is_not_ill(
    log: PostgresLog, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "_SESSION", lanes._SESSION + "; SET lock_timeout = '50ms';")
    await log._lanes.drop_idle()
    with psycopg.connect(postgres_url) as db:
        db.execute("LOCK TABLE log IN SHARE ROW EXCLUSIVE MODE")
        with pytest.raises(LogUnavailable, match="command"):
            await log.append("e", [ADMISSION], T0, 0)
    assert log.available()
    monkeypatch.setattr(lanes, "PATIENCE_S", 0.05)
    monkeypatch.setattr(log._lanes, "_free", asyncio.Semaphore(0))
    with pytest.raises(LogUnavailable, match="in use"):
        await log.append("e", [ADMISSION], T0, 0)
    assert log.available()


async def test_heads_are_read_in_pages(log: PostgresLog, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["", "a", "é", "z", "\U0001f600", "\uffee", "zz"]
    for name in names:
        await log.append(name, [ADMISSION, note()], T0, 0)
    await log.append("b", [ADMISSION], at(1), 0)
    for page in (1, 2, 3, 4, 8, 9):
        monkeypatch.setattr(postgres, "_HEADS_AT_A_TIME", page)
        heads = await log.heads()
        assert list(heads.items()) == [("b", 1), *((name, 2) for name in sorted(names))]


def _before_commit(
    monkeypatch: pytest.MonkeyPatch, first: Callable[[Lane], Awaitable[None]]
) -> None:
    """Have something happen before the next COMMIT, once."""
    commit = Lane.commit

    async def late(self: Lane) -> None:
        monkeypatch.setattr(Lane, "commit", commit)
        await first(self)
        await commit(self)

    monkeypatch.setattr(Lane, "commit", late)


async def test_a_connection_lost_during_the_commit_leaves_it_open_what_was_written(
    log: PostgresLog, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await log.append("e", [ADMISSION], T0, 0)

    async def kill(lane: Lane) -> None:
        await asyncio.to_thread(terminate_others, postgres_url)

    _before_commit(monkeypatch, kill)
    with pytest.raises(Unconfirmed):
        await log.append("e", [note()], T0, 1, line())
    assert len(await log.entries("e")) == 1
    assert [e.seq for e in await log.append("e", [note()], T0, 1, line())] == [2]


async def test_a_commit_that_went_through_unheard_is_unconfirmed_too(
    log: PostgresLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    await log.append("e", [ADMISSION], T0, 0, line())

    async def commit_and_sever(lane: Lane) -> None:
        await lane.db.execute("COMMIT")
        lane.sever()

    _before_commit(monkeypatch, commit_and_sever)
    with pytest.raises(Unconfirmed):
        await log.append("e", [note()], T0, 1, line())
    with pytest.raises(SequenceConflict):
        await log.append("e", [note()], T0, 1, line())
    assert len(await log.entries("e")) == 2


async def test_a_connection_lost_before_the_commit_is_replaced(
    log: PostgresLog, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it was recorded, so it is done once more."""
    await log.append("e", [ADMISSION], T0, 0)
    to_rows, done = postgres.to_rows, []

    def late(*arguments):  # type: ignore[no-untyped-def]
        if not done:
            done.append(terminate_others(postgres_url))
        return to_rows(*arguments)

    monkeypatch.setattr(postgres, "to_rows", late)
    assert [e.seq for e in await log.append("e", [note()], T0, 1)] == [2]
    assert done == [1]


async def test_many_replicas_write_one_chain_for_each_episode(postgres_url: str) -> None:
    replicas = [PostgresLog(postgres_url) for _ in range(4)]
    n_appends, n_conflicts = 15, 0

    async def write(log: PostgresLog, name: str) -> None:
        nonlocal n_conflicts
        for i in range(n_appends):
            while True:
                seq = (await log.heads()).get("e", 0)
                try:
                    await log.append("e", [note(f"{name}-{i}"), note()], T0, seq, line())
                    break
                except SequenceConflict:
                    n_conflicts += 1

    for log in replicas:
        await log.open()
    await asyncio.gather(*(write(log, f"{n}") for n, log in enumerate(replicas)))
    entries = await replicas[0].entries("e")
    assert [e.seq for e in entries] == list(range(1, 2 * 4 * n_appends + 1))
    assert len({e.item_id for e in entries}) == 4 * n_appends + 1
    assert n_conflicts > 0
    for log in replicas:
        await log.close()
    with PostgresTables(postgres_url) as tables:
        assert verify(tables, {}, lambda n: None) == []
        assert tables.count("audit") == 4 * n_appends


async def test_others_are_told_what_was_written(log: PostgresLog, postgres_url: str) -> None:
    other = PostgresLog(postgres_url)
    await other.open()
    changes = other.changes()
    async with asyncio.timeout(60):
        assert await anext(changes) is None
        await other.append("own", [ADMISSION], T0, 0)
        await log.append("a:b.c", [ADMISSION], T0, 0)
        assert await anext(changes) == "a:b.c"
        waiting = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0)
        terminate_others(postgres_url)
        assert await waiting is None  # nothing is heard any more
        assert await anext(changes) is None  # it is again
        await log.append("d", [ADMISSION], T0, 0)
        assert await anext(changes) == "d"
    await changes.aclose()
    await other.close()


async def test_a_commit_that_goes_through_after_it_was_given_up_is_told_of(
    log: PostgresLog, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that is slow for longer than anybody waits."""
    changes = log.changes()
    with psycopg.connect(postgres_url, autocommit=True) as db:
        db.execute(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$"
            " BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$"
        )
        db.execute(
            "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON log DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION wait()"
        )
        db.execute("SELECT pg_advisory_lock(1)")
        async with asyncio.timeout(60):
            assert await anext(changes) is None
            monkeypatch.setattr(lanes, "PATIENCE_S", 0.2)
            with pytest.raises(Unconfirmed):
                await log.append("e", [ADMISSION], T0, 0)
            monkeypatch.undo()
            assert await log.heads() == {}
            db.execute("SELECT pg_advisory_unlock(1)")
            assert await anext(changes) == "e"
            assert await log.heads() == {"e": 1}
    await changes.aclose()


async def test_replicas_are_told_what_was_removed(log: PostgresLog, postgres_url: str) -> None:
    await log.append("e", [ADMISSION], T0, 0)
    changes = log.changes()
    async with asyncio.timeout(60):
        assert await anext(changes) is None
        with PostgresTables(postgres_url) as tables:
            assert list(retire(tables, with_heads(tables, ["e"]), "x")) == [1]
        assert await anext(changes) == "e"
    assert await log.entries("e") == []
    await changes.aclose()


async def test_what_was_written_to_meanwhile_is_not_removed(
    log: PostgresLog, postgres_url: str
) -> None:
    for name in ("a", "b"):
        await log.append(name, [ADMISSION], T0, 0)
    with PostgresTables(postgres_url) as tables:
        due = with_heads(tables, ["a", "b"])
        await log.append("a", [note()], T0, 1)
        assert list(retire(tables, due, "x")) == [0, 1]
    assert await log.heads() == {"a": 2}


async def test_what_is_acknowledged_is_on_disk_whatever_the_database_says(
    postgres_url: str,
) -> None:
    name = postgres_url.rpartition("/")[2]
    for setting, expected in (("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")):
        with psycopg.connect(postgres_url, autocommit=True) as db:
            db.execute(f"ALTER DATABASE {name} SET synchronous_commit = {setting}")
        db = await lanes.connect(lanes.parameters(postgres_url))
        assert await (await db.execute("SHOW synchronous_commit")).fetchone() == (expected,)
        await db.close()


async def test_another_schema_is_refused(empty_postgres_url: str, postgres_url: str) -> None:
    with pytest.raises(LogUnavailable, match="service log migrate"):
        await PostgresLog(empty_postgres_url).open()
    with psycopg.connect(postgres_url, autocommit=True) as db:
        db.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(LogUnavailable, match=f"schema 9999, .* needs {SCHEMA}"):
        await PostgresLog(postgres_url).open()


def test_the_service_says_in_one_line_what_is_wrong(
    empty_postgres_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLM4EHR_LOG_URL", empty_postgres_url)
    assert main(["serve"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "python -m service log migrate" in line


async def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "START_S", -1.0)
    url = f"postgresql://me:secret@127.0.0.1:{free_port()}/none"
    with pytest.raises(LogUnavailable) as told:
        await PostgresLog(url).open()
    assert "secret" not in str(told.value)


async def test_a_server_that_starts_later_is_waited_for(
    own_server: Cluster, postgres_url: str
) -> None:
    own_server.stop("fast")
    log = PostgresLog(postgres_url)
    opening = asyncio.create_task(log.open())
    await asyncio.sleep(0)
    await asyncio.to_thread(own_server.start)
    await opening
    assert log.available()
    await log.close()


def test_what_is_no_url_is_not_quoted() -> None:
    with pytest.raises(LogUnavailable) as told:
        PostgresLog("postgresql:secret")
    assert "secret" not in str(told.value)


async def test_the_service_needs_no_more_than_its_role_has(
    postgres_url: str, anyio_backend: str
) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as db:
        if not db.execute("SELECT 1 FROM pg_roles WHERE rolname = 'llm4ehr_test'").fetchall():
            db.execute("CREATE ROLE llm4ehr_test LOGIN")
    migrate_postgres(postgres_url, "llm4ehr_test")
    url = postgres_url.replace("postgres@", "llm4ehr_test@")
    log = PostgresLog(url)
    await log.open()
    await log.append("e", [ADMISSION], T0, 0, line())
    assert await log.heads() == {"e": 1}
    with psycopg.connect(url, autocommit=True) as db:
        for statement in (
            "DELETE FROM log", "UPDATE audit SET at = 0", "TRUNCATE log",
            "ALTER TABLE log DISABLE TRIGGER ALL", "INSERT INTO retired SELECT 'e', 1, '', 0, ''",
            "DROP TABLE audit", "CREATE TABLE mine (a int)",
        ):  # fmt: skip
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                db.execute(statement)
    await log.close()
