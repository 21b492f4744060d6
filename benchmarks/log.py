"""The log by itself: how long an append takes in either database, and what its hashes cost.

    python -m benchmarks.log [--postgres URL] [--seconds 10] [--items 15] [--quick]

Clients append hourly bundles, each to a stay of its own, one after the other, with a line of the
audit trail in the same transaction. Without a URL of an empty PostgreSQL (`python -m service log
migrate` makes its schema) the SQLite file alone is measured. Put TMPDIR on the disk that counts.

    p50_ms, p99_ms     of one append, from the call until it is durable
    appends_per_s      of all clients together
    hash_us_per_entry  computing the hash, in an append
    rows_us_per_entry  the whole of making rows of entries, the hash included
    verify_per_s       entries that `python -m service log verify` checks in a second
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import milliseconds, progress, write
from service.entries import Draft, to_us
from service.log import EventLog, PostgresLog, SqliteLog
from service.log.rows import FIRST, chain_hash, number, to_rows
from service.log.sqlite_file import open_reader
from service.log.tables import PostgresTables, SqliteTables, Tables
from service.log.verify import verify
from service.trail.record import AuditRecord

CLIENTS = (1, 8, 64)


def main() -> None:
    a = _arguments()
    with tempfile.TemporaryDirectory() as folder, progress() as bar:
        task = bar.add_task("log", total=len(CLIENTS) * (1 + bool(a.postgres)) + 1)
        path = Path(folder) / "log.sqlite"
        advance = partial(bar.advance, task)
        file = Database("sqlite", lambda: SqliteLog(path), lambda: SqliteTables(open_reader(path)))
        rows = measure(file, a, advance)
        if a.postgres:
            server = Database(
                "postgresql", lambda: PostgresLog(a.postgres), lambda: PostgresTables(a.postgres)
            )
            rows += measure(server, a, advance)
        hashing = hash_cost(a.items)
        bar.advance(task)
    write(a.name, rows, items=a.items, seconds=a.seconds, **hashing)


def bundle(items: int, hour: int) -> list[Draft]:
    """What a stay sends in an hour, as the service would record it."""
    now = datetime.now(UTC)
    return [
        Draft(
            kind="observation",
            item_id=f"o-{hour}-{i}",
            effective_at=now,
            available_at=now,
            payload={
                "variable": "heart_rate", "value": 80.5 + i, "unit": "1/min", "source": "monitor",
                "content": "sha256:0123456789abcdef0123456789abcdef",
            },
        )
        for i in range(items)
    ]  # fmt: skip


async def load(log: EventLog, clients: int, seconds: float, items: int) -> list[float]:
    """Durations of the appends of so many clients, in seconds."""
    durations: list[float] = []
    end = time.perf_counter() + seconds

    async def client(n: int) -> None:
        seq = hour = 0
        episode = f"stay-{clients}-{n}"
        record = AuditRecord(
            at_us=to_us(datetime.now(UTC)), principal="ward-7", method="api-key",
            operation="post_observations", action="update", episodes=(episode,),
            outcome="success", request_id="8b1f2c", address="192.0.2.17",
        )  # fmt: skip
        while time.perf_counter() < end:
            drafts, hour = bundle(items, hour), hour + 1
            began = time.perf_counter()
            await log.append(episode, drafts, datetime.now(UTC), seq, record)
            durations.append(time.perf_counter() - began)
            seq += items

    await asyncio.gather(*(client(n) for n in range(clients)))
    return durations


class Database(NamedTuple):
    """Where a log is, and how it is opened."""

    name: str
    log: Callable[[], EventLog]
    tables: Callable[[], Tables]


def measure(
    database: Database, a: argparse.Namespace, advance: Callable[[], None]
) -> list[dict[str, Any]]:
    """A row for every number of clients."""
    rows: list[dict[str, Any]] = []

    async def loads() -> None:
        log = database.log()
        await log.open()
        for clients in CLIENTS:
            durations = await load(log, clients, a.seconds, a.items)
            rows.append(
                {"database": database.name, "clients": clients}
                | milliseconds(durations, 0.5, 0.99)
                | {"appends_per_s": round(len(durations) / a.seconds)}
            )
            advance()
        await log.close()

    asyncio.run(loads())
    with database.tables() as opened:
        n = opened.count("log") + opened.count("audit")
        began = time.perf_counter()
        assert verify(opened, {}, lambda n: None) == []
        rate = round(n / (time.perf_counter() - began))
    return [row | {"verify_per_s": rate, "entries": n} for row in rows]


def hash_cost(items: int, repeats: int = 200) -> dict[str, float]:
    """Microseconds an entry: of the hash, and of making its row."""
    entries = number("stay-1", 0, bundle(items, 0), datetime.now(UTC))
    rows = to_rows(entries, FIRST)
    hashes, whole = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        for row in rows:
            chain_hash(FIRST, row[:-1])
        hashes.append(time.perf_counter() - began)
        began = time.perf_counter()
        to_rows(entries, FIRST)
        whole.append(time.perf_counter() - began)
    return {
        "hash_us_per_entry": round(min(hashes) / items * 1e6, 2),
        "rows_us_per_entry": round(min(whole) / items * 1e6, 2),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--postgres", metavar="URL", help="an empty database with the schema")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of clients")
    parser.add_argument("--items", type=int, default=15, help="in one append")
    parser.add_argument("--name", default="log", help="results/NAME.json")
    parser.add_argument("--quick", action="store_true", help="a moment of each")
    a = parser.parse_args()
    if a.quick:
        a.seconds = 0.2
    return a


if __name__ == "__main__":
    main()
