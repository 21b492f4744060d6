"""Which tick sizes give a row the same bits, found out on the machine that will compute them.

Maths libraries choose their kernels by the shape of the matrices, and another kernel may add the
same numbers in another order. What holds on one processor need not hold on the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llm4ehr.bundle import Network
from service.engine.backends.base import Backend, RowDependenceError, candidate_sizes
from service.engine.backends.shapes import token_positions

_STAYS = 40
_ALONE = 6
_CHAIN = 5


class NotFinite(ValueError):
    """The weights of the network are not fit to answer with."""


class Sizable(Backend, Protocol):
    """A backend that can be told how many rows to fill its ticks up to."""

    tick_sizes: tuple[int, ...]


def agreeing_sizes(backend: Sizable, network: Network, max_rows: int) -> tuple[int, ...]:
    """Those of `candidate_sizes(max_rows)` in which every row has the bits of the largest.

    Rows of as many stays as there are slots for (at most 40), in company and alone, in several
    slots, and one in every place, at short and long positions, hours and event tokens. Overwrites
    slots: call before they are used. Leaves `tick_sizes` at the largest. Raises RowDependenceError
    if not even that one gives the same bits again, NotFinite if a number that comes out is none.
    """
    *smaller, largest = candidate_sizes(max_rows)
    below = smaller[-1] if smaller else 1
    n_stays = min(backend.n_slots, _STAYS)
    try:
        agreeing = [largest]
        for rows in _kinds_of_rows(backend, network, n_stays):
            backend.tick_sizes = (largest,)
            expected = _together(rows, largest)
            if not np.isfinite(expected).all():
                raise NotFinite("the model gives numbers that are not finite")
            if not _agrees(rows, largest, expected, backend.chained):
                raise RowDependenceError(
                    f"on this machine a row's result depends on the {largest} rows of its tick; "
                    f"set LLM4EHR_ENGINE_ROWS={below}, or another number of threads"
                )
            for size in list(smaller):
                backend.tick_sizes = (size,)
                if not _agrees(rows, size, expected, backend.chained):
                    smaller.remove(size)
        return (*smaller, *agreeing)
    finally:
        backend.tick_sizes = (largest,)


@dataclass(frozen=True, slots=True)
class _Rows:
    """One kind of rows: `compute(stays, positions, slots)` -> bits [R, ...] of those rows."""

    compute: Callable[[Sequence[int], Sequence[int], Sequence[int]], NDArray[np.float32]]
    positions: tuple[int, ...]  # rising; the first `_CHAIN` follow one another
    n_stays: int


def _kinds_of_rows(backend: Backend, network: Network, n_stays: int) -> Iterator[_Rows]:
    config, rng = network.model.config, np.random.default_rng(0)

    def drawn(places: int, width: int) -> NDArray[np.float32]:
        return rng.standard_normal((n_stays, places, width)).astype(np.float32)

    at = _positions(network.preprocessing.max_hours)
    series, events = drawn(at[-1] + 1, config.n_series), drawn(at[-1] + 1, config.n_event_channels)
    stream = config.events == "stream"
    latest = drawn(at[-1] + 1, network.model.backbone.hidden_size if stream else 0)

    def hours(
        stays: Sequence[int], positions: Sequence[int], slots: Sequence[int]
    ) -> NDArray[np.float32]:
        here = list(stays), list(positions)
        result = backend.tick(
            series[here], events[here], slots, positions, latest[here] if stream else None
        )
        return np.concatenate([result.hidden, *result.raw.values()], axis=1)

    yield _Rows(hours, at, n_stays)
    if not stream:
        return
    at = _positions(token_positions(network))
    ids = rng.integers(config.n_tokens, size=(n_stays, at[-1] + 1))

    def tokens(
        stays: Sequence[int], positions: Sequence[int], slots: Sequence[int]
    ) -> NDArray[np.float32]:
        return backend.tick_tokens(ids[list(stays), list(positions)], slots, positions)

    yield _Rows(tokens, at, n_stays)


def _positions(n: int) -> tuple[int, ...]:
    """The first few, one in the middle, the last."""
    return tuple(sorted({*range(min(_CHAIN, n)), n // 2, n - 1}))


def _together(rows: _Rows, size: int) -> NDArray[np.float32]:
    """[stays, positions, ...], in full ticks, each stay in the slot of its number."""
    everyone = range(rows.n_stays)
    return _computed(rows, [list(everyone[i : i + size]) for i in everyone[::size]], everyone)


def _agrees(rows: _Rows, size: int, expected: NDArray[np.float32], chained: bool) -> bool:
    """Whether rows come out the same in other company, places and slots, alone, and in chains."""
    n = rows.n_stays
    rng = np.random.default_rng(size)
    order, slots = rng.permutation(n).tolist(), rng.permutation(n).tolist()
    groups = []
    while order:
        width = int(rng.integers(1, size + 1))
        groups.append(order[:width])
        order = order[width:]
    full = list(range(n - 1, -1, -1))
    trials = [
        (groups, slots),
        ([full[i : i + size] for i in range(0, n, size)], list(reversed(slots))),
        ([[i] for i in range(0, n, max(n // _ALONE, 1))], [(s + 1) % n for s in slots]),
    ]
    for parts, where in trials:
        got = _computed(rows, parts, where)
        here = sorted(stay for part in parts for stay in part)
        if got[here].tobytes() != expected[here].tobytes():
            return False
    if not _places_agree(rows, size, expected):
        return False
    return not chained or _chains_agree(rows, size, expected)


def _computed(
    rows: _Rows, parts: Sequence[Sequence[int]], slots: Sequence[int]
) -> NDArray[np.float32]:
    out: NDArray[np.float32] | None = None
    for k, position in enumerate(rows.positions):
        for stays in parts:
            got = rows.compute(stays, [position] * len(stays), [slots[stay] for stay in stays])
            if out is None:
                out = np.zeros((rows.n_stays, len(rows.positions), got.shape[1]), np.float32)
            out[list(stays), k] = got
    assert out is not None
    return out


def _places_agree(rows: _Rows, size: int, expected: NDArray[np.float32]) -> bool:
    """Whether a row comes out the same in every place of a tick: all of its rows are this one."""
    for k, position in enumerate(rows.positions):
        got = rows.compute([0] * size, [position] * size, [0] * size)
        if (got.view(np.int32) != expected[0, k].view(np.int32)).any():
            return False
    return True


def _chains_agree(rows: _Rows, size: int, expected: NDArray[np.float32]) -> bool:
    """Consecutive positions of one stay in one tick, as far as they fit."""
    n = min(_CHAIN, size, len(rows.positions))
    last = rows.n_stays - 1
    got = rows.compute([last] * n, range(n), [0] * n)
    return got.tobytes() == expected[last, :n].tobytes()
