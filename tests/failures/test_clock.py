"""The clock of the service jumps: nothing is lost, nothing is reordered, nothing fails."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.times import format_time
from tests.service.fakes import Client, at, hr, running, stamp, three_hours

pytestmark = pytest.mark.anyio


async def latest(client: Client, **params: Any) -> dict[str, Any]:
    answer = await client.risk(**params)
    assert answer.status_code == 200
    hours: list[dict[str, Any]] = answer.json()["hours"]
    return hours[-1]


async def test_a_clock_set_back(log_path: Path, anyio_backend: str) -> None:
    async with running(log_path) as client:
        await three_hours(client)
        client.clock.to(1)
        # What really happens now lies in the future of that clock: named, so it can be sent again.
        refused = await client.post(observations=[hr(99, 3.8, id="real")])
        assert refused.json()["items"][0]["error"]["type"] == "in-the-future"
        taken = await client.post(observations=[hr(61, 0.9)])
        assert taken.json()["accepted"] == 1
        recorded = [e.recorded_at for e in await client.log.entries("e")]
        assert recorded == sorted(recorded)  # not before what it follows
        assert (await latest(client))["status"] == "preliminary"
        assert (await client.http.get("/episodes")).status_code == 200
        client.clock.to(4)
        assert (await client.post(observations=[hr(99, 3.8, id="real")])).json()["accepted"] == 1


async def test_a_clock_set_forward_and_right_again(log_path: Path, anyio_backend: str) -> None:
    async with running(log_path) as client:
        await three_hours(client)
        before = await latest(client)
        client.clock.to(100)
        ahead = await latest(client)
        assert ahead["status"] == "final"
        assert ahead["score_withheld"] == {"reason": "stale-data"}
        await client.post(observations=[hr(70, 3.6)])
        client.clock.to(4)
        again = await latest(client)
        assert (again["status"], again["score_withheld"]) == (before["status"], None)
        await client.post(observations=[hr(71, 3.7)])
        # Both are recorded at the time that the clock once showed: unknown now by the clock, and
        # known by their numbers.
        assert (await client.risk(as_of=format_time(at(4)))).json()["seq"] == 4
        assert (await client.risk(as_of=6)).json()["seq"] == 6
        assert (await client.risk()).json()["seq"] == 6


_jumps = st.lists(st.integers(-500, 500), min_size=1, max_size=8)


@settings(max_examples=40)
@given(_jumps)
def test_time_and_number_agree_on_what_was_known(minutes: list[int]) -> None:
    async def live() -> None:
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            client = await stack.enter_async_context(
                running(folder / "log.sqlite", staleness_limit_hours=None)
            )
            client.clock.to(10)
            await client.admit()
            for i, jump in enumerate(minutes):
                client.clock.to(10 + jump / 60)
                answer = await client.post(observations=[hr(60 + i, 0.01 * i)])
                assert answer.json()["accepted"] == 1
                assert (await client.http.get("/episodes?sort=updated_at")).status_code == 200
                await latest(client)
            entries = await client.log.entries("e")
            assert len(entries) == 1 + len(minutes)
            recorded = [entry.recorded_at for entry in entries]
            assert recorded == sorted(recorded)
            client.clock.now = max(recorded)
            for entry in entries:
                by_time = await client.http.get(
                    "/episodes/e", params={"as_of": format_time(entry.recorded_at)}
                )
                n = sum(time <= entry.recorded_at for time in recorded)
                assert by_time.json()["seq"] == n

    asyncio.run(live())


async def test_a_clock_that_runs_backwards_all_the_time_keeps_every_item(
    log_path: Path, anyio_backend: str
) -> None:
    async with running(log_path) as client:
        client.clock.to(5)
        for i in range(20):
            answer = await client.post(
                admitted_at=stamp(0), observations=[hr(60 + i, 0.01, id=f"i{i}")]
            )
            assert answer.status_code == 200
            client.clock.to(5 - 0.1 * (i + 1))
        assert (await client.http.get("/episodes/e")).json()["counts"]["observations"] == 20
