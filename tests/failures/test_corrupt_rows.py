"""A row of the log that is not what was written concerns its own stay and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apsw
import pytest

from service.log.tables import open_tables
from service.log.verify import verify
from service.settings import Settings
from tests.service.fakes import Client, hr, running, stamp

pytestmark = pytest.mark.anyio

ROW = "episode_id = 'bad' AND seq = 2"

# What is done to the row of an observation. The hash beside it stays as it was.
DAMAGE = {
    "no JSON": "UPDATE log SET payload = '{\"variable\": ' WHERE {row}",
    "another value of JSON": "UPDATE log SET payload = '[1]' WHERE {row}",
    "a field is gone": "UPDATE log SET payload = '{}' WHERE {row}",
    "a field of another kind": "UPDATE log SET payload = json_set(payload, '$.value', 'x') "
    "WHERE {row}",
    "an unknown variable": "UPDATE log SET payload = json_set(payload, '$.variable', 'x') "
    "WHERE {row}",
    "an unknown kind": "UPDATE log SET kind = 'x' WHERE {row}",
    "no time": "UPDATE log SET effective_at = NULL WHERE {row}",
    "the row is gone": "DELETE FROM log WHERE {row}",
    "no text": "UPDATE log SET payload = CAST(x'ff' AS TEXT) WHERE {row}",
    "the admission is another kind": "UPDATE log SET kind = 'event' WHERE episode_id = 'bad' "
    "AND seq = 1",
}

# What could have been written as well: found by the hash alone.
SILENT = {
    "another number": "UPDATE log SET payload = json_set(payload, '$.value', 81) WHERE {row}",
    "another time": "UPDATE log SET effective_at = effective_at + 1 WHERE {row}",
    "a time beyond the calendar": "UPDATE log SET effective_at = 9000000000000000000 WHERE {row}",
    "recorded before the calendar": "UPDATE log SET recorded_at = -9000000000000000000 WHERE {row}",
}


def damage(path: Path, statement: str) -> None:
    """As nobody can through the service: the triggers of the database are taken away first."""
    db = apsw.Connection(str(path))
    for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
        db.execute(f"DROP TRIGGER {name}")
    db.execute(statement)
    db.close()


async def written(client: Client) -> None:
    for episode in ("good", "bad", "also-good"):
        answer = await client.post(
            episode, admitted_at=stamp(0), observations=[hr(80, 0.25), hr(90, 0.5)]
        )
        assert answer.status_code == 200


def damaged_stays(path: Path) -> set[str]:
    """Of which episodes `log verify` finds that they are not as they were written."""
    with open_tables(Settings(log_path=path)) as tables:
        findings = verify(tables, {}, lambda n: None)
    return {finding.chain for finding in findings if finding.table == "log"}


REQUESTS: list[tuple[str, str, Any]] = [
    ("GET", "/episodes/bad", None),
    ("GET", "/episodes/bad/risk", None),
    ("GET", "/episodes/bad/risk?as_of=1", None),
    ("PATCH", "/episodes/bad", {"discharged_at": None}),
    ("POST", "/episodes/bad/observations", {"observations": [hr(95, 0.75)]}),
    ("PUT", "/episodes/bad", {"admitted_at": stamp(0.1)}),
    ("DELETE", "/episodes/bad", None),
]


async def assert_others_are_served(client: Client) -> None:
    for episode in ("good", "also-good"):
        assert (await client.risk(episode)).status_code == 200
        assert (await client.post(episode, observations=[hr(95, 0.75)])).status_code == 200
    listed = (await client.http.get("/episodes")).json()
    assert {row["episode_id"] for row in listed["episodes"]} - {"bad"} == {"good", "also-good"}
    assert listed["complete"]
    assert (await client.http.get("/v2/health/ready")).status_code == 200


@pytest.mark.parametrize("what", DAMAGE)
async def test_one_stay_fails_and_no_other(log_path: Path, anyio_backend: str, what: str) -> None:
    async with running(log_path) as client:
        await written(client)
    damage(log_path, DAMAGE[what].replace("{row}", ROW))
    async with running(log_path) as client:
        await client.settle()
        for method, path, body in REQUESTS:
            answer = await client.http.request(method, path, json=body)
            assert (answer.status_code, answer.json()["type"]) == (500, "/problems/log-corrupt")
        await assert_others_are_served(client)
    assert damaged_stays(log_path) == {"bad"}


@pytest.mark.parametrize("what", SILENT)
async def test_what_could_have_been_written_is_found_by_its_hash(
    log_path: Path, anyio_backend: str, what: str
) -> None:
    async with running(log_path) as client:
        await written(client)
    assert damaged_stays(log_path) == set()
    damage(log_path, SILENT[what].replace("{row}", ROW))
    async with running(log_path) as client:
        await client.settle()
        for method, path, body in REQUESTS:
            answer = await client.http.request(method, path, json=body)
            assert answer.status_code in (200, 204) or "log-corrupt" in answer.text
        await assert_others_are_served(client)
    assert damaged_stays(log_path) == {"bad"}
