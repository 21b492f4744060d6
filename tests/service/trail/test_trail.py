"""What the audit trail says of every kind of request, read back from the log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import apsw
import httpx
import pytest

from service.access.authenticator import Credentials
from service.access.principal import Principal, Scope
from service.api.trail import UNRECORDED
from service.log import SqliteLog
from service.log.base import LogUnavailable
from service.log.rows import from_audit_row
from service.trail.record import AuditRecord
from tests.service.fakes import Client, hr, running, stamp
from tests.service.shelf import housed

pytestmark = pytest.mark.anyio


class Ward:
    """Knows one client, with the scopes it has."""

    def __init__(self, *scopes: Scope) -> None:
        self.principal = Principal(id="ward-7", method="api-key", scopes=frozenset(scopes))

    def address(self, credentials: Credentials) -> str:
        return credentials.peer

    async def recognise(self, credentials: Credentials) -> Principal:
        return self.principal


def lines(path: Path) -> list[AuditRecord]:
    """The trail, in the order in which it was written; of one writer."""
    with apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY) as db:
        return [from_audit_row(row) for row in db.execute("SELECT * FROM audit ORDER BY seq")]


def short(records: Sequence[AuditRecord]) -> list[tuple[str, str, str, tuple[str, ...]]]:
    return [(r.operation, r.action, r.outcome, r.episodes) for r in records]


@pytest.fixture
async def ward(log_path: Path, anyio_backend: str) -> AsyncIterator[Client]:
    async with running(
        log_path, authenticator=Ward(Scope.INGEST, Scope.DELETE, Scope.READ)
    ) as client:
        yield client


async def test_a_line_says_who_what_when_and_what_came_of_it(ward: Client, log_path: Path) -> None:
    await ward.http.get("/episodes/e", headers={"x-request-id": "r-1"})
    assert lines(log_path) == [
        AuditRecord(
            at_us=int(ward.clock.now.timestamp() * 1e6),
            principal="ward-7",
            method="api-key",
            operation="getEpisode",
            action="read",
            episodes=("e",),
            outcome="refused",
            request_id="r-1",
            address="127.0.0.1",
        )
    ]


async def test_every_request_about_a_stay_has_one_line(ward: Client, log_path: Path) -> None:
    http = ward.http
    body = {"admitted_at": stamp(0), "observations": [hr(id="a")]}
    await ward.post("e", **body)
    await ward.post("e", **body)  # known already: nothing is written but the line
    await ward.admit("other")
    await http.patch("/episodes/e", json={"discharged_at": stamp(0.9)})
    risk = await ward.risk()
    again = await http.get("/episodes/e/risk", headers={"if-none-match": risk.headers["etag"]})
    assert again.status_code == 304
    await http.get("/episodes", params={"sort": "episode_id"})
    await http.get("/episodes", params={"sort": "episode_id", "limit": 1})
    await http.get("/episodes/unknown/embeddings")
    await http.put("/episodes/e", json={"unknown": 1})
    await http.delete("/episodes/other")
    await http.delete("/episodes/unknown")
    assert short(lines(log_path)) == [
        ("postObservations", "create", "success", ("e",)),
        ("postObservations", "create", "success", ("e",)),
        ("putEpisode", "create", "success", ("other",)),
        ("patchEpisode", "update", "success", ("e",)),
        ("getRisk", "read", "success", ("e",)),
        ("getRisk", "read", "success", ("e",)),
        ("listEpisodes", "read", "success", ("e", "other")),
        ("listEpisodes", "read", "success", ("e",)),
        ("getEmbeddings", "read", "refused", ("unknown",)),
        ("putEpisode", "update", "refused", ("e",)),
        ("deleteEpisode", "delete", "success", ("other",)),
        ("deleteEpisode", "delete", "refused", ("unknown",)),
    ]


async def test_failures_are_told_as_such(ward: Client, log_path: Path) -> None:
    await ward.post("e", admitted_at=stamp(0), observations=[hr(), hr(81)])
    ward.engine.broken = True
    assert (await ward.risk(as_of=2)).status_code == 500
    ward.engine.dead = True
    assert (await ward.http.get("/episodes/e/embeddings?as_of=2")).status_code == 500
    assert [r.outcome for r in lines(log_path)] == ["success", "failed", "failed"]


async def test_what_a_client_is_not_allowed_is_in_the_trail(ward: Client, log_path: Path) -> None:
    for path in ("/metrics", "/operator/summary"):
        assert (await ward.http.get(path)).status_code == 403
    assert (await ward.http.post("/models/llm4ehr/versions/2/load")).status_code == 403
    assert short(lines(log_path)) == [
        ("/metrics", "read", "refused", ()),
        ("getOperatorSummary", "read", "refused", ()),
        ("loadModel", "execute", "refused", ()),
    ]


async def test_no_id_that_is_none_is_kept(ward: Client, log_path: Path) -> None:
    assert (await ward.http.get("/episodes/a%00b/risk")).status_code == 422
    assert (await ward.http.get("/episodes/" + "x" * 129)).status_code == 422
    assert [r.episodes for r in lines(log_path)] == [(), ()]


async def test_switching_models_is_in_the_trail(log_path: Path) -> None:
    async with housed(log_path) as house:
        await house.ready(2)
        await house.control(2, "activate")
        await house.http.put("/models/shadow", json={"model": "llm4ehr/1"})
        await house.http.delete("/models/shadow")
        found = short(lines(log_path))
    assert [line for line in found if line[1] == "execute"] == [
        ("loadModel", "execute", "success", ()),
        ("activateModel", "execute", "success", ()),
        ("putShadow", "execute", "success", ()),
        ("deleteShadow", "execute", "success", ()),
    ]
    assert {line[0] for line in found if line[1] == "read"} == {"getModelState"}


async def test_health_metrics_and_metadata_leave_no_line(client: Client, log_path: Path) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/v2", "/v2/models/llm4ehr", "/metrics",
                 "/v2/models/llm4ehr/ready", "/operator/summary", "/openapi.json"):  # fmt: skip
        assert (await client.http.get(path)).status_code == 200
    await client.http.get("/nowhere")
    assert lines(log_path) == []


def test_what_leaves_no_line_is_there(client: Client) -> None:
    paths = client.app.openapi()["paths"].values()
    operations = {operation["operationId"] for path in paths for operation in path.values()}
    assert operations | {"/metrics"} >= UNRECORDED


class Away(SqliteLog):
    """A log that takes no line of the trail for a while."""

    away = True

    async def record(self, records: Sequence[AuditRecord]) -> None:
        if self.away:
            raise LogUnavailable("away")
        await super().record(records)


async def test_reads_go_on_while_the_trail_cannot_be_written(log_path: Path) -> None:
    log = Away(log_path)
    async with running(log_path, log=log) as client:
        await client.post("e", admitted_at=stamp(0), observations=[hr()])
        answers: list[httpx.Response] = [await client.risk() for _ in range(3)]
        assert [a.status_code for a in answers] == [200, 200, 200]
        assert len(lines(log_path)) == 1
        log.away = False
        async with asyncio.timeout(60):
            while len(lines(log_path)) < 4:  # noqa: ASYNC110 - the log tells nobody
                await asyncio.sleep(0.01)
    assert {r.request_id for r in lines(log_path)[1:]} == {
        a.headers["x-request-id"] for a in answers
    }
