"""One line of the audit trail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Action = Literal["create", "read", "update", "delete", "execute"]
"""In FHIR's AuditEvent.action: C, R, U, D, E."""


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
    status: int
    """HTTP status of the answer."""
    request_id: str
    address: str
