"""What is measured by the clock: lag of the event loop, pauses of the collector of garbage."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections import deque

from service.api.metrics import Metrics
from service.api.window import INTERVAL_S, Window

_BEAT_S = 0.5
_MAX_PAUSES = 4096


class Pulse:
    """A task beside the requests, and a hook of the collector."""

    def __init__(self, metrics: Metrics, window: Window) -> None:
        self._metrics = metrics
        self._window = window
        self._task: asyncio.Task[None] | None = None
        self._gc_started = 0.0
        self._pauses: deque[tuple[str, float]] = deque(maxlen=_MAX_PAUSES)

    def start(self) -> None:
        gc.callbacks.append(self._collected)
        self._task = asyncio.create_task(self._beat())

    async def stop(self) -> None:
        gc.callbacks.remove(self._collected)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _beat(self) -> None:
        sampled = time.monotonic()
        while True:
            due = time.monotonic() + _BEAT_S
            await asyncio.sleep(_BEAT_S)
            now = time.monotonic()
            self._metrics.loop_lag_seconds.observe(max(now - due, 0.0))
            while self._pauses:
                generation, seconds = self._pauses.popleft()
                self._metrics.gc_pause_seconds.labels(generation).observe(seconds)
            if now - sampled >= INTERVAL_S:
                sampled = now
                self._window.sample()

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        """Called by the collector, on any thread, maybe inside an instrument: only takes notes."""
        if phase == "start":
            self._gc_started = time.perf_counter()
        else:
            self._pauses.append((str(info["generation"]), time.perf_counter() - self._gc_started))
