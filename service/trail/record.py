"""One line of the audit trail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from service.access.principal import Visit

Action = Literal["create", "read", "update", "delete", "execute"]
"""In FHIR's AuditEvent.action: C, R, U, D, E."""
Outcome = Literal["success", "refused", "failed"]
"""Done; the client's fault; the service's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """Who did what about which episodes, when, and what came of it. Nothing of a value."""

    at_us: int
    """Microseconds since 1970, UTC."""
    principal: str
    method: str
    operation: str
    """`operation_id` of the route."""
    action: Action
    episodes: tuple[str, ...]
    outcome: Outcome
    request_id: str
    address: str


def record_of(visit: Visit, action: Action, outcome: Outcome, at_us: int) -> AuditRecord:
    """The line that tells of a visit."""
    return AuditRecord(
        at_us=at_us,
        principal=visit.principal.id,
        method=visit.principal.method,
        operation=visit.operation,
        action=action,
        episodes=visit.episodes,
        outcome=outcome,
        request_id=visit.request_id,
        address=visit.address,
    )
