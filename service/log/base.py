"""What the service asks of a log, whichever database holds it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import ClassVar

from service.entries import Draft, Entry
from service.trail.record import AuditRecord


class SequenceConflict(Exception):
    """Somebody else wrote to the episode, or it has an item of that id. Read again, then retry."""


class LogUnavailable(Exception):
    """The log cannot be read or written now. Nothing of the failed call was recorded."""


class Unconfirmed(LogUnavailable):
    """The connection or the disk failed while a write was being made durable: it may be recorded or
    not.
    """


class LogCorrupt(Exception):
    """What the log holds of an episode is not what was written. Others are not affected."""


class Retired(Exception):
    """The time to keep the episode is over: its entries are gone, and its id is not used again."""


class EventLog(ABC):
    """Append-only entries, numbered 1, 2, 3 ... within each episode.

    The pair (episode, number) is unique in the database itself, which is the only fence between
    several writers. Entries are never changed, and are removed only as whole episodes whose time
    to be kept is over. Every entry carries a hash over itself and the hash of the one before.

    The audit trail lies in the same database, append-only as well.
    """

    shared: ClassVar[bool]
    """Whether other processes may write: what is held in memory must be compared with the log."""

    @abstractmethod
    async def open(self) -> None:
        """Connect, on the loop that will use it. Raises LogUnavailable."""

    @abstractmethod
    async def append(
        self,
        episode_id: str,
        drafts: Sequence[Draft],
        recorded_at: datetime,
        expected_seq: int | None,
        record: AuditRecord | None = None,
    ) -> list[Entry]:
        """Write all drafts, and the line of the audit trail that tells of them, or nothing; durably
        by the time this returns.

        `recorded_at` must carry an offset. With `expected_seq` the episode must end at that number
        (0: it must not exist). Raises SequenceConflict, Retired, LogUnavailable, Unconfirmed;
        ValueError if there is nothing to write, or something that no database can hold.
        """

    @abstractmethod
    async def entries(self, episode_id: str, after_seq: int = 0) -> list[Entry]:
        """Entries with a number above `after_seq`, in order; empty for an unknown episode.

        Raises LogUnavailable, LogCorrupt.
        """

    @abstractmethod
    async def verify(self, episode_id: str) -> None:
        """Compute every hash of an episode again. Raises LogCorrupt, LogUnavailable."""

    @abstractmethod
    async def heads(self) -> dict[str, int]:
        """The last number of every episode, the one most recently written to first.

        Raises LogUnavailable.
        """

    @abstractmethod
    def changes(self) -> AsyncIterator[str | None]:
        """Episodes that other processes wrote to, as they do, and those of our own writes that went
        through after they were Unconfirmed; None when some may have been missed: compare with
        `heads` then. Begins with None. Never ends in a shared log; ends at once in one
        that is not. Never raises LogUnavailable: it connects again.
        """

    @abstractmethod
    async def record(self, records: Sequence[AuditRecord]) -> None:
        """Write lines of the audit trail, durably by the time this returns. Raises LogUnavailable,
        Unconfirmed.
        """

    @abstractmethod
    def available(self) -> bool:
        """Whether the last write went through, or a trial that followed it."""

    @abstractmethod
    async def close(self) -> None:
        """Finish what was accepted, then release the database. Safe to call twice."""
