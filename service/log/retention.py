"""Episodes whose time to be kept is over: their entries are removed, and what is left says so.

Of such an episode the table `retired` keeps the id, the number and the hash of its last entry, when
it was removed, and why. The id is never used again.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from service.entries import Entry, to_us
from service.log.base import LogCorrupt
from service.log.rows import AuditChain, from_rows
from service.log.tables import Tables, text_of
from service.timeline import discharge_of
from service.trail.record import AuditRecord

# What one transaction removes, for which those that write wait.
_EPISODES = 100
_ENTRIES = 20_000


class Due(NamedTuple):
    """Which episodes are to be removed, and of which it cannot be told."""

    heads: dict[str, int]
    """The number of the last entry of each."""
    unreadable: list[str]


def discharged_before(tables: Tables, instant: datetime) -> Due:
    """Episodes that were discharged before an instant, or deleted without having been discharged.

    Raises LogUnavailable; LogCorrupt if that cannot be found out of any.
    """
    discharged: dict[str, bool] = {}
    deleted: dict[str, bool] = {}
    unreadable: set[str] = set()
    # Of one moment: a stay whose discharge is taken back in between would be judged by the old
    # entries, and named with the new number.
    with tables.snapshot():
        for row in tables.rows("log", "kind IN ('discharge', 'deletion')"):
            episode_id = str(text_of(row[0]))
            try:
                if episode_id != row[0]:
                    raise LogCorrupt("an id that is no text")
                [entry] = from_rows(episode_id, row[1] - 1, [row[1:-1]])
                of_kind = deleted if entry.kind == "deletion" else discharged
                if (ended_at := _ended_at(entry)) is None:
                    of_kind.pop(episode_id, None)
                else:
                    of_kind[episode_id] = ended_at < instant
            except (KeyError, LogCorrupt, OverflowError, TypeError, ValueError):
                unreadable.add(episode_id)
        due = {episode_id for episode_id, over in (deleted | discharged).items() if over}
        return Due(with_heads(tables, sorted(due - unreadable)), sorted(unreadable))


def _ended_at(entry: Entry) -> datetime | None:
    return entry.recorded_at if entry.kind == "deletion" else discharge_of(entry)


def with_heads(tables: Tables, episodes: Iterable[str]) -> dict[str, int]:
    """The number of the last entry of each. Raises ValueError if the log has no such episode."""
    heads = {}
    for episode_id in episodes:
        [(seq,)] = tables.execute("SELECT max(seq) FROM log WHERE episode_id = ?", episode_id)
        if seq is None:
            raise ValueError("the log has no episode of that id")
        heads[episode_id] = int(seq)
    return heads


def retire(tables: Tables, heads: Mapping[str, int], reason: str) -> Iterator[int]:
    """Remove episodes, some at a time; yields how many entries of each were removed.

    One that was written to since it was found to be due is left as it is (0). Each is told in the
    audit trail. Raises LogUnavailable.
    """
    audit = AuditChain(uuid.uuid4().hex)
    for batch in _batches(heads):
        removed = []
        with tables.transaction():
            for episode_id, seq in batch:
                n, audit = _retire(tables, episode_id, seq, reason, audit)
                removed.append(n)
        yield from removed


def _batches(heads: Mapping[str, int]) -> Iterator[list[tuple[str, int]]]:
    """So many episodes and entries at a time; one that is larger goes alone."""
    batch: list[tuple[str, int]] = []
    entries = 0
    for episode_id, seq in heads.items():
        if batch and (len(batch) == _EPISODES or entries + seq > _ENTRIES):
            yield batch
            batch, entries = [], 0
        batch.append((episode_id, seq))
        entries += seq
    if batch:
        yield batch


def _retire(
    tables: Tables, episode_id: str, seq: int, reason: str, audit: AuditChain
) -> tuple[int, AuditChain]:
    at_us = to_us(datetime.now(UTC))
    # Again, now that nobody else writes: it may have gone on, or be gone.
    head = tables.execute(
        "SELECT seq, hash FROM log WHERE episode_id = ? ORDER BY seq DESC LIMIT 1", episode_id
    )
    if not head or head[0][0] != seq:
        return 0, audit
    tables.insert("retired", [(episode_id, *head[0], at_us, reason)])
    tables.execute("DELETE FROM log WHERE episode_id = ?", episode_id)
    record = AuditRecord(
        at_us=at_us,
        principal=f"uid-{os.getuid()}",
        method="command-line",
        operation="retain",
        action="delete",
        episodes=(episode_id,),
        outcome="success",
        request_id=audit.writer,
        address="",
    )
    lines, audit = audit.to_rows([record])
    tables.insert("audit", lines)
    tables.tell(episode_id)
    return seq, audit
