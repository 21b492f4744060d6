"""From raw head outputs to probabilities, hours and intervals."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from llm4ehr.calibration import (
    Interval,
    OutputMap,
    calibration_from_json,
    calibration_json,
    conformal_rank,
    default_calibration,
)

KNOTS = ((-2.0, 0.1), (0.0, 0.1), (1.0, 0.7))
INTERVAL = Interval(coverage=0.9, first_hours=(0, 24), half_widths=(0.5, 0.25), stays=(40, 9))
raw = st.floats(-1e4, 1e4, width=32)


def column(values: Any) -> np.ndarray:
    return np.asarray(values, np.float64)[:, None]


def answers(of: OutputMap, values: Any, hour: int = 0) -> list[float]:
    x = column(values)
    return of(x, np.full(len(x), hour))[:, 0].tolist()


def test_platt_scaling_is_a_sigmoid_of_a_line() -> None:
    assert answers(OutputMap(kind="platt"), [0.0]) == [0.5]
    x = np.array([[0.5, 1.0], [-1.0, 0.0]])
    made = OutputMap(kind="platt", a=2.0, b=-1.0)(x, np.array([0, 30]))
    assert_allclose(made, 1 / (1 + np.exp(-np.array([[0.0, 1.0], [-3.0, -1.0]]))), rtol=1e-15)


def test_the_line_moves_with_the_hour_up_to_its_last() -> None:
    of = OutputMap(kind="platt", a=1.0, b=-0.5, a_hour=0.2, b_hour=0.1, last_hour=47)
    hours = np.array([0, 9, 47, 48, 199])
    u = np.log([1, 10, 48, 48, 48])
    z = (1 + 0.2 * u) * 2.0 - 0.5 + 0.1 * u
    assert_allclose(of(np.full((5, 1), 2.0), hours)[:, 0], 1 / (1 + np.exp(-z)), rtol=1e-14)


def test_isotonic_maps_go_through_their_knots() -> None:
    x = [-9.0, -2.0, -1.0, 0.0, 0.5, 1.0, 9.0]
    expected = [0.1, 0.1, 0.1, 0.1, 0.4, 0.7, 0.7]
    assert_allclose(answers(OutputMap(kind="isotonic", knots=KNOTS), x), expected, rtol=1e-15)
    mean = answers(OutputMap(kind="platt_isotonic", a=2.0, knots=KNOTS), [0.25])
    assert_allclose(mean, [(0.4 + 1 / (1 + np.exp(-0.5))) / 2], rtol=1e-15)


def test_days_and_log_days_become_hours() -> None:
    x = np.array([0.0, 1.0, np.log(3.0)])
    assert_allclose(answers(OutputMap(kind="days"), x), 24 * x)
    assert_allclose(answers(OutputMap(kind="log_days"), x), [0, 24 * (np.e - 1), 48])
    scaled = answers(OutputMap(kind="log_days", a=2.0, b=0.5), x)
    assert_allclose(scaled, 24 * np.expm1(2 * x + 0.5))


@pytest.mark.parametrize("kind", ["days", "log_days"])
def test_hours_are_never_negative(kind: Any) -> None:
    assert answers(OutputMap(kind=kind), [-3.0, -1e9]) == [0, 0]


@st.composite
def output_maps(draw: st.DrawFn) -> OutputMap:
    kind = draw(st.sampled_from(["platt", "isotonic", "platt_isotonic", "log_days", "days"]))
    last_hour = draw(st.integers(0, 199))
    a, end = draw(st.floats(0.01, 5)), draw(st.floats(0.01, 5))
    z = sorted(draw(st.sets(st.floats(-20, 20), min_size=1, max_size=50)))
    p = sorted(draw(st.lists(st.floats(1e-9, 1 - 1e-9), min_size=len(z), max_size=len(z))))
    return OutputMap(
        kind=kind,
        a=a,
        b=draw(st.floats(-3, 3)),
        a_hour=(end - a) / np.log1p(last_hour) * 0.999 if last_hour else 0.0,
        b_hour=draw(st.floats(-1, 1)),
        last_hour=last_hour,
        knots=tuple(zip(z, p, strict=True)) if "isotonic" in kind else (),
        interval=INTERVAL if "days" in kind else None,
    )


@given(of=output_maps(), x=st.lists(raw, min_size=2, max_size=9), hour=st.integers(0, 199))
def test_answers_are_finite_and_keep_the_order(of: OutputMap, x: list[float], hour: int) -> None:
    rows = np.array(sorted(x), np.float32)[:, None]
    hours = np.full(len(rows), hour)
    made = of(rows, hours)
    assert made.dtype == np.float64
    assert np.isfinite(made).all()
    assert (np.diff(made[:, 0]) >= 0).all()
    if "days" in of.kind:
        low, high = of.bounds(rows, hours)
        assert ((low >= 0) & (low <= made) & (made <= high)).all()
        assert np.isfinite(high).all()
        assert (np.diff(low[:, 0]) >= 0).all()
        assert (np.diff(high[:, 0]) >= 0).all()
    else:
        assert ((made >= 0) & (made <= 1)).all()


@given(of=output_maps(), x=st.lists(raw, min_size=1, max_size=40), first=st.integers(0, 150))
def test_an_answer_does_not_depend_on_the_other_hours(
    of: OutputMap, x: list[float], first: int
) -> None:
    rows, hours = np.array(x, np.float32)[:, None], np.arange(first, first + len(x))
    alone = [of(rows[i : i + 1], hours[i : i + 1]) for i in range(len(x))]
    assert of(rows, hours).tobytes() == np.concatenate(alone).tobytes()


@given(of=output_maps())
def test_maps_come_back_from_json(of: OutputMap) -> None:
    made = {"remaining_los": of}
    assert calibration_from_json(json.loads(json.dumps(calibration_json(made)))) == made


def test_the_first_format_is_still_read() -> None:
    body = {"mortality": {"kind": "platt", "a": 0.7, "b": -0.5}}
    assert calibration_from_json(body) == {"mortality": OutputMap(kind="platt", a=0.7, b=-0.5)}


def test_uncalibrated_heads_are_read_as_they_are_trained() -> None:
    assert default_calibration(["mortality", "remaining_los"]) == {
        "mortality": OutputMap(kind="platt"),
        "remaining_los": OutputMap(kind="log_days"),
    }
    in_days = default_calibration(["remaining_los"], "days")
    assert in_days == {"remaining_los": OutputMap(kind="days")}


def test_an_interval_is_as_wide_as_that_of_its_hours() -> None:
    of = OutputMap(kind="days", interval=INTERVAL)
    low, high = of.bounds(np.ones((4, 1)), np.array([0, 23, 24, 199]))
    assert_allclose(low[:, 0], [12, 12, 18, 18])
    assert_allclose(high[:, 0], [36, 36, 30, 30])
    with pytest.raises(ValueError, match="no interval"):
        OutputMap(kind="days").bounds(np.ones((1, 1)), np.array([0]))


def test_the_rank_that_covers() -> None:
    assert [conformal_rank(n, 0.9) for n in (8, 9, 10, 99, 100)] == [None, 9, 10, 90, 91]
    assert conformal_rank(1, 0.5) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "probit"}, "unknown kind"),
        ({"a": 0.0}, "must rise"),
        ({"a": -1.0}, "must rise"),
        ({"a_hour": -0.5}, "must rise"),
        ({"a": float("nan")}, "finite"),
        ({"b_hour": float("inf")}, "finite"),
        ({"last_hour": -1}, "before the stay"),
        ({"knots": [[0.0, 0.5]]}, "1 knots"),
        ({"kind": "isotonic"}, "0 knots"),
        ({"kind": "isotonic", "knots": [[0, 0.2], [0, 0.3]]}, "rise"),
        ({"kind": "isotonic", "knots": [[0, 0.2], [float("nan"), 0.3]]}, "rise"),
        ({"kind": "isotonic", "knots": [[0, 0.2], [1, 0.1]]}, "never fall"),
        ({"kind": "isotonic", "knots": [[0, 0.0], [1, 0.1]]}, "between 0 and 1"),
        ({"kind": "isotonic", "knots": [[0, 0.1], [1, float("nan")]]}, "between 0 and 1"),
        ({"kind": "isotonic", "knots": [[i, 0.1] for i in range(51)]}, "51 knots"),
        ({"interval": INTERVAL}, "only a remaining stay"),
    ],
)
def test_maps_that_cannot_be_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        OutputMap(**({"kind": "platt"} | change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"coverage": 1.0}, "coverage"),
        ({"coverage": float("nan")}, "coverage"),
        ({"first_hours": (1, 24)}, "rise from 0"),
        ({"first_hours": (0, 0)}, "rise from 0"),
        ({"half_widths": (0.5,)}, "every bin"),
        ({"first_hours": (), "half_widths": (), "stays": ()}, "every bin"),
        ({"half_widths": (0.5, -0.1)}, "half widths"),
        ({"half_widths": (0.5, float("inf"))}, "half widths"),
        ({"stays": (40, 8)}, "8 stays"),
    ],
)
def test_intervals_that_cannot_be_are_refused(change: dict[str, Any], reason: str) -> None:
    sound = {"coverage": 0.9, "first_hours": (0, 24), "half_widths": (0.5, 0.2), "stays": (40, 9)}
    with pytest.raises(ValueError, match=reason):
        Interval(**(sound | change))
