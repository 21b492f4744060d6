"""Find the rows and threads of ticks that suit this machine, by measuring them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llm4ehr.bundle import Bundle
from service.engine.backends.base import RowDependenceError, candidate_sizes
from service.engine.backends.factory import unverified_backend
from service.engine.backends.shapes import slots_for
from service.engine.backends.verify import Sizable, agreeing_sizes
from service.settings import PREFIX, Settings

MAX_ROWS = 512
TARGET_MS = 20.0
REPEATS = 9

ENOUGH = 0.9
"""Fewer threads are preferred while they compute this share of the most rows a second."""

# Rows of a tick stand at these hours in turn: most stays are short.
_HOURS = (6, 24, 48, 96)

# Ticks so much longer than wanted are not tried with more rows still.
_HOPELESS = 4.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A setting."""

    threads: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came out."""

    seconds: Mapping[Candidate, float]
    """Median time of a full tick."""
    other_bits: frozenset[Candidate]
    """Those whose rows have other bits than with the fewest threads."""


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))


def thread_counts(n_cores: int) -> list[int]:
    """1, 2, 4, ... below the cores, one less than the cores, and all of them."""
    powers = [1 << k for k in range(n_cores.bit_length()) if 1 << k < n_cores]
    return sorted({*powers, max(n_cores - 1, 1), n_cores})


def measure(
    tick: Callable[[Candidate], bytes],
    candidates: Sequence[Candidate],
    *,
    target_s: float,
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Time full ticks, all candidates in each round, so that a busy moment touches all alike.

    `tick` computes one and returns its bits. The first round warms up and is not counted.
    """
    seconds: dict[Candidate, list[float]] = {c: [] for c in candidates}
    first_bits: dict[int, bytes] = {}
    other_bits: set[Candidate] = set()
    left = list(candidates)
    for _ in range(repeats + 1):
        for c in left:
            tick(c)  # after a change of threads and shapes the first is slow
            started = clock()
            bits = tick(c)
            seconds[c].append(clock() - started)
            if bits != first_bits.setdefault(c.rows, bits):
                other_bits.add(c)
        left = [c for c in left if not _hopeless(c, seconds, target_s)]
    return Measured(
        seconds={c: statistics.median(s[1:]) for c, s in seconds.items() if c in left},
        other_bits=frozenset(other_bits),
    )


def _hopeless(c: Candidate, seconds: Mapping[Candidate, Sequence[float]], target_s: float) -> bool:
    """Whether even half of its rows take far too long."""
    half = seconds.get(Candidate(c.threads, c.rows // 2), ())
    return min(half[1:], default=0.0) > _HOPELESS * target_s


def choose(seconds: Mapping[Candidate, float], target_s: float, n_cores: int) -> Candidate:
    """For each number of threads the most rows whose full tick stays within the target; of these
    the fewest threads with nearly the most rows a second. One core is left to the event loop.

    If no tick is that short: the shortest one.
    """
    free = {c: s for c, s in seconds.items() if c.threads <= max(n_cores - 1, 1)}
    within: dict[int, Candidate] = {}
    for c in sorted(free, key=lambda c: c.rows):
        if free[c] <= target_s:
            within[c.threads] = c
    if not within:
        return min(free, key=lambda c: free[c])
    best = max(c.rows / free[c] for c in within.values())
    enough = (c for c in within.values() if c.rows / free[c] >= ENOUGH * best)
    return min(enough, key=lambda c: c.threads)


def choose_verified(
    seconds: Mapping[Candidate, float],
    target_s: float,
    n_cores: int,
    works: Callable[[Candidate], bool],
) -> Candidate:
    """The best choice with which the service would start. Raises ValueError if there is none."""
    left = dict(seconds)
    while left:
        chosen = choose(left, target_s, n_cores)
        if works(chosen):
            return chosen
        del left[chosen]
        if not any(c.threads <= max(n_cores - 1, 1) for c in left):
            break
    raise ValueError("no number of rows and threads gives rows that are independent of each other")


def starts(bundle: Bundle, settings: Settings, c: Candidate) -> bool:
    """Whether rows are independent of each other in ticks of so many, with so many threads."""
    torch.set_num_threads(c.threads)
    backend = unverified_backend(bundle, settings.model_copy(update={"engine_rows": c.rows}))
    try:
        agreeing_sizes(backend, bundle.network, c.rows)
    except RowDependenceError:
        return False
    return True


def ticker(bundle: Bundle, settings: Settings, max_rows: int) -> Callable[[Candidate], bytes]:
    """Computes full ticks of the settings' backend at typical hours; returns their bits."""
    config, max_hours = bundle.network.model.config, bundle.network.preprocessing.max_hours
    stream = config.events == "stream"
    rng = np.random.default_rng(0)
    series = rng.standard_normal((max_rows, config.n_series)).astype(np.float32)
    events = rng.standard_normal((max_rows, config.n_event_channels)).astype(np.float32)
    latest = np.zeros((max_rows, bundle.network.model.backbone.hidden_size), np.float32)
    backends: dict[int, Sizable] = {}

    def tick(c: Candidate) -> bytes:
        torch.set_num_threads(c.threads)
        # The threads of ONNX Runtime belong to a session, those of torch to the process.
        key = c.threads if settings.backend == "onnx-cpu" else 0
        if key not in backends:
            backends[key] = unverified_backend(
                bundle, settings.model_copy(update={"engine_rows": max_rows})
            )
            tick(Candidate(c.threads, max_rows))  # fills the slots, so that all read the same
        backend = backends[key]
        backend.tick_sizes = (c.rows,)
        n, n_slots = c.rows, min(backend.n_slots, max_rows)
        slots = [i % n_slots for i in range(n)]
        # If there are fewer slots than rows, a slot has several rows: earlier hours.
        hours = [
            max(min(_HOURS[s % 4], max_hours - 1) - i // n_slots, 0) for i, s in enumerate(slots)
        ]
        result = backend.tick(series[:n], events[:n], slots, hours, latest[:n] if stream else None)
        return result.hidden.tobytes()

    return tick


def most_rows(bundle: Bundle, settings: Settings) -> int:
    """Of a tick that the settings' backend can compute, at most `MAX_ROWS`."""
    if not settings.backend.startswith("onnx"):
        return MAX_ROWS
    # Every row is another stay, and the rows of a tick are copied out of their slots.
    half = slots_for(bundle.network, settings.kv_memory_mib << 20) // 2
    return min(MAX_ROWS, 1 << max(half.bit_length() - 1, 2))


def candidates(settings: Settings, max_rows: int, n_cores: int) -> list[Candidate]:
    """What is tried. A GPU has no use for threads."""
    threads = [1] if settings.backend.endswith("cuda") else thread_counts(n_cores)
    return [Candidate(t, rows) for t in threads for rows in candidate_sizes(max_rows)]


def table(measured: Measured, chosen: Candidate) -> str:
    """Milliseconds of a full tick, and rows a second."""
    lines = ["threads   rows   ms a tick   rows a second"]
    for c, seconds in measured.seconds.items():
        mark = "  <- chosen" if c == chosen else ""
        mark += "  other bits than with fewer threads" if c in measured.other_bits else ""
        lines.append(
            f"{c.threads:7d} {c.rows:6d} {seconds * 1000:11.2f} {c.rows / seconds:15.0f}{mark}"
        )
    return "\n".join(lines)


def settings_file(chosen: Candidate, settings: Settings) -> str:
    """Lines that LLM4EHR_SETTINGS_FILE and the env files of containers understand."""
    return (
        f"# Measured for {settings.bundle} on {settings.backend} with {cores()} cores.\n"
        f"{PREFIX}ENGINE_ROWS={chosen.rows}\n"
        f"{PREFIX}TORCH_THREADS={chosen.threads}\n"
    )
