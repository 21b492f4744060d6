"""Hourly labels: what the source knows, what it can only bracket, what it cannot tell."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from llm4ehr.store import Outcome
from training.labels import certain, hourly_labels

NAN = float("nan")


def death(low: float, high: float) -> Outcome:
    return Outcome(mortality=True, death_hours_low=low, death_hours_high=high, los_hours=high)


def test_a_death_at_a_known_time_is_near_for_the_last_24_hours() -> None:
    labels = hourly_labels(death(30.0, 30.001), 30)
    # Hour t is scored at its end: t + 1 + 24 > 30 from hour 6 on.
    assert labels.decompensation.tolist() == [0] * 6 + [1] * 24
    assert labels.mortality.tolist() == [1] * 30
    assert labels.decompensation.dtype == np.float32


def test_a_bracketed_death_gives_the_share_of_its_interval_within_reach() -> None:
    # The third day of the 2012 challenge: somewhere in [72, 96).
    labels = hourly_labels(death(72.0, 96.0), 60)
    expected = np.clip((np.arange(1, 61) + 24 - 72) / 24, 0, 1)
    assert_allclose(labels.decompensation, expected, rtol=1e-6)
    assert labels.decompensation[46] == 0  # reach is 71
    assert labels.decompensation[47] == 0  # reach is 72, where the interval begins
    assert labels.decompensation[48] == pytest.approx(1 / 24)
    assert labels.decompensation[59] == pytest.approx(0.5)
    assert_array_equal(certain(labels.decompensation), np.arange(60) < 48)


def test_after_the_death_nothing_is_labelled() -> None:
    labels = hourly_labels(death(4.0, 5.0), 8)
    assert labels.decompensation[:4].tolist() == [1] * 4
    assert np.isnan(labels.decompensation[5:]).all()
    assert not certain(labels.decompensation[5:]).any()


def test_survivors_never_decompensate() -> None:
    labels = hourly_labels(Outcome(mortality=False, los_hours=100.0), 4)
    assert labels.decompensation.tolist() == [0] * 4
    assert labels.mortality.tolist() == [0] * 4
    assert labels.remaining_los.tolist() == [99, 98, 97, 96]


def test_a_death_without_a_time_has_no_decompensation_label() -> None:
    labels = hourly_labels(Outcome(mortality=True), 3)
    assert np.isnan(labels.decompensation).all()
    assert labels.mortality.tolist() == [1] * 3


def test_without_outcomes_everything_is_unknown() -> None:
    labels = hourly_labels(Outcome(), 3)
    for column in (labels.decompensation, labels.mortality, labels.remaining_los):
        assert_array_equal(column, np.full(3, NAN, np.float32))
    assert not certain(labels.decompensation).any()


def test_the_stay_of_an_unknown_outcome_may_still_have_a_length() -> None:
    labels = hourly_labels(Outcome(los_hours=2.5), 5)
    assert_array_equal(labels.remaining_los, np.array([1.5, 0.5, NAN, NAN, NAN], np.float32))
    assert np.isnan(labels.mortality).all()


def test_the_end_of_the_bin_is_an_hour_later_than_its_start() -> None:
    outcome = death(30.0, 31.0)
    end, start = hourly_labels(outcome, 30), hourly_labels(outcome, 31, "bin_start")
    assert_array_equal(end.remaining_los, start.remaining_los[1:])
    assert_array_equal(end.decompensation, start.decompensation[1:])
    assert start.remaining_los[0] == 31
    assert end.remaining_los[0] == 30


def test_no_hours_no_labels() -> None:
    labels = hourly_labels(death(30.0, 31.0), 0)
    assert len(labels.decompensation) == len(labels.mortality) == len(labels.remaining_los) == 0
