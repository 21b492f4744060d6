"""The verdict on a kill test finds whatever it is there to find."""

from __future__ import annotations

import asyncio
import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import apsw
import httpx
import pytest

from service.log.rows import FIRST, chain_hash
from service.log.tables import open_tables
from service.settings import Settings
from tests.service.fakes import T0, Clock, at, running
from tests.torture import work
from tests.torture.trail import assert_trail_tells
from tests.torture.verdict import assert_log_holds
from tests.torture.work import Client, Ledger, Request

N_CLIENTS, N_REQUESTS = 3, 150

Row = list[Any]
# Columns.
SEQ, ITEM_ID, RECORDED_AT, PAYLOAD = 1, 3, 6, 8
AUDIT_RECORD = 3


class Ticking(Clock):
    """Every look at it is a moment of its own."""

    def __call__(self) -> datetime:
        self.now += timedelta(milliseconds=1)
        return self.now


@dataclass
class Case:
    """A log as rows, and what clients know of it."""

    log: list[Row]
    audit: list[Row]
    ledger: Ledger

    def item(self, named: bool = True) -> int:
        """The place of an item that was acknowledged, with others of its stay after it."""
        for i, row in enumerate(self.log[:-3]):
            own = row[ITEM_ID] is not None and not row[ITEM_ID].startswith("sha256:")
            if row[2] == "observation" and own == named and self.log[i + 3][0] == row[0]:
                return i
        raise AssertionError("there is none")

    def line(self) -> int:
        """The place of the line of an append."""
        at_us = self.log[self.item()][RECORDED_AT]
        return next(i for i, row in enumerate(self.audit) if row[2] == at_us)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ledger]:
    """A log that several clients wrote to, and their ledger."""
    path, ledger = tmp_path_factory.mktemp("good") / "log.sqlite", Ledger(T0)

    async def run() -> None:
        clock = Ticking(at(48))
        async with (
            running(path, clock=clock, requests_per_second_per_client=None) as service,
            asyncio.TaskGroup() as group,
        ):
            for i in range(N_CLIENTS):
                transport = httpx.ASGITransport(app=service.app)
                client = Client(i, 0, lambda: ["http://test"], ledger, transport)
                group.create_task(client.work(lambda: ledger.counts["requests"] < N_REQUESTS))

    asyncio.run(run())
    return path, ledger


def read(path: Path, ledger: Ledger) -> Case:
    with open_tables(Settings(log_path=path)) as tables:
        log, audit = ([list(row) for row in tables.rows(name)] for name in ("log", "audit"))
    return Case(log, audit, copy.deepcopy(ledger))


def write(path: Path, case: Case) -> None:
    """Tables without any constraint, in the place of those that are there."""
    db = apsw.Connection(str(path))
    db.execute("PRAGMA synchronous = OFF")
    for table, rows in (("log", case.log), ("audit", case.audit)):
        columns = ", ".join(column[1] for column in db.execute(f"PRAGMA table_info({table})"))
        db.execute(f"DROP TABLE {table}; CREATE TABLE {table} ({columns})")
        marks = ", ".join("?" * len(rows[0]))
        db.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
    db.close()


def chained(rows: Sequence[Row], *, numbered: bool = True) -> list[Row]:
    """The rows with hashes that fit, as somebody would have written them."""
    done: list[Row] = []
    heads: dict[str, tuple[int, bytes]] = {}
    for row in sorted(rows, key=lambda row: row[0]):
        seq, last = heads.get(row[0], (0, FIRST))
        values = [row[0], seq + 1 if numbered else row[SEQ], *row[2:-1]]
        heads[row[0]] = seq + 1, chain_hash(last, values)
        done.append([*values, heads[row[0]][1]])
    return done


def judge(path: Path, ledger: Ledger) -> None:
    settings = Settings(log_path=path)
    with open_tables(settings) as tables:
        log = assert_log_holds(tables, ledger)
    assert_trail_tells(settings, log, ledger)


def lost_item(case: Case) -> None:
    del case.log[case.item()]
    case.log = chained(case.log)


def lost_last_item(case: Case) -> None:
    del case.log[-1]


def doubled_item(case: Case) -> None:
    i = case.item()
    case.log.insert(i + 1, list(case.log[i]))
    case.log = chained(case.log)


def doubled_item_without_a_name(case: Case) -> None:
    i = case.item(named=False)
    case.log.insert(i + 2, list(case.log[i]))
    case.log = chained(case.log)


def foreign_item(case: Case) -> None:
    row = list(case.log[case.item()])
    row[ITEM_ID] = "of-nobody"
    case.log.insert(case.item() + 1, row)
    case.log = chained(case.log)


def foreign_stay(case: Case) -> None:
    first = case.log[0][0]
    case.log += [["of-nobody", *row[1:]] for row in case.log if row[0] == first]
    case.log = chained(case.log)


def another_value(case: Case) -> None:
    row = case.log[case.item()]
    row[PAYLOAD] = json.dumps(json.loads(row[PAYLOAD]) | {"value": 1.25})
    case.log = chained(case.log)


def gap(case: Case) -> None:
    i = case.item()
    del case.log[i]
    case.log = chained(case.log, numbered=False)


def broken_hash(case: Case) -> None:
    case.log[case.item()][-1] = bytes(32)


def broken_hash_of_a_line(case: Case) -> None:
    case.audit[0][-1] = bytes(32)


def time_that_runs_backwards(case: Case) -> None:
    case.log[case.item() + 1][RECORDED_AT] -= 60_000_000
    case.log = chained(case.log)


def another_number(case: Case) -> None:
    told = case.ledger.acknowledged
    told[0] = replace(told[0], seq=told[0].seq + 1)


def lost_discharge(case: Case) -> None:
    case.ledger.discharged.pop()


def lost_line(case: Case) -> None:
    del case.audit[case.line()]
    case.audit = chained(case.audit)


def doubled_line(case: Case) -> None:
    i = case.line()
    case.audit.insert(i + 1, list(case.audit[i]))
    case.audit = chained(case.audit)


def told(case: Case, **what: Any) -> None:
    row = case.audit[case.line()]
    row[AUDIT_RECORD] = json.dumps(json.loads(row[AUDIT_RECORD]) | what)
    case.audit = chained(case.audit)


def line_of_another_operation(case: Case) -> None:
    told(case, operation="putEpisode")


def line_of_another_stay(case: Case) -> None:
    told(case, episodes=["of-nobody"])


def line_of_a_failure(case: Case) -> None:
    told(case, outcome="failed")


def line_of_another_request(case: Case) -> None:
    told(case, request_id="of-nobody")


def line_of_another_instant(case: Case) -> None:
    case.audit[case.line()][2] += 1
    case.audit = chained(case.audit)


def two_lines_of_one_answer(case: Case) -> None:
    """Of a read, which may be told twice, but in the same words."""
    record = next(r for r in case.audit if json.loads(r[AUDIT_RECORD])["action"] == "read")
    case.audit.append([record[0], 0, record[2] + 1, *record[3:]])
    case.audit = chained(case.audit)


DAMAGES = (
    lost_item, lost_last_item, doubled_item, doubled_item_without_a_name, foreign_item,
    foreign_stay, another_value, gap, broken_hash, broken_hash_of_a_line, time_that_runs_backwards,
    another_number, lost_discharge, lost_line, doubled_line, line_of_another_operation,
    line_of_another_stay, line_of_a_failure, line_of_another_request, line_of_another_instant,
    two_lines_of_one_answer,
)  # fmt: skip


def test_a_log_as_it_should_be_passes(good: tuple[Path, Ledger], tmp_path: Path) -> None:
    """Also once it was written anew, as the damaged ones are."""
    path, ledger = good
    judge(path, ledger)
    shutil.copy(path, tmp_path)
    case = read(path, ledger)
    case.log, case.audit = chained(case.log), chained(case.audit)
    write(tmp_path / path.name, case)
    judge(tmp_path / path.name, case.ledger)
    kinds = {request.kind for request in ledger.attempts.values()}
    assert kinds == {"post", "again", "discharge", "delete", "read", "risk"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(
    good: tuple[Path, Ledger], tmp_path: Path, damage: Callable[[Case], None]
) -> None:
    path, ledger = good
    shutil.copy(path, tmp_path)
    case = read(path, ledger)
    damage(case)
    write(tmp_path / path.name, case)
    with pytest.raises(AssertionError):
        judge(tmp_path / path.name, case.ledger)


def test_a_line_of_a_read_may_be_there_twice(good: tuple[Path, Ledger], tmp_path: Path) -> None:
    path, ledger = good
    shutil.copy(path, tmp_path)
    case = read(path, ledger)
    case.audit += [r for r in case.audit if json.loads(r[AUDIT_RECORD])["action"] == "read"]
    case.audit = chained(case.audit)
    write(tmp_path / path.name, case)
    judge(tmp_path / path.name, case.ledger)


@pytest.mark.parametrize(
    ("seq", "n_items", "stands"), [(4, 3, True), (5, 4, True), (3, 3, False), (4, 2, False)]
)
def test_a_client_notices_what_is_not_there(
    monkeypatch: pytest.MonkeyPatch, seq: int, n_items: int, stands: bool
) -> None:
    """It was told of three items, the last one with the number 4; a fourth one is on its way."""
    monkeypatch.setattr(work, "_LOOKS", 1)
    ledger = Ledger(T0)
    items = [{"value": i} for i in range(4)]
    ledger.sent["e"] = items

    def answer(asked: httpx.Request) -> httpx.Response:
        if asked.method == "POST":
            results = [{"status": "accepted", "item_id": str(i), "seq": i + 2} for i in range(3)]
            return httpx.Response(200, json={"items": results})
        return httpx.Response(200, json={"seq": seq, "counts": {"observations": n_items}})

    client = Client(0, 0, lambda: ["http://a", "http://b"], ledger, httpx.MockTransport(answer))
    monkeypatch.setattr(client, "_requests", [Request("post", "e", {"observations": items[:3]})])
    monkeypatch.setattr(client._random, "choice", lambda of: of[0])
    if stands:
        asyncio.run(client.work(lambda: False))
        assert ledger.counts["looks"] == 1
    else:
        with pytest.raises(AssertionError):
            asyncio.run(client.work(lambda: False))
