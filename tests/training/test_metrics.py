"""Metrics against published vectors and brute force, at ties and with one class only."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from training.metrics import (
    auprc,
    auroc,
    bootstrap,
    brier,
    calibration_error,
    calibration_line,
    fit_logistic,
    fit_platt,
    macro,
    mae,
    micro,
    physionet_h,
    physionet_s1,
    r2,
    rmse,
    s1_threshold,
    two_classes,
)

# The worked example of the 2012 challenge's two scores.
WORKED_P = np.array(
    [
        *[0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10, 0.12],
        *[0.14, 0.16, 0.20, 0.24, 0.30, 0.36, 0.45, 0.55, 0.70, 0.85],
    ]
)
WORKED_Y = np.zeros(20)
WORKED_Y[[7, 11, 14, 16, 18, 19]] = 1
K = np.arange(20)
VECTOR_P, VECTOR_Y = ((7 * K) % 20 + 1) / 25, ((3 * K) % 5 == 0).astype(float)


def outcomes(draw: st.DrawFn) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows = draw(st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=1, max_size=40))
    return np.array([float(y) for y, _ in rows]), np.array([p / 8 for _, p in rows])


some = st.composite(outcomes)()


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-x))


def test_ranking_metrics_of_three_labels() -> None:
    i = np.arange(12)
    areas = []
    for j, expected in enumerate([0.457142857, 0.485714286, 0.628571429]):
        y = (i * (j + 2) + j) % 5 < 2
        p = np.sin(0.9 * i + 1.3 * j)
        areas.append((y, p))
        assert auroc(y, p) == pytest.approx(expected, abs=1e-9)
    assert auprc(*areas[0]) == pytest.approx(0.43, abs=1e-9)
    pooled = [np.concatenate(parts) for parts in zip(*areas, strict=True)]
    assert auroc(*pooled) == pytest.approx(0.530158730, abs=1e-9)


def test_errors_of_a_regression() -> None:
    y, p = np.array([5, 2.5, 1, 0.5, 7.25, 3]), np.array([4, 3, 1.5, -0.25, 6, 2])
    assert rmse(y, p) == pytest.approx(0.877971146, abs=1e-9)
    assert r2(y, p) == pytest.approx(0.856820381, abs=1e-9)
    assert mae(y, p) == pytest.approx(5 / 6)
    assert rmse(y, p) ** 2 / (1 - r2(y, p)) == pytest.approx(y.var())
    assert r2(y, np.full(6, y.mean())) == pytest.approx(0)


def test_ties_count_half() -> None:
    y = np.array([0, 1, 0, 1])
    assert auroc(y, np.ones(4)) == 0.5
    assert auprc(y, np.ones(4)) == 0.5
    assert auroc(y, np.array([0, 1, 1, 2])) == 0.875


@pytest.mark.parametrize("y", [np.zeros(4), np.ones(4)])
def test_a_single_class_has_no_ranking(y: NDArray[np.float64]) -> None:
    p = np.arange(4) / 4
    assert math.isnan(auroc(y, p))
    assert math.isnan(auprc(y, p))


@given(some)
def test_auroc_is_the_share_of_ordered_pairs(data: tuple) -> None:
    y, p = data
    pairs = p[y == 1][:, None] - p[y == 0][None]
    if pairs.size:
        expected = (np.sum(pairs > 0) + np.sum(pairs == 0) / 2) / pairs.size
        assert auroc(y, p) == pytest.approx(expected)


@given(some)
def test_auprc_steps_through_the_thresholds(data: tuple) -> None:
    y, p = data
    if 0 < y.mean() < 1:
        recall, area = 0.0, 0.0
        for threshold in sorted(set(p.tolist()), reverse=True):
            called = p >= threshold
            area += (y[called].sum() / y.sum() - recall) * y[called].mean()
            recall = y[called].sum() / y.sum()
        assert auprc(y, p) == pytest.approx(area)


def test_labels_with_one_class_are_left_out_of_the_mean() -> None:
    i = np.arange(12)[:, None]
    j = np.arange(3)
    y = ((i * (j + 2) + j) % 5 < 2).astype(float)
    p = np.sin(0.9 * i + 1.3 * j)
    assert macro(auroc, y, p) == pytest.approx(0.523809524, abs=1e-9)
    assert micro(auroc, y, p) == pytest.approx(0.530158730, abs=1e-9)
    more_y = np.concatenate([y, np.zeros((12, 1)), np.ones((12, 1))], axis=1)
    more_p = np.concatenate([p, p[:, :2]], axis=1)
    assert two_classes(more_y).tolist() == [True, True, True, False, False]
    assert macro(auroc, more_y, more_p) == macro(auroc, y, p)
    assert math.isnan(macro(auroc, more_y[:, 3:], more_p[:, 3:]))


# The scores of the 2012 challenge.


def test_s1_of_the_worked_examples() -> None:
    assert physionet_s1(WORKED_Y, WORKED_P, 0.30) == pytest.approx(2 / 3)
    assert physionet_s1(VECTOR_Y, VECTOR_P, 0.4) == pytest.approx(2 / 11)
    assert physionet_s1(VECTOR_Y, VECTOR_P, 2.0) == 0
    assert physionet_s1(np.zeros(20), VECTOR_P, 0.4) == 0


def test_h_of_the_worked_examples() -> None:
    assert physionet_h(WORKED_Y, WORKED_P) == pytest.approx(10.992131, abs=1e-6)
    assert physionet_h(VECTOR_Y, VECTOR_P) == pytest.approx(33.781124695, abs=1e-8)


def test_h_leaves_the_remainder_out() -> None:
    """Ten groups of floor(N / 10): the highest risks of the rest are not scored."""
    more_y, more_p = np.append(WORKED_Y, [0] * 9), np.append(WORKED_P, [0.99] * 9)
    assert physionet_h(more_y, more_p) == pytest.approx(10.992131, abs=1e-6)


def test_h_of_fewer_than_ten_patients_is_not_defined() -> None:
    assert math.isnan(physionet_h(WORKED_Y[:9], WORKED_P[:9]))


def test_h_orders_ties_by_id_and_not_by_row() -> None:
    rng = np.random.default_rng(0)
    p, y = rng.integers(1, 5, 200) / 10, rng.random(200) < 0.3
    ids, order = rng.permutation(200), rng.permutation(200)
    assert physionet_h(y, p, ids) == physionet_h(y[order], p[order], ids[order])
    assert physionet_h(y, p, ids) != physionet_h(y, p, -ids)


def test_h_of_constant_risks_is_infinite() -> None:
    assert physionet_h(WORKED_Y, np.full(20, 0.3)) == math.inf


@given(some)
def test_the_best_threshold_is_the_best_of_all(data: tuple) -> None:
    y, p = data
    best = max(physionet_s1(y, p, t) for t in np.unique(p))
    assert physionet_s1(y, p, s1_threshold(y, p)) == best


def test_the_best_threshold_does_not_split_ties() -> None:
    y, p = np.array([1, 0, 0, 1.0]), np.array([0.5, 0.5, 0.5, 0.5])
    assert s1_threshold(y, p) == 0.5


# Calibration.


def test_calibration_error() -> None:
    p = np.repeat([0.1, 0.7], 50)
    y = np.concatenate([np.arange(50) < 5, np.arange(50) < 35]).astype(float)
    rows = np.random.default_rng(0).permutation(100)
    assert calibration_error(y[rows], p[rows], bins=2) == pytest.approx(0, abs=1e-12)
    assert calibration_error(1 - y, p, bins=2) == pytest.approx((0.8 + 0.4) / 2)
    assert calibration_error(np.ones(3), np.full(3, 0.25)) == pytest.approx(0.75)
    assert brier(np.array([0, 1.0]), np.array([0.5, 0.9])) == pytest.approx((0.25 + 0.01) / 2)


@pytest.mark.parametrize(
    ("a", "b", "scale"),
    [(1, 0, 1), (0.5, -1, 1), (2, 0.3, 1), (0.5, -1, 5), (0.2, 1, 20), (9, 0, 1)],
)
def test_platt_scaling_recovers_known_parameters(a: float, b: float, scale: float) -> None:
    """Also where raw outputs are far from 0: full Newton steps from (1, 0) run away there."""
    x = np.random.default_rng(1).normal(0, scale, 20_000)
    soft = sigmoid(a * x + b)
    assert fit_platt(x, soft) == pytest.approx((a, b), rel=0.02, abs=0.02)
    hard = np.random.default_rng(2).random(len(x)) < soft
    assert fit_platt(x, hard) == pytest.approx((a, b), rel=0.1, abs=0.1)


@pytest.mark.parametrize("scale", [1, 10, 100])
@pytest.mark.parametrize("shift", [0, 10])
def test_platt_scaling_of_separable_outputs_is_finite_and_keeps_the_order(
    scale: float, shift: float
) -> None:
    x = np.random.default_rng(3).normal(0, scale, 500)
    a, b = fit_platt(x + shift * scale, x > 0)
    risk = sigmoid(np.clip(a * (x + shift * scale) + b, -700, 700))
    assert a > 0
    # The smoothed targets 1 / (n + 2) keep the fit away from certainty.
    assert risk.mean() == pytest.approx((x > 0).mean(), abs=0.01)
    assert a * scale < 1e3


def test_a_row_of_weight_three_is_three_rows() -> None:
    rng = np.random.default_rng(0)
    x, y, weight = rng.normal(size=50), rng.random(50), rng.integers(0, 4, 50)
    assert fit_platt(x, y, weight) == pytest.approx(
        fit_platt(np.repeat(x, weight), np.repeat(y, weight)), rel=1e-8
    )


def test_logistic_regression_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    design = np.stack([rng.normal(5, 100, 4000), np.ones(4000), rng.normal(size=4000)], 1)
    y = (rng.random(4000) < 1 / (1 + np.exp(0.5 - design @ [0.01, 0, 1.5]))).astype(float)
    expected = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000)
    expected.fit(design, y)
    # Smoothed targets and their absence are the same with so many rows.
    assert fit_logistic(design, y) == pytest.approx(expected.coef_[0], rel=0.01, abs=0.003)


def test_platt_scaling_of_a_single_class_changes_nothing() -> None:
    assert fit_platt(np.arange(5.0), np.zeros(5)) == (1, 0)
    assert fit_platt(np.arange(5.0), np.ones(5)) == (1, 0)


def test_the_calibration_line_of_true_probabilities_is_the_diagonal() -> None:
    rng = np.random.default_rng(4)
    p = sigmoid(rng.normal(-2, 1.5, 20_000))
    y = (rng.random(len(p)) < p).astype(float)
    assert calibration_line(y, p) == pytest.approx((0, 1), abs=0.06)
    overconfident = sigmoid(2 * np.log(p / (1 - p)))
    assert calibration_line(y, overconfident)[1] == pytest.approx(0.5, abs=0.03)
    sure = np.clip(overconfident, 0, 1).round(3)  # many exact zeros
    intercept, slope = calibration_line(y, sure)
    assert 0 < slope < 1
    assert abs(intercept) < 5


# The bootstrap.


def test_the_bootstrap_is_a_function_of_its_seed() -> None:
    rng = np.random.default_rng(5)
    who, y, p = rng.integers(0, 60, 300), rng.random(300) < 0.3, rng.random(300)
    first = bootstrap(auroc, who, y, p, repeats=50)
    assert bootstrap(auroc, who, y, p, repeats=50) == first
    assert bootstrap(auroc, who, y, p, repeats=50, seed=1) != first
    assert first[0] < auroc(y, p) < first[1]
    # Names of patients are names only.
    names = np.array([f"patient {i:03d}" for i in who])
    assert bootstrap(auroc, names, y, p, repeats=50) == first


def test_the_bootstrap_draws_patients_with_all_their_rows() -> None:
    who = np.repeat(np.arange(10), 20)
    y = np.repeat(np.arange(10.0), 20)

    def count(values: NDArray[np.float64]) -> float:
        counts = np.unique(values, return_counts=True)[1]
        assert (counts % 20 == 0).all()
        assert counts.sum() == 200
        return float(values.mean())

    low, high = bootstrap(count, who, y, repeats=400)
    # Ten patients, not two hundred rows: the spread is that of the mean of ten.
    expected = 1.96 * np.arange(10.0).std() / math.sqrt(10)
    assert high - low == pytest.approx(2 * expected, rel=0.2)


def test_the_bootstrap_leaves_out_draws_without_a_value() -> None:
    who, y, p = np.arange(4), np.array([1.0, 0, 0, 0]), np.array([0.9, 0.1, 0.2, 0.3])
    assert bootstrap(auroc, who, y, p, repeats=100) == (1, 1)
