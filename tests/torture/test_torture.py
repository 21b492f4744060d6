"""kill -9, again and again: nothing acknowledged is lost, nothing is applied twice.

`make torture` kills more often, and writes down what it found.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from tests.torture.life import ROWS, small
from tests.torture.torture import Slot, Torture
from tests.torture.verdict import assert_log_holds, assert_replicas_agree
from tests.torture.work import Ledger

_KILLS, _SEED = "LLM4EHR_TEST_KILLS", "LLM4EHR_TEST_SEED"
KILLS = int(os.environ.get(_KILLS, "200"))
SEED = int(os.environ.get(_SEED, "6"))
ON_SQLITE = KILLS // 4
N_REPLICAS = 3
A_ROUND = 250
"""Kills before everything is checked and a new log is begun."""
_COUNTED = (
    "starting", "serving", "stopping", "during a restart of the database",
    "restarts of the database", "requests", "acknowledged items", "sent again", "duplicates",
    "log-slow", "log-unavailable",
)  # fmt: skip

# Many kills take as long as they take.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(0 if _KILLS in os.environ else 900)]


@pytest.fixture(scope="module")
def results() -> Iterator[list[dict[str, Any]]]:
    """Rows of figures, written to benchmarks/results if the number of kills was asked for."""
    rows: list[dict[str, Any]] = []
    yield rows
    if rows and _KILLS in os.environ:
        report.write("torture", rows, seed=SEED)


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
        self, name: str, lives: ForkServerContext, settings: dict[str, Any], replica: Replica
    ) -> None:
        self.name = name
        self.cluster: Cluster | None = None
        self.n_replicas = 1
        self._lives = lives
        self._settings = settings
        self._replica = replica
        self._counts: Counter[str] = Counter()

    def run(self, kills: int, folder: Path, bar: Progress | None) -> dict[str, Any]:
        """Returns the figures."""
        started = time.monotonic()
        task = bar.add_task(self.name, total=kills) if bar is not None else None

        def advance() -> None:
            if bar is not None and task is not None:
                bar.advance(task)

        rounds = range(0, kills, A_ROUND)
        for done in rounds:
            part = folder / str(done)
            part.mkdir()
            with self._log(part) as log:
                self._round(min(A_ROUND, kills - done), SEED + done, part, log, advance)
        figures = {
            "log": self.name,
            "replicas": self.n_replicas,
            "kills": kills,
            "rounds": len(rounds),
            "seconds": round(time.monotonic() - started),
        }
        return figures | {name.replace(" ", "_"): self._counts[name] for name in _COUNTED}

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
        slots = [Slot(self._lives, folder, settings) for _ in range(self.n_replicas)]
        ledger = Ledger(datetime.now(UTC) - timedelta(hours=48))
        torture = Torture(
            slots, ledger, kills=kills, seed=seed, cluster=self.cluster, advance=advance
        )
        try:
            asyncio.run(torture.run())
            with open_tables(Settings(**settings)) as tables:
                entries = assert_log_holds(tables, ledger)
            assert_replicas_agree([slot.url for slot in slots], entries, self._replica)
        except BaseException:
            print(f"{self.name}, seed {seed}: {torture.counts} {ledger.counts}")
            raise
        finally:
            for slot in slots:
                slot.kill()
        items = Counter({"acknowledged items": len(ledger.acknowledged)})
        self._counts += torture.counts + ledger.counts + items


@pytest.fixture
def settings(repository: Path) -> dict[str, Any]:
    return small(repository)


def test_replicas_on_postgres(
    crashable: Cluster,
    lives: ForkServerContext,
    settings: dict[str, Any],
    replica: Replica,
    tmp_path: Path,
    results: list[dict[str, Any]],
    bar: Progress | None,
) -> None:
    rounds = Rounds("PostgreSQL", lives, settings, replica)
    rounds.cluster, rounds.n_replicas = crashable, N_REPLICAS
    results.append(rounds.run(KILLS - ON_SQLITE, tmp_path, bar))


def test_one_process_on_sqlite(
    lives: ForkServerContext,
    settings: dict[str, Any],
    replica: Replica,
    tmp_path: Path,
    results: list[dict[str, Any]],
    bar: Progress | None,
) -> None:
    rounds = Rounds("SQLite", lives, settings, replica)
    results.append(rounds.run(ON_SQLITE, tmp_path, bar))
