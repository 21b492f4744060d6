"""Log entries as database rows, the same in every database."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from service.entries import Draft, Entry, from_us


def number(
    episode_id: str, head: int, drafts: Sequence[Draft], recorded_at: datetime
) -> list[Entry]:
    """Give drafts their numbers after `head`. Raises TypeError for a naive time."""
    return [
        Entry(
            episode_id=episode_id,
            seq=seq,
            kind=draft.kind,
            recorded_at=recorded_at,
            item_id=draft.item_id,
            effective_at=draft.effective_at,
            available_at=draft.available_at,
            target=draft.target,
            payload=draft.payload,
        )
        for seq, draft in enumerate(drafts, start=head + 1)
    ]


def to_row(entry: Entry) -> tuple[Any, ...]:
    """Values in the order of the table's columns. Raises ValueError for NaN in the payload."""
    return (
        entry.episode_id,
        entry.seq,
        entry.kind,
        entry.item_id,
        entry.effective_us,
        entry.available_us,
        entry.recorded_us,
        entry.target,
        json.dumps(dict(entry.payload), separators=(",", ":"), allow_nan=False),
    )


def from_row(episode_id: str, row: Sequence[Any]) -> Entry:
    """Inverse of `to_row` for a row without its first column."""
    seq, kind, item_id, effective_us, available_us, recorded_us, target, payload = row
    return Entry(
        episode_id=episode_id,
        seq=seq,
        kind=kind,
        recorded_at=from_us(recorded_us),
        item_id=item_id,
        effective_at=None if effective_us is None else from_us(effective_us),
        available_at=None if available_us is None else from_us(available_us),
        target=target,
        payload=json.loads(payload),
    )
