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
    new_cell = np.ones(cell.size + 1, dtype=bool)  # and one after the last
    np.not_equal(cell[1:], cell[:-1], out=new_cell[1:-1])
    new_tie = new_cell[:-1].copy()
    new_tie[1:] |= (priority[1:] != priority[:-1]) | (hours[1:] != hours[:-1])
    last = np.flatnonzero(new_cell[1:])
    ties = np.flatnonzero(new_tie)
    tie_start = ties[np.searchsorted(ties, last, side="right") - 1]
    size = last - tie_start + 1
    median = (value[tie_start + (size - 1) // 2] + value[tie_start + size // 2]) / 2
    return cell[last], hours[last], median


def last_cells(
    row: NDArray[np.int64], column: NDArray[np.int64], n_rows: int, n_columns: int
) -> NDArray[np.int32]:
    """Which cell is the last of its column up to each row, rows rising within each column.

    Returns [n_rows, n_columns]: `n_columns` + i for cell i, and the number of the column itself
    before its first cell. With it a table of what was in force ahead of row 0, followed by what the
    cells hold, is read off.
    """
    place = np.empty((n_rows, n_columns), dtype=np.int32)
    place[:] = np.arange(n_columns)
    place[row, column] = np.arange(n_columns, n_columns + len(row))
    return running_max(place)


def running_max(a: NDArray[Any]) -> NDArray[Any]:
    """`np.maximum.accumulate` over the rows of [n, m], in place.

    The span that each row covers doubles with every step: far quicker than row by row.
    """
    span = 1
    while span < len(a):
        np.maximum(a[span:], a[:-span], out=a[span:])
        span *= 2
    return a
