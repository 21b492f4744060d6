"""The extraction report: every number by hand on three stays, the rest against the model's code."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm4ehr.episode import Episode, hourly_grid, variable_indices
from llm4ehr.store import CodeInfo, EpisodeStore, Outcome
from llm4ehr.variables import VARIABLES
from tests.training.data.report_store import died, stay, write_store
from training.data.extraction import Expected, Step
from training.data.report.build import build_report, figures, write_report
from training.data.report.figures import decompensation, histogram
from training.data.report.labels import count_labels, los_bucket, sample_hours
from training.data.report.scan import histogram as histogram_of
from training.data.report.scan import hourly_values, quantiles, scan_store
from training.labels import certain, hourly_labels

STAYS = [
    # Sample times 5..8: the ninth and tenth hour come after the death.
    stay("1", subject_id="p", split="a", los_hours=10.0, sex="male", age_years=40.0, **died(8.0))
    | {"phenotypes": ["Shock"]},
    # Sample times 7..10: the first observation became known at 6.5.
    stay("2", subject_id="q", split="b", los_hours=30.5, mortality=False, phenotypes=[]),
    # Without an observation there is no sample time.
    stay("3", subject_id="q", split="b", n_hours=60, los_hours=60.0, mortality=False),
]
OBSERVATIONS = [
    ("1", "hr", 0.2, None, 80.0),
    ("1", "hr", 0.9, None, 90.0),  # hour 0 has 90, its last value
    ("1", "hr", 1.5, 2.5, 100.0),  # taken in hour 1, known in hour 2
    ("1", "sbp", 0.5, None, 120.0, 0),
    ("1", "sbp", 0.6, None, 300.5, 1),  # not plausible; the preferred source goes first
    ("2", "hr", 6.1, 6.5, 15.0),  # not plausible
]
EVENTS = [
    ("1", "LOINC/2160-0", 1.0, 3.0, 1.0),
    ("2", "LOINC/2160-0", 1.0, 2.0, 2.0),
    ("2", "LOINC/2160-0", 3.0, None, 4.0),
    ("1", "X/start", 2.0, None, None),
]
REFUSED = {"outside-limits:hr": 3, "not-a-number:hr": 1, "outside-limits:sbp": 1}
WATERFALL = (Step("all", 6, 4, 60), Step("adults", 3, 2, 40))
EXPECTED = Expected(
    published={"stays": 30, "mortality.positive": 20, "observed.hr": 0.025, "mean.hr": 136.6667}
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three stays in two row groups."""
    return write_store(
        tmp_path / "store", STAYS, OBSERVATIONS, EVENTS,
        refused=REFUSED, repaired={"fahrenheit:temp": 2}, options={"profile": "strict"},
    )  # fmt: skip


@pytest.fixture
def report(store: Path) -> dict[str, Any]:
    return build_report(store, WATERFALL, EXPECTED)


def _variable(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(v for v in report["variables"] if v["name"] == name)


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


# The page


class _Page(HTMLParser):
    """Tags that are open, every attribute, and whether each figure is described."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _page(store: Path, expected: Expected = EXPECTED) -> str:
    folder = store.parent
    write_report(build_report(store, WATERFALL, expected), folder)
    json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_stands_alone(store: Path) -> None:
    text = _page(store)
    page = _Page(text)
    assert not page.open
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "form"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "style"):
            assert name not in attributes or str(attributes[name]).startswith("#")
    assert "url(" not in text
    assert "@import" not in text
    anchors = {str(a["href"])[1:] for tag, a in page.tags if tag == "a"}
    assert anchors <= {a.get("id") for _, a in page.tags}


def test_figures_have_a_title_and_a_description(store: Path) -> None:
    text = _page(store)
    drawn = re.findall(r'<svg class="figure".*?</svg>', text, flags=re.DOTALL)
    assert len(drawn) == 2  # of the two variables; there are too few stays for a curve
    assert all(re.search(r"<title>.+</title><desc>.+</desc>", figure) for figure in drawn)


def test_the_page_begins_with_the_verdict(store: Path) -> None:
    text = _page(store)
    verdict = text[text.index('class="verdict') : text.index('id="cohort"')]
    # Nine variables were never observed, and one of 15 rows could not be read.
    assert "2 of 8 gates failed" in verdict
    assert "The variable ph is not observed" in verdict
    furthest = ["mortality positive", "mean of hr", "share of stay-hours with hr"]
    assert sorted(furthest, key=verdict.index) == furthest
    assert "outside-limits" in verdict
    absent = frozenset(v.name for v in VARIABLES) - {"hr", "sbp"}
    other = write_store(store.parent / "other", STAYS, OBSERVATIONS, EVENTS)
    assert "All 8 gates passed" in _page(other, Expected(absent_variables=absent))


def test_the_page_escapes_what_it_is_told(tmp_path: Path) -> None:
    bad = "<script>alert('x')</script>&\""
    store = write_store(
        tmp_path / "s",
        [stay("1", split=bad, benchmark_split=bad, mortality=False, phenotypes=[bad], los_hours=9)],
        [("1", "hr", 1.0, None, 80.0)], [("1", bad, 1.0, None, 1.0)],
        codes={bad: CodeInfo(bad, bad)}, source=bad, licence=bad, citation=bad, created_by=bad,
        label_notes={bad: bad}, options={bad: bad},
        refused={f"{bad}:{bad}": 1}, repaired={f"{bad}:{bad}": 1},
    )  # fmt: skip
    report = build_report(
        store, (Step(bad, 1, 1),), Expected(tasks=frozenset({bad}), published={bad: 1.0})
    )
    write_report(report, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 15
    assert not _Page(text).open


def test_ids_of_patients_and_stays_are_nowhere(tmp_path: Path) -> None:
    rows = [
        stay(f"EPISODE{i}", subject_id="SUBJECT", split=str(i), age_years=30.0) for i in range(2)
    ]
    bad = [("EPISODE0", "hr", -1.0, -2.0, 80.0), ("EPISODE1", "hr", 99.0, None, 80.0)]
    store = write_store(tmp_path / "s", rows, bad)
    write_report(build_report(store, (), Expected()), tmp_path)
    for file in ("report.json", "report.html"):
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert "EPISODE" not in text
        assert "SUBJECT" not in text


def test_a_figure_of_nothing_is_empty() -> None:
    assert histogram({"histogram": None}) == ""
    assert decompensation([]) == ""


def test_bars_are_as_high_as_their_counts() -> None:
    variable = {"title": "Heart rate", "unit": "/min", "limits": [0, 350], "plausible": [20, 300]}
    drawn = histogram(
        variable | {"histogram": {"start": 59.5, "width": 1.0, "counts": [10, 0, 40]}}
    )
    found = re.findall(r'<rect[^>]* y="([\d.]+)"[^>]* height="([\d.]+)"', drawn)
    assert found == [("66.0", "18.0"), ("12.0", "72.0")]  # standing on 84
    assert '<line class="limits"' not in drawn  # too far away
    near = histogram(variable | {"histogram": {"start": -0.5, "width": 1.0, "counts": [1] * 40}})
    assert near.count('<line class="limits"') == near.count('<line class="plausible"') == 1


def test_the_curve_ends_where_few_stays_are_left() -> None:
    rows = [
        {"hour": h, "stays": 100 if h < 20 else 9, "positive": 1, "negative": 9, "share": 0.1}
        for h in range(5, 30)
    ]
    drawn = decompensation(rows)
    assert "<title>Decompensation by hour of stay</title>" in drawn
    assert "from hour 5 to 19;" in drawn


def test_the_scan_holds_no_more_than_counts(tmp_path: Path) -> None:
    """Ten times the stays with the same values give tables of the same size."""
    sizes = []
    for n in (10, 100):
        stays = [stay(f"{i:03d}", age_years=50.0) for i in range(n)]
        observations = [
            (s["episode_id"], "hr", 1.0, 1.5, 60.0 + i % 5) for i, s in enumerate(stays)
        ]
        events = [(s["episode_id"], "X/start", 1.0, None, None) for s in stays]
        scanned = scan_store(write_store(tmp_path / str(n), stays, observations, events))
        frames = (scanned.variables, scanned.values, scanned.delays, scanned.codes, scanned.faults)
        sizes.append([len(frame) for frame in frames])
    assert sizes[0] == sizes[1] == [1, 5, 1, 1, 0]
