"""kill -9 in the middle of a load: nothing acknowledged is lost, nothing is applied twice."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from llm4ehr.bundle import Network
from service.core import Entry, episode_at
from service.log import SqliteLog
from tests.end_to_end.load import HOURS, Load, requests
from tests.end_to_end.server import Server
from tests.online import Replica, tiny_bundle

N_CLIENTS = 4
N_KILLS = 5
REQUESTS_EACH = 100
SCORES = (
    "decompensation", "mortality", "remaining_los_hours", "remaining_los_interval_hours",
    "phenotypes", "imputed_share",
)  # fmt: skip


def read_log(path: Path) -> dict[str, list[Entry]]:
    """All entries, read from a copy of the files as the kill left them."""
    copy = path.with_name("copy")
    copy.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        if not file.name.endswith("-shm"):  # made anew from the WAL, as after a power cut
            shutil.copy(file, copy)

    async def read() -> dict[str, list[Entry]]:
        log = SqliteLog(copy / path.name)
        try:
            return {name: await log.entries(name) for name in await log.heads()}
        finally:
            await log.close()

    try:
        return asyncio.run(read())
    finally:
        shutil.rmtree(copy)


def assert_all_there(load: Load, log: dict[str, list[Entry]]) -> None:
    for entries in log.values():
        assert [e.seq for e in entries] == list(range(1, len(entries) + 1))
        assert [e.kind for e in entries].count("admission") == 1
        contents = [e.payload["content"] for e in entries if e.kind != "admission"]
        assert len(contents) == len(set(contents)), "something was applied twice"
    for ack in load.acknowledged:
        entry = log[ack.episode][ack.seq - 1]
        assert entry.item_id == ack.item_id
        assert entry.item_id == ack.item.get("id", entry.item_id)
        assert entry.target == ack.item.get("corrects", ack.item.get("withdraws"))
        assert entry.payload.get("value") == ack.item.get("value")


def scores_of(server: Server, episode: str, **params: Any) -> tuple[int, list[Any]]:
    """Sequence number, and what is said of every hour."""
    while True:
        query = {"from": 0, "to": HOURS - 1} | params
        risk, states = (
            server.http.get(f"/episodes/{episode}/{what}", params=query).json()
            for what in ("risk", "embeddings")
        )
        if risk["seq"] == states["seq"]:  # else written to in between
            hours = zip(risk["hours"], states["hours"], strict=True)
            said = [([hour[s] for s in SCORES], state["embedding"]) for hour, state in hours]
            return risk["seq"], said


def replayed(replica: Replica, entries: list[Entry]) -> list[Any]:
    """The same, worked out in this process from the log alone."""
    view = episode_at(entries)
    answers = replica(view.episode, HOURS)
    said: list[Any] = []
    for hour, state in zip(answers.hours, answers.embeddings.tolist(), strict=True):
        if view.newest_data_at(hour.hour) is None:
            said.append(([None, None, None, None, {}, None], None))
        else:
            said.append(([asdict(hour)[s] for s in SCORES], state))
    return said


@pytest.mark.slow
def test_nothing_acknowledged_is_lost(
    repository: Path, tmp_path: Path, tiny_network: Callable[..., Network]
) -> None:
    replica = Replica(tiny_bundle(tiny_network))
    admitted_at = datetime.now(UTC) - timedelta(hours=3 * HOURS)
    work = [list(requests(c, REQUESTS_EACH, admitted_at)) for c in range(N_CLIENTS)]
    rng = random.Random(9)
    server = Server(repository, tmp_path)
    load = Load(server.port, work)
    remembered: dict[str, tuple[int, list[Any]]] = {}
    log: dict[str, list[Entry]] = {}
    try:
        for kill in range(N_KILLS + 1):
            with server:
                # What was said before the crash is said again, and so is all of the log.
                for episode, (seq, said) in remembered.items():
                    assert scores_of(server, episode, as_of=seq) == (seq, said)
                for episode, entries in log.items():
                    expected = len(entries), replayed(replica, entries)
                    assert scores_of(server, episode) == expected
                load.resume()
                if kill < N_KILLS:
                    load.wait_for(load.n_done + rng.randint(5, 30))
                    remembered = {name: scores_of(server, name) for name in ("shared-0", "own-1")}
                    load.wait_for(load.n_done + 1)
                    time.sleep(rng.uniform(0, 0.01))
                    assert load.n_done < load.n_requests
                else:
                    load.finish()
                    again = [ack for request in work[0] for ack in request.send(server.http)]
                    assert {ack.status for ack in again} == {"duplicate"}
                    load.acknowledged += again
                server.kill()
                load.pause()
                log = read_log(server.log_path)
                assert_all_there(load, log)
    finally:
        load.abandon()
    n_items = sum(len(request.items) for own in work for request in own)
    assert sum(len(entries) - 1 for entries in log.values()) == n_items
