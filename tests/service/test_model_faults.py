"""Versions that fail, are slow, or are written past: what answers is not harmed, and it is told."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service.audit import Auditor
from service.core import ModelFault
from service.models.version import Name
from tests.service.fakes import FakeEngine, hr, stamp
from tests.service.shelf import House, housed
from tests.service.test_api_problems import assert_problem

pytestmark = pytest.mark.anyio

TWO = Name("llm4ehr", 2)


@pytest.fixture
async def house(log_path: Path, anyio_backend: str) -> AsyncIterator[House]:
    async with housed(log_path) as house:
        house.clock.to(4)
        yield house


async def admitted(house: House, *stays: str) -> None:
    for stay in stays:
        await house.post(stay, admitted_at=stamp(0), observations=[hr(80)])
    await house.settle()


async def rows(house: House) -> dict[str, tuple[Any, ...]]:
    """Newest hour, entry, entry of the score, and the score itself."""
    listed = (await house.http.get("/episodes")).json()["episodes"]
    fields = ("hour", "seq", "scored_seq", "remaining_los_hours")
    return {row["episode_id"]: tuple(row[f] for f in fields) for row in listed}


async def discharged(house: House, stay: str, hours: float) -> None:
    body = {"discharged_at": stamp(hours)}
    assert (await house.http.patch(f"/episodes/{stay}", json=body)).status_code == 200


async def test_a_version_that_gives_no_numbers_never_answers(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    await admitted(house, "a", "b")

    def faulty(engine: FakeEngine) -> None:
        engine.fault = ModelFault("not finite")

    house.shelf.prepare = faulty
    await house.control(2, "load")
    failed = await house.until(2, "failed")
    assert failed["failure"] == {"type": "model-fault", "detail": "2 stays could not be scored"}
    assert failed["progress"] is failed["digest"] is None
    assert_problem(await house.control(2, "activate"), "model-not-loaded")
    await house.settle()
    assert house.shelf.closed == [TWO]
    said = [r.getMessage() for r in caplog.records if "scoring failed" in r.getMessage()]
    assert said == ["scoring failed: ModelFault, model llm4ehr/2"]  # once, not for every stay
    house.shelf.prepare = lambda engine: None
    await house.ready(2)
    assert (await house.risk("a")).json()["provenance"]["version"] == "1"


async def test_an_engine_that_dies_while_it_rebuilds(house: House) -> None:
    await admitted(house, "a")
    house.shelf.prepare = lambda engine: setattr(engine, "held", True)
    await house.control(2, "load")
    await house.until(2, "rebuilding")
    bringing_up = house.app.state.context.models._versions[TWO].task
    house.shelf.engines[TWO].is_alive = False
    assert (await house.state(2))["failure"]["type"] == "engine-stopped"
    await asyncio.wait_for(bringing_up, 60)
    await house.settle()
    assert house.shelf.closed == [TWO]
    assert not house.app.state.context.models._closing
    house.shelf.prepare = lambda engine: None
    await house.ready(2)


async def test_what_is_written_during_a_rebuild_is_scored_before_the_version_is_ready(
    house: House,
) -> None:
    await admitted(house, "a")
    house.shelf.prepare = lambda engine: setattr(engine, "held", True)
    await house.control(2, "load")
    await house.until(2, "rebuilding")
    second = house.shelf.engines[TWO]
    await house.settle()
    await admitted(house, "b")
    await house.post("a", observations=[hr(90, hours=2.5)])
    assert (await house.state(2))["progress"] == {"scored": 0, "total": 1, "behind": 2, "failed": 0}
    second.release()
    await house.settle()
    assert {s[0] for s in second.submitted[1:]} == {"a", "b"}
    assert (await house.state(2))["state"] == "rebuilding"
    assert_problem(await house.control(2, "activate"), "model-not-ready")
    second.release()
    await house.until(2, "ready")
    second.full = True  # nothing can be asked any more
    assert (await house.control(2, "activate")).status_code == 200
    assert await rows(house) == {"a": (2, 3, 3, 98.0), "b": (0, 2, 2, 100.0)}


async def test_a_discharged_stay_that_is_written_to_is_scored_by_all_versions(
    house: House,
) -> None:
    await admitted(house, "a")
    await house.ready(2)
    await discharged(house, "a", 3)
    await house.settle()
    await house.post("a", observations=[hr(90, hours=2.5)])
    await house.settle()
    house.shelf.engines[TWO].full = True
    await house.control(2, "activate")
    assert await rows(house) == {"a": (2, 4, 4, 98.0)}


async def test_a_version_is_not_loaded_while_it_is_unloaded(house: House) -> None:
    await house.ready(2)
    with house.app.state.context.models.serving("2"):
        await house.control(2, "unload")
        refused = await house.control(2, "load")
        assert_problem(refused, "model-not-ready")
        assert (await house.state(2))["state"] == "unloading"
    await house.until(2, "available")
    await house.ready(2)


async def test_an_engine_that_cannot_be_closed_keeps_no_place(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.shelf.close_fault = RuntimeError("the secret 4711")
    await house.ready(2)
    await house.control(2, "unload")
    await house.until(2, "available")
    house.shelf.close_fault = None
    await house.ready(2)
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert said == ["model llm4ehr/2 was not closed in order: RuntimeError"]


async def test_background_work_is_no_part_of_the_request_that_began_it(house: House) -> None:
    trace = contextvars.ContextVar("trace", default="none")
    seen: list[str] = []
    house.shelf.prepare = lambda engine: seen.append(trace.get())
    trace.set("a request")
    await house.ready(2)
    assert seen == ["none"]


async def test_readiness_ends_with_the_catch_up(house: House) -> None:
    assert (await house.http.get("/v2/health/ready")).status_code == 200
    house.app.state.context.service.live.catch_up.cancel()
    await house.settle()
    assert (await house.http.get("/v2/health/ready")).status_code == 503
    summary = (await house.http.get("/operator/summary")).json()
    assert summary["service"]["ready"] is False


async def trial(house: House) -> dict[str, Any]:
    await house.settle()
    [found] = (await house.http.get("/models")).json()["trials"]
    keys = ("against", "compared", "dropped", "failed")
    return {key: found[key] for key in keys} | {"over": found["until"] is not None}


async def test_a_trial_counts_every_entry_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of discharged stays, those that only somebody's question had scored, and those
    that are scored again after what was kept is gone.
    """
    monkeypatch.setattr("service.live._MAX_KEPT", 1)
    await admitted(house, "a", "b", "c")
    await discharged(house, "c", 1)
    await house.ready(2)
    await house.http.put("/models/shadow", json={"model": "llm4ehr/2"})
    expected = {"against": "llm4ehr/1", "compared": 0, "dropped": 0, "failed": 0, "over": False}
    assert await trial(house) == expected
    for stay in "abc":
        await house.post(stay, observations=[hr(90, hours=0.7)])
        await house.settle()
    assert await trial(house) == expected | {"compared": 3}
    for stay in "abcabc":
        assert (await house.risk(stay)).status_code == 200
        await house.settle()
    assert await trial(house) == expected | {"compared": 3}
    house.shelf.engines[TWO].fault = ModelFault("not finite")
    for stay in "abc":
        await house.post(stay, observations=[hr(95, hours=0.8)])
        await house.settle()
    assert await trial(house) == expected | {"compared": 3, "failed": 3}
    metrics = (await house.http.get("/metrics")).text
    assert 'llm4ehr_shadow_failed_total{model="llm4ehr/2"} 3.0' in metrics
    # What was found outlasts the trial.
    await house.http.delete("/models/shadow")
    await house.post("a", observations=[hr(96, hours=0.9)])
    assert await trial(house) == expected | {"compared": 3, "failed": 3, "over": True}


async def test_what_somebody_asked_the_active_model_is_tried_too(log_path: Path) -> None:
    async with housed(log_path) as house:
        house.clock.to(4)
        await admitted(house, "a")
        await discharged(house, "a", 3)
        await house.settle()
    async with housed(log_path, clock=house.clock) as house:
        await house.settle()
        await house.ready(2)
        await house.http.put("/models/shadow", json={"model": "llm4ehr/2"})
        assert house.engine.submitted == house.shelf.engines[TWO].submitted == []
        await house.risk("a")
        assert (await trial(house))["compared"] == 1


async def test_a_dead_version_is_on_trial_no_more(house: House) -> None:
    engine = await house.ready(2)
    await house.http.put("/models/shadow", json={"model": "llm4ehr/2"})
    engine.is_alive = False
    assert (await house.http.get("/models")).json()["shadow"] is None


async def test_audits_take_the_versions_in_turn_and_drive_nothing_out(log_path: Path) -> None:
    async with housed(log_path, cached_entries=4) as house:
        await admitted(house, "a", "b", "c")
        second = await house.ready(2)
        context = house.app.state.context
        memory = context.service._memory
        auditor = Auditor(
            context.models, context.log, memory, CollectorRegistry(),
            interval_s=None, random=Random(0),
        )  # fmt: skip
        await house.risk("b", hour=0)
        await house.risk("b", hour=0, model_version="2")
        held = list(memory._cache._states)
        house.engine.past.clear()
        second.past.clear()
        assert [await auditor.audit() for _ in range(4)] == ["equal"] * 4
        assert (len(house.engine.past), len(second.past)) == (2, 2)
        assert list(memory._cache._states) == held


async def test_one_stay_that_cannot_be_read_holds_no_other_up(
    log_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with housed(log_path) as house:
        house.clock.to(4)
        await admitted(house, "a", "b", "c")
    async with housed(log_path, clock=house.clock) as house:
        # The service has begun to look, and waits for the log.
        read = house.log.entries

        async def entries(episode_id: str, after_seq: int = 0) -> Any:
            if episode_id == "b":
                raise ValueError("patient 0815")
            return await read(episode_id, after_seq)

        house.log.entries = entries  # type: ignore[method-assign]
        await house.settle()
        assert {s[0] for s in house.engine.submitted} == {"a", "c"}
        catch_up = house.app.state.context.service.live.catch_up
        assert (catch_up.n_unread, catch_up.ended, catch_up.warm.is_set()) == (1, False, True)
        assert (await house.http.get("/v2/health/ready")).status_code == 200
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert said == ["a stay cannot be caught up with: ValueError"]
