"""From items to model input, with values worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from llm4ehr.episode import (
    STATIC_FEATURES,
    Episode,
    Grid,
    Preprocessing,
    Statics,
    empty_episode,
    event_channels,
    event_tokens,
    featurise,
    hourly_grid,
    preprocessing_digest,
    static_features,
)
from llm4ehr.hourly import hour_of
from llm4ehr.variables import VARIABLE_INDEX, VARIABLES
from llm4ehr.vocabulary import Vocabulary

Make = Callable[..., Episode]
NAN = float("nan")
CREATININE, LACTATE, VENTILATED = "LOINC/2160-0", "LOINC/2524-7", "SNOMED/40617009"
HR = VARIABLE_INDEX["hr"]


def column(grid: Grid, name: str) -> tuple[list[float], list[bool], list[float]]:
    i = VARIABLE_INDEX[name]
    return grid.values[:, i].tolist(), grid.observed[:, i].tolist(), grid.hours_since[:, i].tolist()


# The grid, by hand.


def test_the_last_value_is_carried_forward_from_the_normal_value(make_episode: Make) -> None:
    grid = hourly_grid(make_episode([("hr", 3.2, 90), ("hr", 1.5, 80)]), 6)
    assert column(grid, "hr") == (
        [86, 80, 80, 90, 90, 90],
        [False, True, False, True, False, False],
        [200, 0, 1, 0, 1, 2],
    )
    assert column(grid, "ph") == ([7.4] * 6, [False] * 6, [200] * 6)


def test_the_latest_value_of_an_hour_counts(make_episode: Make) -> None:
    grid = hourly_grid(make_episode([("hr", 2.9, 75), ("hr", 2.1, 70)]), 4)
    assert column(grid, "hr")[0] == [86, 86, 75, 75]


def test_a_preferred_value_beats_a_later_fallback_within_the_hour(make_episode: Make) -> None:
    grid = hourly_grid(make_episode([("sbp", 1.1, 120, 0), ("sbp", 1.9, 90, 1)]), 3)
    assert column(grid, "sbp")[0] == [118, 120, 120]


def test_a_fallback_alone_in_its_hour_counts(make_episode: Make) -> None:
    grid = hourly_grid(make_episode([("sbp", 1.1, 120, 0), ("sbp", 2.0, 90, 1)]), 3)
    assert column(grid, "sbp")[0] == [118, 120, 90]


@pytest.mark.parametrize(
    ("values", "median"), [([70, 80], 75), ([90, 70, 74], 74), ([1, 100, 3, 2], 2.5), ([5, 5], 5)]
)
def test_simultaneous_values_give_their_median(
    make_episode: Make, values: list[float], median: float
) -> None:
    tied = [("hr", 1.5, v) for v in values]
    for beside in (("hr", 1.5, 300, 1), ("hr", 1.4, 300), ("sbp", 1.5, 300), ("hr", 0.5, 300)):
        grid = hourly_grid(make_episode([*tied, beside]), 2)
        assert column(grid, "hr")[0][1] == median


@pytest.mark.parametrize(
    ("hours", "left", "right"),
    [
        *[(0.0, 0, 0), (0.5, 0, 0), (1.0, 1, 0), (np.nextafter(1, 2), 1, 1), (1.5, 1, 1)],
        *[(2.0, 2, 1), (47.99, 47, 47), (48.0, 48, 47)],
    ],
)
def test_an_hour_owns_one_of_its_borders(hours: float, left: int, right: int) -> None:
    assert hour_of(hours, "left") == left
    assert hour_of(hours, "right") == right


def test_before_admission_there_is_no_hour() -> None:
    for edge in ("left", "right"):
        assert (hour_of(np.array([-0.01, -1.0, -2.5]), edge) < 0).all()


def test_the_bin_edge_reaches_the_grid_events_and_tokens(road: Any) -> None:
    for edge, hour in (("left", 1), ("right", 0)):
        features = road.features([("hr", 1.0, 100)], [(CREATININE, 1.0, 0.5)], 3, bin_edge=edge)
        assert np.flatnonzero(features.observed[:, HR]).tolist() == [hour]
        assert np.flatnonzero(features.events[:, 1]).tolist() == [hour]
        assert {h for _, h in road.tokens([(CREATININE, 1.0, 0.5)], 3, bin_edge=edge)} == {hour}


def test_linear_imputation_averages_the_line_over_each_hour(make_episode: Make) -> None:
    grid = hourly_grid(make_episode([("hr", 2.5, 100), ("hr", 0.5, 80)]), 5, "linear")
    # Flat before 0.5 h and after 2.5 h, ten beats an hour between them.
    assert_allclose(column(grid, "hr")[0], [81.25, 90, 98.75, 100, 100], rtol=1e-12)
    assert column(grid, "hr")[1] == [True, False, True, False, False]
    assert column(grid, "ph")[0] == [7.4] * 5


def test_linear_imputation_looks_ahead_and_says_so(
    make_episode: Make, preprocessing: Preprocessing
) -> None:
    early = [("hr", 0.5, 80)]
    grids = [
        hourly_grid(make_episode([*early, ("hr", 3.5, late)]), 4, "linear") for late in (80, 120)
    ]
    assert (grids[0].values[1, HR], grids[1].values[1, HR]) == pytest.approx((80, 80 + 40 / 3))
    assert preprocessing.causal
    assert not replace(preprocessing, imputation="linear").causal


# The whole row.


def test_a_row_holds_value_mask_age_and_statics(
    make_episode: Make, preprocessing: Preprocessing, vocabulary: Vocabulary
) -> None:
    statics = Statics(age_years=80, sex="male")
    episode = make_episode([("hr", 0.5, 86 + preprocessing.std[HR])], statics=statics)
    features = featurise(episode, vocabulary, preprocessing, 3)
    assert features.series.shape == (3, preprocessing.n_series) == (3, 33 + STATIC_FEATURES)
    assert_allclose(features.series[:, HR], 1, rtol=1e-6)
    assert features.series[:, 11 + HR].tolist() == [1, 0, 0]
    age = np.log1p([0, 1, 2]) / np.log1p(200)
    assert_allclose(features.series[:, 22 + HR], age, rtol=1e-6)
    assert (features.series[:, 22 + VARIABLE_INDEX["ph"]] == 1).all()
    assert_array_equal(features.series[:, 33:], np.tile(static_features(statics), (3, 1)))
    bare = replace(preprocessing, observed_inputs=False, static_inputs=False)
    assert featurise(episode, vocabulary, bare, 3).series.shape == (3, 11)


def test_static_features_tell_missing_from_average() -> None:
    known = static_features(
        Statics(age_years=60, sex="female", unit_type="surgical", height_cm=170, weight_kg=105)
    )
    assert known.tolist() == [0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0]
    assert static_features(Statics()).tolist() == [0] * 13


def test_normalised_values_are_clipped(road: Any) -> None:
    row = road.features([("hr", 0, 300), ("sbp", 0, 20)], [], 1, std=(0.001,) * 11).series[0]
    assert (row[HR], row[VARIABLE_INDEX["sbp"]]) == (8, -8)


def test_a_long_dense_stay_is_cut_at_the_last_hour(
    random_episode: Callable[..., Episode], preprocessing: Preprocessing, vocabulary: Vocabulary
) -> None:
    episode = random_episode(0, n_hours=250, n_observations=2000)
    features = featurise(episode, vocabulary, preprocessing, episode.n_hours)
    assert features.series.shape == (200, preprocessing.n_series)
    assert features.events.shape == (200, 3 * len(vocabulary))
    assert np.isfinite(features.series).all()
    assert np.isfinite(features.events).all()


def test_a_stay_without_items_or_hours(
    preprocessing: Preprocessing, vocabulary: Vocabulary
) -> None:
    for n_hours in (0, 3):
        for imputation in ("causal", "linear"):
            chosen = replace(preprocessing, imputation=imputation)
            features = featurise(empty_episode("e"), vocabulary, chosen, n_hours)
            assert features.series.shape == (n_hours, preprocessing.n_series)
            assert not features.events.any()
            assert not features.observed.any()
        assert len(event_tokens(empty_episode("e"), vocabulary, n_hours, preprocessing).ids) == 0
    assert featurise(empty_episode("e"), Vocabulary(), preprocessing, 3).events.shape == (3, 0)
    assert [v.normal for v in VARIABLES] == hourly_grid(empty_episode("e"), 1).values[0].tolist()


# Events.


def channels(features: NDArray[np.float32], code: int) -> list[list[float]]:
    return features[:, 3 * code : 3 * code + 3].tolist()


def test_event_channels_hold_last_value_seen_and_recency(
    make_episode: Make, vocabulary: Vocabulary
) -> None:
    episode = make_episode(
        events=[
            (CREATININE, 1.2, 0.75),  # (0.75 - 0.5) / 0.25 = 1
            (CREATININE, 3.1, NAN),  # seen again, without a number
            (LACTATE, 2.0, 100.0),  # clipped to 16
            (VENTILATED, 2.5, NAN),
            ("LOCAL/unknown", 1.0, 5.0),
        ]
    )
    made = event_channels(episode, vocabulary, 5)
    fading = [math.exp(-k / 12) for k in range(3)]
    assert_allclose(
        channels(made, 0),
        [[0, 0, 0], [1, 1, 1], [1, 0, fading[1]], [1, 1, 1], [1, 0, fading[1]]],
        rtol=1e-6,
    )
    lactate = (math.log(16) - 0.7) / 0.5
    assert_allclose([row[0] for row in channels(made, 1)], [0, 0] + [lactate] * 3, rtol=1e-6)
    assert [row[:2] for row in channels(made, 2)] == [[0, 0], [0, 0], [0, 1], [0, 0], [0, 0]]
    assert_allclose([row[2] for row in channels(made, 2)], [0, 0, *fading], rtol=1e-6)


@pytest.mark.parametrize(
    ("dedupe", "ids", "hours"),
    [
        ("none", [12, 10, 1, 10, 4, 11, 2, 10], [0, 1, 1, 1, 1, 2, 2, 3]),
        ("hour", [12, 10, 4, 11, 2, 10], [0, 1, 1, 2, 2, 3]),
        ("episode_last", [12, 11, 2, 10], [0, 2, 2, 3]),
    ],
)
def test_event_tokens_in_time_order_each_with_its_decile(
    road: Any, dedupe: str, ids: list[int], hours: list[int]
) -> None:
    happened = [
        (CREATININE, 3.0, NAN),  # no number, no decile
        (LACTATE, 2.5, 3.0),  # above 1 and 2
        (CREATININE, 1.75, 0.45),  # above 0.1 ... 0.4
        (CREATININE, 1.5, 0.2),  # above 0.1, not above 0.2 itself
        ("LOCAL/unknown", 1.0, 5.0),
        (VENTILATED, 0.1, 1.0),  # a code that was never given deciles
    ]
    assert road.tokens(happened, 5, dedupe=dedupe) == list(zip(ids, hours, strict=True))


# What a bundle keeps of it.


def test_preprocessing_survives_json(preprocessing: Preprocessing) -> None:
    chosen = replace(
        preprocessing, imputation="linear", bin_edge="right", dedupe="none", clip=5.0, max_hours=48
    )
    assert Preprocessing.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen


def test_preprocessing_refuses_another_version_table_or_shape(preprocessing: Preprocessing) -> None:
    body = preprocessing.to_json()
    with pytest.raises(ValueError, match="version 9"):
        Preprocessing.from_json(body | {"version": 9})
    with pytest.raises(ValueError, match="another table of variables"):
        Preprocessing.from_json(body | {"variables": body["variables"][::-1]})
    with pytest.raises(ValueError, match="11 entries"):
        replace(preprocessing, mean=(0.0,) * 10)
    with pytest.raises(ValueError, match="positive"):
        replace(preprocessing, std=(0.0,) * 11)


def test_the_digest_changes_when_anything_does(
    preprocessing: Preprocessing, vocabulary: Vocabulary
) -> None:
    changed = [
        preprocessing,
        replace(preprocessing, mean=(0.5, *preprocessing.mean[1:])),
        replace(preprocessing, std=(0.5, *preprocessing.std[1:])),
        replace(preprocessing, imputation="linear"),
        replace(preprocessing, bin_edge="right"),
        replace(preprocessing, dedupe="none"),
        replace(preprocessing, observed_inputs=False),
        replace(preprocessing, static_inputs=False),
        replace(preprocessing, clip=7.0),
        replace(preprocessing, max_hours=100),
    ]
    digests = [preprocessing_digest(p, vocabulary) for p in changed]
    digests.append(preprocessing_digest(preprocessing, Vocabulary(vocabulary.entries[:2])))
    assert len(set(digests)) == len(digests)
    assert preprocessing_digest(replace(preprocessing), vocabulary) == digests[0]
