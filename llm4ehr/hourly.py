"""Items to hours: which hour a time belongs to, one value a cell, and what stays in force after it.

Plain arrays, without a word about stays. Everything is indifferent to the order of the items.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

BinEdge = Literal["left", "right"]


def hour_of(hours: NDArray[np.float64] | float, bin_edge: BinEdge = "left") -> NDArray[np.int64]:
    """Hour bin of a time. The one place that decides on which side of an hour its border lies."""
    hours = np.asarray(hours, dtype=np.float64)
    if bin_edge == "left":
        return np.floor(hours).astype(np.int64)
    # Admission itself belongs to the first hour.
    return np.where(hours == 0, 0, np.ceil(hours) - 1).astype(np.int64)


def latest_by_cell(
    cell: NDArray[np.int64],
    priority: NDArray[np.int8],
    hours: NDArray[np.float64],
    value: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """One value a cell: best priority, then latest; equal times give their median.

    Returns the cells in rising order, the time and the value of each.
    """
    if cell.size == 0:
        return cell, hours, value
    order = np.lexsort((value, hours, -priority.astype(np.int64), cell))
    cell, priority, hours, value = cell[order], priority[order], hours[order], value[order]
    last = np.flatnonzero(np.append(cell[1:] != cell[:-1], True))
    new_tie = np.ones(cell.size, dtype=bool)
    new_tie[1:] = (
        (cell[1:] != cell[:-1]) | (priority[1:] != priority[:-1]) | (hours[1:] != hours[:-1])
    )
    tie_start = np.maximum.accumulate(np.where(new_tie, np.arange(cell.size), 0))[last]
    size = last - tie_start + 1
    median = (value[tie_start + (size - 1) // 2] + value[tie_start + size // 2]) / 2
    return cell[last], hours[last], median


def in_force(
    row: NDArray[np.int64], column: NDArray[np.int64], value: NDArray[Any], before: NDArray[Any],
    n_rows: int,
) -> NDArray[Any]:  # fmt: skip
    """What the last cell up to each row of a column holds, or `before` where there is none yet.

    `row`, `column` and `value` [n] are one item a cell, rows rising within each column; `before`
    [columns] is what was in force ahead of row 0. Returns [n_rows, columns].
    """
    place = np.empty((n_rows, len(before)), dtype=np.int32)
    place[:] = np.arange(len(before))
    place[row, column] = np.arange(len(before), len(before) + len(value))
    return np.concatenate([before, value]).take(running_max(place))


def running_max(a: NDArray[Any]) -> NDArray[Any]:
    """`np.maximum.accumulate` over the rows of [n, m], in place.

    The span that each row covers doubles with every step: far quicker than row by row.
    """
    span = 1
    while span < len(a):
        np.maximum(a[span:], a[:-span], out=a[span:])
        span *= 2
    return a
