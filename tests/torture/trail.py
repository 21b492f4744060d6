"""What the audit trail must say of everything that clients sent and were told.

Every append has exactly one line `success`, of its own instant, for both are one transaction. Other
lines may be there twice, word for word: their write was cut off and repeated. A request that was
not acknowledged may have a line `failed` besides. What was answered without an append while the log
was slow or away may have no line, for it waited in memory when the process was killed.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from service.core import Entry
from service.log.trail_rows import audit_lines
from service.settings import Settings
from service.trail.record import AuditRecord
from tests.torture.verdict import of_entry, of_item
from tests.torture.work import Kind, Ledger, Request

_OPERATIONS: dict[Kind, str] = {
    "post": "postObservations",
    "again": "postObservations",
    "discharge": "patchEpisode",
    "delete": "deleteEpisode",
    "read": "getEpisode",
    "risk": "getRisk",
}


def assert_trail_tells(
    settings: Settings, log: dict[str, list[Entry]], ledger: Ledger
) -> Counter[str]:
    """Returns how many lines there are, how many of them twice, and how many answers have none."""
    lines = [line.record for line in audit_lines(settings)]
    successes: dict[str, list[AuditRecord]] = defaultdict(list)
    for record in lines:
        request = ledger.attempts.get(record.request_id)
        if request is None:
            assert record.action == "read", record
            continue
        assert record.episodes == (request.episode,), record
        assert record.operation == _OPERATIONS[request.kind], record
        if record.outcome == "success":
            successes[record.request_id].append(record)
        else:
            # Deleted stays are looked at as well.
            assert record.outcome == "failed" or request.kind in ("read", "risk"), record
            assert record.request_id not in ledger.answered, record
    for records in successes.values():
        assert len(set(records)) == 1, records
    appends = _appends(log, successes, ledger)
    assert ledger.changed <= appends.keys()
    twice = Counter({name: len(records) - 1 for name, records in successes.items()})
    assert not any(twice[request_id] for request_id in appends)
    return Counter(
        {
            "audit lines": len(lines),
            "audit lines twice": twice.total(),
            "answers without a line": len(ledger.answered - successes.keys()),
        }
    )


def _appends(
    log: dict[str, list[Entry]], successes: dict[str, list[AuditRecord]], ledger: Ledger
) -> dict[str, list[Entry]]:
    """The entries by the request that its line says wrote them."""
    at: dict[tuple[str, int], set[str]] = defaultdict(set)
    for request_id, records in successes.items():
        at[ledger.attempts[request_id].episode, records[0].at_us].add(request_id)
    appends: dict[str, list[Entry]] = defaultdict(list)
    for episode, entries in log.items():
        for entry in entries:
            writers = [
                request_id
                for request_id in at[episode, entry.recorded_us]
                if _says(ledger.attempts[request_id], entry)
            ]
            assert len(writers) == 1, (entry, writers)
            appends[writers[0]].append(entry)
    return appends


def _says(request: Request, entry: Entry) -> bool:
    """Whether a request can have written an entry."""
    match entry.kind:
        case "admission":
            return request.kind == "post"
        case "discharge":
            return request.kind == "discharge"
        case "deletion":
            return request.kind == "delete"
        case _:
            return request.kind == "post" and of_entry(entry) in map(of_item, request.items)
