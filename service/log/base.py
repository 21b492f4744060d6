"""What the service asks of a log, whichever database holds it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import datetime

from service.entries import Draft, Entry


class SequenceConflict(Exception):
    """Somebody else wrote to the episode, or it has an item of that id. Read again, then retry."""


class LogUnavailable(Exception):
    """The log cannot be read or written now. Nothing of the failed call was recorded."""


class EventLog(ABC):
    """Append-only entries, numbered 1, 2, 3 ... within each episode.

    The pair (episode, number) is unique in the database itself, which is the only fence between
    several writers. Entries are never changed or removed.
    """

    @abstractmethod
    async def append(
        self,
        episode_id: str,
        drafts: Sequence[Draft],
        recorded_at: datetime,
        expected_seq: int | None,
    ) -> list[Entry]:
        """Write all drafts or none, durably by the time this returns.

        `recorded_at` must carry an offset. With `expected_seq` the episode must end at that number
        (0: it must not exist). Raises SequenceConflict and LogUnavailable; ValueError if there is
        nothing to write.
        """

    @abstractmethod
    async def entries(self, episode_id: str, after_seq: int = 0) -> list[Entry]:
        """Entries with a number above `after_seq`, in order; empty for an unknown episode.

        Raises LogUnavailable.
        """

    @abstractmethod
    async def episode_ids(self) -> list[str]:
        """All episodes, the one most recently written to first. Raises LogUnavailable."""

    @abstractmethod
    def available(self) -> bool:
        """Whether the last write went through, or a trial that followed it."""

    @abstractmethod
    async def close(self) -> None:
        """Finish what was accepted, then release the database. Safe to call twice."""
