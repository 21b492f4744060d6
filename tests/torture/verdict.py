"""What must hold in the end, read from the database itself and asked of every replica."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from service.core import Entry
from service.log.rows import from_rows
from service.log.tables import Tables
from service.log.verify import verify
from tests.end_to_end.checks import SCORES, replayed
from tests.online import Replica
from tests.torture.work import HOURS, Item, Ledger


def assert_log_holds(tables: Tables, ledger: Ledger) -> dict[str, list[Entry]]:
    """Every acknowledged item exactly once, nothing that was never sent, numbers without gaps,
    hashes that fit. Returns the entries of every episode.
    """
    assert verify(tables, {}, lambda n: None) == []
    rows: dict[str, list[Any]] = {}
    with tables.snapshot():
        for episode, *values, _hash in tables.rows("log"):
            rows.setdefault(episode, []).append(values)
    log = {episode: from_rows(episode, 0, found) for episode, found in rows.items()}
    assert log.keys() == ledger.sent.keys()
    for episode, entries in log.items():
        assert [e.seq for e in entries] == list(range(1, len(entries) + 1))
        times = [e.recorded_us for e in entries]
        assert times == sorted(times)
        kinds = [e.kind for e in entries]
        assert kinds.count("admission") == 1
        assert kinds.count("discharge") == (episode in ledger.discharged)
        assert kinds.count("deletion") == (episode in ledger.deleted)
        # Everything sent was acknowledged in the end, so the two must be one and the same.
        recorded = [of_entry(e) for e in entries if e.payload.get("content") or e.target]
        assert sorted(recorded) == sorted(map(of_item, ledger.sent[episode]))
    for ack in ledger.acknowledged:
        entry = log[ack.episode][ack.seq - 1]
        assert entry.item_id == ack.item_id
        assert of_entry(entry) == of_item(ack.item)
    return log


def of_entry(entry: Entry) -> tuple[str, ...]:
    """What an entry says, as `of_item` tells it of what was sent."""
    named = entry.item_id if entry.item_id != entry.payload.get("content") else None
    value = entry.payload.get("value")
    return tuple(map(str, (named, entry.target, None if value is None else float(value))))


def of_item(item: Item) -> tuple[str, ...]:
    """What an item says: its id, what it corrects or withdraws, and its value."""
    value = item.get("value")
    return tuple(
        map(
            str,
            (
                item.get("id"),
                item.get("corrects", item.get("withdraws")),
                None if value is None else float(value),
            ),
        )
    )


def assert_replicas_agree(
    urls: Sequence[str], log: dict[str, list[Entry]], replica: Replica
) -> None:
    """Each says of every stay what the log gives, to the last bit."""
    expected = {
        episode: (len(entries), replayed(replica, entries, HOURS))
        for episode, entries in log.items()
        if entries[-1].kind != "deletion"
    }
    for url in urls:
        with httpx.Client(base_url=url, timeout=60) as http:
            for episode in log:
                said = _said(http, episode)
                assert said == expected.get(episode), episode


def _said(http: httpx.Client, episode: str) -> tuple[int, list[Any]] | None:
    query = {"from": 0, "to": HOURS - 1}
    responses = [
        http.get(f"/episodes/{episode}/{what}", params=query) for what in ("risk", "embeddings")
    ]
    if {r.status_code for r in responses} == {410}:
        return None
    risk, states = (response.json() for response in responses)
    assert risk["seq"] == states["seq"], (risk, states)
    hours = zip(risk["hours"], states["hours"], strict=True)
    return risk["seq"], [([h[s] for s in SCORES], state["embedding"]) for h, state in hours]
