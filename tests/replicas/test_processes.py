"""Two real processes on one PostgreSQL, and what can go wrong between them and it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import httpx
import pytest

from llm4ehr.bundle import Network
from service.log.tables import open_tables
from service.settings import Settings
from tests.end_to_end.server import PATIENCE_S
from tests.online import Replica, tiny_bundle
from tests.postgres import Cluster
from tests.replicas.proxy import Proxy
from tests.service.fakes import hr, stamp
from tests.torture.life import ROWS
from tests.torture.torture import N_CLIENTS, Slot
from tests.torture.trail import assert_trail_tells
from tests.torture.verdict import assert_log_holds, assert_replicas_agree
from tests.torture.work import Client, Ledger, Request

_PAUSE = "LLM4EHR_TEST_PAUSE_SECONDS"
PAUSE_S = float(os.environ.get(_PAUSE, "1"))
"""How long a replica is held up; a minute in `make torture`."""
MORE = 5 if _PAUSE in os.environ else 1
"""So many times the load in `make torture`."""

pytestmark = pytest.mark.slow


@pytest.fixture
def replica(tiny_network: Callable[..., Network]) -> Replica:
    return Replica(tiny_bundle(tiny_network), ROWS)


class Two:
    """Two replicas; the way of the second one to PostgreSQL can be disturbed."""

    def __init__(self, slots: list[Slot], proxy: Proxy, settings: dict[str, Any]) -> None:
        self.slots = slots
        self.proxy = proxy
        self.settings = settings
        self.a, self.b = (httpx.Client(base_url=s.url, timeout=PATIENCE_S) for s in slots)
        self.ledger = Ledger(datetime.now(UTC) - timedelta(hours=48))
        self._clients = 0

    def load(self, requests: int, beside: Callable[[], None] = lambda: None) -> None:
        """So many requests of several clients to both, while `beside` is done."""
        urls = [slot.url for slot in self.slots]
        until = self.ledger.counts["requests"] + MORE * requests

        async def run() -> None:
            going = True
            self._clients += N_CLIENTS  # each has ids of its own
            numbers = range(self._clients - N_CLIENTS, self._clients)
            clients = [Client(i, 0, lambda: urls, self.ledger) for i in numbers]
            async with asyncio.TaskGroup() as group:
                for client in clients:
                    group.create_task(
                        client.work(lambda: going or self.ledger.counts["requests"] < until)
                    )
                await asyncio.to_thread(beside)
                going = False

        asyncio.run(run())

    def judge(self, replica: Replica) -> None:
        with open_tables(Settings(**self.settings)) as tables:
            log = assert_log_holds(tables, self.ledger)
        assert_trail_tells(Settings(**self.settings), log, self.ledger)
        assert_replicas_agree([slot.url for slot in self.slots], log, replica)
        self.wait_for_equal_lists()

    def wait_for_equal_lists(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            one, other = (c.get("/episodes?limit=500").json() for c in (self.a, self.b))
            scored = all(row["scored_seq"] == row["seq"] for row in other["episodes"])
            if one == other and scored and other["complete"]:
                return
            time.sleep(0.05)
        raise AssertionError("the lists never became equal")


@pytest.fixture
def two(
    crashable: Cluster,
    postgres_url: str,
    lives: ForkServerContext,
    settings: dict[str, Any],
    tmp_path: Path,
) -> Iterator[Two]:
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(crashable.port))
        disturbed = postgres_url.replace(f":{crashable.port}/", f":{proxy.port}/")
        slots = [
            Slot(lives, tmp_path, settings | {"log_url": url}) for url in (postgres_url, disturbed)
        ]
        for slot in slots:
            stack.callback(slot.kill)
            slot.start()

        async def ready() -> None:
            await asyncio.gather(*(slot.ready() for slot in slots))

        asyncio.run(ready())
        both = Two(slots, proxy, settings | {"log_url": postgres_url})
        for http in (both.a, both.b):
            stack.callback(http.close)
        yield both


@contextmanager
def paused(slot: Slot) -> Iterator[None]:
    os.kill(slot.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(slot.pid, signal.SIGCONT)


def test_two_processes_write_to_the_same_stays(two: Two, replica: Replica) -> None:
    two.load(100)
    two.judge(replica)


def test_a_replica_that_was_paused_answers_with_the_newest(two: Two) -> None:
    post = {"admitted_at": stamp(0), "observations": [hr(80, 1)]}
    assert two.b.post("/episodes/e/observations", json=post).status_code == 200
    assert two.b.get("/episodes/e/risk").json()["seq"] == 2
    with paused(two.slots[1]):
        deadline, value = time.monotonic() + PAUSE_S, 60
        while time.monotonic() < deadline:
            value += 1
            item = hr(60 + value / 100, 2)
            answer = two.a.post("/episodes/e/observations", json={"observations": [item]})
            assert answer.status_code == 200
            time.sleep(0.05)
    newest = answer.json()["seq"]
    answers = [http.get("/episodes/e/risk", params={"hour": 2}) for http in (two.b, two.a)]
    assert [a.json()["seq"] for a in answers] == [newest, newest]
    assert answers[0].json() == answers[1].json()
    two.wait_for_equal_lists()


def test_postgres_crashes_under_load(two: Two, crashable: Cluster, replica: Replica) -> None:
    def crash() -> None:
        for _ in range(MORE):
            time.sleep(0.5)
            crashable.stop("immediate")
            time.sleep(0.2)
            crashable.start()

    two.load(60, crash)
    two.judge(replica)


@pytest.mark.parametrize("mode", ["cut", "stalled"])
def test_a_replica_without_the_log_says_so_and_comes_back(
    two: Two, replica: Replica, mode: Any
) -> None:
    """Never what may be out of date; the other replica goes on meanwhile."""
    two.load(30)
    episode = "shared-0-0"
    assert two.b.get(f"/episodes/{episode}/risk").status_code == 200
    two.proxy.turn(mode)
    extra = Request("post", "extra", {"admitted_at": stamp(0), "observations": [hr(80, 1)]})
    two.ledger.sent["extra"] = extra.items
    two.ledger.attempts["extra"] = extra
    written = two.a.post(
        "/episodes/extra/observations", json=extra.body, headers={"X-Request-ID": "extra"}
    )
    assert written.status_code == 200
    paths = (f"/episodes/{episode}/risk", f"/episodes/{episode}?min_seq=1")
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(two.b.get, paths))
    for answer in answers:
        assert answer.status_code == 503
        assert answer.json()["type"] in ("/problems/log-unavailable", "/problems/deadline-exceeded")
    two.proxy.turn("open")
    deadline = time.monotonic() + PATIENCE_S
    while two.b.get(f"/episodes/{episode}/risk").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    two.load(30)
    two.judge(replica)


def test_a_slow_way_to_the_log_changes_no_answer(two: Two, replica: Replica) -> None:
    two.proxy.delay_s = 0.03
    two.load(15)
    two.judge(replica)
