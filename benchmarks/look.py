"""What a read pays for looking at a log that replicas share.

    python -m benchmarks.look --postgres URL [--seconds 5] [--name look]

Readers look at a stay of 24 hours with 15 items each, one after the other, as `Memory.look` does:
`nothing new` is what every read pays, `one entry` what follows a write of another replica, `whole`
the first read of a stay. The PostgreSQL must be an empty one with the schema of the log
(`python -m service log migrate`).
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from benchmarks.log import bundle
from benchmarks.report import milliseconds, progress, write
from service.log import PostgresLog

READERS = (1, 8, 64)
HOURS, ITEMS = 24, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--postgres", required=True, help="URL of an empty log")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--name", default="look", help="of the file in benchmarks/results")
    a = parser.parse_args()
    write(a.name, asyncio.run(measure(a.postgres, a.seconds)), hours=HOURS, items=ITEMS)


async def measure(url: str, seconds: float) -> list[dict[str, Any]]:
    """A row for each kind of look and number of readers."""
    log = PostgresLog(url)
    await log.open()
    names = [f"stay-{n}" for n in range(max(READERS))]
    for name in names:
        for hour in range(HOURS):
            await log.append(name, bundle(ITEMS, hour), datetime.now(UTC), hour * ITEMS)
    n = HOURS * ITEMS
    looks: dict[str, Callable[[str], Awaitable[Any]]] = {
        "nothing new": lambda name: log.entries(name, n - 1),
        "one entry": lambda name: log.entries(name, n - 2),
        "whole": lambda name: log.entries(name),
    }
    rows = []
    with progress() as bar:
        task = bar.add_task("looks", total=len(looks) * len(READERS))
        for kind, look in looks.items():
            for readers in READERS:
                durations = await load(look, names[:readers], seconds)
                rows.append(
                    {"look": kind, "readers": readers}
                    | milliseconds(durations, 0.5, 0.99)
                    | {"per_s": round(len(durations) / seconds)}
                )
                bar.advance(task)
    await log.close()
    return rows


async def load(
    look: Callable[[str], Awaitable[Any]], names: list[str], seconds: float
) -> list[float]:
    """Durations of the looks of one reader a name, in seconds."""
    durations: list[float] = []
    end = time.perf_counter() + seconds

    async def reader(name: str) -> None:
        while time.perf_counter() < end:
            began = time.perf_counter()
            await look(name)
            durations.append(time.perf_counter() - began)

    await asyncio.gather(*map(reader, names))
    return durations


if __name__ == "__main__":
    main()
