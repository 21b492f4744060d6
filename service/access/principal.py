"""A client that was recognised, and what it is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from llm4ehr.preprocessing import Statics, UnitType


class Scope(StrEnum):
    """What a client may be allowed; but for `ingest`, one says nothing of another."""

    INGEST = "ingest"
    """Create and change stays, and record what is measured. As a name of ours it implies `delete`,
    which what SMART calls creating and updating does not.
    """
    DELETE = "delete"
    """Delete stays."""
    READ = "read"
    """Read stays, scores and embeddings."""
    JOBS = "jobs"
    """Run jobs over whole cohorts. No route requires it so far."""
    ADMIN = "admin"
    """Load, switch and unload versions of models."""
    METRICS = "metrics"
    """Read metrics and the operator's summary."""


def with_implied(scopes: Iterable[Scope]) -> frozenset[Scope]:
    """Scopes that are granted by our own names, and those they imply."""
    scopes = frozenset(scopes)
    return scopes | {Scope.DELETE} if Scope.INGEST in scopes else scopes


class Forbidden(Exception):
    """The client is known, and is not allowed this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """One client. `units` and `episodes` narrow what its scopes allow; None: no narrowing."""

    id: str
    """Name of the client in the audit trail: no secret, and nothing of a patient."""
    method: str
    """How it proved who it is: "api-key", "bearer", "certificate", "open"."""
    scopes: frozenset[Scope]
    units: frozenset[UnitType] | None = None
    """Types of units whose stays it may touch; a stay of unknown unit is none of them."""
    episodes: tuple[str, ...] | None = None
    """Patterns (`*`, `?`, `[...]`) of ids of episodes that it may touch."""

    def may_name(self, episode_id: str) -> bool:
        """Whether an id of an episode is within the restriction."""
        return self.episodes is None or any(fnmatchcase(episode_id, p) for p in self.episodes)

    def may_see(self, statics: Statics) -> bool:
        """Whether a stay of these static facts is within the restriction."""
        return self.units is None or statics.unit_type in self.units

    def may_list(self, episode_id: str, unit_type: UnitType | None) -> bool:
        """Whether a stay is within both restrictions."""
        return self.may_name(episode_id) and (self.units is None or unit_type in self.units)

    def require(self, scopes: Iterable[Scope]) -> None:
        """Raises Forbidden unless it has one of the scopes."""
        if not self.scopes.intersection(scopes):
            raise Forbidden


@dataclass(slots=True, kw_only=True)
class Visit:
    """One request of a client, from when it was recognised until its answer leaves."""

    principal: Principal
    operation: str
    """`operation_id` of the route."""
    request_id: str
    address: str
    """Of the client as far as it is known: of the peer, or what a trusted gateway says."""
    episodes: tuple[str, ...] = ()
    """The episodes it is about."""
    recorded: bool = False
    """Whether the audit trail has it already, in one transaction with what it wrote."""
