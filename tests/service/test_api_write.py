"""POST, PUT, PATCH and DELETE over HTTP."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from service.api.schemas import EpisodeOut, PostedOut
from service.core import Draft
from service.log import LogUnavailable, SequenceConflict, SqliteLog
from tests.service.fakes import Client, Clock, at, creatinine, hr, running, stamp

pytestmark = pytest.mark.anyio


async def test_a_first_batch_creates_the_episode_and_keeps_the_good_items(client: Client) -> None:
    response = await client.post(
        admitted_at=stamp(0),
        statics={"age_years": 67, "sex": "female"},
        observations=[hr(id="a"), hr("fast"), hr(90, hours=0.75)],
        events=[creatinine(corrects="z")],
        withdrawals=[{"withdraws": "a"}],
    )
    assert response.status_code == 200
    body = response.json()
    PostedOut.model_validate(body)
    assert (body["seq"], body["admission"]) == (5, "created")
    assert (body["accepted"], body["duplicates"], body["rejected"]) == (4, 0, 1)
    first, second, third, fourth, fifth = body["items"]
    assert first == {
        "list": "observations",
        "index": 0,
        "status": "accepted",
        "item_id": "a",
        "seq": 2,
        "flags": [],
    }
    assert second["error"]["type"] == "value-not-a-number"
    assert (third["seq"], third["item_id"][:7]) == (3, "sha256:")
    assert (fourth["list"], fourth["target_known"]) == ("events", False)
    assert (fifth["list"], fifth["target_known"]) == ("withdrawals", True)
    episode = (await client.http.get("/episodes/e")).json()
    assert episode["statics"] == {"age_years": 67, "sex": "female"}
    assert episode["counts"] == {"observations": 1, "events": 1, "corrected": 0, "withdrawn": 1}


async def test_a_batch_is_one_transaction_at_one_time(client: Client) -> None:
    await client.post(admitted_at=stamp(0), observations=[hr(), hr(81)], events=[creatinine()])
    recorded = {e.recorded_at for e in await client.log.entries("e")}
    assert recorded == {at(1)}


async def test_sending_a_batch_again_writes_nothing(client: Client) -> None:
    body: dict[str, Any] = {"admitted_at": stamp(0), "observations": [hr(id="a"), hr(81)]}
    first = (await client.post(**body)).json()
    again = (await client.post(**body)).json()
    assert (again["seq"], again["duplicates"], again["admission"]) == (3, 2, "unchanged")
    assert [i["seq"] for i in again["items"]] == [i["seq"] for i in first["items"]]
    assert len(await client.log.entries("e")) == 3


async def test_a_batch_never_moves_a_known_admission(client: Client) -> None:
    await client.admit()
    body = (await client.post(admitted_at=stamp(-1), observations=[hr()])).json()
    assert (body["admission"], body["accepted"]) == ("differs", 1)
    assert (await client.http.get("/episodes/e")).json()["admitted_at"] == stamp(0)


async def test_a_batch_for_an_unknown_episode_needs_its_admission(client: Client) -> None:
    response = await client.post(observations=[hr()])
    assert response.status_code == 404
    assert response.json()["type"] == "/problems/episode-unknown"
    assert await client.log.heads() == {}


async def test_if_every_item_is_refused_nothing_is_recorded(client: Client) -> None:
    response = await client.post(admitted_at=stamp(0), observations=[hr(-5), hr(None)])
    assert response.status_code == 422
    body = response.json()
    assert body["type"] == "/problems/all-items-rejected"
    assert [i["error"]["type"] for i in body["items"]] == ["value-out-of-range", "value-missing"]
    assert await client.log.heads() == {}


async def test_an_empty_batch_changes_nothing(client: Client) -> None:
    await client.admit()
    body = (await client.post()).json()
    assert (body["seq"], body["items"]) == (1, [])


async def test_an_admission_alone_may_be_posted(client: Client) -> None:
    body = (await client.post(admitted_at=stamp(0))).json()
    assert (body["seq"], body["admission"], body["items"]) == (1, "created", [])


async def test_statics_without_admission_are_not_lost_in_silence(client: Client) -> None:
    await client.admit()
    response = await client.post(statics={"age_years": 5}, observations=[hr()])
    assert response.json()["type"] == "/problems/invalid-request"


async def test_nan_literals_are_refused_where_they_stand(client: Client) -> None:
    await client.admit()
    text = (
        '{"observations": ['
        + ",".join(
            f'{{"variable": "hr", "value": {value}, "time": "{stamp(0.5)}"}}'
            for value in ("NaN", "Infinity", "-Infinity", "1e999", "80")
        )
        + "]}"
    )
    response = await client.http.post(
        "/episodes/e/observations", content=text, headers={"content-type": "application/json"}
    )
    assert response.status_code == 200
    items = response.json()["items"]
    assert [i["error"]["type"] for i in items[:4]] == ["value-not-finite"] * 4
    assert items[4]["status"] == "accepted"


async def test_put_creates_then_repeats_then_replaces(client: Client) -> None:
    created = await client.admit(age_years=70, sex="male")
    assert created.status_code == 201
    assert created.headers["location"] == "/episodes/e"
    EpisodeOut.model_validate_json(created.text)
    again = await client.admit(age_years=70.0, sex="male")
    assert (again.status_code, again.json()["seq"]) == (200, 1)
    replaced = await client.admit(hours=-1, age_years=71)
    assert (replaced.status_code, replaced.json()["seq"]) == (200, 2)
    assert replaced.json()["statics"] == {"age_years": 71}
    assert replaced.json()["admitted_at"] == stamp(-1)


async def test_put_accepts_any_offset_and_answers_in_utc(client: Client) -> None:
    response = await client.http.put(
        "/episodes/e", json={"admitted_at": "2026-03-01T10:00:00+02:00"}
    )
    assert response.json()["admitted_at"] == "2026-03-01T08:00:00Z"


async def test_patch_moves_the_admission_and_with_it_every_hour(client: Client) -> None:
    await client.post(admitted_at=stamp(0), observations=[hr(hours=0.5), hr(81, hours=0.9)])
    response = await client.http.patch("/episodes/e", json={"admitted_at": stamp(0.75)})
    assert response.status_code == 200
    body = response.json()
    assert (body["head_hour"], body["ignored"]) == (0, {"before-admission": 1})
    assert (await client.risk()).json()["hours"][0]["hour_start"] == stamp(0.75)
    back = await client.http.patch("/episodes/e", json={"admitted_at": stamp(-3)})
    assert back.json()["head_hour"] == 3
    assert back.json()["ignored"] == {}


async def test_patch_changes_only_what_is_sent(client: Client) -> None:
    await client.admit(age_years=70, sex="male")
    body = (
        await client.http.patch("/episodes/e", json={"statics": {"weight_kg": 80, "sex": None}})
    ).json()
    assert body["statics"] == {"age_years": 70, "weight_kg": 80}
    assert body["admitted_at"] == stamp(0)
    nothing = await client.http.patch("/episodes/e", json={})
    assert nothing.json()["seq"] == body["seq"]


async def test_discharge_ends_the_stay_and_can_be_taken_back(client: Client) -> None:
    client.clock.to(5)
    await client.post(admitted_at=stamp(0), observations=[hr(hours=1), hr(81, hours=3)])
    body = (await client.http.patch("/episodes/e", json={"discharged_at": stamp(2)})).json()
    assert body["discharged_at"] == stamp(2)
    assert (body["head_hour"], body["ignored"]) == (1, {"after-discharge": 1})
    refused = await client.post(observations=[hr(hours=4)])
    assert refused.json()["items"][0]["error"]["type"] == "after-discharge"
    body = (await client.http.patch("/episodes/e", json={"discharged_at": None})).json()
    assert (body["discharged_at"], body["head_hour"], body["ignored"]) == (None, 3, {})
    assert (await client.post(observations=[hr(hours=4)])).status_code == 200


@pytest.mark.parametrize(
    ("body", "path", "type_"),
    [
        ({"admitted_at": stamp(2)}, "/admitted_at", "in-the-future"),
        ({"admitted_at": None}, "/admitted_at", "null"),
        ({"admitted_at": "2026-03-01T08:00:00"}, "/admitted_at", "time-naive"),
        ({"admitted_at": 7}, "/admitted_at", "time-invalid"),
        ({"discharged_at": stamp(2)}, "/discharged_at", "in-the-future"),
        ({"discharged_at": stamp(-1)}, "/discharged_at", "before-admission"),
        ({"statics": {"age_years": -1}}, "/statics/age_years", "greater-than-equal"),
        ({"statics": {"age_years": "old"}}, "/statics/age_years", "float-type"),
        ({"statics": {"age_years": True}}, "/statics/age_years", "float-type"),
        ({"statics": {"sex": "f"}}, "/statics/sex", "literal-error"),
        ({"statics": {"shoe": 43}}, "/statics", "unknown-field"),
        ({"admited_at": stamp(0)}, "", "unknown-field"),
        ([], "", "model-type"),
    ],
)
async def test_patch_refuses_what_cannot_be(
    client: Client, body: Any, path: str, type_: str
) -> None:
    await client.admit()
    response = await client.http.patch("/episodes/e", json=body)
    assert response.status_code == 422
    [error] = response.json()["errors"]
    assert (error["path"], error["type"]) == (path, type_)
    assert len(await client.log.entries("e")) == 1


async def test_an_admission_cannot_pass_the_discharge(client: Client) -> None:
    await client.admit(hours=-5)
    await client.http.patch("/episodes/e", json={"discharged_at": stamp(-1)})
    for response in (
        await client.admit(hours=0),
        await client.http.patch("/episodes/e", json={"admitted_at": stamp(0)}),
    ):
        assert response.json()["errors"][0]["type"] == "after-discharge"


async def test_delete_leaves_a_tombstone(client: Client) -> None:
    await client.post(admitted_at=stamp(0), observations=[hr()])
    client.clock.to(1.5)
    assert (await client.http.delete("/episodes/e")).status_code == 204
    assert (await client.http.delete("/episodes/e")).status_code == 204
    assert client.engine.forgotten == ["e"]
    assert (await client.log.entries("e"))[-1].kind == "deletion"
    for response in (
        await client.http.get("/episodes/e"),
        await client.risk(),
        await client.http.get("/episodes/e/embeddings"),
        await client.post(observations=[hr(81)]),
        await client.admit(),
        await client.http.patch("/episodes/e", json={}),
    ):
        assert response.status_code == 410
        assert response.json()["type"] == "/problems/episode-deleted"
    assert (await client.http.get("/episodes")).json()["episodes"] == []
    assert (await client.risk(as_of=2)).json()["hours"][0]["decompensation"] is not None
    assert (await client.risk(as_of=stamp(1))).status_code == 200


@pytest.mark.parametrize(
    "method_and_path",
    ["GET /episodes/x", "GET /episodes/x/risk", "DELETE /episodes/x", "PATCH /episodes/x"],
)
async def test_unknown_episodes(client: Client, method_and_path: str) -> None:
    method, path = method_and_path.split()
    response = await client.http.request(method, path, json={} if method == "PATCH" else None)
    assert (response.status_code, response.json()["type"]) == (404, "/problems/episode-unknown")


async def test_writers_of_one_episode_wait_for_each_other(client: Client) -> None:
    await client.admit()
    responses = await asyncio.gather(
        *(client.post(observations=[hr(60 + i, id=f"i{i}"), hr(50)]) for i in range(40))
    )
    assert all(r.status_code == 200 for r in responses)
    log = await client.log.entries("e")
    assert [e.seq for e in log] == list(range(1, 43))
    accepted = [
        item["seq"] for r in responses for item in r.json()["items"] if item["status"] == "accepted"
    ]
    assert sorted(accepted) == list(range(2, 43))


async def test_another_process_may_write_to_the_same_episode(client: Client) -> None:
    await client.post(admitted_at=stamp(0), observations=[hr(id="a")])
    stored = (await client.log.entries("e"))[-1]
    foreign = Draft(
        kind="observation",
        item_id="b",
        effective_at=stored.effective_at,
        payload={**stored.payload, "content": "sha256:other"},
    )
    await client.log.append("e", [foreign], at(1), 2)
    body = (await client.post(observations=[hr(99, id="c")])).json()
    assert body["seq"] == 4
    assert (await client.http.get("/episodes/e")).json()["counts"]["observations"] == 3


async def test_the_log_keeps_the_order_when_the_clock_is_set_back(client: Client) -> None:
    await client.admit()
    client.clock.to(0.5)
    await client.post(observations=[hr(hours=0.25)])
    assert [e.recorded_at for e in await client.log.entries("e")] == [at(1), at(1)]


class _FailingLog(SqliteLog):
    failing = False
    conflicts = 0

    async def append(self, *args: Any) -> Any:
        if self.failing:
            raise LogUnavailable("disk of ward 7 is full")
        if self.conflicts:
            self.conflicts -= 1
            raise SequenceConflict("once more")
        return await super().append(*args)


async def test_no_acknowledgement_without_the_log(log_path: Path) -> None:
    log = _FailingLog(log_path)
    async with running(log_path, log=log) as client:
        await client.admit()
        log.failing = True
        response = await client.post(observations=[hr()])
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        assert response.json()["type"] == "/problems/log-unavailable"
        assert "ward" not in response.text
        assert (await client.http.get("/episodes/e")).json()["seq"] == 1
        log.failing = False
        assert (await client.post(observations=[hr()])).json()["seq"] == 2


async def test_conflicts_are_retried_but_not_for_ever(log_path: Path) -> None:
    log = _FailingLog(log_path)
    async with running(log_path, log=log) as client:
        log.conflicts = 3
        assert (await client.admit()).status_code == 201
        log.conflicts = 100
        assert (await client.post(observations=[hr()])).status_code == 503


async def test_a_write_is_finished_though_its_caller_left(log_path: Path) -> None:
    class SlowLog(SqliteLog):
        async def append(self, *args: Any) -> Any:
            await asyncio.sleep(0.05)
            return await super().append(*args)

    async with running(log_path, log=SlowLog(log_path)) as client:
        await client.admit()
        posting = asyncio.create_task(client.post(observations=[hr()]))
        await asyncio.sleep(0.02)
        posting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await posting
        assert (await client.post(observations=[hr(81)])).json()["seq"] == 3


async def test_everything_is_there_after_a_restart(log_path: Path) -> None:
    clock = Clock(at(1))
    async with running(log_path, clock=clock) as client:
        await client.post(admitted_at=stamp(0), observations=[hr(id="a"), hr(70, hours=0.75)])
        before = (await client.risk()).json()
    async with running(log_path, clock=clock) as client:
        assert (await client.risk()).json() == before
        again = (await client.post(observations=[hr(id="a")])).json()
        assert again["duplicates"] == 1
