"""The disk of the log is full, read-only, or lost its file: nothing is recorded, reads go on."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import pytest

from service.__main__ import main
from service.core import Draft
from service.log import LogUnavailable, SqliteLog, sqlite
from service.log.tables import open_tables
from service.log.verify import verify
from service.settings import Settings
from tests.service.fakes import T0, Client, hr, running, stamp

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _tried_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_TRY_AGAIN_S", 0.01)


async def assert_only_reads(client: Client) -> None:
    """Writes are refused by name and record nothing, readiness ends, reads go on."""
    refused = await client.post(observations=[hr(90, 0.6, id="late")])
    assert (refused.status_code, refused.json()["type"]) == (503, "/problems/log-unavailable")
    assert refused.headers["retry-after"] == "5"
    assert (await client.admit("new")).status_code == 503
    assert (await client.http.get("/v2/health/ready")).status_code == 503
    assert (await client.http.get("/v2/health/live")).status_code == 200
    assert (await client.risk()).status_code == 200
    client.app.state.context.service._memory.drop("e")  # read from the file again
    assert (await client.risk()).json()["seq"] == 2
    assert (await client.http.get("/episodes")).status_code == 200
    assert (await client.http.get("/episodes/new")).status_code == 404


async def assert_well_again(client: Client) -> None:
    """Without a restart; what was refused can be sent again under the same ids."""
    async with asyncio.timeout(60):
        while (await client.http.get("/v2/health/ready")).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    answer = await client.post(observations=[hr(90, 0.6, id="late")])
    assert (answer.status_code, answer.json()["accepted"], answer.json()["seq"]) == (200, 1, 3)


def assert_sound(path: Path) -> None:
    with open_tables(Settings(log_path=path)) as tables:
        assert verify(tables, {}, lambda n: None) == []


@contextmanager
def filled(client: Client, folder: Path) -> Iterator[None]:
    """Meanwhile not a byte is left in the folder's file system."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 512, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
    try:
        yield
    finally:
        ballast.unlink()


async def test_a_full_disk(small_disk: Path, anyio_backend: str) -> None:
    path = small_disk / "log.sqlite"
    async with running(path) as client:
        await client.post(admitted_at=stamp(0), observations=[hr()])
        with filled(client, small_disk):
            # What still fits into the pages that are there is taken, until one is not.
            for i in range(10_000):
                if (await client.admit(f"filling-{i}")).status_code == 503:
                    break
            await assert_only_reads(client)
        await assert_well_again(client)
        seen = {episode for episode in await client.log.heads() if episode.startswith("filling")}
    assert len(seen) == i
    assert_sound(path)
    async with running(path) as client:
        assert (await client.http.get("/episodes/e")).json()["seq"] == 3


async def test_a_file_that_may_not_grow(log_path: Path, anyio_backend: str) -> None:
    async with running(log_path) as client:
        await client.post(admitted_at=stamp(0), observations=[hr()])
        writer = client.log._writer  # type: ignore[attr-defined]
        usual = writer.pragma("max_page_count")
        writer.pragma("max_page_count", writer.pragma("page_count"))
        for i in range(10_000):
            if (await client.admit(f"filling-{i}")).status_code == 503:
                break
        refused = await client.admit(f"filling-{i}")
        assert refused.json()["type"] == "/problems/log-unavailable"
        assert (await client.risk()).status_code == 200
        writer.pragma("max_page_count", usual)
        await assert_well_again(client)
    assert_sound(log_path)


async def test_a_disk_that_became_read_only(log_path: Path, anyio_backend: str) -> None:
    async with running(log_path) as client:
        await client.post(admitted_at=stamp(0), observations=[hr()])
        writer = client.log._writer  # type: ignore[attr-defined]
        writer.pragma("query_only", 1)
        with pytest.raises(apsw.ReadOnlyError):
            writer.execute("CREATE TABLE t (x)")
        await assert_only_reads(client)
        writer.pragma("query_only", 0)
        await assert_well_again(client)
    assert_sound(log_path)


async def test_neither_a_backup_nor_a_log_that_does_not_fit_is_left_in_part(
    small_disk: Path, log_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    log = SqliteLog(log_path)
    for i in range(40):
        note = Draft(kind="event", payload={"text": "x" * 100_000})
        await log.append(f"e{i}", [note], T0, 0)
    await log.close()
    monkeypatch.setenv("LLM4EHR_LOG_PATH", str(log_path))
    assert main(["log", "backup", "--out", str(small_disk / "backup")]) == 1
    assert os.listdir(small_disk) == []
    assert main(["log", "backup", "--out", str(log_path.with_name("backup"))]) == 0
    small = small_disk / "log.sqlite"
    monkeypatch.setenv("LLM4EHR_LOG_PATH", str(small))
    capsys.readouterr()
    assert main(["log", "restore", "--from", str(log_path.with_name("backup"))]) == 1
    assert "error: the log: " in capsys.readouterr().err
    log = SqliteLog(small)  # nobody has it, and nothing is in it
    assert await log.heads() == {}
    await log.close()


async def test_a_disk_that_is_read_only_at_the_start(small_disk: Path) -> None:
    path = small_disk / "log.sqlite"
    await SqliteLog(path).close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)  # noqa: ASYNC221
    with pytest.raises(LogUnavailable, match="cannot open the log"):
        SqliteLog(path)


def take_away(path: Path, how: str) -> None:
    copy = path.with_name("copy")
    match how:
        case "removed":
            path.rename(copy)
        case "replaced":
            copy.write_bytes(path.read_bytes())
            copy.rename(path)
        case "cut off":
            with path.open("r+b") as file:
                file.truncate(512)
        case _:
            path.with_name(f"{path.name}-wal").unlink()


@pytest.mark.parametrize("how", ["removed", "replaced", "cut off", "journal removed"])
async def test_a_file_that_was_taken_away(log_path: Path, anyio_backend: str, how: str) -> None:
    """SQLite would write on into a file without a name: acknowledged, and lost with the process."""
    async with running(log_path) as client:
        await client.post(admitted_at=stamp(0), observations=[hr()])
        client.log._writer.wal_checkpoint()  # type: ignore[attr-defined]
        await client.post(observations=[hr(81)])
        take_away(log_path, how)
        refused = await client.post(observations=[hr(90, 0.6, id="late")])
        assert (refused.status_code, refused.json()["type"]) == (503, "/problems/log-unavailable")
        await asyncio.sleep(0.05)  # some trials later
        assert (await client.http.get("/v2/health/ready")).status_code == 503
        assert (await client.risk()).status_code == 200  # from memory
