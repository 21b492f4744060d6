"""kill -9, again and again: nothing acknowledged is lost, nothing is applied twice.

`make torture` kills more often, and writes down what it found.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from benchmarks import report
from llm4ehr.bundle import Network
from service.log.tables import open_tables
from service.settings import Settings
from tests.online import Replica, tiny_bundle
from tests.postgres import Cluster, new_database
from tests.replicas.proxy import Proxy
from tests.torture.life import ROWS, small
from tests.torture.torture import Slot, Torture
from tests.torture.trail import assert_trail_tells
from tests.torture.verdict import assert_log_holds, assert_replicas_agree
from tests.torture.work import Ledger

_KILLS, _SEED = "LLM4EHR_TEST_KILLS", "LLM4EHR_TEST_SEED"
KILLS = int(os.environ.get(_KILLS, "200"))
SEED = int(os.environ.get(_SEED, "6"))
ON_SQLITE = KILLS // 4
N_REPLICAS = 3
A_ROUND = 250
"""Kills before everything is checked and a new log is begun."""
LOST_COMMITS = 0.1
"""Share of the commits of the first replica on PostgreSQL whose connection is cut meanwhile."""
_COUNTED = (
    "starting", "serving", "stopping", "during a restart of the database",
    "restarts of the database", "cut before a commit", "cut after a commit", "requests",
    "acknowledged items", "sent again", "duplicates", "log-slow", "log-unavailable", "looks",
    "looks in vain", "audit lines", "audit lines twice", "answers without a line",
)  # fmt: skip

# Many kills take as long as they take.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(0 if _KILLS in os.environ else 900)]


class Results:
    """Figures of each log, written to benchmarks/results whenever there are new ones, if the number
    of kills was asked for: whatever ends the test, they are there.
    """

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Any]] = {}

    def put(self, row: dict[str, Any]) -> None:
        self._rows[row["log"]] = row
        if _KILLS in os.environ:
            report.write("torture", list(self._rows.values()), seed=SEED, kills_asked_for=KILLS)


@pytest.fixture(scope="module")
def results() -> Results:
    return Results()


@pytest.fixture(scope="module")
def bar() -> Iterator[Progress | None]:
    """Shown if the number of kills was asked for."""
    if _KILLS not in os.environ:
        yield None
        return
    with report.progress() as progress:
        yield progress


@pytest.fixture(scope="module")
def replica(tiny_network: Callable[..., Network]) -> Replica:
    return Replica(tiny_bundle(tiny_network), ROWS)


class Rounds:
    """Torture in rounds, each on a log of its own."""

    def __init__(
        self,
        name: str,
        lives: ForkServerContext,
        settings: dict[str, Any],
        replica: Replica,
        results: Results,
    ) -> None:
        self.name = name
        self.cluster: Cluster | None = None
        self.n_replicas = 1
        self._lives = lives
        self._settings = settings
        self._replica = replica
        self._results = results
        self._counts: Counter[str] = Counter()

    def run(self, kills: int, folder: Path, bar: Progress | None) -> Counter[str]:
        """Returns what was counted; the figures so far are put down after each round."""
        started = time.monotonic()
        task = bar.add_task(self.name, total=kills) if bar is not None else None

        def advance() -> None:
            if bar is not None and task is not None:
                bar.advance(task)

        for n, before in enumerate(range(0, kills, A_ROUND), start=1):
            part = folder / str(before)
            part.mkdir()
            done = min(before + A_ROUND, kills)
            with self._log(part) as log:
                self._round(done - before, SEED + before, part, log, advance)
            figures = {
                "log": self.name,
                "replicas": self.n_replicas,
                "kills": done,
                "rounds": n,
                "seconds": round(time.monotonic() - started),
            }
            counted = {name.replace(" ", "_"): self._counts[name] for name in _COUNTED}
            self._results.put(figures | counted)
        return self._counts

    @contextmanager
    def _log(self, folder: Path) -> Iterator[dict[str, Any]]:
        """The settings of a log that is empty."""
        if self.cluster is None:
            yield {"log_path": folder / "log.sqlite"}
        else:
            with contextmanager(new_database)(self.cluster.server) as url:
                yield {"log_url": url}

    def _round(
        self,
        kills: int,
        seed: int,
        folder: Path,
        log: dict[str, Any],
        advance: Callable[[], None],
    ) -> None:
        settings = self._settings | log
        with ExitStack() as stack:
            ways = [settings] * self.n_replicas
            lost: Counter[str] = Counter()
            if self.cluster is not None:
                port = self.cluster.port
                proxy = stack.enter_context(Proxy(port, lost_commits=LOST_COMMITS, seed=seed))
                url = log["log_url"].replace(f":{port}/", f":{proxy.port}/")
                ways[0], lost = settings | {"log_url": url}, proxy.lost
            slots = [Slot(self._lives, folder, way) for way in ways]
            for slot in slots:
                stack.callback(slot.kill)
            ledger = Ledger(datetime.now(UTC) - timedelta(hours=48))
            torture = Torture(
                slots, ledger, kills=kills, seed=seed, cluster=self.cluster, advance=advance
            )
            try:
                asyncio.run(torture.run())
                with open_tables(Settings(**settings)) as tables:
                    entries = assert_log_holds(tables, ledger)
                told = assert_trail_tells(Settings(**settings), entries, ledger)
                assert_replicas_agree([slot.url for slot in slots], entries, self._replica)
            except BaseException:
                print(f"{self.name}, seed {seed}: {torture.counts} {ledger.counts}")
                raise
        self._counts += torture.counts + ledger.counts + told
        self._counts["acknowledged items"] += len(ledger.acknowledged)
        for when, n in lost.items():
            self._counts[f"cut {when} a commit"] += n


@pytest.fixture
def settings(repository: Path) -> dict[str, Any]:
    return small(repository)


def test_replicas_on_postgres(
    crashable: Cluster,
    lives: ForkServerContext,
    settings: dict[str, Any],
    replica: Replica,
    tmp_path: Path,
    results: Results,
    bar: Progress | None,
) -> None:
    rounds = Rounds("PostgreSQL", lives, settings, replica, results)
    rounds.cluster, rounds.n_replicas = crashable, N_REPLICAS
    counts = rounds.run(KILLS - ON_SQLITE, tmp_path, bar)
    # Clients were told, now and then, that nobody knows.
    assert counts["log-slow"] > 0 or KILLS < 60


def test_one_process_on_sqlite(
    lives: ForkServerContext,
    settings: dict[str, Any],
    replica: Replica,
    tmp_path: Path,
    results: Results,
    bar: Progress | None,
) -> None:
    rounds = Rounds("SQLite", lives, settings, replica, results)
    rounds.run(ON_SQLITE, tmp_path, bar)
