"""Stand-ins for the engine and the clock, and short ways to say what a client says."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from llm4ehr.vocabulary import CodeEntry, Vocabulary
from service.access.authenticator import Anyone, Authenticator
from service.api import Dependencies, create_app
from service.core import (
    BundleInfo,
    Draft,
    Entry,
    EpisodeView,
    HourScore,
    HoursInterval,
    Numerics,
    Overloaded,
    Scores,
)
from service.log import EventLog, SqliteLog
from service.log.rows import number
from service.models.version import Loader, Model
from service.settings import Settings
from service.times import format_time
from service.tracing import OFF, Tracing

T0 = datetime(2026, 3, 1, 8, tzinfo=UTC)

BUNDLE = BundleInfo(
    name="llm4ehr",
    version="1",
    digest="9f2c41d8" + "0" * 56,
    preprocessing_digest="41d8a1b7" + "0" * 56,
    tasks=("decompensation", "mortality", "remaining_los", "phenotyping"),
    phenotypes=("sepsis",),
    causal=True,
    numerics=Numerics(precision="fp32", backend="torch-cpu", rows=32, threads=1, kernel="compiled"),
)

VOCABULARY = Vocabulary(
    [
        CodeEntry(code="LOINC/2160-0", descriptor="creatinine", unit="mg/dL", n=100),
        CodeEntry(code="LOINC/2951-2", descriptor="sodium", unit="mmol/L", n=100),
        CodeEntry(code="SNOMED/40617009", descriptor="ventilation", unit=None, n=100),
    ]
)


def at(hours: float) -> datetime:
    """The instant that many hours after admission."""
    return T0 + timedelta(hours=hours)


def stamp(hours: float) -> str:
    return format_time(at(hours))


def hr(value: Any = 80, hours: float = 0.5, **more: Any) -> dict[str, Any]:
    """A heart rate."""
    return {"variable": "hr", "value": value, "time": stamp(hours)} | more


def creatinine(value: Any = 1.0, hours: float = 0.5, **more: Any) -> dict[str, Any]:
    item = {"code": "2160-0", "system": "http://loinc.org", "value": value, "unit": "mg/dL"}
    return item | {"time": stamp(hours)} | more


def entries(*drafts: Draft, recorded: Sequence[datetime] = (), episode: str = "e") -> list[Entry]:
    """Drafts as entries 1, 2, ...; each recorded at its own time, or all at admission."""
    times = [*recorded, *[recorded[-1] if recorded else T0] * (len(drafts) - len(recorded))]
    return [
        number(episode, i, [draft], time)[0]
        for i, (draft, time) in enumerate(zip(drafts, times, strict=True))
    ]


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, now: datetime = T0) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def to(self, hours: float) -> None:
        """Move to that many hours after the admission of the examples."""
        self.now = at(hours)


def fake_scores(view: EpisodeView, n_hours: int) -> Scores:
    """Scores that depend on every item up to their hour, and on nothing else."""
    episode = view.episode
    hours = []
    for hour in range(n_hours):
        known = np.floor(episode.obs_hours) <= hour
        events = np.floor(episode.ev_hours) <= hour
        load = float(episode.obs_value[known].sum()) + float(np.nansum(episode.ev_value[events]))
        risk = abs(load) / (1000 + abs(load))
        hours.append(
            HourScore(
                hour=hour,
                decompensation=risk,
                mortality=risk / 2,
                remaining_los_hours=100.0 - hour,
                remaining_los_interval_hours=HoursInterval(
                    low=50.0 - hour / 4, high=200.0 - hour, coverage=0.9
                ),
                phenotypes={"sepsis": risk / 4},
                imputed_share=0.5,
            )
        )
    embeddings = np.array([[s.hour, s.decompensation] for s in hours], np.float32).reshape(-1, 2)
    return Scores(seq=view.seq, hours=tuple(hours), embeddings=embeddings)


class FakeEngine:
    """Answers on the next turn of the loop; while `held`, when `release` is called."""

    def __init__(self, bundle: BundleInfo = BUNDLE) -> None:
        self.bundle = bundle
        self.held = False
        self.full = False
        self.broken = False
        self.fault: Exception | None = None
        self.secret = "failed on the value 4711 of patient 0815"
        self.dead = False
        self.is_alive = True
        self.submitted: list[tuple[str, int, int]] = []
        self.past: list[tuple[str, int, int]] = []
        self.forgotten: list[str] = []
        self.waiting: deque[tuple[EpisodeView, int, asyncio.Future[Scores]]] = deque()

    def submit(
        self, view: EpisodeView, n_hours: int | None = None, *, background: bool = False
    ) -> asyncio.Future[Scores]:
        self._check()
        n = max(view.head_hour + 1, n_hours or 0)
        self.submitted.append((view.episode_id, view.seq, n))
        return self._ask(view, n)

    def submit_as_of(self, view: EpisodeView, n_hours: int | None = None) -> asyncio.Future[Scores]:
        self._check()
        n = max(view.head_hour + 1, n_hours or 0)
        self.past.append((view.episode_id, view.seq, n))
        return self._ask(view, n)

    def release(self) -> None:
        """Answer what waits. As the engine may, it answers all of an episode with the newest."""
        newest: dict[str, tuple[EpisodeView, int]] = {}
        for view, n, _ in self.waiting:
            kept = newest.get(view.episode_id)
            if kept is None or view.seq >= kept[0].seq:
                newest[view.episode_id] = (view, n)
        while self.waiting:
            view, _, future = self.waiting.popleft()
            if not future.done():
                future.set_result(fake_scores(*newest[view.episode_id]))

    def forget(self, episode_id: str) -> None:
        self.forgotten.append(episode_id)

    def alive(self) -> bool:
        return self.is_alive

    def idle(self) -> bool:
        return not self.waiting

    def _check(self) -> None:
        if self.dead:
            raise RuntimeError(self.secret)
        if self.full:
            raise Overloaded(2)

    def _ask(self, view: EpisodeView, n: int) -> asyncio.Future[Scores]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Scores] = loop.create_future()
        if self.broken:
            future.set_exception(RuntimeError(self.secret))
        elif self.fault is not None:
            future.set_exception(self.fault)
        elif self.held:
            self.waiting.append((view, n, future))
        else:
            loop.call_soon(lambda: future.done() or future.set_result(fake_scores(view, n)))
        return future


def fake_model(engine: FakeEngine | None = None) -> Model:
    return Model(engine=engine or FakeEngine(), vocabulary=VOCABULARY)


class Client:
    """An app on a log of its own, spoken to over HTTP."""

    def __init__(
        self, http: httpx.AsyncClient, engine: FakeEngine, clock: Clock, log: EventLog, app: Any
    ) -> None:
        self.http = http
        self.engine = engine
        self.clock = clock
        self.log = log
        self.app = app

    async def post(self, episode: str = "e", **body: Any) -> httpx.Response:
        return await self.http.post(f"/episodes/{episode}/observations", json=body)

    async def admit(self, episode: str = "e", hours: float = 0, **statics: Any) -> httpx.Response:
        body = {"admitted_at": stamp(hours), "statics": statics}
        return await self.http.put(f"/episodes/{episode}", json=body)

    async def risk(self, episode: str = "e", **params: Any) -> httpx.Response:
        return await self.http.get(f"/episodes/{episode}/risk", params=params)

    async def settle(self) -> None:
        """Let the background work that is ready be done."""
        for _ in range(50):
            await asyncio.sleep(0.001)


@asynccontextmanager
async def running(
    path: Path,
    *,
    engine: FakeEngine | None = None,
    clock: Clock | None = None,
    log: EventLog | None = None,
    loader: Loader | None = None,
    tracing: Tracing = OFF,
    authenticator: Authenticator | None = None,
    monotonic: Callable[[], float] = time.monotonic,
    **settings: Any,
) -> AsyncIterator[Client]:
    """An app with its lifespan, on the log file `path`."""
    engine, clock, log = engine or FakeEngine(), clock or Clock(at(1)), log or SqliteLog(path)
    app = create_app(
        Settings(log_path=path, **settings),
        Dependencies(
            authenticator=authenticator or Anyone(),
            log=log,
            model=fake_model(engine),
            loader=loader,
            clock=clock,
            monotonic=monotonic,
            tracing=tracing,
        ),
    )
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as http,
    ):
        yield Client(http, engine, clock, log, app)


async def three_hours(client: Client) -> None:
    """Data in hours 0, 1 and 3, each recorded in time; the clock ends at 3.75."""
    await client.admit()
    for hours in (0.5, 1.5, 3.5):
        client.clock.to(hours + 0.25)
        await client.post(observations=[hr(60 + hours, hours=hours)])
