"""Scoring is switched off and on again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.service.fakes import hr, running, stamp

pytestmark = pytest.mark.anyio


async def test_what_was_written_meanwhile_is_scored_afterwards(
    log_path: Path, anyio_backend: str
) -> None:
    async with running(log_path) as client:
        await client.post(admitted_at=stamp(0), observations=[hr(80)])
    async with running(log_path, scoring_enabled=False) as client:
        answer = await client.post(observations=[hr(120, 0.75)])
        assert (answer.status_code, answer.json()["accepted"]) == (200, 1)
        [hour] = (await client.risk()).json()["hours"]
        assert hour["decompensation"] is None
        assert client.engine.submitted == []
        assert (await client.http.get("/v2/health/ready")).status_code == 200
    async with running(log_path) as client:
        answer = (await client.risk()).json()
        assert answer["seq"] == 3
        assert answer["hours"][0]["decompensation"] is not None
