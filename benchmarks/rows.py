"""Time to compute one hour of several stays, by the number of rows of a tick.

`python -m benchmarks.rows`

Helps to choose LLM4EHR_ENGINE_ROWS for a machine. Default bundle, hour 40, one thread, all numbers
of rows interleaved.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import milliseconds, write
from llm4ehr.bundle import load_bundle
from service.engine.backends.torch_cpu import TorchCpuBackend

ROWS = (8, 16, 32, 64, 128)
HOUR = 40


def main() -> None:
    torch.set_num_threads(1)
    network = load_bundle(Path("model_repository"), "llm4ehr", 1).network
    config = network.model.config
    rng = np.random.default_rng(0)
    backends = {rows: TorchCpuBackend(network, n_slots=128, max_rows=rows) for rows in ROWS}
    table = []
    for stays in (1, 8, 32, 128):
        series = rng.standard_normal((stays, config.n_series)).astype(np.float32)
        events = rng.standard_normal((stays, config.n_event_channels)).astype(np.float32)
        seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
        for _ in range(9):
            for rows, backend in backends.items():
                started = time.perf_counter()
                for first in range(0, stays, rows):
                    part = slice(first, min(first + rows, stays))
                    slots = range(part.start, part.stop)
                    backend.tick(series[part], events[part], slots, [HOUR] * len(slots))
                seconds[rows].append(time.perf_counter() - started)
        medians = {f"{r}_rows_ms": milliseconds(t, 0.5)["p50_ms"] for r, t in seconds.items()}
        table.append({"stays": stays, **medians})
    write("rows", table)


if __name__ == "__main__":
    main()
