"""A client sees in the list what it may see, and its cursors say nothing of anything else."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.access.authenticator import Credentials
from service.access.principal import Principal, Scope
from tests.service.fakes import Client, hr, running, stamp

pytestmark = pytest.mark.anyio

STAYS = {
    "a-1": "medical", "a-2": "surgical", "a-3": None,
    "b-1": "medical", "b-2": "surgical", "b-3": "medical",
}  # fmt: skip

NARROWED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "all": ({}, set(STAYS)),
    "medical": ({"units": frozenset({"medical"})}, {"a-1", "b-1", "b-3"}),
    "a": ({"episodes": ("a-*",)}, {"a-1", "a-2", "a-3"}),
    "both": ({"units": frozenset({"medical"}), "episodes": ("b-*",)}, {"b-1", "b-3"}),
    "none": ({"episodes": ("c-*",)}, set()),
}


class ByName:
    """Takes everybody at their word."""

    def address(self, credentials: Credentials) -> str:
        return credentials.peer

    async def recognise(self, credentials: Credentials) -> Principal:
        name = credentials.authorization or "all"
        return Principal(id=name, method="test", scopes=frozenset(Scope), **NARROWED[name][0])


@pytest.fixture
async def stays(log_path: Path, anyio_backend: str) -> AsyncIterator[Client]:
    async with running(log_path, authenticator=ByName()) as client:
        for stay, unit in STAYS.items():
            statics = {} if unit is None else {"unit_type": unit}
            await client.post(
                stay, admitted_at=stamp(0), statics=statics, observations=[hr(60, hours=0.5)]
            )
        await client.settle()
        yield client


async def page(client: Client, name: str, **query: Any) -> tuple[list[str], str | None]:
    answer = await client.http.get("/episodes", params=query, headers={"Authorization": name})
    assert answer.status_code == 200
    body = answer.json()
    return [row["episode_id"] for row in body["episodes"]], body["next_cursor"]


@pytest.mark.parametrize("name", NARROWED)
@pytest.mark.parametrize("sort", ["risk", "admitted_at", "updated_at", "episode_id"])
async def test_pages_hold_what_a_client_may_see(stays: Client, name: str, sort: str) -> None:
    _, visible = NARROWED[name]
    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        shown, following = await page(stays, name, sort=sort, limit=1, **cursor)
        seen += shown
        if following is None:
            break
        assert shown
        *_, episode_id = json.loads(base64.urlsafe_b64decode(following))
        assert episode_id == shown[-1]
        cursor = {"cursor": following}
    assert sorted(seen) == sorted(visible)
    assert (await page(stays, name, sort=sort))[1] is None


async def test_the_cursor_of_another_client_shows_nothing_more(stays: Client) -> None:
    _, cursor = await page(stays, "all", sort="episode_id", limit=2)
    shown, following = await page(stays, "medical", sort="episode_id", limit=9, cursor=cursor)
    assert (shown, following) == (["b-1", "b-3"], None)


async def test_a_stay_that_moves_to_another_unit_moves_between_lists(stays: Client) -> None:
    await stays.http.patch("/episodes/a-1", json={"statics": {"unit_type": "surgical"}})
    assert sorted((await page(stays, "medical"))[0]) == ["b-1", "b-3"]
