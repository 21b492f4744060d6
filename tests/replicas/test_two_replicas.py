"""What each replica says of what the other one did, case by case."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from service.times import format_time
from tests.replicas.pair import NOW, Pair, pair
from tests.replicas.shared_log import Fault
from tests.service.fakes import Client, hr, stamp

pytestmark = pytest.mark.anyio


async def listed(client: Client) -> dict[str, Any]:
    body = (await client.http.get("/episodes")).json()
    return {row["episode_id"]: row for row in body["episodes"]}


async def metric(client: Client, name: str) -> float:
    text = (await client.http.get("/metrics")).text
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


async def settled(replicas: Pair) -> list[dict[str, Any]]:
    await replicas.lists()
    return [await listed(client) for client in replicas.clients]


async def test_what_one_wrote_is_listed_and_scored_by_the_other(tmp_path: Path) -> None:
    async with pair(tmp_path) as replicas:
        await replicas.a.post(admitted_at=stamp(0), observations=[hr(80, 1), hr(82, 2)])
        one, other = await settled(replicas)
        assert one == other
        assert other["e"]["scored_seq"] == 3
        assert await metric(replicas.b, "llm4ehr_followed_entries_total") == 3
        assert await metric(replicas.a, "llm4ehr_followed_entries_total") == 0


async def test_a_read_needs_no_follower(tmp_path: Path) -> None:
    async with pair(tmp_path) as replicas:
        await replicas.a.admit()
        assert (await replicas.b.http.get("/episodes/e")).json()["seq"] == 1
        replicas.logs[1].store.listeners.clear()  # nobody is told
        seq = (await replicas.a.post(observations=[hr()])).json()["seq"]
        read = await replicas.b.risk()
        assert read.json()["seq"] == seq
        again = await replicas.a.http.get(
            "/episodes/e/risk", headers={"If-None-Match": read.headers["etag"]}
        )
        assert again.status_code == 304
        await replicas.a.post(observations=[hr(90)])
        again = await replicas.b.http.get(
            "/episodes/e/risk", headers={"If-None-Match": read.headers["etag"]}
        )
        assert (again.status_code, again.json()["seq"]) == (200, seq + 1)
        assert (await replicas.b.risk(min_seq=seq + 1)).status_code == 200
        assert (await replicas.b.risk(min_seq=seq + 2)).status_code == 409
        assert (await replicas.b.risk(as_of=seq)).json()["seq"] == seq


async def test_a_poll_that_finds_nothing_new_asks_the_log_once(tmp_path: Path) -> None:
    async with pair(tmp_path) as replicas:
        await replicas.a.post(admitted_at=stamp(0), observations=[hr()])
        await settled(replicas)
        await replicas.b.risk()
        before = replicas.logs[1].looks
        await replicas.b.risk()
        assert replicas.logs[1].looks == before + 1


async def test_a_deleted_stay_leaves_both_lists_and_stays_gone(tmp_path: Path) -> None:
    async with pair(tmp_path) as replicas:
        await replicas.a.post(admitted_at=stamp(0), observations=[hr()])
        await settled(replicas)
        assert (await replicas.b.http.delete("/episodes/e")).status_code == 204
        for client in replicas.clients:
            assert (await client.risk()).status_code == 410
            assert (await client.post(observations=[hr(99)])).status_code == 410
        assert await settled(replicas) == [{}, {}]


async def test_a_retired_stay_is_unknown_and_its_id_stays_taken(tmp_path: Path) -> None:
    async with pair(tmp_path) as replicas:
        await replicas.a.post(admitted_at=stamp(0), observations=[hr()])
        await settled(replicas)
        replicas.store.retire("e")
        for client, log in zip(replicas.clients, replicas.logs, strict=True):
            assert (await client.risk()).status_code == 404
            log.mend()  # after a lost connection all is compared
        assert await settled(replicas) == [{}, {}]
        sent = await replicas.b.post(admitted_at=stamp(0), observations=[hr()])
        assert sent.status_code == 410


async def test_a_log_that_went_back_is_not_overlaid_by_memory(tmp_path: Path) -> None:
    """As after the restore of a backup: what is held is not what the log has."""
    async with pair(tmp_path) as replicas:
        for value in (80, 81, 82):
            await replicas.a.post(admitted_at=stamp(0), observations=[hr(value, 1)])
        await settled(replicas)
        del replicas.store.entries["e"][3:]
        assert (await replicas.a.risk()).json()["seq"] == 3
        assert (await replicas.a.post(observations=[hr(99, 2)])).json()["seq"] == 4
        for log in replicas.logs:
            log.mend()
        one, other = await settled(replicas)
        assert one == other
        assert one["e"]["seq"] == one["e"]["scored_seq"] == 4
        await replicas.agree("e")


async def test_a_tag_of_entries_that_are_gone_is_not_that_of_others(tmp_path: Path) -> None:
    """After a restore the numbers are given again: to entries that bring other answers."""
    async with pair(tmp_path) as replicas:
        a = replicas.a
        await a.post(admitted_at=stamp(0), observations=[hr(80, 1)])
        before = await a.risk()
        del replicas.store.entries["e"][1:]
        a.clock.now += timedelta(seconds=1)
        await a.post(observations=[hr(200, 1)])
        tag = {"If-None-Match": before.headers["etag"]}
        after = await a.http.get("/episodes/e/risk", headers=tag)
        assert after.status_code == 200
        assert after.json()["seq"] == before.json()["seq"]
        assert after.json()["hours"] != before.json()["hours"]
        tag = {"If-None-Match": after.headers["etag"]}
        assert (await a.http.get("/episodes/e/risk", headers=tag)).status_code == 304


async def test_a_damaged_stay_leaves_the_others_served(tmp_path: Path) -> None:
    async with pair(tmp_path) as replicas:
        for name in ("e", "f"):
            await replicas.a.post(name, admitted_at=stamp(0), observations=[hr()])
        await settled(replicas)
        replicas.store.corrupt.add("e")
        for client in replicas.clients:
            for answer in (await client.risk("e"), await client.post("e", observations=[hr(1)])):
                assert answer.status_code == 500
                assert answer.json()["type"] == "/problems/log-corrupt"
            assert (await client.risk("f")).status_code == 200
        replicas.store.listeners[replicas.logs[1]].put_nowait("e")
        await replicas.a.post("f", observations=[hr(70, 2)])
        one, other = await settled(replicas)
        assert one["f"] == other["f"]
        assert await metric(replicas.b, "llm4ehr_follow_skipped_total") == 1


async def test_a_replica_that_was_cut_off_catches_up_and_says_when(tmp_path: Path) -> None:
    async with pair(tmp_path) as replicas:
        await replicas.a.post(admitted_at=stamp(0), observations=[hr()])
        await settled(replicas)
        b, log = replicas.b, replicas.logs[1]
        log.cut = True
        await replicas.a.post(observations=[hr(90, 2)])
        await replicas.a.post("f", admitted_at=stamp(0), observations=[hr()])
        assert (await b.risk()).status_code == 503  # rather than what may be out of date
        replicas.store.listeners[log].put_nowait(None)
        await b.settle()
        assert (await b.http.get("/episodes")).json()["complete"] is False
        log.mend()
        one, other = await settled(replicas)
        assert one == other
        assert set(other) == {"e", "f"}


@pytest.mark.parametrize("fault", ["recorded", "not recorded"])
async def test_a_write_whose_confirmation_was_lost(tmp_path: Path, fault: Fault) -> None:
    async with pair(tmp_path) as replicas:
        await replicas.a.admit()
        replicas.logs[0].faults.append(fault)
        first = await replicas.a.post(observations=[hr(id="x"), hr(99, 2)])
        assert (first.status_code, first.json()["type"]) == (503, "/problems/log-slow")
        expected = "duplicate" if fault == "recorded" else "accepted"
        for client in (replicas.b, replicas.a):
            items = (await client.post(observations=[hr(id="x"), hr(99, 2)])).json()["items"]
            assert {item["status"] for item in items} == {expected}
            assert [item["seq"] for item in items] == [2, 3]
            expected = "duplicate"


@pytest.mark.parametrize("sent_again_to", [0, 1, None])
async def test_what_was_never_confirmed_is_listed_by_who_wrote_it(
    tmp_path: Path, sent_again_to: int | None
) -> None:
    """Whoever is asked what became of it, and if nobody is."""
    async with pair(tmp_path) as replicas:
        await replicas.a.admit("f")
        await settled(replicas)  # nothing is compared with the log any more
        replicas.logs[0].faults.append("recorded")
        body = {"admitted_at": stamp(0), "observations": [hr()]}
        assert (await replicas.a.post(**body)).status_code == 503
        if sent_again_to is not None:
            again = await replicas.clients[sent_again_to].post(**body)
            assert again.json()["items"][0]["status"] == "duplicate"
        one, other = await settled(replicas)
        assert one == other
        assert one["e"]["scored_seq"] == 2


async def test_an_instant_is_answered_once_the_writes_before_it_are_in_the_log(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as replicas:
        a, log = replicas.a, replicas.logs[0]
        await a.admit()
        may_go_on = asyncio.Event()
        append = log.append

        async def held(*arguments: Any) -> Any:
            await may_go_on.wait()
            return await append(*arguments)

        log.append = held  # type: ignore[method-assign]
        write = asyncio.create_task(a.post(observations=[hr()]))
        await a.settle()
        read = asyncio.create_task(a.risk(as_of=format_time(NOW)))
        now = asyncio.create_task(a.risk())
        await a.settle()
        assert now.done()
        assert not read.done()
        may_go_on.set()
        assert (await write).status_code == 200
        assert (await read).json()["seq"] == 2
