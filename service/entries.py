"""Log entries: what was received, never changed afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

Kind = Literal["admission", "observation", "event", "withdrawal", "discharge", "deletion"]
ITEM_KINDS: frozenset[Kind] = frozenset({"observation", "event"})

CONTENT_ID_PREFIX = "sha256:"

to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
"""JSON without spaces. Raises ValueError for NaN."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A fact that passed validation and waits for its place in the log."""

    kind: Kind
    item_id: str | None = None
    effective_at: datetime | None = None
    available_at: datetime | None = None
    target: str | None = None
    """Item id that this entry corrects or withdraws."""
    payload: Mapping[str, Any] = field(default_factory=dict)


class Entry(NamedTuple):
    """One immutable row of the log. `seq` counts 1, 2, 3 ... within an episode.

    Times are microseconds since 1970, UTC, and can be read as datetimes as well.
    `payload["content"]` of an item is the name it has by its content alone (`content_id`). It is
    the `item_id` of an item that came without one, and names any other item as well.
    """

    episode_id: str
    seq: int
    kind: Kind
    item_id: str | None
    effective_us: int | None
    available_us: int | None
    recorded_us: int
    target: str | None
    payload: Mapping[str, Any]

    @property
    def effective_at(self) -> datetime | None:
        return None if self.effective_us is None else from_us(self.effective_us)

    @property
    def available_at(self) -> datetime | None:
        return None if self.available_us is None else from_us(self.available_us)

    @property
    def recorded_at(self) -> datetime:
        return from_us(self.recorded_us)


def content_id(*content: str | float | None) -> str:
    """Name of an item by what it says: equal for equal content, on every machine and version."""
    return CONTENT_ID_PREFIX + hashlib.sha256(to_json(content).encode()).hexdigest()[:32]


def to_us(instant: datetime) -> int:
    """Microseconds since 1970-01-01 UTC. Raises TypeError for a naive datetime."""
    since = instant - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def from_us(microseconds: int) -> datetime:
    """Inverse of `to_us`, in UTC."""
    return _EPOCH + timedelta(microseconds=microseconds)


def entries_as_of(entries: Sequence[Entry], as_of: int | datetime) -> list[Entry]:
    """The entries known at a sequence number or at an instant, both included."""
    if isinstance(as_of, datetime):
        as_of_us = to_us(as_of)
        return [e for e in entries if e.recorded_us <= as_of_us]
    return [e for e in entries if e.seq <= as_of]
