"""Log entries as database rows, the same in every database."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic_core import from_json

from service.entries import Draft, Entry, to_json, to_us


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


def to_row(entry: Entry) -> tuple[Any, ...]:
    """Values in the order of the table's columns. Raises ValueError for NaN in the payload."""
    return (*entry[:-1], to_json(entry.payload))


def from_row(episode_id: str, row: Sequence[Any]) -> Entry:
    """Inverse of `to_row` for a row without its first column."""
    # Strings that many rows have in common are one object.
    return Entry._make((episode_id, *row[:-1], from_json(row[-1], cache_strings="all")))
