"""A state that grows entry by entry is what a reading of all its entries gives, bit for bit."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import service.state
from llm4ehr.episode import Episode
from service.core import Draft, Entry, EpisodeView, episode_at
from service.log.rows import number
from service.state import EpisodeState
from service.times import format_time
from tests.service.fakes import at

# Few values of everything, so that ties, repeats and borders are common.
HOURS = [-3.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.0, 2.75, 3.0, 9.5, 199.5, 200.0, 260.0]
hours = st.sampled_from(HOURS)
names = st.sampled_from([f"i{n}" for n in range(12)] + [f"sha256:{n}" for n in range(6)])
values = st.sampled_from([-0.0, 0.0, 1.0, 2.0])


@st.composite
def an_item(draw: st.DrawFn, plain: bool) -> Draft:
    kind: Any = draw(st.sampled_from(["observation", "event"]))
    content = f"sha256:{draw(st.integers(0, 40 if plain else 6))}"
    payload: dict[str, Any] = {"content": content}
    if kind == "observation":
        payload["variable"] = draw(st.sampled_from(["hr", "ph"]))
        payload |= {"value": draw(values), "priority": draw(st.integers(0, 1))}
    else:
        payload["code"] = draw(st.sampled_from(["LOINC/1-8", "LOINC/2-6"]))
        payload["value"] = draw(st.none() | values)
        payload["unit"] = draw(st.sampled_from([None, "", "mg/dL"]))
    available = draw(st.none() | hours)
    return Draft(
        kind=kind,
        item_id=draw(st.just(content) | names),
        effective_at=at(draw(hours)),
        available_at=None if available is None else at(available),
        target=None if plain else draw(st.none() | names),
        payload=payload,
    )


@st.composite
def a_change(draw: st.DrawFn) -> Draft:
    kind: Any = draw(st.sampled_from(["admission", "discharge", "withdrawal", "deletion"]))
    if kind == "admission":
        statics = draw(st.sampled_from([{}, {"age_years": 50.0}]))
        when = format_time(at(draw(st.sampled_from([-1.0, 0.0, 0.5]))))
        return Draft(kind=kind, payload={"admitted_at": when, "statics": statics})
    if kind == "discharge":
        when = draw(st.none() | st.sampled_from([0.5, 3.0, 9.0]).map(lambda h: format_time(at(h))))
        return Draft(kind=kind, payload={"discharged_at": when})
    if kind == "withdrawal":
        target = draw(names)
        content = f"sha256:withdraw {target}"
        item_id = draw(st.sampled_from([content, f"w {target}"]))
        return Draft(kind=kind, item_id=item_id, target=target, payload={"content": content})
    return Draft(kind=kind)


@st.composite
def histories(draw: st.DrawFn) -> list[list[Entry]]:
    """Entries of one stay in portions, each recorded at its own time."""
    admission = Draft(kind="admission", payload={"admitted_at": format_time(at(0)), "statics": {}})
    portions = [number("e", 0, [admission], at(0))]
    seq, now, used = 1, 0.0, set[str]()
    for _ in range(draw(st.integers(1, 6))):
        now += draw(st.sampled_from([0.0, 0.5, 4.0]))
        drafts = draw(st.lists(an_item(plain=True) | an_item(plain=False) | a_change(), max_size=5))
        if draw(st.booleans()):
            drafts = [d for d in drafts if d.target is None and d.kind in ("observation", "event")]
        # An id stands once in the log.
        kept: list[Draft] = []
        for draft in drafts:
            if draft.item_id is None or draft.item_id not in used:
                kept.append(draft)
                used.add(draft.item_id or "")
        portions.append(number("e", seq, kept, at(now)))
        seq += len(kept)
    return portions


def contents(view: EpisodeView) -> list[Any]:
    """Every field, arrays by their bits."""

    def of(value: Any) -> Any:
        if isinstance(value, Episode):
            return [of(getattr(value, field.name)) for field in fields(value)]
        if isinstance(value, np.ndarray):
            bits = value.tolist() if value.dtype == object else value.tobytes()
            return value.dtype, value.shape, bits
        return value

    return [of(getattr(view, field.name)) for field in fields(view)]


@given(histories(), st.data())
@settings(max_examples=500)
def test_a_growing_state_is_a_full_reading(
    portions: list[list[Entry]], data: st.DataObject
) -> None:
    state = EpisodeState(portions[0])
    handed_out: list[tuple[EpisodeView, list[Any]]] = []
    for portion in portions[1:]:
        state.extend(portion)
        if data.draw(st.booleans(), "read"):
            assert contents(state.view) == contents(episode_at(state.entries))
            handed_out.append((state.view, contents(state.view)))
    assert contents(state.view) == contents(episode_at(state.entries))
    for view, then in handed_out:
        assert contents(view) == then, "a view handed out has changed"


def plain(n: int, hour: float = 1.0) -> Draft:
    payload = {"variable": "hr", "value": 80.0 + n, "priority": 0, "content": f"sha256:{n}"}
    return Draft(kind="observation", item_id=f"i{n}", effective_at=at(hour), payload=payload)


def withdrawal(target: str) -> Draft:
    return Draft(kind="withdrawal", item_id="w" + target, target=target, payload={"content": "w"})


@pytest.mark.parametrize(
    ("more", "readings"),
    [
        ([plain(1), plain(2, 5.0)], 0),
        ([plain(1, -2.0), plain(2, 300.0)], 0),
        ([replace(plain(9), payload=plain(0).payload)], 0),
        ([replace(plain(0), item_id="sha256:0")], 1),
        ([replace(plain(6), item_id="sha256:6"), plain(6)], 1),
        ([withdrawal("i0")], 1),
        ([Draft(kind="deletion")], 1),
        ([plain(7)], 1),
        ([plain(8)], 1),
    ],
    ids=[
        "new items",
        "outside the stay",
        "content on record under another id",
        "content on record under an id",
        "content on record under none",
        "withdrawal",
        "deletion",
        "withdrawn by id before it came",
        "withdrawn by content before it came",
    ],
)
def test_only_items_that_stand_alone_spare_a_full_reading(
    monkeypatch: pytest.MonkeyPatch, more: list[Draft], readings: int
) -> None:
    done: list[int] = []

    def counted(entries: list[Entry]) -> EpisodeView:
        done.append(len(entries))
        return episode_at(entries)

    monkeypatch.setattr(service.state, "episode_at", counted)
    admission = Draft(kind="admission", payload={"admitted_at": format_time(at(0)), "statics": {}})
    early = [admission, plain(0), withdrawal("i7"), withdrawal("sha256:8")]
    state = EpisodeState(number("e", 0, early, at(0)))
    assert state.view.seq == 4
    for draft in more:
        state.extend(number("e", state.seq, [draft], at(1)))
    assert contents(state.view) == contents(episode_at(state.entries))
    assert len(done) - 1 == readings
