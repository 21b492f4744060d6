"""Rows that grow: what was handed out stays as it was."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.rows import Rows

STEPS = st.lists(st.tuples(st.integers(0, 80), st.integers(0, 40), st.booleans()), max_size=12)


@given(steps=STEPS)
def test_views_keep_what_they_showed(steps: list[tuple[int, int, bool]]) -> None:
    rows, expected, views = Rows(1, np.float64), [], []
    for number, (n, more, look) in enumerate(steps):
        rows.crop(n)
        del expected[n:]
        for i in range(more):
            value = 1000.0 * number + i + 1
            rows.append(np.array([value]))
            expected.append(value)
        assert len(rows) == len(expected)
        if look:
            views.append((rows.view(), list(expected)))
    for view, values in views:
        assert view[:, 0].tolist() == values
    if expected:
        assert rows[len(expected) - 1] == expected[-1]


def test_views_are_not_written_to() -> None:
    rows = Rows(2, np.float32)
    rows.append(np.ones(2))
    with pytest.raises(ValueError, match="read-only"):
        rows.view()[0] = 0
    rows.append(np.zeros(2))
    assert rows.view().tolist() == [[1, 1], [0, 0]]
