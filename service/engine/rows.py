"""Arrays that grow row by row and may be read while they do."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T", bound=np.generic)

_CAPACITY = 32  # rows that there is room for at first


class Rows(Generic[_T]):
    """Rows of one width. Those that were handed out are never written to again."""

    def __init__(self, width: int, dtype: type[_T]) -> None:
        self._data: NDArray[_T] = np.zeros((_CAPACITY, width), dtype)
        self._n = 0
        self._shared = 0  # rows that somebody may hold

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, row: int) -> NDArray[_T]:
        """A row, to be looked at only now."""
        found: NDArray[_T] = self._data[row]
        return found

    @property
    def n_bytes(self) -> int:
        """Memory, with the room for more."""
        return self._data.nbytes

    def append(self, row: NDArray[Any]) -> None:
        """One row more."""
        if self._n == len(self._data):
            larger = np.zeros((2 * self._n, self._data.shape[1]), self._data.dtype)
            larger[: self._n] = self._data
            self._data = larger
        self._data[self._n] = row
        self._n += 1

    def crop(self, n: int) -> None:
        """Drop the rows from `n` on."""
        self._n = min(self._n, n)
        if n < self._shared:
            self._data = self._data.copy()
            self._shared = n

    def view(self) -> NDArray[_T]:
        """All rows, not to be written to."""
        self._shared = self._n
        view = self._data[: self._n]
        view.flags.writeable = False
        return view
