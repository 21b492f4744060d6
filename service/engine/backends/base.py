"""What a backend must do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llm4ehr.model import Task


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TickResult:
    """Outputs of the rows of one tick, in their order."""

    raw: dict[Task, NDArray[np.float32]]  # task -> [R, n], before calibration
    hidden: NDArray[np.float32]  # [R, H]


class Backend(Protocol):
    """Computes ticks against KV slots that it owns.

    The result of a row is a function, to the last bit, of its inputs and of the rows written before
    it at lower positions of its slot: neither of other rows, nor of the slot's number, nor of how
    many rows share the tick.
    """

    n_slots: int
    max_rows: int

    def tick(
        self,
        series: NDArray[np.float32],
        events: NDArray[np.float32],
        slots: Sequence[int],
        positions: Sequence[int],
    ) -> TickResult:
        """Write and read one row each: `series` [R, S], `events` [R, E], R <= `max_rows`."""
        ...
