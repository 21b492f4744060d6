"""Curves against scikit-learn, and a picture that is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_curve, roc_curve

from training.evaluation.curves import (
    auprc_trapezoid,
    draw_curves,
    precision_recall_points,
    roc_points,
)

ROWS = st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=30).filter(
    lambda rows: 0 < sum(y for y, _ in rows) < len(rows)
)


@given(ROWS)
def test_points_are_those_of_scikit_learn(rows: list[tuple[bool, int]]) -> None:
    y, p = np.array(rows, dtype=float).T
    false, true, _ = roc_curve(y, p, drop_intermediate=False)
    assert np.allclose(roc_points(y, p), (false, true))
    precision, recall, _ = precision_recall_curve(y, p)
    ours = precision_recall_points(y, p)
    # Beyond the threshold that finds the last positive scikit-learn draws no points.
    found = slice(0, len(recall))
    assert np.allclose(ours[0][found], recall[::-1])
    assert np.allclose(ours[1][found], precision[::-1])


def test_the_trapezoid_area() -> None:
    i = np.arange(12)
    y, p = ((2 * i % 5) < 2).astype(float), np.sin(0.9 * i)
    assert auprc_trapezoid(y, p) == pytest.approx(0.359220779, abs=1e-9)
    assert np.isnan(auprc_trapezoid(np.zeros(3), p[:3]))


def test_a_picture_of_the_labels_that_have_both_classes(tmp_path: Path) -> None:
    y, p = np.array([0.0, 1.0, 1.0]), np.array([0.1, 0.2, 0.3])
    draw_curves(tmp_path / "a.png", "two labels", {"a": (y, p), "b": (np.zeros(3), p)})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
