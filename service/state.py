"""What is held in memory of episodes. All of it is a cache of the log."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from llm4ehr.preprocessing import UnitType
from service.core import (
    Entry,
    EpisodeView,
    HourScore,
    HourStatus,
    Scores,
    episode_at,
    hour_status,
)
from service.entries import ITEM_KINDS
from service.projection import extended


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Scores and the very view they were computed from."""

    view: EpisodeView
    scores: Scores


class EpisodeState:
    """All entries of one episode, and what was last computed from them."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        if not entries:
            raise ValueError("an episode has at least one entry")
        self.entries: list[Entry] = []
        self.by_id: dict[str, Entry] = {}
        self.by_content: dict[str, Entry] = {}
        self.scored: dict[str, Scored] = {}
        """What each loaded model last made of it, by the digest of its bundle."""
        self._named: set[str] = set()
        """Ids of items that some entry corrects or withdraws."""
        self._view: EpisodeView | None = None
        self._fresh: list[Entry] = []
        """Entries that stand alone and are not in `_view` yet."""
        self.extend(entries)

    @property
    def episode_id(self) -> str:
        return self.entries[0].episode_id

    @property
    def seq(self) -> int:
        return self.entries[-1].seq

    @property
    def view(self) -> EpisodeView:
        """The episode as it stands."""
        if self._view is None:
            self._view = episode_at(self.entries)
        elif self._fresh:
            self._view = extended(self._view, self._fresh)
        self._fresh = []
        return self._view

    def extend(self, entries: Sequence[Entry]) -> None:
        """Add entries that follow the last one; those already held are skipped."""
        for entry in entries:
            seq = self.entries[-1].seq if self.entries else 0
            if entry.seq <= seq:
                continue
            if entry.seq != seq + 1:
                raise ValueError("a gap between entries")
            if self._view is not None:
                if self._stands_alone(entry):
                    self._fresh.append(entry)
                else:
                    self._view = None
            self.entries.append(entry)
            if entry.item_id is not None:
                self.by_id[entry.item_id] = entry
                self.by_content.setdefault(entry.payload["content"], entry)
            if entry.target is not None:
                self._named.add(entry.target)

    def _stands_alone(self, entry: Entry) -> bool:
        """Whether an entry is an item that changes nothing held, nor the other way round."""
        if entry.kind not in ITEM_KINDS or entry.target is not None:
            return False
        content = entry.payload["content"]
        # Items that have ids are different facts even if they say the same.
        same = self.by_content if entry.item_id == content else self.by_id
        return content not in same and not {entry.item_id, content} & self._named


class StateCache:
    """The most recently used episodes, bounded by the number of their entries together."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._states: OrderedDict[str, EpisodeState] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._total = 0

    def get(self, episode_id: str) -> EpisodeState | None:
        state = self._states.get(episode_id)
        if state is not None:
            self._states.move_to_end(episode_id)
        return state

    def offer(self, state: EpisodeState, *, evict: bool = True) -> EpisodeState:
        """Keep the fuller of this state and the one held; returns it.

        A reader may have loaded an episode while a writer was adding to it. Without `evict` the
        state is kept only where there is room.
        """
        held = self._states.get(state.episode_id)
        if held is not None and held is not state and held.seq >= state.seq:
            return held
        size = len(state.entries)
        growth = size - self._sizes.get(state.episode_id, 0)
        if not evict and held is not state and self._total + growth > self._max_entries:
            return state
        self._states[state.episode_id] = state
        self._states.move_to_end(state.episode_id)
        self._sizes[state.episode_id] = size
        self._total += growth
        while evict and self._total > self._max_entries and len(self._states) > 1:
            oldest, _ = self._states.popitem(last=False)
            self._total -= self._sizes.pop(oldest)
        return state

    def drop(self, episode_id: str) -> None:
        """Keep nothing of an episode: it is read again when it is asked for."""
        if self._states.pop(episode_id, None) is not None:
            self._total -= self._sizes.pop(episode_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the list of episodes shows of one: kept for every episode, however old."""

    episode_id: str
    seq: int
    admitted_at: datetime
    discharged_at: datetime | None
    updated_at: datetime
    head_hour: int
    newest_effective_at: datetime | None
    stands_at: datetime | None
    """When the head hour stops being preliminary; None without one."""
    amended: bool
    unit_type: UnitType | None
    latest: HourScore | None = None
    """Score of the head hour as of `scored_seq`; None while none was computed for that hour."""
    scored_seq: int | None = None

    def status(self, now: datetime) -> HourStatus:
        """Status of the head hour."""
        if self.stands_at is None or now < self.stands_at:
            return "preliminary"
        return "amended" if self.amended else "final"


def summarise(
    view: EpisodeView, previous: Summary | None, scored: Scored | None, lateness: timedelta
) -> Summary:
    """Summary of a view, with the newest scores there are."""
    latest = previous.latest if previous else None
    scored_seq = previous.scored_seq if previous else None
    if scored is not None and (scored_seq is None or scored.scores.seq > scored_seq):
        head = scored.view.head_hour
        latest = scored.scores.hours[head] if head >= 0 else None
        scored_seq = scored.scores.seq
    # A score of an earlier hour says nothing of this one.
    if latest is not None and latest.hour != view.head_hour:
        latest = None
    stands_at = view.hour_end(view.head_hour) + lateness if view.head_hour >= 0 else None
    return Summary(
        episode_id=view.episode_id,
        seq=view.seq,
        admitted_at=view.admitted_at,
        discharged_at=view.discharged_at,
        updated_at=view.recorded_at,
        head_hour=view.head_hour,
        newest_effective_at=view.newest_effective_at,
        stands_at=stands_at,
        amended=stands_at is not None
        and hour_status(view, view.head_hour, stands_at, lateness) == "amended",
        unit_type=view.statics.unit_type,
        latest=latest,
        scored_seq=scored_seq,
    )
