"""Cleaning of items: repair before limits, nothing outside the stay, no copies, one order."""

from __future__ import annotations

import random
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm4ehr.variables import VARIABLES
from training.data.cleaning import (
    CODE_COLUMNS,
    EVENT_COLUMNS,
    OBSERVATION_COLUMNS,
    finish,
)
from training.data.extraction import Items
from training.data.sources import SourceError, Tally

STAYS = pl.DataFrame(
    {"stay": [0, 1], "end_hours": [48.0, 10.5]}, schema_overrides={"stay": pl.Int32}
)


def frame(rows: list[tuple[Any, ...]], columns: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=columns, orient="row")


def cleaned(
    observations: list[tuple[Any, ...]] = (),  # type: ignore[assignment]
    events: list[tuple[Any, ...]] = (),  # type: ignore[assignment]
    *,
    limits: bool = True,
) -> tuple[Items, Tally]:
    tally = Tally()
    codes = [(code, code.lower(), None) for code in sorted({e[1] for e in events})]
    items = Items(
        frame(list(observations), OBSERVATION_COLUMNS),
        frame(list(events), EVENT_COLUMNS),
        frame(codes, CODE_COLUMNS),
    )
    return finish(items, STAYS, tally, limits=limits), tally


def values(variable: str, value: float) -> tuple[list[float], Tally]:
    made, tally = cleaned([(0, variable, 1.0, None, value, 0)])
    return made.observations["value"].to_list(), tally


@pytest.mark.parametrize(
    ("variable", "sent", "kept", "repaired"),
    [
        ("fio2", 0.4, 0.4, None),
        ("fio2", 40.0, 0.4, "percent:fio2"),
        ("fio2", 21.0, 0.21, "percent:fio2"),
        ("fio2", 100.0, 1.0, "percent:fio2"),
        ("fio2", 1.0, 1.0, None),
        ("temp", 98.6, 37.0, "fahrenheit:temp"),
        ("temp", 37.0, 37.0, None),
        ("spo2", 0.97, 97.0, "fraction:spo2"),
        ("spo2", 97.0, 97.0, None),
        ("glucose", 5.5, None, None),  # its unit is never guessed: outside the limits
    ],
)
def test_a_unit_is_repaired_only_where_the_value_tells_it(
    variable: str, sent: float, kept: float | None, repaired: str | None
) -> None:
    found, tally = values(variable, sent)
    assert found == ([] if kept is None else [pytest.approx(kept)])
    assert dict(tally.repaired) == ({repaired: 1} if repaired else {})


@pytest.mark.parametrize("sent", [2.0, 10.0, 20.9, 101.0, 0.1])
def test_an_oxygen_fraction_in_no_unit_is_refused(sent: float) -> None:
    found, tally = values("fio2", sent)
    assert found == []
    assert dict(tally.refused) == {"outside-limits:fio2": 1}


@pytest.mark.parametrize("variable", ["hr", "sbp", "dbp", "mbp", "rr", "spo2"])
def test_zero_is_missing_where_it_means_no_probe(variable: str) -> None:
    found, tally = values(variable, 0.0)
    assert found == []
    assert dict(tally.refused) == {f"zero:{variable}": 1}


@given(
    variable=st.sampled_from([v.name for v in VARIABLES]),
    value=st.floats(allow_nan=True, allow_infinity=True),
)
def test_what_is_kept_lies_within_the_limits(variable: str, value: float) -> None:
    found, tally = values(variable, value)
    limits = next(v for v in VARIABLES if v.name == variable)
    assert all(limits.low <= v <= limits.high for v in found)
    assert len(found) + sum(tally.refused.values()) == 1


def test_without_limits_values_stay_as_they_are() -> None:
    made, tally = cleaned(
        [(0, "hr", 1.0, None, 1e7, 0), (0, "fio2", 1.0, None, 0.004, 0)], limits=False
    )
    assert sorted(made.observations["value"].to_list()) == [0.004, 1e7]
    assert not tally.repaired


@pytest.mark.parametrize(
    ("stay", "hours", "available", "reason"),
    [
        (0, -0.01, None, "before-admission"),
        (0, 48.01, None, "after-end"),
        (1, 10.0, 10.6, "after-end"),  # it was known only after the end
        (0, None, None, "untimed"),
    ],
)
def test_nothing_outside_the_stay_is_kept(
    stay: int, hours: float | None, available: float | None, reason: str
) -> None:
    made, tally = cleaned(
        [(stay, "hr", hours, available, 80.0, 0)], [(stay, "A", hours, available, 1.0)]
    )
    assert made.observations.is_empty()
    assert made.events.is_empty()
    assert made.codes.is_empty()
    assert dict(tally.refused) == {f"{reason}:observation": 1, f"{reason}:event": 1}


def test_admission_and_end_belong_to_the_stay() -> None:
    made, tally = cleaned([(1, "hr", 0.0, None, 80.0, 0), (1, "hr", 10.5, None, 81.0, 0)])
    assert made.observations["hours"].to_list() == [0.0, 10.5]
    assert not tally.refused


def test_a_second_choice_is_one_that_the_service_can_see() -> None:
    """A cuff has a code of its own; of the coma scale there is only one."""
    made, _ = cleaned([(0, "sbp", 1.0, None, 120.0, 1), (0, "gcs_total", 1.0, None, 14.0, 1)])
    assert made.observations["priority"].to_list() == [1, 0]


def test_of_equal_observations_the_one_known_first_stays() -> None:
    made, tally = cleaned([(0, "hr", 1.0, 3.0, 80.0, 0), (0, "hr", 1.0, 2.0, 80.0, 0)])
    assert made.observations["available_hours"].to_list() == [2.0]
    assert dict(tally.refused) == {"duplicate:observation": 1}


def test_different_values_at_one_time_all_stay() -> None:
    """Which of them counts is decided once, where episodes become model input."""
    made, tally = cleaned([(0, "hr", 1.0, None, 80.0, 0), (0, "hr", 1.0, None, 90.0, 0)])
    assert made.observations["value"].to_list() == [80.0, 90.0]
    assert not tally.refused


def test_of_the_versions_of_an_event_the_last_stays() -> None:
    made, tally = cleaned(
        events=[(0, "A", 1.0, 2.0, 5.0), (0, "A", 1.001, 4.0, 3.0), (0, "A", 2.0, None, None)]
    )
    assert made.events["value"].to_list() == [3.0, None]
    assert dict(tally.refused) == {"duplicate:event": 1}


def test_an_event_with_a_value_that_is_no_number_is_an_event() -> None:
    made, _ = cleaned(events=[(0, "A", 1.0, None, float("nan")), (0, "B", 1.0, None, float("inf"))])
    assert made.events["value"].to_list() == [None, None]


def test_a_code_is_one_that_the_service_takes() -> None:
    long = "X/" + "y" * 200
    sent = ["EICU/ORDER/d 5 µg", long, long + "//mg"]
    made, _ = cleaned(events=[(0, code, 1.0, None, 1.0) for code in sent])
    codes = made.events["code"].to_list()
    assert sorted(codes) == made.codes["code"].to_list()
    assert codes[0] == "EICU/ORDER/d_5_g"
    assert made.codes["descriptor"][0] == "eicu/order/d 5 µg"
    assert len(set(codes)) == 3
    assert all(len(c) <= 128 and c.isascii() and c.isprintable() for c in codes)


@given(
    minutes=st.lists(st.integers(0, 47 * 60), min_size=1, unique=True), second=st.integers(0, 59)
)
def test_events_of_different_minutes_all_stay(minutes: list[int], second: int) -> None:
    """An admission at half a minute puts every charted minute at half a minute."""
    sent = [(0, "A", (60 * m + second) / 3600, None, 1.0) for m in minutes]
    made, tally = cleaned(events=sent)
    assert len(made.events) == len(minutes)
    assert not tally.refused


def test_one_code_has_one_unit() -> None:
    items = Items(
        frame([], OBSERVATION_COLUMNS),
        frame([(0, "A", 1.0, None, 5.0)], EVENT_COLUMNS),
        frame([("A", "a", "mg"), ("A", "a", "g")], CODE_COLUMNS),
    )
    with pytest.raises(SourceError, match="'A' comes in several units"):
        finish(items, STAYS, Tally(), limits=True)


times = st.integers(0, 47 * 60).map(lambda minute: minute / 60)


@given(
    observations=st.lists(
        st.tuples(
            st.integers(0, 1),
            st.sampled_from(["hr", "sbp", "temp"]),
            times,
            st.none(),
            st.sampled_from([36.5, 37.0, 80.0]),
            st.integers(0, 1),
        ),
        max_size=30,
    ),
    events=st.lists(
        st.tuples(
            st.integers(0, 1),
            st.sampled_from("AB"),
            times,
            st.none() | times.map(lambda t: t + 47.0),
            st.none() | st.sampled_from([1.0, 2.0]),
        ),
        max_size=30,
    ),
    seed=st.integers(0, 1000),
)
def test_neither_order_nor_copies_of_rows_matter(
    observations: list[Any], events: list[Any], seed: int
) -> None:
    rng = random.Random(seed)
    again = [observations * 2, events * 2]
    for rows in again:
        rng.shuffle(rows)
    once, _ = cleaned(observations, events)
    twice, _ = cleaned(*again)
    assert twice.observations.equals(once.observations)
    assert twice.events.equals(once.events)
