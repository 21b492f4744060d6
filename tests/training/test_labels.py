"""Labels: what the source knows, what it can only bracket, what it cannot tell, what is asked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from llm4ehr.episode import Episode
from llm4ehr.store import EpisodeRecord, Outcome
from training.data.phenotypes import PHENOTYPES
from training.labels import (
    HourlyLabels,
    LabelOptions,
    certain,
    first_observation,
    hourly_labels,
    phenotype_flags,
    record_labels,
)

NAN = float("nan")


def labels(outcome: Outcome, n_hours: int, first: float = 0.0, **options: object) -> HourlyLabels:
    """Labels without the benchmark's four hours of history."""
    chosen = LabelOptions(**{"min_history_hours": 0.0} | options)  # type: ignore[arg-type]
    return hourly_labels(outcome, n_hours, chosen, first_observation=first)


def death(low: float, high: float, los: float | None = None) -> Outcome:
    return Outcome(mortality=True, death_hours_low=low, death_hours_high=high, los_hours=los)


def exact_death(hours: float, los: float | None = None) -> Outcome:
    return death(hours, float(np.nextafter(hours, np.inf)), los)


# The time of a death.


def test_a_death_at_a_known_time_is_near_for_the_last_24_hours() -> None:
    made = labels(exact_death(30.0), 30)
    # Hour t is scored at its end, strictly less than 24 hours before: t + 1 + 24 > 30 from hour 6.
    assert made.decompensation.tolist() == [0] * 6 + [1] * 24
    assert made.mortality.tolist() == [1] * 30
    assert made.decompensation.dtype == np.float32


@given(st.floats(0.01, 500), st.sampled_from(["bin_end", "bin_start"]))
def test_of_an_exact_death_every_hour_of_life_is_certain(hours: float, align: str) -> None:
    made = labels(exact_death(hours), 200, first=-1.0, align=align)
    alive = np.arange(200) + (align == "bin_end") <= hours
    if align == "bin_start":
        alive[0] = False  # time 0 is not after 0 hours of history
    assert_array_equal(certain(made.decompensation), alive)
    assert_array_equal(made.valid, alive)
    time = np.arange(200) + (align == "bin_end")
    assert_array_equal(made.decompensation[alive], (hours - time[alive] < 24).astype(np.float32))


def test_a_bracketed_death_gives_the_share_of_its_interval_within_reach() -> None:
    # The third day of the 2012 challenge: somewhere in [72, 96).
    made = labels(death(72.0, 96.0), 60)
    expected = np.clip((np.arange(1, 61) + 24 - 72) / 24, 0, 1)
    assert_allclose(made.decompensation, expected, rtol=1e-6)
    assert made.decompensation[46] == 0  # reach is 71
    assert made.decompensation[47] == 0  # reach is 72, where the interval begins
    assert made.decompensation[48] == pytest.approx(1 / 24)
    assert made.decompensation[59] == pytest.approx(0.5)
    assert_array_equal(certain(made.decompensation), np.arange(60) < 48)


def test_after_the_death_nothing_is_labelled() -> None:
    made = labels(death(4.0, 5.0, los=20.0), 8)
    assert made.decompensation[:4].tolist() == [1] * 4
    for column in (made.decompensation, made.mortality, made.remaining_los):
        # Time 5 is the first at which the death is certainly over.
        assert np.isnan(column).tolist() == [False] * 4 + [True] * 4
    assert made.valid.tolist() == [True] * 4 + [False] * 4


def test_a_death_without_a_time_has_no_decompensation_label() -> None:
    made = labels(Outcome(mortality=True), 3)
    assert np.isnan(made.decompensation).all()
    assert made.mortality.tolist() == [1] * 3


# The end of the stay.


def test_survivors_never_decompensate() -> None:
    made = labels(Outcome(mortality=False, los_hours=100.0), 4)
    assert made.decompensation.tolist() == [0] * 4
    assert made.mortality.tolist() == [0] * 4
    assert made.remaining_los.tolist() == [99, 98, 97, 96]


def test_after_the_end_of_the_stay_nothing_is_labelled() -> None:
    made = labels(Outcome(mortality=False, los_hours=2.5), 5)
    assert_array_equal(made.remaining_los, np.array([1.5, 0.5, NAN, NAN, NAN], np.float32))
    assert_array_equal(made.decompensation, np.array([0, 0, NAN, NAN, NAN], np.float32))
    assert_array_equal(made.mortality, np.array([0, 0, NAN, NAN, NAN], np.float32))


@pytest.mark.parametrize(("los", "reaches"), [(48.0, True), (47.99, False), (None, True)])
@pytest.mark.parametrize("align", ["bin_end", "bin_start"])
def test_mortality_at_48_hours_is_for_stays_that_reach_them(
    los: float | None, reaches: bool, align: str
) -> None:
    made = labels(Outcome(mortality=True, los_hours=los), 48, align=align)
    assert np.isnan(made.mortality[47]) == (not reaches)


def test_a_death_before_48_hours_has_no_mortality_label_there() -> None:
    assert np.isnan(labels(exact_death(47.5, los=60.0), 60).mortality[47])
    assert labels(exact_death(48.0, los=60.0), 60).mortality[47] == 1


def test_the_stay_of_an_unknown_outcome_may_still_have_a_length() -> None:
    made = labels(Outcome(los_hours=2.5), 5)
    assert_array_equal(made.remaining_los, np.array([1.5, 0.5, NAN, NAN, NAN], np.float32))
    assert np.isnan(made.mortality).all()
    assert np.isnan(made.decompensation).all()


def test_without_outcomes_everything_is_unknown() -> None:
    made = labels(Outcome(), 3)
    for column in (made.decompensation, made.mortality, made.remaining_los):
        assert_array_equal(column, np.full(3, NAN, np.float32))
    assert made.valid.all()


# What is asked.


@pytest.mark.parametrize(
    ("first", "options", "first_time"),
    [
        (0.0, {}, 5),  # the benchmark: t > 4
        (-0.5, {}, 5),
        (4.5, {}, 5),
        (5.0, {}, 6),  # strictly after the first observation
        (7.2, {}, 8),
        (0.0, {"min_history_hours": 0.0}, 1),
        (0.0, {"min_history_hours": 6.0}, 7),
        (2.5, {"min_history_hours": 0.0}, 3),
    ],
)
@pytest.mark.parametrize("align", ["bin_end", "bin_start"])
def test_tasks_are_asked_after_some_history_and_the_first_observation(
    first: float, options: dict[str, float], first_time: int, align: str
) -> None:
    chosen = LabelOptions(align=align, **options)  # type: ignore[arg-type]
    outcome = Outcome(mortality=False, los_hours=11.0)
    made = hourly_labels(outcome, 15, chosen, first_observation=first)
    time = np.arange(15) + (align == "bin_end")
    expected = (time >= first_time) & (time <= 11)
    assert_array_equal(made.valid, expected)
    assert_array_equal(~np.isnan(made.decompensation), expected)
    assert_array_equal(~np.isnan(made.remaining_los), expected)
    # Mortality is one fact of the stay: it is asked at every whole hour of it.
    assert_array_equal(~np.isnan(made.mortality), np.arange(15) < 11)


def test_a_stay_without_observations_is_not_asked(
    make_episode: Callable[..., Episode],
) -> None:
    outcome = Outcome(mortality=False, los_hours=50.0)
    for seen, first, asked in (
        ([], np.inf, 0),
        ([("hr", -2, 80)], np.inf, 0),  # before admission
        ([("hr", 9.5, 80), ("hr", 6.5, 80), ("hr", -1, 80)], 6.5, 14),
    ):
        episode = make_episode(seen, n_hours=20)
        assert first_observation(episode) == first
        record = EpisodeRecord(episode=episode, subject_id="p", split="a", outcome=outcome)
        made = record_labels(record, 20, LabelOptions())
        assert made.valid.sum() == asked
        assert made.mortality.tolist() == [0] * 20


def test_the_end_of_the_bin_is_an_hour_later_than_its_start() -> None:
    outcome = death(30.0, 31.0, los=31.0)
    end, start = labels(outcome, 30), labels(outcome, 31, align="bin_start")
    assert_array_equal(end.remaining_los, start.remaining_los[1:])
    assert_array_equal(end.decompensation, start.decompensation[1:])
    assert start.remaining_los[1] == 30
    assert end.remaining_los[0] == 30


def test_no_hours_no_labels() -> None:
    made = labels(death(30.0, 31.0), 0)
    assert len(made.decompensation) == len(made.mortality) == len(made.remaining_los) == 0


# Phenotypes.


def test_phenotypes_are_flags_in_the_published_order() -> None:
    flags = phenotype_flags(Outcome(phenotypes=(PHENOTYPES[24], PHENOTYPES[3])))
    assert flags.shape == (25,)
    assert np.flatnonzero(flags).tolist() == [3, 24]
    assert flags.sum() == 2


def test_a_stay_coded_without_any_is_not_one_that_was_not_coded() -> None:
    assert not phenotype_flags(Outcome(phenotypes=())).any()
    assert np.isnan(phenotype_flags(Outcome())).all()


def test_an_unknown_phenotype_is_named() -> None:
    with pytest.raises(ValueError, match="unknown phenotype 'Hiccups'"):
        phenotype_flags(Outcome(phenotypes=("Shock", "Hiccups")))
