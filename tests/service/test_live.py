"""The catch-up: newest activity first, so many at a time, and whoever asks comes before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.core import Draft, EngineStopped, Overloaded
from service.live import LiveScores
from service.log import SqliteLog
from service.memory import Memory
from service.settings import Settings
from tests.service.fakes import BUNDLE, FakeEngine, at, hr, running, stamp

pytestmark = pytest.mark.anyio

ROWS = 3
"""As many stays are asked for at a time."""


async def wrote(log: SqliteLog, episode: str, hours: float) -> None:
    """A stay with one heart rate, recorded at that hour."""
    drafts = [
        Draft(kind="admission", payload={"admitted_at": stamp(0), "statics": {}}),
        Draft(
            kind="observation",
            item_id=f"{episode}-1",
            effective_at=at(0.5),
            payload={"variable": "hr", "value": 80.0, "priority": 0, "content": f"{episode}-1"},
        ),
    ]
    await log.append(episode, drafts, at(hours), 0)


class Ward:
    """The scores of one model on a log of eight stays, `s7` the last that was written to."""

    def __init__(self, log: SqliteLog, engine: FakeEngine) -> None:
        self.log, self.engine = log, engine
        self.memory = Memory(log, 1000)
        self.published: list[float] = []
        self.live = self.scores(engine)

    def scores(self, engine: FakeEngine, **options: Any) -> LiveScores:
        return LiveScores(
            engine=engine,
            settings=Settings(engine_rows=ROWS),
            load=self.memory.load,
            log=self.log,
            on_published=self.published.append,
            **options,
        )

    def asked(self) -> list[str]:
        return [episode for episode, _, _ in self.engine.submitted]


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0.001)


@pytest.fixture
async def ward(log_path: Path, anyio_backend: str) -> AsyncIterator[Ward]:
    log = SqliteLog(log_path)
    for i in range(8):
        await wrote(log, f"s{i}", 1 + i)
    engine = FakeEngine()
    engine.held = True
    ward = Ward(log, engine)
    ward.live.start()
    await settle()
    yield ward
    await ward.live.stop()
    await log.close()


async def test_so_many_stays_at_a_time_newest_first(ward: Ward) -> None:
    assert ward.asked() == ["s7", "s6", "s5"]
    # The list of stays does not wait for their scores.
    assert ward.live.complete
    assert len(list(ward.live.summaries)) == 8
    assert not ward.live.catch_up.warm.is_set()
    ward.engine.release()
    await settle()
    assert ward.asked() == ["s7", "s6", "s5", "s4", "s3", "s2"]
    while ward.engine.waiting:
        ward.engine.release()
        await settle()
    assert ward.asked() == [f"s{i}" for i in range(7, -1, -1)]
    assert (ward.live.catch_up.n_scored, ward.live.catch_up.to_score) == (8, 8)
    await asyncio.wait_for(ward.live.catch_up.warm.wait(), 60)
    assert ward.published == []  # nobody waited for them


async def test_a_write_is_asked_for_at_once_whatever_waits(ward: Ward) -> None:
    state = await ward.memory.load("s0")
    assert state is not None
    ward.live.changed(state)
    assert ward.asked()[-1] == "s0"
    while ward.engine.waiting:
        ward.engine.release()
        await settle()
    assert ward.asked().count("s0") == 1  # the catch-up finds it scored
    assert len(ward.published) == 1


async def test_a_model_behind_another_reads_no_log_and_waits_its_turn(ward: Ward) -> None:
    second = FakeEngine(replace(BUNDLE, digest="b" * 64))
    second.held = True
    behind = ward.scores(second, leads=False)
    behind.start(after=ward.live)
    await settle()
    assert len(list(behind.summaries)) == 8
    assert [s[0] for s in second.submitted] == ["s7", "s6", "s5"]
    state = await ward.memory.load("s0")
    assert state is not None
    behind.changed(state)
    await settle()
    assert len(second.submitted) == ROWS  # no more at a time
    while second.waiting:
        second.release()
        await settle()
    assert len(second.submitted) == 8
    assert list(state.scored) == ["b" * 64]  # the other engine holds its own back
    await behind.stop()


async def test_an_engine_without_room_is_asked_again(ward: Ward) -> None:
    ward.engine.full = True
    ward.engine.release()
    await settle()
    asked = len(ward.asked())
    ward.engine.full = False
    async with asyncio.timeout(60):
        while not ward.live.catch_up.warm.is_set():
            ward.engine.release()
            await asyncio.sleep(0.01)
    assert len(ward.asked()) == 8 > asked


async def test_what_came_too_fast_is_caught_up_with(log_path: Path) -> None:
    async with running(log_path, engine_rows=2) as client:
        client.engine.full = True
        for i in range(6):
            await client.post(f"e{i}", admitted_at=stamp(0), observations=[hr(80)])
        assert client.engine.submitted == []
        client.engine.full = False
        for _ in range(40):  # it asks again after a moment
            await client.settle()
        rows = (await client.http.get("/episodes")).json()["episodes"]
        assert {row["scored_seq"] for row in rows} == {2}
        text = (await client.http.get("/metrics")).text
        assert "llm4ehr_score_published_seconds_count 6.0" in text  # the longest waits of all
        await client.post("e0", observations=[hr(90, hours=0.6)])
        await client.settle()
        text = (await client.http.get("/metrics")).text
        assert "llm4ehr_score_published_seconds_count 7.0" in text


async def test_a_write_counts_from_the_oldest_that_has_no_scores(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("service.live.time.perf_counter", lambda: now)
    state = await ward.memory.load("s0")
    assert state is not None
    ward.engine.full = True
    ward.live.changed(state)
    now = 105.0
    ward.live.changed(state)
    now, ward.engine.full = 107.0, False
    ward.live.changed(state)
    now = 110.0
    ward.engine.release()
    await settle()
    assert ward.published == [10.0]
    ward.live.changed(state)
    now = 111.0
    ward.engine.release()
    await settle()
    assert ward.published == [10.0, 1.0]


async def test_a_reader_waits_for_what_a_full_engine_has_under_way(ward: Ward) -> None:
    state = await ward.memory.load("s7")
    assert state is not None
    ward.engine.full = True
    with pytest.raises(Overloaded):
        await ward.live.newest(state, state.view.head_hour + 2)  # not under way
    reader = asyncio.create_task(ward.live.newest(state, 1))
    await settle()
    assert not reader.done()
    ward.engine.release()
    assert (await asyncio.wait_for(reader, 60)).view.seq == state.seq


async def test_a_reader_of_a_stay_that_is_deleted_meanwhile_is_told_so(
    log_path: Path, caplog: pytest.LogCaptureFixture, anyio_backend: str
) -> None:
    class Forgetting(FakeEngine):
        """Fails what waits for a stay that is forgotten, as the engine does."""

        def forget(self, episode_id: str) -> None:
            super().forget(episode_id)
            for _, _, future in [w for w in self.waiting if w[0].episode_id == episode_id]:
                future.set_exception(EngineStopped("the episode was dropped"))

    async with running(log_path, engine=Forgetting()) as client:
        client.engine.held = True
        await client.post(admitted_at=stamp(0), observations=[hr()])
        reader = asyncio.create_task(client.risk())
        await client.settle()
        assert (await client.http.delete("/episodes/e")).status_code == 204
        answer = await asyncio.wait_for(reader, 60)
        assert answer.status_code == 410
        assert answer.json()["type"] == "/problems/episode-deleted"
        assert not [r for r in caplog.records if r.name.startswith("service")]


async def test_the_scores_that_are_kept_are_bounded(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.live._MAX_KEPT", 2)
    while ward.engine.waiting:
        ward.engine.release()
        await settle()
    states = [await ward.memory.load(f"s{i}") for i in range(8)]
    assert [len(state.scored) for state in states if state] == [1, 1, 0, 0, 0, 0, 0, 0]
    rows = sorted(ward.live.summaries, key=lambda s: s.episode_id)
    assert [row.scored_seq for row in rows] == [2] * 8  # the list shows them all the same
    await ward.live.stop()
    assert [len(state.scored) for state in states if state] == [0] * 8
