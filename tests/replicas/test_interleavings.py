"""Two replicas on one log, whatever order things happen in: one truth, told by both."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.replicas.pair import Pair, pair
from tests.replicas.shared_log import Fault
from tests.service.fakes import creatinine, hr, stamp

EPISODES = ("e", "f")
EXAMPLES = 100 if "LLM4EHR_TEST_PAUSE_SECONDS" in os.environ else 20
"""More in `make torture`."""


@dataclass(frozen=True)
class Write:
    """One write to one of the replicas, and what the log does to it."""

    replica: int
    episode: str
    what: str
    n: int
    fault: Fault | None


writes = st.builds(
    Write,
    replica=st.integers(0, 1),
    episode=st.sampled_from(EPISODES),
    what=st.sampled_from(["new", "new", "same", "unnamed", "correct", "withdraw", "admission"]),
    n=st.integers(0, 3),
    fault=st.sampled_from([None, None, None, "recorded", "not recorded", "unavailable"]),
)
rounds = st.lists(st.lists(writes, min_size=1, max_size=5), min_size=1, max_size=6)


class Writer:
    """Sends what a test draws, again and again until it is acknowledged, to either replica."""

    def __init__(self, replicas: Pair) -> None:
        self.replicas = replicas
        self.serial = 0
        self.acknowledged: dict[str, int] = {}
        """The highest number that was acknowledged of each episode."""
        self.sent: dict[str, Counter[str | None]] = {name: Counter() for name in EPISODES}

    def body(self, write: Write) -> dict[str, Any]:
        self.serial += 1
        n, hours = write.n, self.serial % 28 / 4
        match write.what:
            case "new":
                items = [hr(40 + self.serial, hours, id=f"n{self.serial}")]
            case "same":  # the same item may be on its way from elsewhere
                items = [hr(30 + n, n, id=f"s{n}")]
            case "unnamed":
                items = [hr(20 + n, n), hr(120 + self.serial, hours)]
            case "correct":
                items = [hr(90 + self.serial, n, id=f"c{self.serial}", corrects=f"s{n}")]
            case _:
                items = []
        body: dict[str, Any] = {"admitted_at": stamp(0), "observations": items}
        if write.what == "withdraw":
            body["withdrawals"] = [{"id": f"w{n}", "withdraws": f"s{n}"}]
            body["events"] = [creatinine(self.serial, hours, id=f"e{self.serial}")]
        return body

    async def send(self, write: Write) -> None:
        body, replica = self.body(write), write.replica
        if write.fault is not None:
            self.replicas.logs[replica].faults.append(write.fault)
        for _ in range(10):
            client = self.replicas.clients[replica]
            if write.what == "admission":
                statics = {"admitted_at": stamp(0), "statics": {"age_years": 40 + write.n}}
                response = await client.http.put(f"/episodes/{write.episode}", json=statics)
            else:
                response = await client.post(write.episode, **body)
            if response.status_code in (200, 201):
                self.acknowledge(write.episode, response)
                return
            assert response.status_code == 503, response.text
            replica = 1 - replica
        raise AssertionError("never acknowledged")

    def acknowledge(self, episode: str, response: httpx.Response) -> None:
        body = response.json()
        seqs = [item["seq"] for item in body.get("items", [])] + [body["seq"]]
        self.acknowledged[episode] = max(self.acknowledged.get(episode, 0), *seqs)
        entries = self.replicas.store.entries[episode]
        for item in body.get("items", []):
            assert entries[item["seq"] - 1].item_id == item["item_id"]


@settings(
    max_examples=EXAMPLES,
    phases=[Phase.explicit, Phase.generate],  # an example takes too long to be made smaller
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(rounds=rounds, seed=st.integers(0, 1 << 16), cached=st.sampled_from([0, 200_000]))
def test_what_one_replica_acknowledged_both_show(
    rounds: list[list[Write]], seed: int, cached: int, tmp_path: Path
) -> None:
    async def run() -> None:
        async with pair(tmp_path, seed, cached_entries=cached) as replicas:
            writer = Writer(replicas)
            for round_ in rounds:
                await asyncio.gather(*(writer.send(write) for write in round_))
                for episode, seq in writer.acknowledged.items():
                    for response in await replicas.agree(episode):
                        assert response.json()["seq"] >= seq
                    for client in replicas.clients:
                        held = await client.risk(episode, min_seq=seq)
                        assert held.status_code == 200
            for entries in replicas.store.entries.values():
                assert [e.seq for e in entries] == list(range(1, len(entries) + 1))
                assert max(Counter(e.item_id for e in entries if e.item_id).values(), default=1) < 2
                times = [e.recorded_us for e in entries]
                assert times == sorted(times)
            one, other = await replicas.lists()
            assert one == other
            assert {r["episode_id"]: r["seq"] for r in one["episodes"]} == {
                name: len(entries) for name, entries in replicas.store.entries.items()
            }

    asyncio.run(run())


@pytest.mark.anyio
async def test_many_writers_of_one_episode_all_get_through(tmp_path: Path) -> None:
    async with pair(tmp_path, seed=3) as replicas:
        await replicas.a.admit()
        answers = await asyncio.gather(
            *(c.post(observations=[hr(40 + i, id=f"{c is replicas.a}-{i}")])
              for i in range(60) for c in replicas.clients)
        )  # fmt: skip
        assert {r.status_code for r in answers} == {200}
        seqs = [r.json()["items"][0]["seq"] for r in answers]
        assert sorted(seqs) == list(range(2, 122))
