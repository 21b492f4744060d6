"""Versions side by side: each answer is that of the version it names, whatever is switched."""

from __future__ import annotations

import asyncio
import random
import shutil
import weakref
from pathlib import Path

import httpx
import pytest

from tests.service.models.house import House, serving

pytestmark = pytest.mark.anyio

STAYS = ("a", "b", "c", "d")


async def test_switches_under_load_mix_nothing_and_lose_nothing(house: House) -> None:
    answers: list[httpx.Response] = []
    posted: dict[str, int] = {}
    over = asyncio.Event()
    rng = random.Random(0)

    async def write(stay: str) -> None:
        for hour in range(14):
            response = await house.post(stay, hour + 0.5, 60.0 + 3 * hour)
            posted[stay] = response.json()["seq"]
            await asyncio.sleep(0.005)

    async def read() -> None:
        while not over.is_set():
            ask = rng.choice([house.risk, house.embeddings])
            answers.append(await ask(rng.choice(STAYS)))
            await asyncio.sleep(0)

    async def switch() -> None:
        await house.ready(2)
        for version in (2, 1, 2, 1, 2):
            assert (await house.control(version, "activate")).status_code == 200
            await asyncio.sleep(0.02)

    await asyncio.gather(*(house.post(stay, 0.25) for stay in STAYS))
    readers = [asyncio.create_task(read()) for _ in range(3)]
    await asyncio.gather(switch(), *(write(stay) for stay in STAYS))
    over.set()
    await asyncio.gather(*readers)
    versions = [await house.check(answer) for answer in answers]
    assert set(versions) == {1, 2}
    for stay in STAYS:
        # Two items a request, and the admission.
        assert posted[stay] == 2 * 15 + 1
        assert len(await house.app.state.context.log.entries(stay)) == posted[stay]
        assert await house.check(await house.risk(stay)) == 2


async def test_switching_there_and_back_changes_no_bit(house: House) -> None:
    for stay in STAYS:
        for hour in range(6):
            await house.post(stay, hour + 0.5, 70.0 + hour)

    async def everything() -> list[bytes]:
        answers = [await ask(stay) for stay in STAYS for ask in (house.risk, house.embeddings)]
        for answer in answers:
            await house.check(answer)
        return [answer.content for answer in answers]

    first = await everything()
    await house.ready(2)
    assert await everything() == first
    await house.control(2, "activate")
    second = await everything()
    assert all(a != b for a, b in zip(first, second, strict=True))
    await house.control(1, "activate")
    assert await everything() == first


async def test_a_request_is_answered_by_the_version_it_began_with(house: House) -> None:
    await house.post("a", 0.5)
    await house.ready(2)
    models = house.models
    with models.serving() as serving_1:
        models.activate(type(serving_1.version.name)("tiny", 2))
        await house.post("a", 1.5)
        former = models.unload(serving_1.version.name)
        state = await house.app.state.context.service._memory.load("a")
        scored = await serving_1.live.newest(state, 0)
        assert former.condition == "unloading"
        expected = await house.expected(1, "a", scored.view.seq)
        assert scored.scores.hours == expected.hours
    await house.until(1, "available")
    assert await house.check(await house.risk("a")) == 2


async def test_the_former_version_is_at_hand_until_it_is_unloaded(house: House) -> None:
    await house.post("a", 0.5)
    await house.ready(2)
    assert (await house.control(1, "unload")).json()["type"] == "/problems/model-active"
    await house.control(2, "activate")
    await house.post("a", 1.5)
    assert await house.check(await house.risk("a")) == 2
    assert await house.check(await house.risk("a", model_version="1")) == 1
    await house.control(1, "activate")
    assert await house.check(await house.risk("a")) == 1
    assert (await house.control(2, "unload")).status_code == 202
    assert (await house.until(2, "available"))["digest"] is None
    answer = await house.risk("a", model_version="2")
    assert answer.json()["type"] == "/problems/model-not-loaded"
    state = await house.app.state.context.service._memory.load("a")
    assert len(state.scored) == 1


async def test_a_pinned_answer_has_a_tag_of_its_own(house: House) -> None:
    await house.post("a", 0.5)
    await house.ready(2)
    active = await house.risk("a")
    pinned = await house.risk("a", model_version="tiny/2")
    assert await house.check(pinned) == 2
    assert active.headers["etag"] != pinned.headers["etag"]
    again = await house.http.get(
        "/episodes/a/risk?from=0&model_version=2", headers={"If-None-Match": pinned.headers["etag"]}
    )
    assert again.status_code == 304
    other = await house.http.get(
        "/episodes/a/risk?from=0", headers={"If-None-Match": pinned.headers["etag"]}
    )
    assert await house.check(other) == 1
    past = await house.embeddings("a", model_version="2", as_of=2)
    assert await house.check(past) == 2
    for pin in ("9", "other/1"):
        answer = await house.risk("a", model_version=pin)
        assert (answer.status_code, answer.json()["type"]) == (404, "/problems/model-not-loaded")
    assert (await house.risk("a", model_version="x")).status_code == 422


async def test_a_bundle_that_is_damaged_fails_alone(repository: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "repository"
    shutil.copytree(repository, damaged)
    weights = damaged / "tiny" / "2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x00")
    async with serving(damaged, tmp_path / "log.sqlite") as house:
        await house.post("a", 0.5)
        assert (await house.control(2, "load")).status_code == 202
        failed = await house.until(2, "failed")
        assert failed["failure"] == {
            "type": "bundle-invalid",
            "detail": "tiny/2/model.safetensors: SHA-256 differs from the manifest",
        }
        assert await house.check(await house.risk("a")) == 1
        assert (await house.control(2, "activate")).json()["type"] == "/problems/model-not-loaded"
        # Once it is mended it loads.
        shutil.copy(repository / "tiny" / "2" / "model.safetensors", weights)
        await house.ready(2)
        await house.control(2, "activate")
        assert await house.check(await house.risk("a")) == 2


async def test_the_open_stays_are_scored_before_a_version_is_ready(house: House) -> None:
    for stay in STAYS:
        await house.post(stay, 2.5)
    await house.risk("d")
    await house.http.patch(
        "/episodes/d",
        json={"discharged_at": (await house.risk("d")).json()["hours"][-1]["hour_end"]},
    )
    await house.ready(2)
    state = await house.state(2)
    assert state["progress"] == {"scored": 3, "total": 3, "behind": 0, "failed": 0}
    engine = house.models.able("tiny")[1].model.engine
    assert engine.status().stays == 3
    await house.control(2, "activate")
    rows = (await house.http.get("/episodes")).json()
    assert rows["provenance"]["version"] == "2"
    scored = {row["episode_id"]: row["scored_seq"] for row in rows["episodes"]}
    assert scored == {"a": 3, "b": 3, "c": 3, "d": None}


async def test_events_that_another_version_reads_are_kept_as_sent(house: House) -> None:
    """Version 1 counts lactate in mmol/L and version 3 in mg/dL; both read one log."""
    await house.post("a", 0.5)
    await house.ready(3)
    [entry] = [e for e in await house.app.state.context.log.entries("a") if e.kind == "event"]
    assert (entry.payload["value"], entry.payload["unit"]) == (2.0, "mmol/L")
    before = entry.payload
    for version in (1, 3):
        assert await house.check(await house.risk("a", model_version=str(version))) == version
    await house.control(3, "activate")
    await house.post("a", 1.5)
    entries = [e for e in await house.app.state.context.log.entries("a") if e.kind == "event"]
    assert [e.payload["unit"] for e in entries] == ["mmol/L"] * 2
    assert entries[0].payload == before
    assert await house.check(await house.risk("a")) == 3


async def test_an_unloaded_version_leaves_no_memory_behind(house: House) -> None:
    await house.post("a", 0.5)
    await house.ready(2)
    for version in (1, 2):
        await house.control(version, "activate")
        await house.risk("a")
        engine = weakref.ref(house.models.active.model.engine)
        backend = weakref.ref(engine()._lanes._backend)  # type: ignore[union-attr]
        assert backend() is not None
        await house.control(3 - version, "activate")
        await house.control(version, "unload")
        await house.until(version, "available")
        assert (engine(), backend()) == (None, None)
        await house.ready(version)
