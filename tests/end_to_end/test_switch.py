"""Switches between versions in a process of its own, under load, and kill -9 around them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from llm4ehr.bundle import Bundle, Network, save_bundle
from service.core import Entry, entries_as_of
from tests.end_to_end.checks import SCORES, assert_all_there, read_log, replayed
from tests.end_to_end.load import HOURS, Load, requests
from tests.end_to_end.server import PATIENCE_S, Server
from tests.online import Replica, tiny_bundle

N_CLIENTS = 3
REQUESTS_EACH = 200
STAYS = ("shared-0", "shared-1")

# Whether the kill comes before the switch, right after it, or after another one back.
KILLS = ("loaded", "switched", "back")


@pytest.fixture(scope="module")
def bundles(tiny_network: Callable[..., Network]) -> dict[int, Bundle]:
    return {v: replace(tiny_bundle(tiny_network, seed=v), version=v) for v in (1, 2)}


@pytest.fixture(scope="module")
def repository(bundles: dict[int, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_versions")
    for version, bundle in bundles.items():
        save_bundle(
            folder, "tiny", version, bundle.network, calibration=bundle.calibration,
            labels=bundle.labels, metrics={}, card="# Tiny\n",
        )  # fmt: skip
    return folder


def control(server: Server, version: int, verb: str) -> None:
    answer = server.http.post(f"/models/tiny/versions/{version}/{verb}")
    assert answer.is_success, answer.text


def state_of(server: Server, version: int) -> dict[str, Any]:
    return dict(server.http.get(f"/models/tiny/versions/{version}").json())


def until(server: Server, version: int, *states: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (state := state_of(server, version))["state"] not in states:
        assert state["state"] != "failed", state
        assert time.monotonic() < deadline, state
        time.sleep(0.02)


def load_ready(server: Server, version: int, load: Load) -> None:
    """The clients rest while the engine is checked, and write while it rebuilds."""
    load.pause()
    control(server, version, "load")
    until(server, version, "rebuilding", "ready")
    load.resume()
    until(server, version, "ready")


def ask(server: Server, stay: str) -> dict[str, Any]:
    answer = server.http.get(f"/episodes/{stay}/risk", params={"from": 0, "to": HOURS - 1})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def check(answer: dict[str, Any], log: dict[str, list[Entry]], replicas: dict[int, Replica]) -> int:
    """The numbers are those of the version and the entries that the answer names."""
    version = int(answer["provenance"]["version"])
    known = entries_as_of(log[answer["episode_id"]], answer["seq"])
    said = [[hour[s] for s in SCORES] for hour in answer["hours"]]
    assert said == [scores for scores, _ in replayed(replicas[version], known)]
    return version


@pytest.mark.slow
def test_switches_lose_nothing_and_mix_nothing(
    repository: Path, tmp_path: Path, bundles: dict[int, Bundle]
) -> None:
    replicas = {version: Replica(bundle) for version, bundle in bundles.items()}
    admitted_at = datetime.now(UTC) - timedelta(hours=3 * HOURS)
    work = [list(requests(c, REQUESTS_EACH, admitted_at)) for c in range(N_CLIENTS)]
    rng = random.Random(4)
    server = Server(repository, tmp_path, model_control="true")
    load = Load(server.port, work)
    answers: list[dict[str, Any]] = []

    def read(version: int) -> None:
        found = [ask(server, stay) for stay in STAYS]
        assert {a["provenance"]["version"] for a in found} == {str(version)}
        answers.extend(found)

    try:
        for kill in KILLS:
            with server:
                load.resume()
                load.wait_for(load.n_done + rng.randint(10, 20))
                read(1)  # a switch is forgotten by a restart
                load_ready(server, 2, load)
                read(1)
                if kill != "loaded":
                    control(server, 2, "activate")
                if kill == "back":
                    read(2)
                    load.wait_for(load.n_done + 5)
                    read(2)
                    control(server, 1, "activate")
                    read(1)
                    control(server, 2, "unload")
                    load.wait_for(load.n_done + 1)
                assert load.n_done < load.n_requests
                server.kill()
                load.pause()
                log = read_log(server.log_path)
                assert_all_there(load, log)
        with server:
            load.resume()
            load.finish()
            load_ready(server, 2, load)
            control(server, 2, "activate")
            read(2)
            [listed] = [
                row
                for row in server.http.get("/episodes").json()["episodes"]
                if row["episode_id"] == STAYS[0]
            ]
            assert listed["scored_seq"] == listed["seq"]
            assert listed["mortality"] is not None
            server.kill()
            log = read_log(server.log_path)
            assert_all_there(load, log)
    finally:
        load.abandon()
    assert {check(answer, log, replicas) for answer in answers} == {1, 2}
