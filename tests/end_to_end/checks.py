"""What a log must hold after a load, and what must be said of it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from service.core import Entry, episode_at
from service.log import SqliteLog
from tests.end_to_end.load import HOURS, Load
from tests.online import Replica

SCORES = (
    "decompensation", "mortality", "remaining_los_hours", "remaining_los_interval_hours",
    "phenotypes", "imputed_share",
)  # fmt: skip


def read_log(path: Path) -> dict[str, list[Entry]]:
    """All entries, read from a copy of the files as the kill left them."""
    copy = path.with_name("copy")
    copy.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        if not file.name.endswith("-shm"):  # made anew from the WAL, as after a power cut
            shutil.copy(file, copy)

    async def read() -> dict[str, list[Entry]]:
        log = SqliteLog(copy / path.name)
        try:
            return {name: await log.entries(name) for name in await log.heads()}
        finally:
            await log.close()

    try:
        return asyncio.run(read())
    finally:
        shutil.rmtree(copy)


def assert_all_there(load: Load, log: dict[str, list[Entry]]) -> None:
    for entries in log.values():
        assert [e.seq for e in entries] == list(range(1, len(entries) + 1))
        assert [e.kind for e in entries].count("admission") == 1
        contents = [e.payload["content"] for e in entries if e.kind != "admission"]
        assert len(contents) == len(set(contents)), "something was applied twice"
    for ack in load.acknowledged:
        entry = log[ack.episode][ack.seq - 1]
        assert entry.item_id == ack.item_id
        assert entry.item_id == ack.item.get("id", entry.item_id)
        assert entry.target == ack.item.get("corrects", ack.item.get("withdraws"))
        assert entry.payload.get("value") == ack.item.get("value")


def replayed(replica: Replica, entries: Sequence[Entry], n_hours: int = HOURS) -> list[Any]:
    """Scores and states of the first hours, worked out in this process from the log alone."""
    view = episode_at(entries)
    answers = replica(view.episode, n_hours)
    said: list[Any] = []
    for hour, state in zip(answers.hours, answers.embeddings.tolist(), strict=True):
        if view.newest_data_at(hour.hour) is None:
            said.append(([None, None, None, None, {}, None], None))
        else:
            said.append(([asdict(hour)[s] for s in SCORES], state))
    return said
