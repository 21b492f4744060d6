"""What a stay looks like depends on what was said, not on how it arrived."""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from service import decisions
from service.core import Entry, EpisodeView, hour_status
from service.decisions import Admission, NothingAccepted
from service.ingest import Batch, Rules
from service.log.rows import number
from service.state import EpisodeState
from tests.service.fakes import T0, VOCABULARY, at, creatinine, hr, stamp

RULES = Rules(
    vocabulary=VOCABULARY,
    future_tolerance=timedelta(minutes=5),
    allowed_lateness=timedelta(hours=2),
)
LISTS = ("observations", "events", "withdrawals")

Item = tuple[str, dict[str, Any]]


@st.composite
def said(draw: st.DrawFn) -> list[Item]:
    """What clients say of one stay: with and without ids, corrected, withdrawn, some of it bad.

    A target is corrected once: several corrections of one are settled by their order in the log.
    """
    hours = st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0, 2.75, 3.0, 9.5, 199.5, 200.0])
    items: list[Item] = []
    names: list[str] = []
    for i in range(draw(st.integers(0, 7))):
        more: dict[str, Any] = {}
        if draw(st.booleans()):
            more["id"] = f"i{i}"
            names.append(f"i{i}")
        if draw(st.booleans()):
            more["available_at"] = stamp(draw(hours))
        make = draw(st.sampled_from([hr, creatinine]))
        value = draw(st.sampled_from([60, 61.5, 400, "x"]))
        items.append(("observations" if make is hr else "events", make(value, draw(hours), **more)))
    # Of the same content as another item, under another name or under none.
    for list_, item in draw(st.lists(st.sampled_from(items), max_size=2)) if items else []:
        items.append((list_, {k: v for k, v in item.items() if k != "id"}))
    for i, target in enumerate(draw(st.permutations(names))[:3]):
        more = {"id": f"c{i}", "corrects": target}
        if draw(st.booleans()):
            more["available_at"] = stamp(draw(hours))
        items.append(("observations", hr(90 + i, draw(hours), **more)))
        names.append(f"c{i}")
    for target in draw(st.lists(st.sampled_from([*names, "never"]), max_size=2)):
        items.append(("withdrawals", {"withdraws": target}))
    return items


@st.composite
def deliveries(draw: st.DrawFn, items: list[Item]) -> list[list[Item]]:
    """The same items in any order, some of them again, in any number of requests."""
    again = draw(st.lists(st.sampled_from(items), max_size=4)) if items else []
    order = draw(st.permutations(items + again))
    cuts = sorted(draw(st.lists(st.integers(0, len(order)), max_size=4)))
    return [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]


def receive(requests: list[list[Item]], times: list[datetime] | None = None) -> EpisodeState:
    """Take requests as the service does, all of them at hour 300 unless `times` says when."""
    admission = Admission(admitted_at=T0)
    drafts, _ = decisions.put(None, T0, RULES, admission)
    state = EpisodeState(number("e", 0, drafts, T0))
    for i, request in enumerate(requests):
        now = at(300) if times is None else times[i]
        batch = Batch(**{name: [item for kind, item in request if kind == name] for name in LISTS})
        try:
            drafts, _ = decisions.post(state, now, RULES, batch, None)
        except NothingAccepted:
            continue
        state.extend(number("e", state.seq, drafts, now))
    return state


def assert_same_facts(a: EpisodeView, b: EpisodeView) -> None:
    for field in fields(a.episode):
        x, y = getattr(a.episode, field.name), getattr(b.episode, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype
            assert x.tolist() == y.tolist() or np.array_equal(x, y, equal_nan=True)
        else:
            assert x == y
    assert a.head_hour == b.head_hour
    assert a.newest_effective_at == b.newest_effective_at
    assert a.newest_us.tolist() == b.newest_us.tolist()
    assert a.ignored == b.ignored
    for name in ("observations", "events"):
        assert a.counts[name] == b.counts[name]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_order_repetition_and_batching_do_not_matter(data: st.DataObject) -> None:
    items = data.draw(said())
    once = receive([items])
    assert_same_facts(once.view, receive(data.draw(deliveries(items))).view)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_sending_everything_again_writes_nothing(data: st.DataObject) -> None:
    items = data.draw(said())
    first = receive([items])
    assert receive([items, items, items[::-1]]).entries == first.entries


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_the_past_stays_as_it_was(data: st.DataObject) -> None:
    """The entries up to a number describe what was known then, whatever came later."""
    requests = data.draw(deliveries(data.draw(said())))
    whole = receive(requests)
    for i in range(len(requests)):
        before = receive(requests[:i])
        assert_same_facts(before.view, EpisodeState(whole.entries[: before.seq]).view)


def amended_by_definition(rows: list[Entry], view: EpisodeView, hour: int) -> bool:
    """The rule for `amended`, read word by word; items without availability and corrections only
    of items at known hours, so that places never move.
    """
    stands_at = view.hour_end(hour) + timedelta(hours=2)
    places = {e.item_id: view.hour_at(e.effective_at) for e in rows if e.effective_at}
    for entry in rows:
        touched = [places[name] for name in (entry.item_id, entry.target) if name in places]
        if not touched or min(touched) > hour or entry.recorded_at < stands_at:
            continue
        if any(
            e.effective_at and places[e.item_id] >= hour and e.recorded_at < entry.recorded_at
            for e in rows
        ):
            return True
    return False


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["new", "correct", "withdraw"]),
            st.integers(0, 7),  # hour of the item
            st.integers(0, 12),  # hours until the next request
            st.integers(0, 9),  # target
        ),
        max_size=10,
    )
)
@settings(max_examples=300, deadline=None)
def test_amended_means_what_its_definition_says(
    steps: list[tuple[str, int, int, int]],
) -> None:
    requests: list[list[Item]] = []
    times: list[datetime] = []
    now = 8
    for i, (kind, hour, wait, target) in enumerate(steps):
        name = f"i{target % i}" if i else "none"
        if kind == "withdraw":
            item: Item = ("withdrawals", {"withdraws": name, "id": f"i{i}"})
        else:
            more = {"corrects": name} if kind == "correct" else {}
            item = ("observations", hr(60 + i, hour + 0.5, id=f"i{i}", **more))
        requests.append([item])
        times.append(at(now))
        now += wait
    state = receive(requests, times)
    for hour in range(9):
        status = hour_status(state.view, hour, at(1000), timedelta(hours=2))
        expected = amended_by_definition(state.entries, state.view, hour)
        assert (status == "amended") == expected
