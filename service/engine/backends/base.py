"""What a backend must do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llm4ehr.model import Task


class OutOfMemory(Exception):
    """The device had no memory for a tick. Nothing is broken: a smaller backend may go on."""


class DeviceFault(Exception):
    """The device cannot be used any more: only a new process helps."""


class RowDependenceError(RuntimeError):
    """On this machine the result of a row depends on the rows beside it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TickResult:
    """Outputs of the rows of one tick, in their order."""

    raw: dict[Task, NDArray[np.float32]]  # task -> [R, n], before calibration
    hidden: NDArray[np.float32]  # [R, state size]


class Backend(Protocol):
    """Computes ticks against KV slots that it owns.

    The result of a row is a function, to the last bit, of its inputs and of the rows written before
    it at lower positions of its slot: neither of other rows, nor of the slot's number, nor of how
    many rows share the tick.

    There is one slot array for the series pass and, with `events="stream"`, a second one for the
    event pass, with slots of `event_window` tokens. They have `n_slots` slots each.
    """

    @property
    def name(self) -> str:
        """As the setting says it: torch-cpu, torch-cuda, onnx-cpu, onnx-cuda."""
        ...

    @property
    def n_slots(self) -> int: ...

    @property
    def tick_sizes(self) -> tuple[int, ...]:
        """Numbers of rows that a tick is filled up to, rising; a row has the same bits in each."""
        ...

    @property
    def chained(self) -> bool:
        """Whether consecutive hours of one stay may share a tick."""
        ...

    def tick(
        self,
        series: NDArray[np.float32],
        events: NDArray[np.float32],
        slots: Sequence[int],
        hours: Sequence[int],
        latest: NDArray[np.float32] | None = None,
    ) -> TickResult:
        """Write and read one hour each: `series` [R, S], `events` [R, E], R <= `tick_sizes[-1]`.

        `latest` [R, H] is what heads read beside the hour with `events="stream"`: z of the last
        token, zeros where there is none. Raises OutOfMemory, DeviceFault.
        """
        ...

    def tick_tokens(
        self, ids: NDArray[np.int64], slots: Sequence[int], positions: Sequence[int]
    ) -> NDArray[np.float32]:
        """The same in the slots of the event pass: `ids` [R] -> z [R, H].

        Position 0 is the first token of a window; the begin token, where the model has one, is in
        every slot already.
        """
        ...

    def shrink(self) -> bool:
        """Give back half of the slots. All slots lose what they hold. False if none can be spared.

        Raises DeviceFault.
        """
        ...


def candidate_sizes(max_rows: int) -> tuple[int, ...]:
    """Tick sizes worth trying: powers of two from 4 up to `max_rows`, and `max_rows`."""
    sizes = {max_rows} | {1 << k for k in range(2, 12) if 1 << k < max_rows}
    return tuple(sorted(sizes))
