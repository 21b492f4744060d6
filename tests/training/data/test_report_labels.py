"""The report of an extraction: label instances are those of training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm4ehr.store import Outcome
from tests.training.data.report_source import (
    EXPECTED,
    WATERFALL,
    known_store,
)
from tests.training.data.report_store import stay, write_store
from training.data.extraction import Expected
from training.data.report.build import build_report
from training.data.report.labels import count_labels, sample_hours
from training.labels import certain, hourly_labels


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return known_store(tmp_path)


@pytest.fixture
def report(store: Path) -> dict[str, Any]:
    return build_report(store, WATERFALL, EXPECTED)


def test_label_instances(report: dict[str, Any]) -> None:
    labels = report["labels"]
    assert labels["outcomes"] == {
        "died": 1, "survived": 2, "death_time_known": 1, "los_known": 3,
    }  # fmt: skip
    assert labels["instances"]["column"] == "split"
    a, b = labels["instances"]["groups"]
    assert a == {
        "name": "a", "mortality_stays": 0, "mortality_positive": 0, "decompensation_positive": 4,
        "decompensation_negative": 0, "decompensation_uncertain": 0, "remaining_los_hours": 4,
        "phenotyping_stays": 1,
    }  # fmt: skip
    assert (b["decompensation_negative"], b["remaining_los_hours"]) == (4, 4)
    assert b["phenotyping_stays"] == 1
    assert labels["instances"]["all"]["remaining_los_hours"] == 8
    by_hour = {row["hour"]: row for row in labels["decompensation_by_hour"]}
    assert sorted(by_hour) == [5, 6, 7, 8, 9, 10]
    assert by_hour[5] == {"hour": 5, "stays": 1, "positive": 1, "negative": 0, "share": 1.0}
    assert by_hour[7] == {"hour": 7, "stays": 2, "positive": 1, "negative": 1, "share": 0.5}
    # 10 hours, 30.5 and 60; the samples of stay 2 have 20.5 to 23.5 hours left.
    days = {row["days"]: (row["stays"], row["hours_left"]) for row in labels["los_days"]}
    assert days["<1"] == (1, 8)
    assert (days["1-2"][0], days["2-3"][0]) == (1, 1)
    shock = next(p for p in labels["phenotypes"] if p["name"] == "Shock")
    assert (len(labels["phenotypes"]), shock["stays"], shock["share"]) == (25, 1, 0.5)


def test_mortality_needs_48_hours_and_an_observation_in_them(tmp_path: Path) -> None:
    stays = [
        stay("1", los_hours=48.0, mortality=True, n_hours=48),
        stay("2", los_hours=47.9, mortality=True, n_hours=48),
        stay("3", los_hours=90.0, mortality=False, n_hours=90),  # first observed after hour 48
        stay("4", los_hours=90.0, n_hours=90),  # outcome not known
        stay("5", mortality=False, n_hours=50),  # the record stands for the stay
    ]
    observations = [(s["episode_id"], "hr", 1.0, None, 80.0) for s in stays]
    observations[2] = ("3", "hr", 49.0, None, 80.0)
    report = build_report(write_store(tmp_path / "s", stays, observations), (), Expected())
    found = report["labels"]["instances"]["all"]
    assert (found["mortality_stays"], found["mortality_positive"]) == (2, 1)


def test_a_death_known_to_the_day_is_uncertain(tmp_path: Path) -> None:
    """Death in [48, 72): certain from time 48 on, possible from 25 on."""
    row = stay("1", n_hours=60, los_hours=80.0, mortality=True)
    row |= {"death_hours_low": 48.0, "death_hours_high": 72.0}
    store = write_store(tmp_path / "s", [row], [("1", "hr", 0.0, None, 80.0)])
    found = build_report(store, (), Expected())["labels"]["instances"]["all"]
    assert found["decompensation_negative"] == 24 - 5 + 1
    assert found["decompensation_uncertain"] == 47 - 25 + 1
    assert found["decompensation_positive"] == 60 - 48 + 1


def test_instances_go_by_the_split_of_the_benchmark(tmp_path: Path) -> None:
    stays = [stay("1", benchmark_split="train", phenotypes=[]), stay("2", phenotypes=[])]
    instances = build_report(write_store(tmp_path / "s", stays), (), Expected())["labels"][
        "instances"
    ]
    assert instances["column"] == "benchmark_split"
    found = [(g["name"], g["phenotyping_stays"]) for g in instances["groups"]]
    assert found == [("train", 1), (None, 1)]


_hours = st.floats(0, 80) | st.integers(0, 80).map(float)


@st.composite
def _outcomes(draw: st.DrawFn) -> dict[str, Any]:
    row = stay("1", n_hours=draw(st.integers(1, 70)))
    row["los_hours"] = draw(st.none() | _hours)
    row["mortality"] = draw(st.sampled_from([None, False, True]))
    if row["mortality"] and draw(st.booleans()):
        # On an hour, and so close to it that training takes the label for certain.
        whole = st.integers(1, 80)
        low = draw(st.floats(0.01, 80) | whole.map(float) | whole.map(lambda h: h - 1e-9))
        width = draw(st.sampled_from([0.0, 0.5, 24.0]))
        row["death_hours_low"] = low
        row["death_hours_high"] = low + width if width else float(np.nextafter(low, np.inf))
    row["first_hours"] = draw(st.none() | _hours)
    return row


def _seen(n_hours: int, low: float, high: float) -> dict[str, Any]:
    return stay("1", n_hours=n_hours, mortality=True, first_hours=0.0) | {
        "death_hours_low": low,
        "death_hours_high": high,
    }


@settings(max_examples=300)
@given(_outcomes())
@example(_seen(30, 4.0, 28.0))  # no sample at time 28
@example(_seen(10, 6.0, 30.0 - 1e-9))  # at time 6 so close to 1 that it counts as certain
@example(_seen(10, 6.0, 30.0 + 1e-9))
def test_instances_are_those_of_training(row: dict[str, Any]) -> None:
    """`hourly_labels` pairs bin t with time t + 1; every sample time has the same label here."""
    schema = {
        "n_hours": pl.Int16, "mortality": pl.Boolean, "phenotypes": pl.List(pl.String),
        **dict.fromkeys(("los_hours", "death_hours_low", "death_hours_high"), pl.Float64),
        "first_hours": pl.Float64, "split": pl.String,
    }  # fmt: skip
    stays = pl.DataFrame({name: [row[name]] for name in schema}, schema=schema)
    outcome = Outcome(
        **{k: row[k] for k in ("mortality", "los_hours", "death_hours_low", "death_hours_high")}
    )
    first = math.inf if row["first_hours"] is None else row["first_hours"]
    labels = hourly_labels(outcome, row["n_hours"], first_observation=first)

    hours = sample_hours(stays)
    assert hours["hour"].to_list() == (np.flatnonzero(labels.valid) + 1).tolist()
    at = hours["hour"].to_numpy() - 1
    for name in ("decompensation", "remaining_los"):
        ours = hours[name].cast(pl.Float32).fill_null(float("nan")).to_numpy()
        np.testing.assert_array_equal(ours, getattr(labels, name)[at])

    (found,) = count_labels(stays, "split").instances.to_dicts()
    known = labels.decompensation[~np.isnan(labels.decompensation)]
    assert found["decompensation_positive"] == (known == 1).sum()
    assert found["decompensation_negative"] == (known == 0).sum()
    assert found["decompensation_uncertain"] == (~certain(known)).sum()
    assert found["remaining_los_hours"] == (~np.isnan(labels.remaining_los)).sum()
