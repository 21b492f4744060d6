"""Reading scores while the engine is busy, overtaken, full or broken, and after a restart."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from service.core import EpisodeView, Scores
from tests.service.fakes import (
    Client,
    FakeEngine,
    hr,
    running,
    stamp,
    three_hours,
)

pytestmark = pytest.mark.anyio


class Short(FakeEngine):
    """Gives fewer hours than it is asked for."""

    def _ask(self, view: EpisodeView, n: int) -> asyncio.Future[Scores]:
        return super()._ask(view, n - 1)


async def test_an_engine_that_gives_too_little_is_not_asked_for_ever(
    log_path: Path, anyio_backend: str
) -> None:
    async with running(log_path, engine=Short()) as client:
        await client.post(admitted_at=stamp(0), observations=[hr(hours=0.25), hr(hours=0.5)])
        answer = await client.risk(as_of=2)
        assert answer.status_code == 503
        assert answer.json()["type"] == "/problems/overloaded"
        assert len(client.engine.past) == 20


async def test_what_fails_in_the_background_is_logged_without_what_it_says(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "patient " + "0815"

    def fail() -> None:
        raise ValueError(secret)

    asyncio.get_running_loop().call_soon(fail)
    await client.settle()
    [record] = [r for r in caplog.records if r.levelname == "ERROR"]
    assert "ValueError" in record.getMessage()
    assert "0815" not in caplog.text


async def test_repeated_reads_ask_the_engine_once(client: Client) -> None:
    await three_hours(client)
    await client.risk()
    asked = len(client.engine.submitted)
    bodies = [(await client.risk(to=3)).text for _ in range(5)]
    assert len(set(bodies)) == 1
    assert len(client.engine.submitted) == asked


async def test_reads_at_once_share_one_computation(client: Client) -> None:
    client.engine.held = True
    await client.post(admitted_at=stamp(0), observations=[hr()])
    reads = [asyncio.create_task(client.risk()) for _ in range(10)]
    await client.settle()
    assert len(client.engine.submitted) == 1
    assert not any(read.done() for read in reads)
    client.engine.release()
    assert {(await read).text for read in reads} == {(await client.risk()).text}


async def test_a_write_does_not_wait_for_the_model(client: Client) -> None:
    client.engine.held = True
    response = await client.post(admitted_at=stamp(0), observations=[hr()])
    assert response.status_code == 200


async def test_a_read_overtaken_by_a_write_answers_from_one_state_of_the_log(
    client: Client,
) -> None:
    client.engine.held = True
    await client.post(admitted_at=stamp(0), observations=[hr(60)])
    reading = asyncio.create_task(client.risk())
    await client.settle()
    client.clock.to(1.75)
    await client.post(observations=[hr(70, hours=1.5)])
    client.engine.release()  # both futures get the newer result
    await client.settle()
    client.engine.release()
    body = (await reading).json()
    assert body["seq"] == body["provenance"]["seq"] == 3
    assert [h["hour"] for h in body["hours"]] == [1]
    assert body["hours"][0]["decompensation"] == pytest.approx(130 / 1130)


async def test_a_cancelled_computation_is_asked_for_again(client: Client) -> None:
    client.engine.held = True
    await client.post(admitted_at=stamp(0), observations=[hr(60)])
    reading = asyncio.create_task(client.risk())
    await client.settle()
    client.engine.waiting.popleft()[2].cancel()
    await client.settle()
    assert len(client.engine.submitted) == 2
    client.engine.release()
    assert (await reading).status_code == 200


async def test_hours_beyond_the_data_survive_a_shorter_recomputation(client: Client) -> None:
    await three_hours(client)
    client.clock.to(5.5)
    assert (await client.risk(hour=5)).status_code == 200
    assert client.engine.submitted[-1][2] == 6
    assert (await client.risk()).status_code == 200
    assert (await client.risk(hour=5)).status_code == 200
    assert len(client.engine.submitted) == 4


async def test_an_overloaded_engine_costs_no_data(client: Client) -> None:
    await client.admit()
    client.engine.full = True
    assert (await client.post(observations=[hr(60)])).status_code == 200
    for response in (await client.risk(), await client.risk(hour=0, as_of=2)):
        assert (response.status_code, response.headers["retry-after"]) == (503, "2")
        assert response.json()["type"] == "/problems/overloaded"
    [row] = (await client.http.get("/episodes")).json()["episodes"]
    assert row["score_withheld"] == {"reason": "not-computed"}
    client.engine.full = False
    await asyncio.sleep(0.1)
    [row] = (await client.http.get("/episodes")).json()["episodes"]
    assert (row["scored_seq"], row["score_withheld"]) == (2, None)


async def test_data_is_taken_though_the_engine_is_dead(
    log_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(log_path) as client:
        await client.post(admitted_at=stamp(0), observations=[hr(60)])
        client.engine.dead = True
        response = await client.post(observations=[hr(70)])
        assert (response.status_code, response.json()["seq"]) == (200, 3)
        assert (await client.risk()).status_code == 500
    dead = FakeEngine()
    dead.dead = True
    async with running(log_path, engine=dead) as client:
        await client.settle()
        assert (await client.http.get("/episodes")).json()["complete"] is True
    assert "0815" not in caplog.text


async def test_a_failing_engine_is_an_error_without_its_text(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    client.engine.broken = True
    await client.post(admitted_at=stamp(0), observations=[hr(id="patient-0815")])
    response = await client.risk()
    assert (response.status_code, response.json()["type"]) == (500, "/problems/internal-error")
    for text in (response.text, caplog.text):
        assert "4711" not in text
        assert "0815" not in text
    assert "RuntimeError" in caplog.text
    client.engine.broken = False
    assert (await client.risk()).status_code == 200


async def test_after_a_restart_open_stays_are_scored_and_all_are_listed(log_path: Path) -> None:
    async with running(log_path) as client:
        for name, hours in (("old", 0.2), ("new", 0.8), ("gone", 0.5), ("left", 0.6)):
            client.clock.to(hours)
            await client.post(name, admitted_at=stamp(0), observations=[hr(hours=0.1)])
        await client.http.delete("/episodes/gone")
        await client.http.patch("/episodes/left", json={"discharged_at": stamp(0.6)})
    async with running(log_path) as client:
        await client.settle()
        assert [s[0] for s in client.engine.submitted] == ["new", "old"]
        body = (await client.http.get("/episodes?sort=episode_id")).json()
        assert body["complete"] is True
        assert [(r["episode_id"], r["scored_seq"]) for r in body["episodes"]] == [
            ("left", None),
            ("new", 2),
            ("old", 2),
        ]
        assert (await client.risk("left")).json()["hours"][0]["decompensation"] is not None
        rows = (await client.http.get("/episodes?sort=episode_id")).json()["episodes"]
        assert rows[0]["scored_seq"] == 3


async def test_memory_for_entries_is_bounded_and_forgetting_changes_nothing(
    log_path: Path,
) -> None:
    async with running(log_path, cached_entries=10) as client:
        for i in range(8):
            await client.post(
                f"e{i}", admitted_at=stamp(0), observations=[hr(60 + j) for j in range(4 + i)]
            )
        cache = client.app.state.context.service._memory._cache
        assert cache._total == sum(len(s.entries) for s in cache._states.values())
        assert len(cache._states) == 1  # the newest alone exceeds the bound
        answers = [(await client.risk(f"e{i}")).text for i in range(8)]
        assert [(await client.risk(f"e{i}")).text for i in range(8)] == answers
        assert (await client.post("e0", observations=[hr(60)])).json()["duplicates"] == 1
        assert len((await client.http.get("/episodes")).json()["episodes"]) == 8
