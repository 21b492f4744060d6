"""Whatever is written, read and switched in whatever order: each answer is its version's."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm4ehr.bundle import Bundle, Network
from service.access.authenticator import Anyone
from service.api import Dependencies, create_app
from service.core import entries_as_of, episode_at
from service.engine.turns import Turns
from service.log import SqliteLog
from service.models.version import Model, Name
from service.projection import model_episode
from service.settings import Settings
from tests.online import Answers, Replica, engine_of, model_of, tiny_bundle
from tests.service.fakes import Clock, at, creatinine, hr, stamp

PATIENCE_S = 120
EPISODES = ("a", "b", "c")

Step = tuple[str, str | int, str | int | None]

steps = st.one_of(
    st.tuples(st.just("post"), st.sampled_from(EPISODES), st.integers(0, 9)),
    st.tuples(st.just("read"), st.sampled_from(EPISODES), st.sampled_from([None, "1", "2"])),
    st.tuples(st.just("past"), st.sampled_from(EPISODES), st.sampled_from([None, "1", "2"])),
    st.tuples(st.just("switch"), st.sampled_from([1, 2]), st.none()),
    st.tuples(st.just("switch"), st.sampled_from([1, 2]), st.none()),
    st.tuples(st.just("unload"), st.sampled_from([1, 2]), st.none()),
)
"""A version that is not loaded is loaded before a switch to it, which may be while others read."""


@pytest.fixture(scope="module")
def bundles(tiny_network: Callable[..., Network]) -> dict[int, Bundle]:
    made = {v: tiny_bundle(tiny_network, seed=v) for v in (1, 2)}
    return {v: replace(b, version=v, digest=f"{v}b" * 32) for v, b in made.items()}


@pytest.fixture(scope="module")
def replicas(bundles: dict[int, Bundle]) -> dict[int, Replica]:
    return {version: Replica(bundle) for version, bundle in bundles.items()}


class Shelf:
    """Both versions, with so few slots that stays drive one another out."""

    def __init__(self, bundles: dict[int, Bundle]) -> None:
        self._bundles = bundles
        self._turns = Turns()

    def on_disk(self) -> list[Name]:
        return [Name("tiny", version) for version in self._bundles]

    def load(self, name: Name) -> Model:
        bundle = self._bundles[name.version]
        me = object()
        engine = engine_of(bundle, n_slots=2, turn=lambda: self._turns.turn(me))
        return replace(
            model_of(bundle, engine),
            start=engine.start,
            close=engine.close,
            go_first=lambda: self._turns.put_in_front(me, lambda: not engine.idle()),
        )


@pytest.mark.timeout(900)  # a failure is made small before it is shown
def test_no_answer_mixes_versions(bundles: dict[int, Bundle], replicas: dict[int, Replica]) -> None:
    answered: Counter[int] = Counter()

    @given(st.lists(steps, min_size=4, max_size=25))
    @settings(max_examples=25)
    def all_scripts(script: list[Step]) -> None:
        with TemporaryDirectory() as folder:
            run = play(Path(folder) / "log.sqlite", bundles, replicas, script)
            answered.update(asyncio.run(asyncio.wait_for(run, PATIENCE_S)))

    all_scripts()
    # Otherwise nothing was switched, and nothing tested.
    assert answered[1] > 0
    assert answered[2] > 0


async def play(
    path: Path,
    bundles: dict[int, Bundle],
    replicas: dict[int, Replica],
    script: list[Step],
) -> list[int]:
    """Plays a script; returns which versions answered without being named."""
    log, clock, shelf = SqliteLog(path), Clock(at(12)), Shelf(bundles)
    app = create_app(
        Settings(model_control=True, audit_interval_seconds=None, cached_entries=12),
        Dependencies(
            log=log,
            authenticator=Anyone(),
            model=shelf.load(Name("tiny", 1)),
            loader=shelf,
            clock=clock,
        ),
    )
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://t") as http,
    ):
        reads: list[tuple[asyncio.Task[httpx.Response], bool]] = []
        versions = []
        for i, (verb, what, more) in enumerate(script):
            clock.now += timedelta(seconds=1)
            if verb == "post":
                assert isinstance(more, int)
                items = [hr(60 + i, hours=more + 0.5)]
                events = [creatinine(1 + i / 10, hours=more + 0.7)]
                body = {"admitted_at": stamp(0), "observations": items, "events": events}
                await http.post(f"/episodes/{what}/observations", json=body)
            elif verb in ("read", "past"):
                params = {"from": "0"} | ({"model_version": str(more)} if more else {})
                params |= {"as_of": "3"} if verb == "past" else {}
                url = f"/episodes/{what}/embeddings"
                reads.append((asyncio.create_task(http.get(url, params=params)), more is None))
                await asyncio.sleep(0)
            elif verb == "switch":
                await switch(http, f"/models/tiny/versions/{what}")
            else:
                await http.post(f"/models/tiny/versions/{what}/unload")
        for read, unnamed in reads:
            answer = await read
            if answer.status_code == 404:  # not there, or not loaded
                continue
            assert answer.status_code == 200, answer.text
            version = await check(answer, log, bundles, replicas)
            if unnamed:
                versions.append(version)
    return versions


async def switch(http: httpx.AsyncClient, version: str) -> None:
    """Have a version answer, whatever its state is."""
    while (state := (await http.get(version)).json()["state"]) not in ("ready", "active"):
        if state == "available":
            await http.post(f"{version}/load")
        await asyncio.sleep(0.001)
    assert (await http.post(f"{version}/activate")).status_code == 200


async def check(
    answer: httpx.Response, log: SqliteLog, bundles: dict[int, Bundle], replicas: dict[int, Replica]
) -> int:
    """The numbers are those of the version that the answer names, which is returned."""
    body = answer.json()
    version = int(body["provenance"]["version"])
    bundle = bundles[version]
    assert body["provenance"]["digest"] == bundle.digest
    entries = await log.entries(body["episode_id"])
    view = episode_at(entries_as_of(entries, body["seq"]))
    expected: Answers = replicas[version](
        model_episode(view, bundle.network.vocabulary), view.head_hour + 1
    )
    assert len(body["hours"]) == len(expected.hours)
    for hour, embedding in zip(body["hours"], expected.embeddings.tolist(), strict=True):
        # Before the first data nothing is shown.
        assert hour["embedding"] == (None if hour["score_withheld"] else embedding)
    assert body["hours"][-1]["embedding"] is not None
    return version
