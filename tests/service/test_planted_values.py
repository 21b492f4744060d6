"""Nothing of a patient and no secret comes out where it does not belong, whatever goes wrong."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service import logs
from service.access.authenticator import Credentials, Unauthenticated
from service.access.principal import Principal, Scope
from service.core import Draft, Entry, ModelFault
from service.log import LogCorrupt, LogUnavailable, SqliteLog
from service.tracing_otel import OtelTracing
from service.trail.record import AuditRecord
from tests.planted import (
    EPISODE,
    KEY,
    NUMBER,
    TEXT,
    Ask,
    admission,
    bad,
    error_text,
    found_in,
    good,
)
from tests.service.fakes import T0, at
from tests.service.shelf import House, housed

pytestmark = pytest.mark.anyio


class Guard:
    """Knows one client by its key."""

    key: str | None = f"Bearer {KEY}"

    def address(self, credentials: Credentials) -> str:
        return credentials.peer

    async def recognise(self, credentials: Credentials) -> Principal:
        if credentials.authorization != self.key:
            raise Unauthenticated("the key is not known")
        return Principal(id="ward-7", method="api-key", scopes=frozenset(Scope))


class FailingLog(SqliteLog):
    """A log whose errors tell what they should not."""

    error: Exception | None = None

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error

    async def append(
        self,
        episode_id: str,
        drafts: Sequence[Draft],
        recorded_at: datetime,
        expected_seq: int | None,
        record: AuditRecord | None = None,
    ) -> list[Entry]:
        self._fail()
        return await super().append(episode_id, drafts, recorded_at, expected_seq, record)

    async def entries(self, episode_id: str, after_seq: int = 0) -> list[Entry]:
        self._fail()
        return await super().entries(episode_id, after_seq)

    async def record(self, records: Sequence[AuditRecord]) -> None:
        self._fail()
        await super().record(records)


class Scene:
    """The service on a log that may fail, and everything that it writes."""

    house: House

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = FailingLog(folder / "log.sqlite")
        self.spans = InMemorySpanExporter()
        self.written = io.StringIO()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.spans))
        self.tracing = OtelTracing(provider)
        self.statuses: set[int] = set()

    async def ask(self, asks: Iterable[Ask]) -> None:
        """Send all; no error may tell anything."""
        for ask in asks:
            headers = {"Authorization": f"Bearer {KEY}"} | dict(ask.headers)
            answer: httpx.Response = await self.house.http.request(
                ask.method, ask.url, headers=headers, content=ask.body
            )
            self.statuses.add(answer.status_code)
            if answer.status_code >= 400:
                told = f"{answer.headers!r} {error_text(answer.text)}"
                assert not found_in(told), (ask.method, ask.url[:80], answer.status_code, told)

    async def look(self) -> None:
        """Search everything that was written."""
        for path in ("/metrics", "/operator/summary", "/models"):
            answer = await self.house.http.get(path, headers={"Authorization": f"Bearer {KEY}"})
            assert answer.status_code == 200
            assert not found_in(answer.text), path
        assert self.spans.get_finished_spans()
        for span in self.spans.get_finished_spans():
            assert not found_in(span.to_json())
        lines = self.written.getvalue().splitlines()
        assert any("service.requests" in line for line in lines)
        assert [line for line in lines if found_in(line)] == []
        for file in self.folder.iterdir():
            if not file.name.startswith("log.sqlite"):
                assert not found_in(file.read_bytes().decode("latin-1")), file


@pytest.fixture
def both_formats() -> Iterator[io.StringIO]:
    """What the log holds, in both formats; the lines of the client in this process left out."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers = []
    for formatter in (logs._Text(), logs._Json()):
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        handler.addFilter(lambda record: not record.name.startswith("http"))
        handlers.append(handler)
        root.addHandler(handler)
    level = root.level
    root.setLevel(logging.INFO)
    yield stream
    root.setLevel(level)
    for handler in handlers:
        root.removeHandler(handler)


@pytest.fixture
async def scene(
    tmp_path: Path, both_formats: io.StringIO, anyio_backend: str
) -> AsyncIterator[Scene]:
    scene = Scene(tmp_path)
    scene.written = both_formats
    async with housed(
        tmp_path / "log.sqlite",
        log=scene.log,
        tracing=scene.tracing,
        authenticator=Guard(),
        requests_per_second_per_client=None,
    ) as house:
        scene.house = house
        house.clock.now = at(1)
        yield scene


async def test_good_and_bad_requests_to_every_route(scene: Scene) -> None:
    await scene.ask(good(T0))
    await scene.ask(bad(T0))
    await scene.ask([Ask(method="DELETE", path=f"/episodes/{EPISODE}")])
    await scene.ask(good(T0, tag="-again"))
    await scene.look()
    assert {200, 201, 204, 400, 401, 404, 405, 409, 410, 413, 415, 422} <= scene.statuses
    # Nothing was left out: every operation of the interface was asked.
    text = (await scene.house.http.get("/metrics", headers={"Authorization": f"Bearer {KEY}"})).text
    paths: dict[str, Any] = scene.house.app.openapi()["paths"]
    for path, operations in paths.items():
        for method in operations:
            label = f'method="{method.upper()}",route="{path}"'
            assert f"llm4ehr_http_request_duration_seconds_count{{{label}" in text, label


SECRET = f"failed on {TEXT} of {EPISODE}, {KEY}"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (LogUnavailable(SECRET), 503),
        (LogCorrupt(SECRET), 500),
        (RuntimeError(SECRET), 500),
        (ValueError(SECRET), 500),
    ],
)
async def test_a_log_that_fails(scene: Scene, error: Exception, status: int) -> None:
    await scene.ask(good(T0))
    scene.log.error = error
    await scene.ask(good(T0, f"{TEXT}-other"))
    await scene.ask(good(T0, tag="-again"))
    await scene.ask(bad(T0))
    assert status in scene.statuses
    scene.log.error = None
    await scene.look()


@pytest.mark.parametrize("how", ["broken", "dead", "full", "fault", "held"])
async def test_an_engine_that_fails(scene: Scene, how: str) -> None:
    await scene.ask(good(T0))
    engine = scene.house.engine
    engine.secret = SECRET
    if how == "fault":
        engine.fault = ModelFault(SECRET)
    else:
        setattr(engine, how, True)
    asks = [*good(T0, tag="-again"), *good(T0, f"{TEXT}-other")]
    if how == "held":  # a deadline that the client asks for
        wait = {"Prefer": "wait=0"}
        asks = [Ask(method=a.method, path=a.path, query=a.query, body=a.body,
                    headers=dict(a.headers) | wait) for a in asks]  # fmt: skip
    await scene.ask(asks)
    assert scene.statuses & {500, 503}
    await scene.look()


async def test_a_model_that_cannot_be_loaded(scene: Scene) -> None:
    scene.house.shelf.fault = RuntimeError(SECRET)
    await scene.ask(good(T0))
    await scene.ask([Ask(method="POST", path="/models/llm4ehr/versions/2/load")])
    async with asyncio.timeout(60):
        while True:
            answer = await scene.house.http.get(
                "/models/llm4ehr/versions/2", headers={"Authorization": f"Bearer {KEY}"}
            )
            if answer.json()["state"] == "failed":
                break
            await asyncio.sleep(0.001)
    assert not found_in(answer.text)
    await scene.look()


async def test_marks_are_found_where_they_are(scene: Scene) -> None:
    """The search itself: what may show them does."""
    await scene.ask(good(T0))
    shown = await scene.house.http.get(
        f"/episodes/{EPISODE}", headers={"Authorization": f"Bearer {KEY}"}
    )
    assert TEXT in found_in(shown.text)
    assert "47114711" in found_in(f"61.{NUMBER}")
    assert any(mark.endswith(".471147") for mark in found_in(shown.text))
    assert found_in(str(admission(T0)))
    assert not found_in("0.4711 2026-03-01T08:00:00.471Z marked")
