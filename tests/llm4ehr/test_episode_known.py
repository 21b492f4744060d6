"""Features that continue known ones are those computed anew, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm4ehr.episode import (
    MAX_HOURS,
    Episode,
    Preprocessing,
    Statics,
    empty_episode,
    featurise,
    first_difference,
)
from llm4ehr.hourly import hour_of
from llm4ehr.vocabulary import Vocabulary
from tests.llm4ehr.test_episode_invariance import as_bytes, edges, events, observations

N_HOURS = 12
counts = st.integers(0, N_HOURS)
shapes = st.fixed_dictionaries(
    {
        "bin_edge": edges,
        "max_hours": st.sampled_from([7, N_HOURS, MAX_HOURS]),
        "observed_inputs": st.booleans(),
        "static_inputs": st.booleans(),
    }
)


def before(items: list, hour: int, edge: Any) -> list:
    return [i for i in items if hour_of(i[1], edge) < hour]


@given(
    seen=observations, happened=events, other_seen=observations, other_happened=events,
    shape=shapes, first=counts, n_known=counts, n_hours=counts,
)  # fmt: skip
def test_known_rows_are_continued_to_the_bit(
    road: Any, seen: list, happened: list, other_seen: list, other_happened: list, shape: dict,
    first: int, n_known: int, n_hours: int,
) -> None:  # fmt: skip
    """`known` has other items from `first` on, and more or fewer hours."""
    edge = shape["bin_edge"]

    def changed(items: list, others: list) -> list:
        return before(items, first, edge) + [
            i for i in others if i not in before(others, first, edge)
        ]

    known = road.features(
        changed(seen, other_seen), changed(happened, other_happened), n_known, **shape
    )
    first = min(first, len(known.series))
    whole = road.features(seen, happened, n_hours, **shape)
    continued = featurise(
        road.make(seen, happened), road.vocabulary, replace(road.preprocessing, **shape), n_hours,
        known=known, first=first,
    )  # fmt: skip
    assert as_bytes(continued) == as_bytes(whole)
    for part in ("series", "events", "observed"):
        one, other = getattr(continued, part), getattr(whole, part)
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize("codes", ["with codes", "without"])
def test_a_long_stay_is_continued_hour_by_hour(
    random_episode: Callable[..., Episode], vocabulary: Vocabulary, preprocessing: Preprocessing,
    codes: str,
) -> None:  # fmt: skip
    """Values and ages are carried over 200 borders: nothing is lost on the way."""
    if codes == "without":
        vocabulary = Vocabulary()
    episode = random_episode(3, n_hours=MAX_HOURS, n_observations=40)
    early = [episode.ev_hours < 20, episode.ev_hours < 1]
    for some in early:
        rare = replace(
            episode,
            ev_code=episode.ev_code[some],
            ev_hours=episode.ev_hours[some],
            ev_value=episode.ev_value[some],
        )
        features = featurise(rare, vocabulary, preprocessing, 1)
        for hour in range(1, MAX_HOURS):
            features = featurise(rare, vocabulary, preprocessing, hour + 1, features, hour)
        assert as_bytes(features) == as_bytes(featurise(rare, vocabulary, preprocessing, MAX_HOURS))


def test_what_cannot_be_continued_is_refused(
    random_episode: Callable[..., Episode], vocabulary: Vocabulary, preprocessing: Preprocessing
) -> None:
    episode = random_episode(0, n_hours=9)
    known = featurise(episode, vocabulary, preprocessing, 5)
    linear = replace(preprocessing, imputation="linear")
    for choices, features, first in (
        (preprocessing, None, 1),
        (preprocessing, known, 6),
        (linear, known, 5),
    ):
        with pytest.raises(ValueError, match="taken over"):
            featurise(episode, vocabulary, choices, 9, features, first)
    # Nothing is taken over: there is nothing to refuse.
    assert as_bytes(featurise(episode, vocabulary, linear, 9, known, 0)) == as_bytes(
        featurise(episode, vocabulary, linear, 9)
    )


@given(
    seen=observations, happened=events, other_seen=observations, other_happened=events,
    edge=edges, imputation=st.sampled_from(["causal", "linear"]), common=counts,
    in_order=st.booleans(), data=st.data(),
)  # fmt: skip
def test_features_are_equal_before_the_first_difference(
    road: Any, seen: list, happened: list, other_seen: list, other_happened: list, edge: str,
    imputation: str, common: int, in_order: bool, data: st.DataObject,
) -> None:  # fmt: skip
    other_seen = before(seen, common, edge) + other_seen
    other_happened = before(happened, common, edge) + other_happened
    if in_order:
        for items in (seen, other_seen, happened, other_happened):
            items.sort(key=lambda item: item[1])
    age = data.draw(st.sampled_from([50.0, 50.0, 60.0]))
    choices = replace(road.preprocessing, bin_edge=edge, imputation=imputation)
    old = road.make(seen, happened, statics=Statics(age_years=50.0))
    new = road.make(other_seen, other_happened, statics=Statics(age_years=age))
    hour = first_difference(old, new, choices)
    assert hour == first_difference(new, old, choices)
    assert 0 <= hour <= MAX_HOURS
    one, other = (featurise(e, road.vocabulary, choices, N_HOURS) for e in (old, new))
    assert as_bytes(one, hour) == as_bytes(other, hour)


@pytest.mark.parametrize(
    ("change", "hour"),
    [
        (([("hr", 1.5, 80), ("hr", 3.5, 81), ("sbp", 9.0, 120)], []), 9),
        (([("hr", 1.5, 80), ("hr", 2.5, 81)], []), 2),
        (([("hr", 1.5, 80), ("sbp", 3.5, 81)], []), 3),
        (([("hr", 1.5, 80), ("hr", 3.5, 81, 1)], []), 3),
        (([("hr", 1.5, 80)], []), 3),
        (([("hr", 1.5, -0.0), ("hr", 3.5, 81)], []), 1),
        (([], [("LOINC/2160-0", 2.0, 1.0)]), 1),
        (([("hr", 1.5, 80), ("hr", 3.5, 81)], [("LOINC/2160-0", 5.0, 1.0)]), 5),
        (([("hr", 1.5, 80), ("hr", 3.5, 81)], []), MAX_HOURS),
        (([("hr", 1.5, 80), ("hr", 3.5, 81), ("hr", 999.0, 81)], []), MAX_HOURS),
        (([("hr", -1.5, 80), ("hr", 1.5, 80), ("hr", 3.5, 81)], []), 0),
    ],
)  # fmt: skip
def test_the_first_difference_by_hand(
    make_episode: Callable[..., Episode], preprocessing: Preprocessing, change: Any, hour: int
) -> None:
    old = make_episode([("hr", 1.5, 80), ("hr", 3.5, 81)])
    assert first_difference(old, make_episode(*change), preprocessing) == hour


def test_an_event_differs_by_code_and_by_value(
    make_episode: Callable[..., Episode], preprocessing: Preprocessing
) -> None:
    nan = float("nan")
    first, old = ("LOINC/2160-0", 1.0, 2.0), ("LOINC/2160-0", 4.0, nan)
    for new, hour in (
        (old, MAX_HOURS),
        (("LOINC/2160-0", 4.0, 0.0), 4),
        (("LOINC/2524-7", 4.0, nan), 4),
    ):
        one, other = (make_episode(events=[first, last]) for last in (old, new))
        assert first_difference(one, other, preprocessing) == hour


def test_the_first_difference_follows_the_border_of_hours(
    make_episode: Callable[..., Episode], preprocessing: Preprocessing
) -> None:
    old, new = empty_episode("e"), make_episode([("hr", 5.0, 80)])
    assert first_difference(old, new, preprocessing) == 5
    assert first_difference(old, new, replace(preprocessing, bin_edge="right")) == 4
    assert first_difference(old, new, replace(preprocessing, imputation="linear")) == 0
    aged = replace(old, statics=Statics(age_years=1.0))
    assert first_difference(old, aged, preprocessing) == 0


def test_the_fading_of_events_has_the_same_bits_on_every_machine() -> None:
    """No libm that is right to a few units in the last place rounds it otherwise in float32."""
    exact = np.exp(-np.arange(MAX_HOURS) / 12)
    for away in (1 - 2.0**-49, 1 + 2.0**-49):
        assert (exact * away).astype(np.float32).tobytes() == exact.astype(np.float32).tobytes()
