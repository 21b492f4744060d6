"""Nobody waits too long or for somebody who left, and nobody asks for too much at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from service.api.problems import PROBLEMS
from service.core import Draft, Entry
from service.log import SqliteLog
from tests.service.fakes import Client, hr, running, stamp

pytestmark = pytest.mark.anyio

RISK = "/episodes/e/risk"


async def until(what: Callable[[], Any]) -> None:
    """Until it is true: whatever is waited for here comes, or the test is ended from outside."""
    while not what():  # noqa: ASYNC110 - most of it happens where no event can be set
        await asyncio.sleep(0.001)


async def refusals(client: Client) -> dict[str, float]:
    """Refused requests by reason, those that happened."""
    prefix = 'llm4ehr_refusals_total{reason="'
    lines = (await client.http.get("/metrics")).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith(prefix))
    found = {name.removeprefix(prefix)[:-2]: float(value) for name, value in pairs}
    assert set(found) == {name for name, (status, _) in PROBLEMS.items() if status in (429, 503)}
    return {name: n for name, n in found.items() if n}


def assert_refused(response: httpx.Response, name: str) -> None:
    assert response.status_code == PROBLEMS[name][0]
    assert response.json()["type"] == f"/problems/{name}"
    assert int(response.headers["retry-after"]) >= 1


@contextmanager
def deadlines(client: Client, **seconds: float) -> Iterator[None]:
    """Meanwhile so short that they pass: the rest of a test is not measured by the clock."""
    context = client.app.state.context
    settings = context.settings.model_copy(update=seconds)
    client.app.state.context = replace(context, settings=settings)
    usual = context.service._write_s
    context.service._write_s = settings.write_deadline_seconds
    try:
        yield
    finally:
        client.app.state.context = context
        context.service._write_s = usual


async def test_a_read_waits_no_longer_than_the_deadline(log_path: Path, anyio_backend: str) -> None:
    async with running(log_path) as client:
        await client.post(admitted_at=stamp(0), observations=[hr(hours=0.1), hr(hours=0.2)])
        await client.risk()  # the newest entry is known
        client.engine.held = True
        with deadlines(client, read_deadline_seconds=0.01):
            assert_refused(await client.risk(as_of=2), "deadline-exceeded")
        [(_, _, past)] = client.engine.waiting
        assert past.cancelled()  # nobody else asks for a view of the past
        assert (await client.risk()).status_code == 200
        await client.post(observations=[hr(hours=0.3)])
        with deadlines(client, read_deadline_seconds=0.01):
            assert_refused(await client.risk(), "deadline-exceeded")
        _, (_, _, newest) = client.engine.waiting
        assert not newest.done()  # it serves whoever comes next
        client.engine.release()
        assert (await client.risk()).json()["seq"] == 4
        assert await refusals(client) == {"deadline-exceeded": 2}


@pytest.mark.parametrize(
    ("prefer", "applied"),
    [
        ("wait=0", "wait=0"),
        ('WAIT = "0"', "wait=0"),
        ("respond-async, wait=0; x=1, wait=7", "wait=0"),
        ("wait=10", "wait=10"),
        ("wait=11", None),
        ("wait=99999999999999", None),
        ("wait=-1", None),
        ("wait=soon", None),
        ("return=minimal", None),
        ("", None),
    ],
)
async def test_a_client_may_ask_for_a_shorter_wait(
    client: Client, prefer: str, applied: str | None
) -> None:
    await client.post(admitted_at=stamp(0), observations=[hr()])
    await client.risk()
    # What is known is answered at once.
    response = await client.http.get(RISK, headers={"Prefer": prefer})
    assert (response.status_code, response.headers.get("preference-applied")) == (200, applied)
    if applied == "wait=0":
        client.engine.held = True
        response = await client.http.get(f"{RISK}?as_of=1", headers={"Prefer": prefer})
        assert response.status_code == 200  # an admission alone needs no score
        response = await client.http.get(f"{RISK}?hour=1", headers={"Prefer": prefer})
        assert_refused(response, "deadline-exceeded")


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[int]:
    """The app behind a real socket, on the loop of the test; the port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="critical"))
    server.capture_signals = nothing  # type: ignore[method-assign]
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


class nothing:  # noqa: N801
    """A context that changes no handler of signals."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


async def test_a_client_that_leaves_frees_its_place(log_path: Path, anyio_backend: str) -> None:
    async with (
        running(log_path, max_in_flight_per_client=1) as client,
        listening(client.app) as port,
    ):
        await client.post(admitted_at=stamp(0), observations=[hr(hours=0.1), hr(hours=0.2)])
        client.engine.held = True
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {RISK}?as_of=2 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await until(lambda: client.engine.waiting)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            assert_refused(await http.get(RISK), "too-many-requests")
            assert (await http.get("/v2/health/ready")).status_code == 200
            assert (await http.get("/metrics")).status_code == 200
            writer.close()
            [(_, _, past)] = client.engine.waiting
            await until(past.cancelled)
            client.engine.held = False
            assert (await http.get(RISK)).status_code == 200
        assert await refusals(client) == {"too-many-requests": 1}
        metrics = (await client.http.get("/metrics")).text
        for status in (429, 499):
            assert f'route="/episodes/{{episode_id}}/risk",status="{status}"' in metrics
        assert "unmatched" not in metrics


class SlowLog(SqliteLog):
    """Appends when it is told to, and reads unless it is told to stop."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.go = asyncio.Event()
        self.read = asyncio.Event()
        self.read.set()
        self.waiting = 0

    async def entries(self, episode_id: str, after_seq: int = 0) -> list[Entry]:
        await self.read.wait()
        return await super().entries(episode_id, after_seq)

    async def append(self, episode_id: str, drafts: Any, *rest: Any) -> list[Entry]:
        self.waiting += 1
        await self.go.wait()
        written: list[Draft] = drafts
        return await super().append(episode_id, written, *rest)


async def test_writes_that_wait_for_the_log_are_bounded(log_path: Path, anyio_backend: str) -> None:
    log = SlowLog(log_path)
    async with running(log_path, log=log, max_waiting_writes=2) as client:
        under_way = [asyncio.create_task(client.admit(name)) for name in "ab"]
        await until(lambda: log.waiting == 2)
        assert_refused(await client.admit("c"), "log-busy")
        log.go.set()
        assert [(await admitted).status_code for admitted in under_way] == [201, 201]
        assert (await client.admit("c")).status_code == 201
        assert await refusals(client) == {"log-busy": 1}


async def test_a_write_is_answered_although_the_log_is_slow(
    log_path: Path, anyio_backend: str
) -> None:
    log = SlowLog(log_path)
    async with running(log_path, log=log) as client:
        with deadlines(client, write_deadline_seconds=0.01):
            assert_refused(await client.admit(), "log-slow")
        log.go.set()  # what was begun goes on
        await until(lambda: client.app.state.context.service.waiting_writes == 0)
        answer = await client.admit()
        assert (answer.status_code, answer.json()["seq"]) == (200, 1)
        assert await refusals(client) == {"log-slow": 1}


async def test_a_read_is_answered_although_the_log_is_slow(
    log_path: Path, anyio_backend: str
) -> None:
    log = SlowLog(log_path)
    async with running(log_path, log=log) as client:
        log.read.clear()
        with deadlines(client, read_deadline_seconds=0.01):
            assert_refused(await client.risk(), "deadline-exceeded")
            assert_refused(await client.http.get("/episodes/e"), "deadline-exceeded")
        log.read.set()
        assert (await client.risk()).status_code == 404
        assert await refusals(client) == {"deadline-exceeded": 2}


POST = b"POST /episodes/e/observations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
"""With a body that is still to come."""


async def test_a_body_that_does_not_come_is_not_waited_for(
    log_path: Path, anyio_backend: str
) -> None:
    async with running(log_path) as client, listening(client.app) as port:
        with deadlines(client, write_deadline_seconds=0.01):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(POST + b"Content-Length: 99\r\n\r\n{")
            answer = await asyncio.wait_for(reader.read(), 60)  # until the connection is closed
            writer.close()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"/problems/body-timeout" in answer


async def test_a_client_that_leaves_within_its_body_is_no_fault(
    log_path: Path, anyio_backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(log_path) as client, listening(client.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(POST + b"Expect: 100-continue\r\nContent-Length: 99\r\n\r\n{")
        await reader.readline()  # the body is being read
        writer.close()
        metrics = ""
        while 'method="POST"' not in metrics:
            await asyncio.sleep(0.001)
            metrics = (await client.http.get("/metrics")).text
        assert 'method="POST",route="/episodes/{episode_id}/observations",status="499"' in metrics
    assert not [record for record in caplog.records if record.name.startswith("service")]


async def test_an_overloaded_engine_is_counted(client: Client) -> None:
    client.engine.full = True
    await client.post(admitted_at=stamp(0), observations=[hr()])
    assert_refused(await client.risk(), "overloaded")
    assert await refusals(client) == {"overloaded": 1}


async def test_load_is_no_reason_to_take_a_replica_away(client: Client) -> None:
    """Whoever took it away would move its load to the others, which would follow."""
    client.engine.full = True
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/llm4ehr/ready"):
        assert (await client.http.get(path)).status_code == 200
    summary = (await client.http.get("/operator/summary")).json()
    assert summary["service"]["ready"] is True


async def test_a_service_that_drains_says_so(client: Client) -> None:
    await client.post(admitted_at=stamp(0), observations=[hr()])
    ready = await client.http.get("/v2/health/ready")
    assert (ready.status_code, ready.headers.get("connection")) == (200, None)
    client.app.state.context.lifecycle.draining = True
    ready = await client.http.get("/v2/health/ready")
    assert (ready.status_code, ready.json()) == (503, {"error": "draining"})
    assert (await client.http.get("/v2/health/live")).status_code == 200
    risk = await client.risk()
    assert (risk.status_code, risk.headers["connection"]) == (200, "close")
    assert (await client.post(observations=[hr(90)])).status_code == 200
