"""What every answer rests on: features do not depend on order, repeats, or anything later."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llm4ehr.episode import Features
from llm4ehr.hourly import hour_of

# Times on a coarse raster and few values, so that ties, borders and repeats are common.
times = st.integers(-4, 40).map(lambda quarter: quarter / 4)
observations = st.lists(
    st.tuples(
        st.sampled_from(["hr", "sbp", "ph"]), times, st.floats(1, 200), st.integers(0, 1)
    ),
    max_size=25,
)  # fmt: skip
events = st.lists(
    st.tuples(
        st.sampled_from(["LOINC/2160-0", "LOINC/2524-7", "SNOMED/40617009", "LOCAL/unknown"]),
        times,
        st.floats(0, 20) | st.just(float("nan")),
    ),
    max_size=25,
)
edges = st.sampled_from(["left", "right"])
imputations = st.sampled_from(["causal", "linear"])


def as_bytes(features: Features, n_hours: int | None = None) -> list[bytes]:
    parts = (features.series, features.events, features.observed)
    return [part[:n_hours].tobytes() for part in parts]


@given(seen=observations, happened=events, edge=edges, imputation=imputations)
def test_items_outside_the_grid_leave_no_trace(
    road: Any, seen: list, happened: list, edge: Any, imputation: str
) -> None:
    def inside(items: list) -> list:
        return [i for i in items if 0 <= hour_of(i[1], edge) < 6]

    choices = {"bin_edge": edge, "imputation": imputation}
    everything = road.features(seen, happened, 6, **choices)
    kept = road.features(inside(seen), inside(happened), 6, **choices)
    assert as_bytes(everything) == as_bytes(kept)
    assert road.tokens(happened, 6, **choices) == road.tokens(inside(happened), 6, **choices)


@given(
    seen=observations, happened=events, edge=edges, imputation=imputations,
    dedupe=st.sampled_from(["hour", "episode_last", "none"]), data=st.data(),
)  # fmt: skip
def test_the_order_of_items_does_not_matter(
    road: Any, seen: list, happened: list, data: st.DataObject, edge: str, imputation: str,
    dedupe: str,
) -> None:  # fmt: skip
    choices = {"bin_edge": edge, "imputation": imputation, "dedupe": dedupe}
    other_seen, other_happened = (data.draw(st.permutations(i)) for i in (seen, happened))
    one = road.features(seen, happened, 9, **choices)
    other = road.features(other_seen, other_happened, 9, **choices)
    assert as_bytes(one) == as_bytes(other)
    assert road.tokens(happened, 9, **choices) == road.tokens(other_happened, 9, **choices)


@given(seen=observations, happened=events)
def test_duplicates_do_not_matter(road: Any, seen: list, happened: list) -> None:
    twice = road.features(seen * 2, happened * 2, 9)
    assert as_bytes(road.features(seen, happened, 9)) == as_bytes(twice)
    assert road.tokens(happened, 9) == road.tokens(happened * 2, 9)


@given(seen=observations, happened=events, edge=edges, short=st.integers(0, 9))
def test_a_longer_prefix_begins_with_the_shorter(
    road: Any, seen: list, happened: list, edge: str, short: int
) -> None:
    few = road.features(seen, happened, short, bin_edge=edge)
    many = road.features(seen, happened, 10, bin_edge=edge)
    assert as_bytes(few) == as_bytes(many, short)
    tokens = road.tokens(happened, short, bin_edge=edge)
    assert road.tokens(happened, 10, bin_edge=edge)[: len(tokens)] == tokens


@given(
    seen=observations, happened=events, other_seen=observations, other_happened=events,
    edge=edges, now=st.integers(0, 8),
)  # fmt: skip
def test_nothing_after_an_hour_changes_what_came_before(
    road: Any, seen: list, happened: list, other_seen: list, other_happened: list, edge: Any,
    now: int,
) -> None:  # fmt: skip
    def mixed(past: list, future: list) -> list:
        known = [i for i in past if hour_of(i[1], edge) <= now]
        return known + [i for i in future if hour_of(i[1], edge) > now]

    one = road.features(seen, happened, 10, bin_edge=edge)
    other = road.features(
        mixed(seen, other_seen), mixed(happened, other_happened), 10, bin_edge=edge
    )
    assert as_bytes(one, now + 1) == as_bytes(other, now + 1)
