"""The service finds out when it serves other numbers than the log gives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import apsw
import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from llm4ehr.bundle import Bundle, Network
from service.access.authenticator import Anyone
from service.api import Dependencies, create_app
from service.audit import Auditor
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.log import SqliteLog
from service.settings import Settings
from tests.online import ROWS, engine_of, model_of, tiny_bundle
from tests.service.fakes import Client, Clock, at, creatinine, hr, running, stamp

pytestmark = pytest.mark.anyio


@pytest.fixture
def bundle(tiny_network: Callable[..., Network]) -> Bundle:
    return tiny_bundle(tiny_network)


class Audited:
    """The app on a real engine; audits happen when they are asked for."""

    def __init__(self, client: Client, backend: TorchCpuBackend) -> None:
        self.client, self.backend = client, backend
        context = client.app.state.context
        self.context, self.memory = context, context.service._memory
        self.registry = CollectorRegistry()
        self.auditor = Auditor(
            context.models, context.log, self.memory, self.registry,
            interval_s=None, random=Random(0),
        )  # fmt: skip

    async def state(self) -> Any:
        return await self.memory.load("e")

    def counts(self) -> tuple[float | None, float | None]:
        return (
            self.registry.get_sample_value("llm4ehr_replay_audits_total"),
            self.registry.get_sample_value("llm4ehr_replay_mismatch_total"),
        )

    async def risk(self) -> dict[str, Any]:
        answer = await self.client.http.get("/episodes/e/risk", params={"from": 0})
        body: dict[str, Any] = answer.json()
        return body


@pytest.fixture
async def audited(bundle: Bundle, log_path: Path, anyio_backend: str) -> AsyncIterator[Audited]:
    backend = TorchCpuBackend(bundle.network, n_slots=4, max_rows=ROWS)
    engine, clock, log = engine_of(bundle, backend=backend), Clock(at(8)), SqliteLog(log_path)
    app = create_app(
        Settings(log_path=log_path, audit_interval_seconds=None),
        Dependencies(log=log, authenticator=Anyone(), model=model_of(bundle, engine), clock=clock),
    )
    engine.start()
    try:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://t") as http,
        ):
            client = Client(http, engine, clock, log, app)  # type: ignore[arg-type]
            items = [hr(70 + h, hours=h + 0.5) for h in range(6)]
            await client.post(
                admitted_at=stamp(0), observations=items, events=[creatinine(1.2, hours=2.5)]
            )
            yield Audited(client, backend)
    finally:
        engine.close()


async def test_what_is_right_is_found_to_be_right(audited: Audited) -> None:
    assert await audited.auditor.audit() in ("equal", "skipped")  # it may not be scored yet
    before = await audited.risk()
    for _ in range(3):
        assert await audited.auditor.audit() == "equal"
    assert audited.counts()[1] == 0
    assert await audited.risk() == before
    # An audit leaves nothing behind.
    assert audited.context.engine.status().stays == 1


@pytest.mark.parametrize("part", ["score", "embedding"])
async def test_a_corrupted_score_is_found_and_mended(
    audited: Audited, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = await audited.risk()
    state = await audited.state()
    [(digest, scored)] = state.scored.items()
    if part == "score":
        hours = (*scored.scores.hours[:2], replace(scored.scores.hours[2], mortality=0.5))
        wrong = replace(scored.scores, hours=hours + scored.scores.hours[3:])
    else:
        embeddings = scored.scores.embeddings.copy()
        embeddings[2, 0] = np.nextafter(embeddings[2, 0], np.float32(9))
        wrong = replace(scored.scores, embeddings=embeddings)
    state.scored[digest] = replace(scored, scores=wrong)
    if part == "score":
        assert await audited.risk() != before
    with caplog.at_level(logging.CRITICAL):
        assert await audited.auditor.audit() == "different"
    assert audited.counts() == (1, 1)
    [record] = caplog.records
    assert "'e'" not in record.getMessage()
    assert await audited.risk() == before
    assert await audited.auditor.audit() == "equal"
    [row] = (await audited.client.http.get("/episodes")).json()["episodes"]
    assert (row["mortality"], row["scored_seq"]) == (before["hours"][-1]["mortality"], 8)


async def test_a_corrupted_slot_is_found_and_mended(audited: Audited) -> None:
    await audited.risk()
    assert await audited.auditor.audit() == "equal"
    config = audited.backend.config
    series = np.full((1, config.n_series), 3.0, np.float32)
    events = np.zeros((1, config.n_event_channels), np.float32)
    for slot in range(audited.backend.n_slots):
        audited.backend.tick(series, events, [slot], [2])  # another hour 2 than that of the stay
    await audited.client.post(observations=[hr(99, hours=6.5)])
    wrong = await audited.risk()
    assert await audited.auditor.audit() == "different"
    mended = await audited.risk()
    assert mended["seq"] == wrong["seq"]
    assert mended["hours"][-1] != wrong["hours"][-1]
    assert mended["hours"][:-1] == wrong["hours"][:-1]
    assert await audited.auditor.audit() == "equal"
    assert audited.counts()[1] == 1


async def test_a_stay_that_was_changed_in_the_log_is_found(
    audited: Audited, log_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await audited.risk()
    db = apsw.Connection(str(log_path))
    db.execute("DROP TRIGGER log_is_never_updated")
    db.execute("UPDATE log SET payload = replace(payload, '70', '71')")
    db.close()
    with caplog.at_level(logging.CRITICAL):
        assert await audited.auditor.audit() == "corrupt"
    assert audited.registry.get_sample_value("llm4ehr_log_corrupt_total") == 1
    [record] = caplog.records
    assert "'e'" not in record.getMessage()


async def test_a_stay_that_has_changed_meanwhile_is_skipped(audited: Audited) -> None:
    await audited.risk()
    log, read = audited.context.log, audited.context.log.entries

    async def entries(episode_id: str, after_seq: int = 0) -> Any:
        await audited.client.post(observations=[hr(99, hours=6.5)])
        return await read(episode_id, after_seq)

    log.entries = entries
    assert await audited.auditor.audit() == "skipped"
    assert audited.counts() == (0, 0)


async def test_nothing_is_audited_without_scores_or_while_the_engine_works(
    log_path: Path,
) -> None:
    slept: list[float] = []
    enough = asyncio.Event()
    async with running(log_path, audit_interval_seconds=None) as client:
        context = client.app.state.context

        async def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) > 3:
                enough.set()
                await asyncio.Event().wait()

        registry = CollectorRegistry()
        auditor = Auditor(
            context.models, context.log, context.service._memory, registry,
            interval_s=7.0, random=Random(0), sleep=sleep,
        )  # fmt: skip
        assert await auditor.audit() == "skipped"
        await client.post(admitted_at=stamp(0), observations=[hr(80)])
        await client.risk()
        client.engine.held = True
        await client.post("other", admitted_at=stamp(0), observations=[hr(80)])
        assert await auditor.audit() == "skipped"
        client.engine.held = False
        client.engine.release()
        await client.settle()
        auditor.start()
        await asyncio.wait_for(enough.wait(), 60)
        await auditor.stop()
        assert slept == [7.0] * 4
        audits = registry.get_sample_value("llm4ehr_replay_audits_total")
        assert audits == len(client.engine.past) == 3
