"""From raw head outputs to probabilities and hours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from llm4ehr.calibration import OutputMap, default_calibration

raw = st.floats(-1e4, 1e4, width=32)


def test_platt_scaling_is_a_sigmoid_of_a_line() -> None:
    assert OutputMap(kind="platt")(np.array([0.0]))[0] == 0.5
    made = OutputMap(kind="platt", a=2.0, b=-1.0)(np.array([[0.5, 1.0], [-1.0, 0.0]]))
    assert_allclose(made, 1 / (1 + np.exp(-np.array([[0.0, 1.0], [-3.0, -1.0]]))), rtol=1e-15)


def test_days_and_log_days_become_hours() -> None:
    x = np.array([0.0, 1.0, np.log(3.0)])
    assert_allclose(OutputMap(kind="days")(x), 24 * x)
    assert_allclose(OutputMap(kind="log_days")(x), [0, 24 * (np.e - 1), 48])
    assert_allclose(OutputMap(kind="log_days", a=2.0, b=0.5)(x), 24 * np.expm1(2 * x + 0.5))


@pytest.mark.parametrize("kind", ["days", "log_days"])
def test_hours_are_never_negative(kind: str) -> None:
    assert OutputMap(kind=kind)(np.array([-3.0, -1e9])).tolist() == [0, 0]


@given(x=st.lists(raw, min_size=2, max_size=5), kind=st.sampled_from(["platt", "log_days", "days"]))
def test_answers_are_finite_and_keep_the_order(x: list[float], kind: str) -> None:
    made = OutputMap(kind=kind, a=1.5, b=0.1)(np.array(sorted(x), np.float32))
    assert made.dtype == np.float64
    assert np.isfinite(made).all()
    assert (np.diff(made) >= 0).all()
    assert kind != "platt" or ((made >= 0) & (made <= 1)).all()


def test_uncalibrated_heads_are_read_as_they_are_trained() -> None:
    made = default_calibration(["mortality", "remaining_los"])
    assert made == {
        "mortality": OutputMap(kind="platt"),
        "remaining_los": OutputMap(kind="log_days"),
    }
