"""Answers say where their time went."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest

from service import timing
from tests.service.fakes import Client, hr, stamp

pytestmark = pytest.mark.anyio


def parts(response: httpx.Response) -> dict[str, float]:
    """Milliseconds by part; the header must be as W3C wants it."""
    found = {}
    for metric in response.headers["server-timing"].split(", "):
        match = re.fullmatch(r"([a-z]+);dur=(\d+\.\d+)", metric)
        assert match, metric
        found[match[1]] = float(match[2])
    return found


async def test_a_write_and_a_read(client: Client) -> None:
    posted = await client.post(admitted_at=stamp(0), observations=[hr()])
    found = parts(posted)
    assert list(found) == ["parse", "judge", "log", "total"]
    assert found.pop("total") >= sum(found.values()) - 0.02  # of rounding
    assert list(parts(await client.risk())) == ["engine", "audit", "total"]


async def test_every_answer_has_a_total(client: Client) -> None:
    for path in ("/v2", "/metrics"):
        assert list(parts(await client.http.get(path))) == ["total"]
    wrong = await client.http.get("/episodes/unknown/risk?hour=x")
    assert list(parts(wrong)) == ["audit", "total"]


async def test_what_is_not_there_says_nothing_of_its_time(client: Client) -> None:
    """Else it would tell whether a stay exists that the client may not see."""
    for path in ("/nowhere", "/episodes/unknown/risk"):
        assert "server-timing" not in (await client.http.get(path)).headers


async def test_requests_at_the_same_time_keep_their_own(log_path: Path, anyio_backend: str) -> None:
    async def request(seconds: float) -> bytes:
        own = timing.begin()
        await asyncio.sleep(0)
        # As a write does, which goes on when its caller is gone.
        await asyncio.create_task(note(seconds))
        return own.header()

    async def note(seconds: float) -> None:
        timing.add("log", seconds)

    one, two = await asyncio.gather(request(1), request(2))
    assert (b"log;dur=1000.00" in one, b"log;dur=2000.00" in two) == (True, True)


def test_outside_a_request_nothing_is_recorded() -> None:
    with timing.measured("engine"):
        timing.add("log", 1.0)
