"""GET /episodes: filter, order, pages."""

from __future__ import annotations

from typing import Any

import pytest

from service.api.schemas import EpisodeListOut
from tests.service.fakes import Client, hr, stamp

pytestmark = pytest.mark.anyio


@pytest.fixture
async def ward(client: Client) -> Client:
    """Seven stays: risk rises from a to e, where b and c are equal; f and g have no data."""
    for i, (name, value) in enumerate(zip("abcde", (50, 60, 60, 70, 80), strict=True)):
        client.clock.to(1 + i / 100)
        await client.post(name, admitted_at=stamp(-i), observations=[hr(value)])
    for i, name in enumerate("fg"):
        client.clock.to(1.2 + i / 100)
        await client.post(name, admitted_at=stamp(-10 - i))
    client.clock.to(1.3)
    await client.http.patch("/episodes/b", json={"discharged_at": stamp(0.75)})
    await client.settle()
    return client


async def listed(client: Client, **params: Any) -> list[str]:
    response = await client.http.get("/episodes", params=params)
    assert response.status_code == 200
    EpisodeListOut.model_validate_json(response.text)
    return [row["episode_id"] for row in response.json()["episodes"]]


async def test_a_row_says_what_the_ward_needs(ward: Client) -> None:
    row = (await ward.http.get("/episodes")).json()["episodes"][0]
    risk = 80 / 1080
    assert row == {
        "episode_id": "e",
        "seq": 2,
        "admitted_at": stamp(-4),
        "discharged_at": None,
        "updated_at": stamp(1.04),
        "newest_data_at": stamp(0.5),
        "hour": 4,
        "status": "preliminary",
        "risk": risk,
        "decompensation": risk,
        "mortality": risk / 2,
        "remaining_los_hours": 96.0,
        "scored_seq": 2,
        "score_withheld": None,
    }


@pytest.mark.parametrize(
    ("params", "order"),
    [
        ({}, "edcbafg"),
        ({"order": "asc"}, "abcdefg"),
        ({"sort": "episode_id"}, "abcdefg"),
        ({"sort": "episode_id", "order": "desc"}, "gfedcba"),
        ({"sort": "admitted_at"}, "abcdefg"),
        ({"sort": "admitted_at", "order": "asc"}, "gfedcba"),
        ({"sort": "updated_at"}, "bgfedca"),
        ({"status": "open"}, "edcafg"),
        ({"status": "discharged"}, "b"),
        ({"min_risk": 0.06}, "ed"),
        ({"min_risk": 0}, "edcba"),
        ({"min_risk": 1}, ""),
    ],
)
async def test_order_and_filters(ward: Client, params: dict[str, Any], order: str) -> None:
    assert "".join(await listed(ward, **params)) == order


@pytest.mark.parametrize("sort", ["risk", "episode_id", "admitted_at", "updated_at"])
@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 2, 3, 6, 7, 8])
async def test_pages_together_are_the_whole(
    ward: Client, sort: str, order: str, limit: int
) -> None:
    whole = await listed(ward, sort=sort, order=order)
    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        body = (
            await ward.http.get(
                "/episodes", params={"sort": sort, "order": order, "limit": limit} | cursor
            )
        ).json()
        assert 0 < len(body["episodes"]) <= limit
        seen += [row["episode_id"] for row in body["episodes"]]
        if body["next_cursor"] is None:
            break
        cursor = {"cursor": body["next_cursor"]}
    assert seen == whole


async def test_a_stay_that_goes_between_pages_shifts_nothing(ward: Client) -> None:
    first = (await ward.http.get("/episodes", params={"limit": 2})).json()
    await ward.http.delete("/episodes/e")
    await ward.http.delete("/episodes/d")
    rest = await listed(ward, limit=2, cursor=first["next_cursor"])
    assert rest == ["c", "b"]


@pytest.mark.parametrize(
    "params",
    [
        {"sort": "name"},
        {"order": "up"},
        {"limit": 0},
        {"limit": 501},
        {"limit": "many"},
        {"min_risk": 1.5},
        {"min_risk": "nan"},
        {"status": "dead"},
        {"page": 2},
        {"cursor": "x"},
        {"cursor": "AAAA"},
        {"cursor": "W10="},
        {"cursor": "x" * 600},
    ],
)
async def test_bad_parameters(ward: Client, params: dict[str, Any]) -> None:
    response = await ward.http.get("/episodes", params=params)
    assert (response.status_code, response.json()["type"]) == (422, "/problems/invalid-request")


async def test_a_cursor_belongs_to_its_order(ward: Client) -> None:
    cursor = (await ward.http.get("/episodes", params={"limit": 2})).json()["next_cursor"]
    for params in ({"order": "asc"}, {"sort": "episode_id"}, {"sort": "updated_at"}):
        response = await ward.http.get("/episodes", params=params | {"cursor": cursor})
        assert response.json()["type"] == "/problems/invalid-request"


async def test_the_list_follows_new_data(ward: Client) -> None:
    await ward.post("a", observations=[hr(340)])
    await ward.settle()
    assert (await listed(ward))[0] == "a"


async def test_withdrawn_data_leaves_no_score_behind(ward: Client) -> None:
    await ward.post("x", admitted_at=stamp(0), observations=[hr(id="only")])
    await ward.settle()
    await ward.post("x", withdrawals=[{"withdraws": "only"}])
    await ward.settle()
    rows = {r["episode_id"]: r for r in (await ward.http.get("/episodes")).json()["episodes"]}
    assert rows["x"]["risk"] is None
    assert rows["x"]["score_withheld"] == {"reason": "no-data"}
    assert rows["f"]["hour"] is rows["f"]["status"] is None


async def test_a_score_of_withdrawn_data_does_not_come_back_with_new_data(client: Client) -> None:
    await client.post(admitted_at=stamp(0), observations=[hr(id="wrong")])
    await client.settle()
    await client.post(withdrawals=[{"withdraws": "wrong"}])
    client.engine.held = True
    await client.post(observations=[hr(60)])
    [row] = (await client.http.get("/episodes")).json()["episodes"]
    assert (row["risk"], row["score_withheld"]) == (None, {"reason": "not-computed"})


async def test_the_score_of_an_earlier_hour_is_not_shown_for_the_newest(client: Client) -> None:
    await client.post(admitted_at=stamp(0), observations=[hr(60)])
    await client.settle()
    client.clock.to(3)
    client.engine.held = True
    await client.post(observations=[hr(90, hours=2.5)])

    async def row() -> tuple[Any, ...]:
        [row] = (await client.http.get("/episodes")).json()["episodes"]
        return row["hour"], row["scored_seq"], row["remaining_los_hours"], row["score_withheld"]

    assert await row() == (2, None, None, {"reason": "not-computed"})
    client.engine.release()
    await client.settle()
    assert await row() == (2, 3, 98.0, None)


async def test_a_stay_deleted_while_it_is_scored_stays_gone(client: Client) -> None:
    client.engine.held = True
    await client.post(admitted_at=stamp(0), observations=[hr()])
    await client.http.delete("/episodes/e")
    client.engine.release()
    await client.settle()
    assert await listed(client) == []


async def test_an_empty_list(client: Client) -> None:
    body = (await client.http.get("/episodes")).json()
    assert (body["episodes"], body["next_cursor"]) == ([], None)
