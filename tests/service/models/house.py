"""The whole service on a repository of tiny models, and what it must answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from llm4ehr.bundle import Bundle, Network, load_bundle, save_bundle
from service.core import entries_as_of, episode_at
from service.projection import model_episode
from service.runtime import build_app
from service.settings import Settings
from service.times import format_time
from tests.online import ROWS, Answers, Replica, tiny_bundle

PATIENCE_S = 120


class House:
    """A running service, spoken to over HTTP, and what it must answer."""

    def __init__(self, http: httpx.AsyncClient, app: Any, repository: Path) -> None:
        self.http = http
        self.app = app
        self.admitted_at = datetime.now(UTC) - timedelta(hours=30)
        self._repository = repository
        self._replicas: dict[int, tuple[Bundle, Replica]] = {}
        self._expected: dict[tuple[int, str, int], Answers] = {}

    @property
    def models(self) -> Any:
        return self.app.state.context.models

    async def post(self, episode: str, hour: float, value: float = 80.0) -> httpx.Response:
        """A heart rate and a lactate, in an hour of the stay."""
        at = format_time(self.admitted_at + timedelta(hours=hour))
        body = {
            "admitted_at": format_time(self.admitted_at),
            "observations": [{"variable": "hr", "value": value, "time": at}],
            "events": [{"code": "2524-7", "value": value / 40, "unit": "mmol/L", "time": at}],
        }
        response = await self.http.post(f"/episodes/{episode}/observations", json=body)
        assert response.status_code == 200, response.text
        return response

    async def risk(self, episode: str, **params: Any) -> httpx.Response:
        return await self.http.get(f"/episodes/{episode}/risk", params={"from": 0, **params})

    async def embeddings(self, episode: str, **params: Any) -> httpx.Response:
        return await self.http.get(f"/episodes/{episode}/embeddings", params={"from": 0, **params})

    async def control(self, version: int, verb: str) -> httpx.Response:
        return await self.http.post(f"/models/tiny/versions/{version}/{verb}")

    async def state(self, version: int) -> dict[str, Any]:
        body: dict[str, Any] = (await self.http.get(f"/models/tiny/versions/{version}")).json()
        return body

    async def until(self, version: int, *states: str) -> dict[str, Any]:
        """Wait until a version is in one of these states."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                state = await self.state(version)
                if state["state"] in states:
                    return state
                await asyncio.sleep(0.01)

    async def ready(self, version: int) -> None:
        """Load a version and wait for it."""
        assert (await self.control(version, "load")).status_code == 202
        assert (await self.until(version, "ready", "failed"))["state"] == "ready"

    async def expected(self, version: int, episode: str, seq: int) -> Answers:
        """What a version must say of the first entries of a stay."""
        if version not in self._replicas:
            bundle = load_bundle(self._repository, "tiny", version)
            self._replicas[version] = (bundle, Replica(bundle))
        bundle, replica = self._replicas[version]
        key = (version, episode, seq)
        if key not in self._expected:
            entries = await self.app.state.context.log.entries(episode)
            view = episode_at(entries_as_of(entries, seq))
            self._expected[key] = replica(
                model_episode(view, bundle.network.vocabulary), view.head_hour + 1
            )
        return self._expected[key]

    async def check(self, answer: httpx.Response) -> int:
        """The numbers are those of the version that the answer names, which is returned."""
        assert answer.status_code == 200, answer.text
        body = answer.json()
        provenance = body["provenance"]
        version = int(provenance["version"])
        expected = await self.expected(version, body["episode_id"], provenance["seq"])
        assert provenance["digest"] == self._replicas[version][0].digest
        assert provenance["digest"][:8] in answer.headers["etag"]
        assert len(body["hours"]) == len(expected.hours)
        for hour, score, embedding in zip(
            body["hours"], expected.hours, expected.embeddings.tolist(), strict=True
        ):
            if "embedding" in hour:
                assert hour["embedding"] == embedding
            else:
                assert hour["decompensation"] == score.decompensation
                assert hour["mortality"] == score.mortality
                assert hour["remaining_los_hours"] == score.remaining_los_hours
                assert hour["phenotypes"] == score.phenotypes
        return version


def save_broken(make_network: Callable[..., Network], repository: Path, version: int) -> None:
    """A bundle whose weights are no numbers."""
    bundle = tiny_bundle(make_network)
    for parameter in bundle.network.model.parameters():
        parameter.data.fill_(float("nan"))
    save_bundle(
        repository, "tiny", version, bundle.network, calibration=bundle.calibration,
        labels=bundle.labels, metrics={}, card="# Broken\n",
    )  # fmt: skip


@asynccontextmanager
async def serving(repository: Path, log_path: Path, **settings: Any) -> AsyncIterator[House]:
    """The service as it is put together for production, with tiny/1 active."""
    chosen = {
        "model_repository": repository,
        "bundle": "tiny/1",
        "log_path": log_path,
        "staleness_limit_hours": None,
        "kv_memory_mib": 1,
        "engine_rows": ROWS,
        "torch_threads": 1,
        "model_control": True,
        "audit_interval_seconds": None,
        "authentication": "open",
        "requests_per_second_per_client": None,
    }
    app = build_app(Settings(**(chosen | settings)))
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as http,
    ):
        yield House(http, app, repository)
