"""Calibration on held-out stays: maps by hour, equal weights, intervals that cover."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from llm4ehr.calibration import OutputMap, calibration_from_json
from training.calibrate import (
    fit_calibration,
    fit_interval,
    fit_map,
    hours_of,
    on_scale,
    one_row_a_stay,
    stay_weights,
    uncalibrated,
)
from training.config import FinetuneConfig
from training.heads import Targets

METHODS = ("none", "platt", "temperature", "isotonic", "platt_isotonic")
N_HOURS = 48


def config_with(**changes: Any) -> FinetuneConfig:
    body = {
        "run": Path("run"),
        "pretrained": Path("pretrained"),
        "data": {"sources": [{"store": Path("s"), "splits": ["a"]}], "cache": Path("cache")},
        "tasks": {"mortality": 1.0, "remaining_los": 1.0, "phenotyping": 1.0},
    }
    return FinetuneConfig.model_validate(body | changes)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


class Ward:
    """Stays of 48 hours whose raw output is worth more the later it is."""

    def __init__(self, n_stays: int, seed: int = 0, level: float = -1.5) -> None:
        rng = np.random.default_rng(seed)
        self.stay = np.repeat(np.arange(n_stays), N_HOURS)
        self.hours = np.tile(np.arange(N_HOURS), n_stays)
        severity = rng.normal(size=n_stays) * 1.5
        self.y = (rng.random(n_stays) < sigmoid(level + severity)).astype(float)[self.stay]
        # The logit of the risk is `level + severity`; the network says it too loud, less so later.
        self.slope = 0.4 + 0.15 * np.log1p(self.hours)
        self.raw = severity[self.stay] / self.slope
        self.level = level

    def map(self, method: Any = "platt", **how: bool) -> OutputMap:
        how = {"by_stay": True, "by_hour": True} | how
        return fit_map(method, self.raw, self.y, self.stay, self.hours, **how)


def log_loss(y: np.ndarray, p: np.ndarray) -> float:
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)))


def test_the_line_follows_the_hour() -> None:
    ward = Ward(4000)
    of = ward.map()
    assert (of.kind, of.last_hour) == ("platt", N_HOURS - 1)
    assert of.a + of.a_hour * np.log1p([0, 5, 47]) == pytest.approx([0.4, 0.669, 0.981], abs=0.06)
    assert of.b + of.b_hour * np.log1p([0, 5, 47]) == pytest.approx([-1.5] * 3, abs=0.15)
    one_line = ward.map(by_hour=False)
    assert (one_line.a_hour, one_line.b_hour) == (0, 0)
    fresh = Ward(1000, seed=1)
    late = fresh.hours == 47
    loss = [
        log_loss(fresh.y[late], m(fresh.raw[late, None], fresh.hours[late])[:, 0])
        for m in (of, one_line)
    ]
    assert loss[0] < loss[1]


def test_hours_later_than_most_stays_take_the_line_of_the_last_sure_hour() -> None:
    ward = Ward(1000)
    gone = (ward.hours >= 24) & (ward.stay >= 20)  # twenty stays go on
    of = fit_map(
        "platt", ward.raw[~gone], ward.y[~gone], ward.stay[~gone], ward.hours[~gone],
        by_stay=True, by_hour=True,
    )  # fmt: skip
    assert of.last_hour == 23


def test_few_deaths_give_one_line_for_all_hours() -> None:
    ward = Ward(100)
    assert 5 < ward.y[::N_HOURS].sum() < 40
    for method in ("platt", "isotonic", "platt_isotonic"):
        of = ward.map(method)
        assert (of.kind, of.a_hour, of.b_hour) == ("platt", 0, 0)
        assert of.a != 1


def test_answers_of_one_hour_give_one_line() -> None:
    """As a network that answers once a stay gives them: the hour tells nothing apart."""
    ward = Ward(800)
    rows = [of[ward.hours == 47] for of in (ward.raw, ward.y, ward.stay, ward.hours)]
    by_hour, plain = (fit_map("platt", *rows, by_stay=True, by_hour=b) for b in (True, False))
    assert by_hour == plain


def test_a_line_that_falls_at_some_hour_does_not_follow_the_hour() -> None:
    ward = Ward(1000)
    early = ward.hours < 3
    ward.raw[early] *= -1
    of = ward.map()
    assert of.a_hour == 0
    assert of.a > 0
    ward.raw *= -1
    assert {ward.map(m) for m in METHODS} == {OutputMap(kind="platt")}


def test_every_stay_weighs_the_same() -> None:
    assert stay_weights(np.array([3, 3, 7, 3])).tolist() == [1 / 3, 1 / 3, 1, 1 / 3]
    ward = Ward(300)
    short = ward.hours < np.where(ward.stay % 2, 6, N_HOURS)
    rows = (ward.raw[short], ward.y[short], ward.stay[short])
    hours = ward.hours[short] * 0
    plain = fit_map("platt", *rows, hours, by_stay=True, by_hour=False)
    twice = np.repeat(np.arange(len(hours)), np.where(rows[2] == 4, 30, 1))
    again = fit_map("platt", *(r[twice] for r in rows), hours[twice], by_stay=True, by_hour=False)
    assert (again.a, again.b) == pytest.approx((plain.a, plain.b), rel=1e-9)
    by_row = fit_map("platt", *(r[twice] for r in rows), hours[twice], by_stay=False, by_hour=False)
    assert abs(by_row.b - plain.b) > 1e-3


def test_temperature_has_no_level() -> None:
    of = Ward(2000, level=0.0).map("temperature")
    assert (of.b, of.a_hour, of.b_hour) == (0, 0, 0)
    assert 0.6 < of.a < 1


def test_isotonic_maps_find_what_a_line_cannot() -> None:
    rng = np.random.default_rng(0)
    raw = rng.uniform(-4, 4, 20_000)
    risk = np.where(raw < 0, 0.1, 0.3)  # a step
    y = (rng.random(len(raw)) < risk).astype(float)
    rows = (raw, y, np.arange(len(raw)), np.zeros(len(raw), int))
    how = {"by_stay": True, "by_hour": False}
    fitted = {m: fit_map(m, *rows, **how) for m in ("platt", "isotonic", "platt_isotonic")}
    at, hours = np.array([[-3.0], [-0.5], [0.5], [3.0]]), np.zeros(4, int)
    steps = fitted["isotonic"](at, hours)[:, 0]
    assert_allclose(steps, [0.1, 0.1, 0.3, 0.3], atol=0.03)
    assert np.abs(fitted["platt"](at, hours)[:, 0] - steps).max() > 0.03
    mean = (fitted["platt"](at, hours) + fitted["isotonic"](at, hours)) / 2
    assert_allclose(fitted["platt_isotonic"](at, hours), mean, rtol=1e-12)
    assert 2 < len(fitted["isotonic"].knots) <= 50


@given(seed=st.integers(0, 1000), method=st.sampled_from(METHODS), soft=st.booleans())
@settings(max_examples=40)
def test_fitted_maps_are_sound(seed: int, method: Any, soft: bool) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 400))
    stay, hours = np.arange(n), rng.integers(0, 60, n)
    raw = rng.normal(size=n).round(1) * rng.choice([0.01, 1, 30])
    y = rng.random(n) if soft else (rng.random(n) < sigmoid(raw)).astype(float)
    y[rng.random(n) < 0.2] = np.nan
    rows = (raw, y, stay, hours)
    of = fit_map(method, *rows, by_stay=True, by_hour=bool(seed % 2))
    assert of == fit_map(method, *rows, by_stay=True, by_hour=bool(seed % 2))
    x = np.linspace(raw.min() - 1, raw.max() + 1, 200)[:, None]
    p = of(x, np.full(200, seed % 200))[:, 0]
    assert ((p >= 0) & (p <= 1)).all()
    assert (np.diff(p) >= 0).all()


# Intervals.


def remaining(rng: np.random.Generator, n_stays: int) -> dict[str, np.ndarray]:
    """Stays of many lengths, each with an error of its own that is wider early in the stay."""
    length = rng.integers(6, 150, n_stays)
    stay = np.repeat(np.arange(n_stays), length)
    hours = hours_of(stay)
    left = (length[stay] - hours).astype(np.float64)
    error = rng.standard_t(3, n_stays)[stay] * np.where(hours < 24, 1.0, 0.3)
    return {"raw": on_scale(left, "log_days") + error, "left": left, "stay": stay, "hours": hours}


@pytest.mark.parametrize("coverage", [0.5, 0.9])
def test_intervals_cover_new_stays(coverage: float) -> None:
    """Marginally and in the bins, over many held-out sets: within binomial bounds."""
    config = config_with(coverage=coverage)
    rng = np.random.default_rng(7)
    hit: dict[str, list[bool]] = {"all": [], "early": [], "late": []}
    for repeat in range(150):
        held_out, new = remaining(rng, 150), remaining(rng, 60)
        interval = fit_interval(
            held_out["raw"], held_out["left"], held_out["stay"], held_out["hours"], config
        )
        assert interval is not None
        assert interval.first_hours[0] == 0
        assert sum(interval.stays) == 150
        assert min(interval.stays) >= 30
        of = OutputMap(kind="log_days", interval=interval)
        rows = one_row_a_stay(new["stay"], new["left"] >= 0, repeat)
        x, hours = new["raw"][rows, None], new["hours"][rows]
        low, high = of.bounds(x, hours)
        inside = (low[:, 0] <= new["left"][rows]) & (new["left"][rows] <= high[:, 0])
        answer = of(x, hours)
        assert ((low <= answer) & (answer <= high) & (low >= 0)).all()
        hit["all"] += inside.tolist()
        hit["early"] += inside[hours < 12].tolist()
        hit["late"] += inside[hours >= 96].tolist()
    for name, of_bin in hit.items():
        # Never less than asked for; a finite sample may cover up to 1 / (n + 1) more of a bin.
        error = 4 * np.sqrt(coverage * (1 - coverage) / len(of_bin)) + 0.01
        share = float(np.mean(of_bin))
        assert coverage - error <= share <= coverage + 1 / 31 + error, name


def test_bins_with_few_stays_are_one_with_their_neighbours() -> None:
    stay = np.arange(100)
    hours = np.r_[np.full(5, 3), np.full(55, 13), np.full(35, 30), np.full(5, 150)]
    raw, left = np.zeros(100), np.arange(100.0)
    interval = fit_interval(raw, left, stay, hours, config_with(los_scale="days"))
    assert interval is not None
    assert (interval.first_hours, interval.stays) == ((0, 24), (60, 40))
    # Rank ceil(61 * 0.9) = 55 of 60 and ceil(41 * 0.9) = 37 of 40, counted from 1.
    assert_allclose(interval.half_widths, np.array([54, 60 + 36]) / 24)


def test_too_few_stays_give_no_interval() -> None:
    def of(n: int) -> Any:
        return fit_interval(np.zeros(n), np.ones(n), np.arange(n), np.zeros(n, int), config_with())

    assert of(8) is None
    assert of(9).stays == (9,)


def test_one_known_hour_of_every_stay_is_drawn() -> None:
    stay = np.repeat([0, 1, 2], [40, 10, 5])
    known = np.ones(55, bool)
    known[:20] = False
    known[50:] = False  # nothing is known of the last
    drawn = np.array([one_row_a_stay(stay, known, seed) for seed in range(400)])
    assert drawn.shape == (400, 2)
    assert (drawn[:, 0] >= 20).all()
    assert ((drawn[:, 1] >= 40) & (drawn[:, 1] < 50)).all()
    assert set(drawn[:, 1].tolist()) == set(range(40, 50))
    assert drawn[:, 0].mean() == pytest.approx(29.5, abs=1)
    assert (one_row_a_stay(stay, known, 3) == drawn[3]).all()


# All heads.


def test_hours_are_counted_from_the_first_of_each_stay() -> None:
    assert hours_of(np.array([0, 0, 0, 2, 3, 3])).tolist() == [0, 1, 2, 0, 0, 1]
    assert hours_of(np.zeros(0, int)).tolist() == []


def test_every_head_gets_its_map() -> None:
    ward = Ward(600)
    rng = np.random.default_rng(0)
    n = len(ward.y)
    hourly = np.stack([np.full(n, np.nan), ward.y, N_HOURS - ward.hours - 1.0], 1)
    phenotypes = (rng.random((600, 25)) < 0.2).astype(np.float32)
    targets = Targets(
        hourly=torch.tensor(hourly),
        valid=torch.ones(n, dtype=torch.bool),
        stay=torch.from_numpy(ward.stay),
        phenotypes=torch.from_numpy(phenotypes),
    )
    raw = 2 * phenotypes[ward.stay] + rng.normal(size=(n, 25))
    outputs: Any = {
        "mortality": torch.from_numpy(ward.raw)[:, None],
        "remaining_los": torch.from_numpy(rng.normal(size=(n, 1))),
        "phenotyping": torch.from_numpy(raw),
    }
    config = config_with(calibration="platt_isotonic", coverage=0.8)
    fitted = fit_calibration(config, outputs, targets)
    maps = calibration_from_json(fitted["calibration"])
    assert maps["mortality"] == ward.map("platt_isotonic")
    assert (maps["phenotyping"].kind, maps["phenotyping"].a_hour) == ("platt_isotonic", 0)
    assert maps["remaining_los"].interval is not None
    assert maps["remaining_los"].interval.coverage == 0.8
    assert set(fitted["thresholds"]) == {"mortality"}

    plain = uncalibrated(config_with(los_scale="days"))
    assert calibration_from_json(plain["calibration"]) == {
        "mortality": OutputMap(kind="platt"),
        "remaining_los": OutputMap(kind="days"),
        "phenotyping": OutputMap(kind="platt"),
    }
    assert plain["thresholds"] == {}
