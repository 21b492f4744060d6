"""Episodes whose time to be kept is over: their entries are removed, and what is left says so.

Of such an episode the table `retired` keeps the id, the number and the hash of its last entry, when
it was removed, and why. The id is never used again.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime

from service.entries import to_us
from service.log.rows import AuditChain, from_rows
from service.log.tables import Tables
from service.timeline import discharge_of
from service.trail.record import AuditRecord

_AT_A_TIME = 100
"""Episodes in one transaction, for which others wait."""


def discharged_before(tables: Tables, instant: datetime) -> dict[str, int]:
    """Episodes that were discharged before an instant, or deleted without having been discharged,
    and the number of their last entry.

    Raises LogUnavailable, LogCorrupt.
    """
    ended: dict[str, datetime | None] = {}
    deleted: dict[str, datetime] = {}
    for episode_id, *row in tables.execute(
        "SELECT episode_id, seq, kind, item_id, effective_at, available_at, recorded_at, target,"
        " payload FROM log WHERE kind IN ('discharge', 'deletion') ORDER BY episode_id, seq"
    ):
        [entry] = from_rows(episode_id, row[0] - 1, [row])
        if entry.kind == "deletion":
            deleted[episode_id] = entry.recorded_at
        else:
            ended[episode_id] = discharge_of(entry)
    return with_heads(
        tables,
        sorted(
            episode_id
            for episode_id in deleted.keys() | ended.keys()
            if (ended.get(episode_id) or deleted.get(episode_id, instant)) < instant
        ),
    )


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
    due = list(heads.items())
    for first in range(0, len(due), _AT_A_TIME):
        removed = []
        with tables.transaction():
            for episode_id, seq in due[first : first + _AT_A_TIME]:
                n, audit = _retire(tables, episode_id, seq, reason, audit)
                removed.append(n)
        yield from removed


def _retire(
    tables: Tables, episode_id: str, seq: int, reason: str, audit: AuditChain
) -> tuple[int, AuditChain]:
    at_us = to_us(datetime.now(UTC))
    last, last_hash = tables.execute(
        "SELECT seq, hash FROM log WHERE episode_id = ? ORDER BY seq DESC LIMIT 1", episode_id
    )[0]
    if last != seq:
        return 0, audit
    tables.insert("retired", [(episode_id, last, last_hash, at_us, reason)])
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
