"""What the tests write."""

from __future__ import annotations

from service.core import Draft
from service.trail.record import AuditRecord
from tests.service.fakes import at

ADMISSION = Draft(kind="admission", payload={"admitted_at": "2026-03-01T08:00:00Z", "statics": {}})


def note(item_id: str | None = None, text: str = "x") -> Draft:
    return Draft(
        kind="observation",
        item_id=item_id,
        effective_at=at(0.123456789),
        available_at=at(0.5),
        target="t",
        payload={"text": text, "value": 0.1 + 0.2, "unicode": "µ\u0000\n", "none": None},
    )


def line(operation: str = "get_risk", episode: str = "e") -> AuditRecord:
    """A line of the audit trail."""
    return AuditRecord(
        at_us=1_700_000_000_000_000,
        principal="ward-1",
        method="api-key",
        operation=operation,
        action="read",
        episodes=(episode,),
        outcome="success",
        request_id="r-1",
        address="192.0.2.1",
    )
