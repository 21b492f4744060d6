"""From entries to the view of an episode: liveness, placement, history."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest

from llm4ehr.episode import Statics
from llm4ehr.hourly import hour_of
from llm4ehr.vocabulary import CodeEntry, Vocabulary
from service.core import (
    Draft,
    Entry,
    EpisodeView,
    content_id,
    entries_as_of,
    episode_at,
    from_us,
    hour_status,
    to_us,
)
from service.projection import model_episode
from service.times import format_time
from tests.service.fakes import T0, at, entries

LATENESS = timedelta(hours=2)
_numbers = itertools.count()


def admission(hours: float = 0, **statics: Any) -> Draft:
    return Draft(
        kind="admission", payload={"admitted_at": format_time(at(hours)), "statics": statics}
    )


def discharge(hours: float | None) -> Draft:
    when = None if hours is None else format_time(at(hours))
    return Draft(kind="discharge", payload={"discharged_at": when})


def obs(
    hours: float,
    value: float = 80.0,
    item_id: str | None = None,
    *,
    available: float | None = None,
    corrects: str | None = None,
    content: str | None = None,
) -> Draft:
    content = content or content_id(next(_numbers))
    return Draft(
        kind="observation",
        item_id=item_id or content,
        effective_at=at(hours),
        available_at=None if available is None else at(available),
        target=corrects,
        payload={"variable": "hr", "value": value, "priority": 0, "content": content},
    )


def event(hours: float, value: float | None = 1.0, item_id: str | None = None) -> Draft:
    content = content_id(next(_numbers))
    return Draft(
        kind="event",
        item_id=item_id or content,
        effective_at=at(hours),
        payload={"code": "LOINC/2160-0", "value": value, "unit": None, "content": content},
    )


def withdrawal(target: str) -> Draft:
    content = content_id("withdrawal", target)
    return Draft(kind="withdrawal", item_id=content, target=target, payload={"content": content})


def values(view: EpisodeView) -> list[float]:
    return view.episode.obs_value.tolist()


def test_an_admission_alone_is_an_episode_without_hours() -> None:
    view = episode_at(entries(admission(age_years=70.0, sex="male")))
    assert view.statics == Statics(age_years=70.0, sex="male")
    assert (view.seq, view.head_hour, view.episode.n_hours) == (1, -1, 0)
    assert view.newest_effective_at is None
    assert view.admitted_at == T0
    assert not view.deleted


def test_without_an_admission_there_is_no_episode() -> None:
    with pytest.raises(ValueError, match="admission"):
        episode_at(entries(obs(1)))


def test_items_become_the_arrays_of_the_model() -> None:
    view = episode_at(entries(admission(), obs(2.5, 90), obs(0.25, 70), event(1.5), event(1, None)))
    assert view.head_hour == 2
    assert view.episode.n_hours == 3
    assert view.episode.obs_hours.tolist() == [0.25, 2.5]
    assert values(view) == [70, 90]
    assert view.episode.ev_hours.tolist() == [1.0, 1.5]
    assert np.isnan(view.episode.ev_value[0])
    assert view.episode.ev_value[1] == 1.0
    assert view.newest_effective_at == at(2.5)
    assert view.counts == {"observations": 2, "events": 2, "corrected": 0, "withdrawn": 0}


def test_the_order_of_the_argument_is_nothing() -> None:
    rows = entries(admission(), obs(2), obs(1, item_id="a"), withdrawal("a"), discharge(3))
    assert values(episode_at(rows[::-1])) == values(episode_at(rows))
    assert episode_at(rows[::-1]).seq == 5


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_withdrawal_takes_effect_whenever_it_comes(order: tuple[int, ...]) -> None:
    drafts = [obs(1, 1, "a"), obs(1.5, 2, "b"), withdrawal("a")]
    view = episode_at(entries(admission(), *(drafts[i] for i in order)))
    assert values(view) == [2]
    assert view.counts["withdrawn"] == 1


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_chain_of_corrections_leaves_its_end(order: tuple[int, ...]) -> None:
    drafts = [
        obs(1, 1, "a"),
        obs(1, 2, "b", corrects="a"),
        obs(1, 3, "c", corrects="b"),
    ]
    view = episode_at(entries(admission(), *(drafts[i] for i in order)))
    assert values(view) == [3]
    assert view.counts["corrected"] == 2


def test_of_several_corrections_the_last_recorded_is_live() -> None:
    first, second = obs(1, 2, "b", corrects="a"), obs(1, 3, "c", corrects="a")
    assert values(episode_at(entries(admission(), obs(1, 1, "a"), first, second))) == [3]
    assert values(episode_at(entries(admission(), second, obs(1, 1, "a"), first))) == [2]


def test_withdrawing_a_correction_does_not_bring_its_target_back() -> None:
    view = episode_at(
        entries(admission(), obs(1, 1, "a"), obs(1, 2, "b", corrects="a"), withdrawal("b"))
    )
    assert values(view) == []
    assert view.head_hour == -1


def test_corrections_that_name_each_other_leave_neither() -> None:
    view = episode_at(
        entries(admission(), obs(1, 1, "a", corrects="b"), obs(1, 2, "b", corrects="a"))
    )
    assert values(view) == []


def test_a_correction_for_ever_unmatched_is_an_item_like_any_other() -> None:
    assert values(episode_at(entries(admission(), obs(1, 2, "b", corrects="never")))) == [2]


@pytest.mark.parametrize("anonymous_first", [True, False])
def test_an_anonymous_item_yields_to_an_identified_one(anonymous_first: bool) -> None:
    content = content_id("same")
    pair = [obs(1, 5, content=content), obs(1, 5, "a", content=content)]
    drafts = pair if anonymous_first else pair[::-1]
    assert values(episode_at(entries(admission(), *drafts))) == [5]
    # Taking the identified one back takes the fact back.
    assert values(episode_at(entries(admission(), *drafts, withdrawal("a")))) == []


def test_two_ids_are_two_facts_even_if_they_say_the_same() -> None:
    content = content_id("same again")
    view = episode_at(
        entries(admission(), obs(1, 5, "a", content=content), obs(1, 5, "b", content=content))
    )
    assert values(view) == [5, 5]
    both = episode_at(
        entries(
            admission(),
            obs(1, 5, "a", content=content),
            obs(1, 5, "b", content=content),
            withdrawal(content),
        )
    )
    assert values(both) == []


def test_an_item_stands_where_it_became_available() -> None:
    view = episode_at(entries(admission(), obs(1.5, available=4.25), obs(2, available=2)))
    assert view.episode.obs_hours.tolist() == [2, 4.25]
    assert view.head_hour == 4
    assert view.newest_data_at(3) == at(2)
    assert view.newest_data_at(4) == at(2)
    assert view.newest_data_at(1) is None


@pytest.mark.parametrize("target_first", [True, False])
def test_a_correction_was_available_with_its_target(target_first: bool) -> None:
    pair = [obs(1, 1, "a", available=5), obs(1.5, 2, "b", corrects="a")]
    drafts = pair if target_first else pair[::-1]
    assert episode_at(entries(admission(), *drafts)).episode.obs_hours.tolist() == [5]
    chained = obs(1.25, 3, "c", corrects="b")
    assert episode_at(entries(admission(), chained, *drafts)).episode.obs_hours.tolist() == [5]
    own = obs(1.5, 2, "d", corrects="a", available=3)
    assert episode_at(entries(admission(), pair[0], own)).episode.obs_hours.tolist() == [3]


def test_corrections_in_a_circle_do_not_hang() -> None:
    drafts = [
        obs(1, 1, "a", corrects="c"),
        obs(1, 2, "b", corrects="a"),
        obs(1, 3, "c", corrects="b"),
    ]
    assert values(episode_at(entries(admission(), *drafts))) == []


def test_moving_the_admission_moves_every_hour_and_keeps_what_falls_out() -> None:
    drafts = [admission(), obs(0.5, 1), obs(2.5, 2), event(150)]
    later = episode_at(entries(*drafts, admission(1)))
    assert later.episode.obs_hours.tolist() == [1.5]
    assert later.ignored == {"before-admission": 1}
    assert later.head_hour == 149
    earlier = episode_at(entries(*drafts, admission(-60)))
    assert earlier.head_hour == 62
    assert earlier.ignored == {"beyond-horizon": 1}
    assert episode_at(entries(*drafts, admission(-60), admission())).head_hour == 150


def test_items_after_the_discharge_are_counted_not_used() -> None:
    drafts = [admission(), obs(1, 1), obs(3, 2), obs(3.5, 3)]
    view = episode_at(entries(*drafts, discharge(3)))
    assert values(view) == [1, 2]
    assert view.ignored == {"after-discharge": 1}
    assert view.discharged_at == at(3)
    back = episode_at(entries(*drafts, discharge(3), discharge(None)))
    assert values(back) == [1, 2, 3]
    assert back.discharged_at is None


def test_a_deletion_is_seen() -> None:
    assert episode_at(entries(admission(), Draft(kind="deletion"))).deleted


def test_as_of_keeps_what_was_recorded_by_then() -> None:
    rows = entries(admission(), obs(1), obs(2), recorded=[at(0), at(1), at(2)])
    assert [e.seq for e in entries_as_of(rows, 2)] == [1, 2]
    assert [e.seq for e in entries_as_of(rows, at(1))] == [1, 2]
    assert [e.seq for e in entries_as_of(rows, at(1) - timedelta(microseconds=1))] == [1]
    assert entries_as_of(rows, at(-1)) == []


@pytest.mark.parametrize("hour", [0, 1, 7, 42, 133, 199])
def test_hours_agree_with_the_preprocessing_to_the_microsecond(hour: int) -> None:
    for shift in (-1, 0, 1):
        instant = at(hour) + timedelta(microseconds=shift)
        if instant < T0:
            continue
        draft = obs(0)
        row = Draft(
            kind="observation",
            item_id=draft.item_id,
            effective_at=instant,
            payload=draft.payload,
        )
        view = episode_at(entries(admission(), row))
        assert view.head_hour == hour_of(view.episode.obs_hours).max()
        assert view.head_hour == hour + (shift >= 0) - 1


def test_microseconds_are_exact() -> None:
    for text in ("0001-01-01T00:00:00+00:00", "2026-03-01T08:00:00.000001+00:00"):
        instant = datetime.fromisoformat(text)
        assert from_us(to_us(instant)) == instant
    with pytest.raises(TypeError):
        to_us(datetime(2026, 1, 1))  # noqa: DTZ001


def statuses(rows: list[Entry], now: float, n: int = 4) -> list[str]:
    view = episode_at(rows)
    return [hour_status(view, hour, at(now), LATENESS) for hour in range(n)]


def test_an_hour_is_preliminary_until_its_watermark() -> None:
    rows = entries(admission(), obs(0.5), recorded=[at(0), at(0.5)])
    assert statuses(rows, 2.999, 2) == ["preliminary", "preliminary"]
    assert statuses(rows, 3, 2) == ["final", "preliminary"]
    assert statuses(rows, 4, 2) == ["final", "final"]


def test_data_in_time_amends_nothing() -> None:
    rows = entries(
        admission(), obs(0.5), obs(1.5), obs(2.5), recorded=[at(0), at(0.6), at(1.6), at(2.6)]
    )
    assert statuses(rows, 100, 3) == ["final"] * 3


def test_late_data_amends_its_hour_and_those_after_it_that_stood() -> None:
    rows = entries(
        *[admission(), obs(0.5), obs(1.5), obs(2.5), obs(3.5)],
        obs(1.25),
        recorded=[at(0), at(0.6), at(1.6), at(2.6), at(3.6), at(5.1)],
    )
    # At 5.1 hours 0, 1 and 2 stood; hour 0 lies before the late item, hour 3 was still open.
    assert statuses(rows, 100) == ["final", "amended", "amended", "final"]


def test_first_data_amends_nothing_however_late() -> None:
    rows = entries(admission(), obs(0.5), obs(0.75), recorded=[at(0), at(50), at(50)])
    assert statuses(rows, 100, 1) == ["final"]


@pytest.mark.parametrize(
    "change", [withdrawal("b"), obs(2.5, 9, "c", corrects="b")], ids=["withdrawal", "correction"]
)
def test_a_change_amends_from_the_hour_of_its_target(change: Draft) -> None:
    rows = entries(
        *[admission(), obs(0.5), obs(1.5, 1, "b"), obs(2.5)],
        change,
        recorded=[at(0), at(0.6), at(1.6), at(2.6), at(9)],
    )
    assert statuses(rows, 100, 3) == ["final", "amended", "amended"]


def test_a_moved_admission_amends_every_hour_that_stood() -> None:
    rows = entries(
        *[admission(), obs(0.5), obs(3.5), admission(-0.25)],
        recorded=[at(0), at(0.6), at(3.6), at(4)],
    )
    assert statuses(rows, 100) == ["amended", "amended", "final", "final"]


def test_a_discharge_amends_only_hours_it_takes_data_from() -> None:
    rows = [admission(), obs(0.5), obs(1.5), obs(2.5)]
    recorded = [at(0), at(0.6), at(1.6), at(2.6), at(20)]
    assert statuses(entries(*rows, discharge(2.6), recorded=recorded), 100, 3) == ["final"] * 3
    assert statuses(entries(*rows, discharge(1), recorded=recorded), 100, 3) == [
        "final",
        "amended",
        "amended",
    ]


def test_an_entry_at_the_very_watermark_amends() -> None:
    rows = entries(admission(), obs(0.5), obs(0.6), recorded=[at(0), at(0.7), at(3)])
    assert statuses(rows, 3, 1) == ["amended"]


def test_event_values_reach_each_model_in_its_own_units() -> None:
    """What is logged does not depend on the model in service; what the model reads does."""

    def stored(code: str, value: float, unit: str | None) -> Draft:
        draft = event(1, value, f"{code} {unit}")
        return replace(draft, payload=draft.payload | {"code": code, "unit": unit})

    view = episode_at(
        entries(
            admission(),
            stored("LOINC/2160-0", 88.42, "umol/L"),
            stored("LOINC/2160-0", 1.5, "mg/dL"),
            stored("LOINC/2160-0", 2.5, "furlong"),
            stored("LOINC/1-8", 7.0, "furlong"),
        )
    )
    in_mg = Vocabulary([CodeEntry(code="LOINC/2160-0", descriptor="", unit="mg/dL", n=1)])
    in_umol = Vocabulary([CodeEntry(code="LOINC/2160-0", descriptor="", unit="umol/L", n=1)])
    by_unit = {
        model.entries[0].unit: dict(
            zip(view.event_units, model_episode(view, model).ev_value.tolist(), strict=True)
        )
        for model in (in_mg, in_umol)
    }
    assert view.episode.ev_value.tolist() == [7.0, 1.5, 2.5, 88.42]
    assert by_unit["mg/dL"]["umol/L"] == pytest.approx(1.0, rel=1e-3)
    assert by_unit["mg/dL"]["mg/dL"] == 1.5
    assert by_unit["umol/L"]["umol/L"] == 88.42
    assert by_unit["umol/L"]["mg/dL"] == pytest.approx(132.6, rel=1e-3)
    # A value that does not convert is lost to the model, the event is not; a code that the model
    # does not know is left alone.
    for model in (in_mg, in_umol):
        read = model_episode(view, model)
        assert np.isnan(read.ev_value).tolist() == [False, False, True, False]
        assert len(read.ev_code) == 4
