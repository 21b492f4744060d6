"""Log entries as database rows, the same in every database."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def from_rows(episode_id: str, rows: Iterable[Sequence[Any]]) -> list[Entry]:
    """Inverse of `to_row` for rows without their first column."""
    # Strings that many rows have in common become one object.
    return [
        Entry(
            episode_id, seq, kind, item_id, effective_us, available_us, recorded_us, target,
            from_json(payload, cache_strings="all"),
        )
        for seq, kind, item_id, effective_us, available_us, recorded_us, target, payload in rows
    ]  # fmt: skip
