"""What clients say of a stay, and in which ways it may reach the service."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from hypothesis import strategies as st

from llm4ehr.vocabulary import Vocabulary
from service import decisions
from service.core import EpisodeView
from service.decisions import Admission, NothingAccepted
from service.ingest import Batch, Rules
from service.log.rows import number
from service.state import EpisodeState
from tests.service.fakes import T0, at, creatinine, hr, stamp

Item = tuple[str, dict[str, Any]]
"""Name of the list it is sent in, and the item."""

LISTS = ("observations", "events", "withdrawals")
N_HOURS = 14


def glucose(value: float, hours: float, **more: Any) -> dict[str, Any]:
    item = {"variable": "glucose", "value": value, "unit": "mg/dL", "time": stamp(hours)}
    return item | more


def ventilation(_: float, hours: float, **more: Any) -> dict[str, Any]:
    item = {"code": "40617009", "system": "http://snomed.info/sct", "time": stamp(hours)}
    return item | more


def hours(low: float = 0.0) -> st.SearchStrategy[float]:
    """Instants from `low` on, the borders of hours among them."""
    return st.sampled_from(
        [h for h in (0.0, 0.25, 0.75, 1.0, 2.5, 2.75, 5.0, 5.9, 8.5, 11.0, 13.9) if h >= low]
    )


@st.composite
def said(draw: st.DrawFn, low: float = 0.0, prefix: str = "") -> list[Item]:
    """Items from the hour `low` on, some without ids, some corrected, withdrawn or not usable.

    A target is corrected once: several corrections of one are settled by their order in the log.
    """
    items: list[Item] = []
    names: list[str] = []
    for i in range(draw(st.integers(1, 7))):
        make = draw(st.sampled_from([hr, hr, glucose, creatinine, ventilation]))
        time = draw(hours(low))
        more: dict[str, Any] = {}
        if draw(st.booleans()):
            more["id"] = f"{prefix}i{i}"
            names.append(f"{prefix}i{i}")
        if draw(st.booleans()):
            more["available_at"] = stamp(draw(hours(time)))
        value = draw(st.sampled_from([60.0, 61.5, 97.25, 130.0, "x"]))
        list_ = "observations" if make in (hr, glucose) else "events"
        items.append((list_, make(value, time, **more)))
    for i, target in enumerate(draw(st.permutations(names))[:2]):
        correction = hr(90.0 + i, draw(hours(low)), id=f"{prefix}c{i}", corrects=target)
        items.append(("observations", correction))
        names.append(f"{prefix}c{i}")
    for target in draw(st.lists(st.sampled_from([*names, "never"]), max_size=2)):
        items.append(("withdrawals", {"withdraws": target}))
    return items


@st.composite
def deliveries(draw: st.DrawFn, items: list[Item]) -> list[list[Item]]:
    """The items in any order, some of them twice, split into any number of requests."""
    order = draw(st.permutations(items + draw(st.lists(st.sampled_from(items), max_size=3))))
    cuts = sorted(draw(st.lists(st.integers(0, len(order)), max_size=4)))
    return [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]


class Record:
    """One stay as the service keeps it, without log and engine."""

    def __init__(self, vocabulary: Vocabulary, name: str = "e") -> None:
        self._rules = Rules(
            vocabulary=vocabulary,
            future_tolerance=timedelta(minutes=5),
            allowed_lateness=timedelta(hours=2),
        )
        drafts, _ = decisions.put(None, T0, self._rules, Admission(admitted_at=T0))
        self.state = EpisodeState(number(name, 0, drafts, T0))

    def take(self, request: list[Item]) -> EpisodeView:
        """What is known after a request; all of them come at hour 20."""
        batch = Batch(**{name: [item for kind, item in request if kind == name] for name in LISTS})
        try:
            drafts, _ = decisions.post(self.state, at(20), self._rules, batch, None)
        except NothingAccepted:
            drafts = []
        if drafts:
            episode, seq = self.state.episode_id, self.state.seq
            self.state.extend(number(episode, seq, drafts, at(20)))
        return self.state.view
