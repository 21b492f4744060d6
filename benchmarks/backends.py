"""Time of a tick by backend, number of stays and hour, on what this machine has.

`python -m benchmarks.backends`

Default bundle, 32 rows at most, one thread, backends interleaved. `hidden_difference` is how far
states are from those of torch-cpu.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from benchmarks.report import milliseconds, write
from llm4ehr.bundle import Bundle, load_bundle
from service.engine.backends.base import Backend
from service.engine.backends.factory import make_backend
from service.settings import Settings

ROWS = (1, 8, 32)
HOURS = (24, 100, 199)
REPEATS = 100


def main() -> None:
    torch.set_num_threads(1)
    bundle = load_bundle(Path("model_repository"), "llm4ehr", 1)
    config = bundle.network.model.config
    backends = available(bundle)
    rng = np.random.default_rng(0)
    series = rng.standard_normal((200, 32, config.n_series)).astype(np.float32)
    events = rng.standard_normal((200, 32, config.n_event_channels)).astype(np.float32)
    states = {
        backend.name: np.stack(
            [
                backend.tick(series[hour], events[hour], range(32), [hour] * 32).hidden
                for hour in range(200)
            ]
        )
        for backend in backends
    }
    table = []
    for rows in ROWS:
        for hour in HOURS:
            seconds: dict[str, list[float]] = {backend.name: [] for backend in backends}
            for _ in range(REPEATS):
                for backend in backends:
                    started = time.perf_counter()
                    backend.tick(
                        series[hour, :rows], events[hour, :rows], range(rows), [hour] * rows
                    )
                    seconds[backend.name].append(time.perf_counter() - started)
            for name, taken in seconds.items():
                times = milliseconds(taken, 0.0, 0.5, 0.99)
                table.append({"backend": name, "rows": rows, "hour": hour, **times})
    differences = {
        name: float(np.abs(of - states["torch-cpu"]).max()) for name, of in states.items()
    }
    sizes = {backend.name: backend.tick_sizes for backend in backends}
    write("backends", table, hidden_difference=differences, tick_sizes=sizes)


def available(bundle: Bundle) -> list[Backend]:
    """Every backend that can be made here; says why others cannot."""
    made = []
    for name in get_args(Settings.model_fields["backend"].annotation):
        try:
            made.append(make_backend(bundle, Settings(backend=name, kv_memory_mib=128)))
        except ValueError as reason:
            print(f"{name}: {reason}")
    return made


if __name__ == "__main__":
    main()
