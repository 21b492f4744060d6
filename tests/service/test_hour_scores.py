"""Answers of many hours in one array, as objects."""

from __future__ import annotations

import numpy as np
import pytest

from service.core import AnswerLayout, HourScore, HourScores, HoursInterval

FULL = AnswerLayout(
    tasks=frozenset({"decompensation", "mortality", "remaining_los", "phenotyping"}),
    phenotypes=("sepsis", "shock"),
    coverage=0.9,
)
VALUES = np.array([[0.5, 0.1, 0.2, 30.0, 10.0, 50.0, 0.3, 0.4], [0.6, 0.2, 0.3, 29, 9, 49, 0.4, 0]])


def test_an_hour_is_what_its_row_says() -> None:
    first, second = HourScores(FULL, VALUES)
    assert first == HourScore(
        hour=0,
        decompensation=0.1,
        mortality=0.2,
        remaining_los_hours=30.0,
        remaining_los_interval_hours=HoursInterval(low=10.0, high=50.0, coverage=0.9),
        phenotypes={"sepsis": 0.3, "shock": 0.4},
        imputed_share=0.5,
    )
    assert (second.hour, second.imputed_share) == (1, 0.6)
    assert type(first.mortality) is float


def test_what_a_bundle_does_not_give_is_none() -> None:
    layout = AnswerLayout(tasks=frozenset({"mortality"}), phenotypes=(), coverage=None)
    (only,) = HourScores(layout, VALUES[:1, :6])
    assert (only.mortality, only.decompensation, only.remaining_los_hours) == (0.2, None, None)
    assert (only.remaining_los_interval_hours, only.phenotypes) == (None, {})


def test_it_is_a_sequence() -> None:
    scores = HourScores(FULL, VALUES)
    assert (len(scores), scores[-1].hour, [h.hour for h in scores[1:]]) == (2, 1, [1])
    with pytest.raises(IndexError):
        scores[2]
    assert scores == HourScores(FULL, VALUES.copy()) == tuple(scores)
    assert scores != HourScores(FULL, VALUES + 1)
    assert scores != HourScores(FULL, VALUES[:1])
    assert HourScores(FULL, VALUES * 0.0) != HourScores(FULL, VALUES * -0.0)  # other bits
    assert scores != 5
