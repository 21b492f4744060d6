"""A ledger of what the service acknowledged, and what its answers must be by that.

Shares nothing with the service but preprocessing, model and calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from llm4ehr.episode import Episode, Statics, empty_episode
from llm4ehr.variables import VARIABLE_INDEX
from service.times import format_time
from tests.online import Replica, with_items
from tests.service.fakes import T0

HOUR = timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One acknowledged entry. Item times are hours since `T0`."""

    seq: int
    recorded_at: datetime
    kind: str  # admission, observation, event, withdrawal
    item_id: str = ""
    target: str | None = None
    what: str = ""  # variable or canonical code
    value: float | None = None
    time: float = 0.0
    available: float | None = None
    admitted: float = 0.0
    statics: Statics = field(default_factory=Statics)


@dataclass(frozen=True, kw_only=True)
class Known:
    """A stay as some lines describe it."""

    seq: int
    admitted: float
    episode: Episode
    first_hour: int  # with data; the hours before it show no score
    head_hour: int

    def expected(
        self, replica: Replica, first: int, last: int
    ) -> list[tuple[dict[str, Any], list[float] | None]]:
        """What is said of hours first..last: the fields of a risk, and the embedding."""
        answers = replica(self.episode, last + 1)
        hours = []
        for hour in range(first, last + 1):
            shown = self.head_hour >= 0 and self.first_hour <= hour
            score = asdict(answers.hours[hour]) if shown else _WITHHELD | {"hour": hour}
            body = score | {
                "score_withheld": None if shown else {"reason": "no-data"},
                "hour_start": format_time(T0 + (self.admitted + hour) * HOUR),
            }
            hours.append((body, answers.embeddings[hour].tolist() if shown else None))
        return hours


_NUMBERS = (
    "decompensation", "mortality", "remaining_los_hours", "remaining_los_interval_hours",
    "imputed_share",
)  # fmt: skip
_WITHHELD: dict[str, Any] = dict.fromkeys(_NUMBERS) | {"phenotypes": {}}


def known(lines: Sequence[Line], name: str) -> Known:
    """The rules of the log, word by word.

    An item is live unless a withdrawal or a correction names it; of several corrections of one
    target the last is live. It stands at the later of effective and available time; a correction
    that does not say when it became available was so together with its target.
    """
    admission = [line for line in lines if line.kind == "admission"][-1]
    items = {line.item_id: line for line in lines if line.kind in ("observation", "event")}
    withdrawn = {line.target for line in lines if line.kind == "withdrawal"}
    last = {line.target: line.seq for line in items.values() if line.target is not None}
    placed: list[tuple[Line, float]] = []
    for line in items.values():
        if line.item_id in withdrawn or line.item_id in last:
            continue
        if line.target is not None and last[line.target] != line.seq:
            continue
        said: Line | None = line
        while said is not None and said.available is None:
            said = items.get(said.target) if said.target is not None else None
        available = line.time if said is None or said.available is None else said.available
        hours = max(line.time, available) - admission.admitted
        if 0 <= hours < 200:
            placed.append((line, hours))
    bins = [int(hours // 1) for _, hours in placed]
    episode = with_items(
        replace(empty_episode(name), statics=admission.statics),
        [
            (VARIABLE_INDEX[line.what], hours, line.value)
            for line, hours in placed
            if line.kind == "observation"
        ],
        [(line.what, hours, line.value) for line, hours in placed if line.kind == "event"],
    )
    return Known(
        seq=lines[-1].seq,
        admitted=admission.admitted,
        episode=episode,
        first_hour=min(bins, default=0),
        head_hour=max(bins, default=-1),
    )
