"""Log entries and lines of the audit trail as database rows, the same in every database.

Rows are chained: the hash of each is over its values and the hash of the row before it, within one
episode of the log, or one writer of the audit trail.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, get_args

from pydantic import TypeAdapter
from pydantic_core import from_json

from service.entries import Draft, Entry, Kind, from_us, to_json, to_us
from service.log.base import LogCorrupt
from service.trail.record import AuditRecord

Row = tuple[Any, ...]
"""Values in the order of a table's columns; the last one of `log` and of `audit` is the hash."""

FIRST = bytes(32)
"""What stands for the hash before the first row of a chain."""

_KINDS = frozenset(get_args(Kind))
_RECORDS = TypeAdapter(AuditRecord)


def number(
    episode_id: str, head: int, drafts: Sequence[Draft], recorded_at: datetime
) -> list[Entry]:
    """Give drafts their numbers after `head`. Raises TypeError for a naive time."""
    recorded_us = to_us(recorded_at)
    return [
        Entry(
            episode_id,
            seq,
            draft.kind,
            draft.item_id,
            None if draft.effective_at is None else to_us(draft.effective_at),
            None if draft.available_at is None else to_us(draft.available_at),
            recorded_us,
            draft.target,
            draft.payload,
        )
        for seq, draft in enumerate(drafts, start=head + 1)
    ]


def chain_hash(previous: bytes, values: Sequence[Any]) -> bytes:
    """SHA-256 of the hash before and the values of a row as a JSON array, its hash left out."""
    return hashlib.sha256(previous + to_json(values).encode()).digest()


def to_rows(entries: Iterable[Entry], previous: bytes) -> list[Row]:
    """Rows of the table `log` for entries of one episode that follow the one of hash `previous`.

    Raises ValueError for NaN in a payload, and for text that a database cannot hold.
    """
    rows = []
    for entry in entries:
        values = (*entry[:-1], to_json(entry.payload))
        for text in (entry.episode_id, entry.item_id, entry.target):
            _require_storable(text)
        previous = chain_hash(previous, values)
        rows.append((*values, previous))
    return rows


def _require_storable(text: str | None) -> None:
    # PostgreSQL holds no NUL, and neither database half a surrogate pair. JSON escapes both.
    if text is not None:
        if "\0" in text:
            raise ValueError("an identifier must not contain NUL")
        text.encode()  # UnicodeEncodeError is a ValueError


def from_rows(episode_id: str, after_seq: int, rows: Iterable[Sequence[Any]]) -> list[Entry]:
    """Inverse of `to_rows` for the rows after a number, without their first column and their hash.

    Raises LogCorrupt if one is missing or cannot be read.
    """
    entries = []
    for expected, row in enumerate(rows, start=after_seq + 1):
        seq, kind, item_id, effective_us, available_us, recorded_us, target, text = row
        try:
            # Strings that many rows have in common become one object.
            payload = from_json(text, cache_strings="all")
        except ValueError:
            payload = None
        if seq != expected or kind not in _KINDS or not isinstance(payload, dict):
            raise LogCorrupt("an entry is missing or cannot be read")
        entries.append(
            Entry(
                episode_id, seq, kind, item_id, effective_us, available_us, recorded_us, target,
                payload,
            )
        )  # fmt: skip
    return entries


def require_chain(rows: Iterable[Row]) -> None:
    """Raises LogCorrupt unless these are all rows of one episode, as they were written."""
    last = FIRST
    for expected, row in enumerate(rows, start=1):
        if row[1] != expected or chain_hash(last, row[:-1]) != row[-1]:
            raise LogCorrupt("an entry is missing or not as it was written")
        last = row[-1]


@dataclass(slots=True)
class AuditChain:
    """Where the lines of one writer of the audit trail have got to."""

    writer: str
    seq: int = 0
    hash: bytes = FIRST

    def to_rows(self, records: Iterable[AuditRecord]) -> tuple[list[Row], AuditChain]:
        """Rows of the table `audit`, and where the chain is once they are written."""
        seq, last, rows = self.seq, self.hash, []
        for record in records:
            seq += 1
            values = (self.writer, seq, record.at_us, _text_of(record))
            last = chain_hash(last, values)
            rows.append((*values, last))
        return rows, AuditChain(self.writer, seq, last)


def _text_of(record: AuditRecord) -> str:
    told = asdict(record)
    del told["at_us"]
    return to_json(told)


def from_audit_row(row: Sequence[Any]) -> AuditRecord:
    """The line of the audit trail in a row. Raises LogCorrupt if it cannot be read."""
    _, _, at_us, text, _ = row
    try:
        told = from_json(text)
        from_us(at_us)  # is within the calendar
        return _RECORDS.validate_python(
            told | {"at_us": at_us, "episodes": tuple(told["episodes"])}
        )
    except (KeyError, OverflowError, TypeError, ValueError):
        raise LogCorrupt("a line of the audit trail cannot be read") from None
