"""The report of an extraction: its figures."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm4ehr.episode import Episode, hourly_grid, variable_indices
from llm4ehr.store import CodeInfo, EpisodeStore
from llm4ehr.variables import VARIABLES
from tests.training.data.report_source import (
    EVENTS,
    EXPECTED,
    OBSERVATIONS,
    REFUSED,
    STAYS,
    WATERFALL,
    _variable,
    known_store,
)
from tests.training.data.report_store import stay, write_store
from training.data.extraction import Expected
from training.data.report.build import build_report, figures, write_report
from training.data.report.labels import los_bucket
from training.data.report.scan import histogram as histogram_of
from training.data.report.scan import hourly_values, quantiles, scan_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return known_store(tmp_path)


@pytest.fixture
def report(store: Path) -> dict[str, Any]:
    return build_report(store, WATERFALL, EXPECTED)


def test_description(report: dict[str, Any], store: Path) -> None:
    described = report["description"]
    assert described["counts"] == {
        "stays": 3, "subjects": 2, "stay_hours": 80, "observations": 6, "events": 4,
    }  # fmt: skip
    assert described["options"] == {"profile": "strict"}
    digests = json.loads((store / "store.json").read_text())["digests"]
    assert described["digests"] == {name: d[:12] for name, d in digests.items()}


def test_waterfall(report: dict[str, Any]) -> None:
    first, second = report["waterfall"]
    assert first["dropped_stays"] is None
    assert first["ratio"] == 0.1
    assert second == {
        "rule": "adults", "stays": 3, "subjects": 2, "dropped_stays": 3, "dropped_subjects": 2,
        "published_stays": 40, "ratio": 0.075,
    }  # fmt: skip


def test_splits(report: dict[str, Any]) -> None:
    assert report["splits"]["split"] == [
        {"name": "a", "stays": 1, "subjects": 1, "stay_hours": 10, "mortality": 1.0},
        {"name": "b", "stays": 2, "subjects": 1, "stay_hours": 70, "mortality": 0.0},
    ]
    assert report["splits"]["benchmark_split"] == []
    assert report["splits"]["overlap"] == {"split": 0, "benchmark_split": 0}


def test_a_patient_in_two_splits_is_counted_once(tmp_path: Path) -> None:
    splits = [("train", "x"), ("test", None), ("train", "y")]
    stays = [
        stay(str(i), subject_id="p", split=split, benchmark_split=benchmark)
        for i, (split, benchmark) in enumerate(splits)
    ]
    report = build_report(write_store(tmp_path / "s", stays), (), Expected())
    assert report["splits"]["overlap"] == {"split": 1, "benchmark_split": 1}
    assert [row["name"] for row in report["splits"]["benchmark_split"]] == ["x", "y", None]


def test_stays(report: dict[str, Any]) -> None:
    age = next(n for n in report["stays"]["numbers"] if n["name"] == "age_years")
    assert (age["known"], age["q50"]) == (0.333333, 40.0)
    sexes = [(c["name"], c["stays"]) for c in report["stays"]["categories"]["sex"]]
    assert sexes == [(None, 2), ("male", 1)]


def test_variable(report: dict[str, Any]) -> None:
    """Hourly heart rates: 90 and 100 in stay 1 (hours 0 and 2), 15 in stay 2 (hour 6)."""
    hr = _variable(report, "hr")
    assert hr["values"] == 4
    assert hr["values_per_hour"] == 4 / 80
    assert hr["stays_share"] == 0.666667
    assert hr["hours_observed"] == 3
    assert hr["observed_share"] == 0.0375
    assert hr["charted_share"] == 0.0375
    assert hr["mean"] == pytest.approx(205 / 3, rel=1e-5)
    assert hr["std"] == pytest.approx(np.std([90, 100, 15]), rel=1e-5)
    assert hr["quantiles"] == {"q01": 15.0, "q50": 90.0, "q99": 100.0}
    assert hr["implausible_share"] == 0.25
    assert hr["limits"] == [0.0, 350.0]
    # 1.0 and 0.4 hours: the median is the lower one.
    assert hr["delay"] == {"rows": 2, "share": 0.5, "median_hours": 0.4, "p95_hours": 1.0}
    sbp = _variable(report, "sbp")
    assert (sbp["mean"], sbp["implausible_share"], sbp["delay"]["rows"]) == (120.0, 0.5, 0)
    ph = _variable(report, "ph")
    assert (ph["hours_observed"], ph["mean"], ph["histogram"]) == (0, None, None)


def test_hours_known_and_hours_charted_differ(tmp_path: Path) -> None:
    observations = [("1", "hr", 0.5, 1.5, 80.0), ("1", "hr", 1.2, None, 81.0)]
    report = build_report(write_store(tmp_path / "s", [stay("1")], observations), (), Expected())
    hr = _variable(report, "hr")
    assert (hr["observed_share"], hr["charted_share"]) == (0.1, 0.2)
    assert figures(report)["observed.hr"] == 0.2


def test_events(report: dict[str, Any]) -> None:
    events = report["events"]
    assert (events["rows"], events["codes"], events["codes_described"]) == (4, 2, 2)
    assert events["delay"] == {"rows": 2, "share": 0.5, "median_hours": 1.0, "p95_hours": 2.0}
    creatinine, start = events["top"]
    assert creatinine == {
        "code": "LOINC/2160-0", "descriptor": "creatinine in serum or plasma", "unit": "mg/dL",
        "n": 3, "stays": 2, "stays_share": 0.666667, "valued_share": 1.0, "median": 2.0,
    }  # fmt: skip
    assert (start["unit"], start["valued_share"], start["median"]) == (None, 0.0, None)


def test_only_the_top_codes_are_listed(tmp_path: Path) -> None:
    codes = {f"X/{i:02d}": CodeInfo(f"thing {i}", None) for i in range(40)}
    events = [
        ("1", code, float(k % 10), None, None)
        for i, code in enumerate(codes)
        for k in range(40 - i)
    ]
    store = write_store(tmp_path / "s", [stay("1")], (), events, codes=codes)
    events = build_report(store, (), Expected())["events"]
    assert [row["code"] for row in events["top"]] == list(codes)[:30]
    assert events["codes"] == 40
    assert events["top_share"] == pytest.approx(sum(range(11, 41)) / sum(range(1, 41)), rel=1e-5)


def test_refused_and_repaired(report: dict[str, Any]) -> None:
    refused = report["refused"]
    assert (refused["rows"], refused["rows_seen"]) == (5, 15)
    assert refused["share"] == 0.333333
    assert refused["reasons"] == [
        {
            "reason": "outside-limits", "rows": 4, "share": 0.266667, "unreadable": False,
            "details": [{"name": "hr", "rows": 3}, {"name": "sbp", "rows": 1}],
        },
        {
            "reason": "not-a-number", "rows": 1, "share": 0.0666667, "unreadable": True,
            "details": [{"name": "hr", "rows": 1}],
        },
    ]  # fmt: skip
    assert report["repaired"] == [{"reason": "fahrenheit", "name": "temp", "rows": 2}]


def test_absent_tables_are_no_rows(tmp_path: Path) -> None:
    refused = REFUSED | {"table-absent:lab": 1, "table-absent:diagnosis": 1}
    store = write_store(tmp_path / "s", STAYS, OBSERVATIONS, EVENTS, refused=refused)
    report = build_report(store, (), Expected())
    found = report["refused"]
    assert (found["rows"], found["rows_seen"], found["share"]) == (5, 15, 0.333333)
    absent = next(r for r in found["reasons"] if r["reason"] == "table-absent")
    assert (absent["rows"], absent["share"]) == (2, None)
    write_report(report, tmp_path)
    assert "table-absent" in (tmp_path / "report.html").read_text()


def test_published_figures(report: dict[str, Any]) -> None:
    rows = {row["figure"]: row for row in report["published"]}
    assert (rows["stays"]["ratio"], rows["stays"]["per_stay"]) == (0.1, 1.0)
    # No stay of the task: 0 of 20.
    assert rows["mortality.positive"]["ratio"] == 0.0
    assert (rows["observed.hr"]["ratio"], rows["observed.hr"]["per_stay"]) == (1.5, 1.5)
    assert rows["mean.hr"]["ratio"] == pytest.approx(0.5, rel=1e-5)
    assert _variable(report, "hr")["published"] == {"observed": 0.025, "mean": 136.6667}


def test_a_store_without_a_stay(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [])
    report = build_report(store, (), Expected())
    write_report(report, tmp_path)
    assert report["description"]["counts"]["stays"] == 0


def test_the_same_store_gives_the_same_files(store: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_report(build_report(store, WATERFALL, EXPECTED), tmp_path / name)
    for file in ("report.json", "report.html"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_row_groups_do_not_matter(report: dict[str, Any], tmp_path: Path) -> None:
    other = write_store(tmp_path / "s", STAYS, OBSERVATIONS, EVENTS, stays_per_group=1)
    again = build_report(other, WATERFALL, EXPECTED)
    for section in ("variables", "events", "labels", "stays", "splits"):
        assert again[section] == report[section]


# Values as a model would see them, and labels as it is trained on them


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_hourly_values_are_those_of_the_grid(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, n_hours = int(rng.integers(0, 60)), int(rng.integers(1, 6))
    # Coarse times, so that many items share one.
    at = rng.integers(-2, 4 * n_hours + 4, n) / 4
    variable = rng.choice(["hr", "sbp"], n)
    value, priority = rng.integers(50, 90, n).astype(float), rng.integers(0, 2, n).astype(np.int8)
    episode = Episode(
        episode_id="e", n_hours=n_hours, obs_variable=variable_indices(list(variable)),
        obs_hours=at, obs_value=value, obs_priority=priority, ev_code=np.array([], object),
        ev_hours=np.array([]), ev_value=np.array([]),
    )  # fmt: skip
    grid = hourly_grid(episode, n_hours)
    frame = pl.DataFrame(
        {"variable": variable.tolist(), "at": at, "value": value, "priority": priority},
        schema={"variable": pl.String, "at": pl.Float64, "value": pl.Float64, "priority": pl.Int8},
    ).with_columns(episode_id=pl.lit("e"), n_hours=pl.lit(n_hours))
    found = hourly_values(frame)
    assert len(found) == grid.observed.sum()
    for name, hour, seen in found.select("variable", "hour", "value").iter_rows():
        index = variable_indices([name])[0]
        assert grid.observed[hour, index]
        assert seen == grid.values[hour, index]


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_the_report_sees_what_is_read_from_the_store(seed: int) -> None:
    """Items known late, in any order, some when they were history."""
    rng = np.random.default_rng(seed)
    n_hours = 6
    stays = [stay(str(i), n_hours=n_hours) for i in range(3)]
    observations = []
    for _ in range(int(rng.integers(0, 80))):
        hours = int(rng.integers(0, 4 * n_hours)) / 4
        late = None if rng.integers(3) == 0 else hours + int(rng.integers(0, 12)) / 4
        variable, value = str(rng.choice(["hr", "sbp"])), float(rng.integers(50, 90))
        episode_id = str(rng.integers(3))
        priority = int(rng.integers(2))
        observations.append((episode_id, variable, hours, late, value, priority))
    with tempfile.TemporaryDirectory() as folder:
        path = write_store(Path(folder) / "s", stays, observations)
        scanned = scan_store(path)
        records = list(EpisodeStore.open(path))
    seen: Counter[tuple[str, float]] = Counter()
    first = {}
    for record in records:
        grid = hourly_grid(record.episode, n_hours)
        for hour, index in zip(*np.nonzero(grid.observed), strict=True):
            seen[VARIABLES[index].name, float(grid.values[hour, index])] += 1
        if len(record.episode.obs_hours):
            first[record.episode.episode_id] = float(record.episode.obs_hours.min())
    assert {(name, value): n for name, value, n in scanned.values.iter_rows()} == seen
    assert dict(scanned.first_hours.iter_rows()) == first


def test_los_buckets() -> None:
    hours = pl.DataFrame({"h": [0.0, 23.99, 24.0, 47.0, 191.9, 192.0, 335.9, 336.0, 999.0]})
    assert hours.select(los_bucket("h")).to_series().to_list() == [
        "<1", "<1", "1-2", "1-2", "7-8", "8-14", "8-14", "14+", "14+",
    ]  # fmt: skip


@given(st.lists(st.integers(0, 30), min_size=1), st.floats(0, 1))
def test_quantiles_of_counts_are_those_of_the_values(values: list[int], share: float) -> None:
    counts = pl.DataFrame({"value": [float(v) for v in values]}).group_by("value").len("n")
    (found,) = quantiles(counts, "value", (share,))
    assert found in values
    assert np.mean(np.array(values) <= found) >= share - 1e-9
    lower = [v for v in values if v < found]
    assert not lower or np.mean(np.array(values) <= max(lower)) < share + 1e-9


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 4000), min_size=1, max_size=300),
    st.sampled_from([1.0, 0.1, 0.05, 0.01]),
)
def test_a_histogram_counts_every_value_once(steps: list[int], step: float) -> None:
    values = [round(k * step, 2) for k in steps]
    counts = pl.DataFrame({"value": values}).group_by("value").len("n")
    found = histogram_of(counts)
    assert found is not None
    assert len(found["counts"]) <= 40
    assert found["below"] + sum(found["counts"]) + found["above"] == len(values)
    # Borders lie between two values that can be charted, so every bin spans as many of them.
    assert (found["width"] / step) == pytest.approx(round(found["width"] / step))
    # With few values nothing is beyond the robust limits.
    assert found["below"] == found["above"] == 0
