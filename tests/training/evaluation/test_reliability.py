"""Reliability diagrams: the numbers that are drawn, and that they are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import binomtest

from training.evaluation.reliability import (
    draw_interval_coverage,
    draw_reliability,
    interval_coverage,
    reliability,
    wilson,
)
from training.metrics import calibration_error


def test_score_intervals_are_those_of_scipy() -> None:
    hits, count = np.array([0, 3, 10, 10]), np.array([7, 20, 10, 1000])
    low, high = wilson(hits, count)
    for i in range(4):
        expected = binomtest(int(hits[i]), int(count[i])).proportion_ci(method="wilson")
        assert (low[i], high[i]) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_bins_are_those_of_the_calibration_error() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(1003) ** 2
    y = (rng.random(1003) < p).astype(float)
    shares = reliability(y, p)
    assert shares.count.tolist() == [101] * 3 + [100] * 7
    assert (np.diff(shares.at) > 0).all()
    assert ((shares.low <= shares.observed) & (shares.observed <= shares.high)).all()
    error = (shares.count * np.abs(shares.observed - shares.at)).sum() / 1003
    assert error == pytest.approx(calibration_error(y, p))
    assert len(reliability(y[:3], p[:3]).at) == 3


def test_coverage_is_counted_by_day() -> None:
    hours = np.array([0, 23, 24, 95, 96, 120, 199])
    inside = np.array([True, False, True, True, False, False, True])
    shares = interval_coverage(inside, hours)
    assert shares.at.tolist() == [0, 24, 72, 96]
    assert shares.count.tolist() == [2, 1, 1, 3]
    assert_allclose(shares.observed, [0.5, 1, 1, 1 / 3])


@pytest.mark.parametrize("n", [3, 500])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_pictures_are_drawn(n: int, rate: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    p, y = rng.random(n) * 0.4, (rng.random(n) < rate).astype(float)
    draw_reliability(tmp_path / "mortality.png", "mortality", y, p)
    draw_interval_coverage(
        tmp_path / "stay.png", "remaining stay", y < 1, rng.integers(0, 200, n), 0.9
    )
    for picture in tmp_path.iterdir():
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list(tmp_path.iterdir())) == 2
