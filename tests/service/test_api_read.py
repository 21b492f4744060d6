"""Reading scores over HTTP: which hours, from which entries, and when not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.api.schemas import EmbeddingsOut, RiskOut
from tests.service.fakes import (
    BUNDLE,
    Client,
    creatinine,
    hr,
    running,
    stamp,
    three_hours,
)

pytestmark = pytest.mark.anyio


def hours_of(body: dict[str, Any]) -> list[int]:
    return [h["hour"] for h in body["hours"]]


async def test_the_answer_says_where_it_comes_from(client: Client) -> None:
    await three_hours(client)
    response = await client.risk()
    body = response.json()
    RiskOut.model_validate_json(response.text)
    assert response.headers["cache-control"] == "private, no-store"
    assert body["provenance"] == {
        "model": BUNDLE.name,
        "version": BUNDLE.version,
        "digest": BUNDLE.digest,
        "preprocessing_digest": BUNDLE.preprocessing_digest,
        "numerics": {
            "precision": "fp32",
            "backend": "torch-cpu",
            "rows": 32,
            "threads": 1,
            "kernel": "compiled",
            "gate": None,
        },
        "seq": 4,
        "as_of": None,
        "newest_data_at": stamp(3.5),
    }
    [hour] = body["hours"]
    assert (hour["hour"], hour["hour_start"], hour["hour_end"]) == (3, stamp(3), stamp(4))
    assert hour["status"] == "preliminary"
    assert hour["data_age_hours"] == 0.5
    assert hour["imputed_share"] == 0.5
    assert set(hour["phenotypes"]) == {"sepsis"}
    interval = {"low": 49.25, "high": 197.0, "coverage": 0.9}
    assert (hour["remaining_los_hours"], hour["remaining_los_interval_hours"]) == (97, interval)
    assert 0 < hour["decompensation"] < 1


@pytest.mark.parametrize(
    ("params", "hours"),
    [
        ({}, [3]),
        ({"hour": 0}, [0]),
        ({"hour": 2}, [2]),
        ({"from": 1}, [1, 2, 3]),
        ({"to": 1}, [0, 1]),
        ({"from": 1, "to": 2}, [1, 2]),
        ({"from": 3, "to": 3}, [3]),
    ],
)
async def test_hours_are_selected(client: Client, params: dict[str, Any], hours: list[int]) -> None:
    await three_hours(client)
    body = (await client.risk(**params)).json()
    assert hours_of(body) == hours
    everything = {h["hour"]: h for h in (await client.risk(to=3)).json()["hours"]}
    assert body["hours"] == [everything[hour] for hour in hours]


async def test_hours_without_data_may_be_asked_for_up_to_the_clock(client: Client) -> None:
    await three_hours(client)
    client.clock.to(6.5)
    body = (await client.risk(**{"from": 3, "to": 6})).json()
    assert hours_of(body) == [3, 4, 5, 6]
    assert [h["data_age_hours"] for h in body["hours"]] == [0.5, 1.5, 2.5, 3.5]
    assert all(h["decompensation"] is not None for h in body["hours"])
    assert hours_of((await client.risk()).json()) == [3]


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"hour": 7}, "hour-in-the-future"),
        ({"to": 7}, "hour-in-the-future"),
        ({"from": 7}, "hour-in-the-future"),
        ({"hour": -1}, "hour-out-of-range"),
        ({"hour": 200}, "hour-out-of-range"),
        ({"hour": 10**30}, "hour-out-of-range"),
        ({"from": 2, "to": 1}, "hour-out-of-range"),
        ({"from": -1}, "hour-out-of-range"),
        ({"hour": "now"}, "invalid-request"),
        ({"hour": 1.5}, "invalid-request"),
        ({"hour": 1, "to": 2}, "invalid-request"),
        ({"hours": 1}, "invalid-request"),
        ({"as_of": "yesterday"}, "invalid-request"),
        ({"as_of": "2026-03-01T08:00:00"}, "invalid-request"),
        ({"as_of": 0}, "invalid-request"),
        ({"as_of": -1}, "invalid-request"),
        ({"as_of": stamp(7)}, "invalid-request"),
        ({"as_of": 5}, "seq-not-reached"),
        ({"min_seq": 5}, "seq-not-reached"),
        ({"min_seq": -1}, "invalid-request"),
        ({"as_of": stamp(0.5)}, "episode-unknown"),
    ],
)
async def test_hours_that_cannot_be_answered(
    client: Client, params: dict[str, Any], problem: str
) -> None:
    await three_hours(client)
    client.clock.to(6.5)
    for resource in ("risk", "embeddings"):
        response = await client.http.get(f"/episodes/e/{resource}", params=params)
        assert response.json()["type"] == f"/problems/{problem}"


async def test_hours_after_the_discharge_do_not_exist(client: Client) -> None:
    await three_hours(client)
    client.clock.to(9)
    await client.http.patch("/episodes/e", json={"discharged_at": stamp(5.5)})
    assert (await client.risk(hour=5)).status_code == 200
    assert (await client.risk(hour=6)).json()["type"] == "/problems/hour-out-of-range"


async def test_an_episode_without_data_has_no_hours(client: Client) -> None:
    await client.admit()
    for params in ({}, {"from": 0}):
        body = (await client.risk(**params)).json()
        assert (body["hours"], body["score_withheld"]) == ([], {"reason": "no-data"})
    [hour] = (await client.risk(hour=0)).json()["hours"]
    assert hour["score_withheld"] == {"reason": "no-data"}
    assert hour["decompensation"] is hour["data_age_hours"] is None
    assert client.engine.submitted == []


async def test_hours_before_the_first_data_have_no_score(client: Client) -> None:
    client.clock.to(3)
    await client.post(admitted_at=stamp(0), observations=[hr(hours=2.5)])
    body = (await client.risk(to=2)).json()
    assert [h["score_withheld"] for h in body["hours"]] == [{"reason": "no-data"}] * 2 + [None]


async def test_no_score_from_stale_data(client: Client) -> None:
    await three_hours(client)
    client.clock.to(15.5)
    assert (await client.risk()).json()["hours"][0]["score_withheld"] is None
    client.clock.to(15.51)
    for params in ({}, {"hour": 3}, {"hour": 15}):
        [hour] = (await client.risk(**params)).json()["hours"]
        assert hour["score_withheld"] == {"reason": "stale-data"}
        assert hour["decompensation"] is hour["mortality"] is hour["remaining_los_hours"] is None
        assert hour["remaining_los_interval_hours"] is None
        assert hour["phenotypes"] == {}
    # What was said of the hours before stands: it was fresh at their end.
    past = (await client.risk(to=2)).json()["hours"]
    assert all(h["score_withheld"] is None for h in past)
    [row] = (await client.http.get("/episodes")).json()["episodes"]
    assert (row["risk"], row["score_withheld"]) == (None, {"reason": "stale-data"})


async def test_a_gap_within_the_stay_is_stale_too(client: Client) -> None:
    client.clock.to(30)
    await client.post(admitted_at=stamp(0), observations=[hr(hours=0.5), hr(81, hours=29.5)])
    hours = (await client.risk(to=29)).json()["hours"]
    withheld = [h["hour"] for h in hours if h["score_withheld"]]
    assert withheld == list(range(12, 29))


async def test_a_finished_stay_does_not_go_stale(client: Client) -> None:
    await three_hours(client)
    client.clock.to(4)
    await client.http.patch("/episodes/e", json={"discharged_at": stamp(4)})
    client.clock.to(1000)
    assert (await client.risk()).json()["hours"][0]["decompensation"] is not None


async def test_without_a_limit_nothing_goes_stale(log_path: Path) -> None:
    async with running(log_path, staleness_limit_hours=None) as client:
        await three_hours(client)
        client.clock.to(1000)
        assert (await client.risk()).json()["hours"][0]["decompensation"] is not None


async def test_the_kill_switch_withholds_every_score(log_path: Path) -> None:
    async with running(log_path, scoring_enabled=False) as client:
        await three_hours(client)
        body = (await client.risk(to=3)).json()
        assert [h["score_withheld"] for h in body["hours"]] == [{"reason": "scoring-disabled"}] * 4
        embedding = (await client.http.get("/episodes/e/embeddings")).json()["hours"][0]
        assert embedding["embedding"] is None
        [row] = (await client.http.get("/episodes")).json()["episodes"]
        assert row["score_withheld"] == {"reason": "scoring-disabled"}
        assert client.engine.submitted == client.engine.past == []


async def test_statuses_follow_the_clock_and_late_data(client: Client) -> None:
    await three_hours(client)

    async def statuses() -> list[str]:
        return [h["status"] for h in (await client.risk(to=3)).json()["hours"]]

    assert await statuses() == ["final"] + ["preliminary"] * 3
    client.clock.to(6)
    assert await statuses() == ["final"] * 4
    await client.post(observations=[hr(200, hours=1.25)])
    assert await statuses() == ["final", "amended", "amended", "amended"]


async def test_reads_see_what_was_just_written(client: Client) -> None:
    await client.admit()
    for i in range(20):
        seq = (await client.post(observations=[hr(60 + i, id=f"i{i}")])).json()["seq"]
        body = (await client.risk(min_seq=seq)).json()
        assert body["seq"] == body["provenance"]["seq"] == seq
        load = sum(60 + j for j in range(i + 1))
        assert body["hours"][0]["decompensation"] == pytest.approx(load / (1000 + load))


async def test_as_of_shows_what_was_seen_then(client: Client) -> None:
    await three_hours(client)
    seen = {}
    client.clock.to(3.75)
    seen[3.75] = (await client.risk()).json()
    client.clock.to(4)
    await client.post(
        observations=[hr(300, hours=3.25, id="late")], events=[creatinine(9, hours=0.25)]
    )
    seen[4] = (await client.risk()).json()
    client.clock.to(9)
    await client.post(withdrawals=[{"withdraws": "late"}])
    assert (await client.risk()).json()["hours"] != seen[4]["hours"]
    for hours, body in seen.items():
        then = (await client.risk(as_of=stamp(hours))).json()
        assert then["provenance"].pop("as_of") == stamp(hours)
        body["provenance"].pop("as_of")
        assert then == body
    assert (await client.risk(as_of=4)).json()["hours"] == seen[3.75]["hours"]
    assert client.engine.past != []
    episode = (await client.http.get("/episodes/e", params={"as_of": 4})).json()
    assert (episode["seq"], episode["counts"]["observations"]) == (4, 3)


async def test_as_of_now_is_now_and_the_future_is_refused(client: Client) -> None:
    await three_hours(client)
    now = (await client.risk(as_of=stamp(3.75))).json()
    assert now["hours"] == (await client.risk()).json()["hours"]


async def test_a_plus_in_a_query_may_arrive_as_a_space(client: Client) -> None:
    await three_hours(client)
    response = await client.http.get("/episodes/e/risk?as_of=2026-03-01T11:00:00+01:00")
    assert response.json()["provenance"]["as_of"] == stamp(2)


async def test_polling_costs_nothing_until_something_changes(client: Client) -> None:
    await three_hours(client)
    first = await client.risk()
    asked = len(client.engine.submitted)
    etag = first.headers["etag"]
    assert etag.startswith(f'"4.{BUNDLE.digest[:8]}.{BUNDLE.preprocessing_digest[:8]}.')

    async def poll(tag: str, **params: Any) -> int:
        response = await client.http.get(
            "/episodes/e/risk", params=params, headers={"if-none-match": tag}
        )
        assert response.headers["cache-control"] == "private, no-store"
        assert (response.content == b"") == (response.status_code == 304)
        return response.status_code

    for tag in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        assert await poll(tag) == 304
    assert await poll('"4.x"') == 200
    assert await poll(etag, to=3) == 200
    assert await poll(etag, as_of=4) == 200
    assert len(client.engine.submitted) == asked
    client.clock.to(6)  # the hour has become final
    assert await poll(etag) == 200
    etag = (await client.risk()).headers["etag"]
    client.clock.to(5.99)
    await client.post(observations=[hr(90, hours=3.25)])
    assert await poll(etag) == 200
    embeddings = await client.http.get("/episodes/e/embeddings")
    assert embeddings.headers["etag"] != (await client.risk()).headers["etag"]


async def test_another_gate_is_another_answer(client: Client) -> None:
    await three_hours(client)
    gate = {"limit": 0.01, "stays": 3, "hours": 9, "changes": {}}
    numerics = [
        replace(BUNDLE.numerics, precision="bf16", gate=gate | {"stays": n}) for n in (3, 4)
    ]
    tags = []
    for measured in numerics:
        client.engine.bundle = replace(BUNDLE, numerics=measured)
        answer = await client.risk()
        assert answer.json()["provenance"]["numerics"]["gate"] == measured.gate
        tags.append(answer.headers["etag"])
    assert tags[0] != tags[1]


async def test_embeddings_are_exact(client: Client) -> None:
    await three_hours(client)
    response = await client.http.get("/episodes/e/embeddings", params={"to": 3})
    EmbeddingsOut.model_validate_json(response.text)
    body = json.loads(response.text)
    risks = [h["decompensation"] for h in (await client.risk(to=3)).json()["hours"]]
    assert [h["embedding"][0] for h in body["hours"]] == [0, 1, 2, 3]
    for hour, risk in zip(body["hours"], risks, strict=True):
        assert hour["embedding"][1] == pytest.approx(risk, rel=1e-6)
