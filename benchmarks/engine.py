"""One hour of many stays: the engine's tick against other ways to compute it, and its floor.

    python -m benchmarks.engine [--models default,6x384,gpt2-124m] [--contexts 24,100,200]
                                [--batches 1,8,32,128,512] [--repeats 7] [--quick]
                                [--backend torch-cpu] [--threads 1]

Every stay has `context` hours behind it; what is timed is its next hour, outputs on the host:

    stateless   the whole prefix again, in one padded Hugging Face forward without a cache
    loop        a Hugging Face DynamicCache for each patient, one forward each
    restacked   the same caches stacked into one batch, one forward, and split again
    ours        `Backend.tick`

All must agree within 1e-4 before they are timed. Repeats are interleaved, medians are shown. The
floor is the larger of FLOPs over the measured peak of a product and bytes over the measured
bandwidth. What would take longer than `--limit` seconds is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.engine_baselines import Loop, PatientCaches, Reference, Restacked, Rows, Stateless
from benchmarks.engine_models import MODELS, Peak, measured_peak, network_of, tick_cost
from benchmarks.report import progress, write
from llm4ehr.bundle import Network
from service.engine.backends.base import Backend, OutOfMemory
from service.engine.backends.onnx_runtime import OnnxBackend
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.engine.backends.torch_cuda import TorchCudaBackend

BACKENDS = ("torch-cpu", "torch-cuda", "onnx-cpu", "onnx-cuda")
TOLERANCE = 1e-4
HOURS = 201  # the hour after 200 hours of context is not a live one, and costs as much
MINIMUM_ROWS = 4
TURN_S = 0.05
GRAPH = Path("model_repository/llm4ehr/1/step.onnx")  # the other networks have none
TARGETS = {
    "cpu": {
        ("6x384", 100, 32): {"times_stateless": 40, "times_loop": 9, "times_restacked": 3.5},
        ("gpt2-124m", 100, 32): {"times_stateless": 60, "times_loop": 9, "times_restacked": 3.5},
    },
    "cuda": {
        ("6x384", 100, 32): {"times_stateless": 30},
        ("gpt2-124m", 100, 32): {"times_stateless": 30},
        ("6x384", 100, 512): {"times_loop": 50},
        ("gpt2-124m", 100, 512): {"times_loop": 50},
    },
}  # fmt: skip
FLOORS = {"cpu": 3.0, "cuda": 2.0}


class Ours:
    """Stays in slots, written hour by hour."""

    name = "ours"

    def __init__(self, backend: Backend, series: Rows, events: Rows) -> None:
        self._backend, self._series, self._events = backend, series, events
        self._slots = list(range(len(series)))
        self._filled = 0

    def extend(self, context: int) -> None:
        for hour in range(self._filled, context):
            self.tick(hour)
        self._filled = max(self._filled, context)

    def tick(self, context: int) -> Rows:
        series, events = self._series[:, context], self._events[:, context]
        most = self._backend.tick_sizes[-1]
        parts = []
        for first in range(0, len(self._slots), most):
            rows = slice(first, first + most)
            slots = self._slots[rows]
            result = self._backend.tick(series[rows], events[rows], slots, [context] * len(slots))
            parts.append(np.concatenate(list(result.raw.values()), axis=1))
        return np.concatenate(parts)


def main() -> None:
    a = _arguments()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    device = torch.device(a.device)
    peak = measured_peak(device)
    rows: list[dict[str, Any]] = []
    with progress() as bar:
        cells = len(a.models) * len(a.batches) * len(a.contexts)
        task = bar.add_task("engine", total=cells)
        for name in a.models:
            network = network_of(name)
            for batch in a.batches:
                for row in measured(a, name, network, batch, peak):
                    rows.append(row)
                    bar.advance(task)
                gc.collect()
    about = {"gflops_per_s": peak.flops_per_s / 1e9, "gbytes_per_s": peak.bytes_per_s / 1e9}
    write(
        a.name,
        rows,
        **{key: round(value, 1) for key, value in about.items()},
        device=a.device,
        backend=a.backend,
        floor_target=FLOORS[device.type],
    )


def measured(
    a: argparse.Namespace, name: str, network: Network, batch: int, peak: Peak
) -> Iterator[dict[str, Any]]:
    """Rows of the table for one network and number of stays, contexts rising."""
    rng = np.random.default_rng(0)
    config = network.model.config
    series = rng.standard_normal((batch, HOURS, config.n_series)).astype(np.float32)
    events = rng.standard_normal((batch, HOURS, config.n_event_channels)).astype(np.float32)
    most_hours = network.preprocessing.max_hours
    reference = Reference(network, torch.device(a.device))
    patients = PatientCaches(reference, series, events)
    ways: list[Any] = [Stateless(reference, series, events), Loop(patients), Restacked(patients)]
    ours: Ours | None = None
    for context in sorted(a.contexts):
        at = min(context, most_hours - 1)
        filling = tick_cost(network, batch, at).flops * at / peak.flops_per_s
        row: dict[str, Any] = {"model": name, "stays": batch, "context": context}
        if filling > a.limit:
            yield row | _columns(a, {}, row, None, None, f"left out: filling takes {filling:.0f} s")
            continue
        if ours is None:
            with suppress(OutOfMemory):
                ours = Ours(_backend(a, network, batch), series, events)
        if ours is None:
            yield row | _columns(a, {}, row, None, None, "left out: no memory for the slots")
            continue
        again = tick_cost(network, batch, at).flops * (at + 1) / peak.flops_per_s
        chosen = [ours, *(w for w in ways if w.name != "stateless" or again <= a.limit)]
        for way in chosen:
            way.extend(at)
        answers = {way.name: way.tick(at) for way in chosen}
        difference = max(float(np.abs(o - answers["ours"]).max()) for o in answers.values())
        if difference > TOLERANCE:
            raise RuntimeError(
                f"{name}, {batch} stays, {context} h: outputs differ by {difference}"
            )
        rounds, seconds = _interleaved(chosen, at, a.repeats, a.limit)
        floor = tick_cost(network, batch, at).floor_seconds(peak)
        note = "" if again <= a.limit else f"stateless left out: about {again:.0f} s"
        columns = _columns(a, seconds, row, floor, difference, note)
        yield row | columns | {"repeats": rounds}


def _interleaved(
    ways: list[Any], context: int, repeats: int, limit: float
) -> tuple[int, dict[str, list[float]]]:
    """Rounds, and seconds of each way, in turns; fewer rounds where they take longer than `limit`.

    A turn lasts `TURN_S` at least: the first tick of a short one finds nothing in the cache but
    what the way before it left there.
    """
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    started = time.perf_counter()
    rounds = 0
    while rounds < repeats and (not rounds or time.perf_counter() - started < limit):
        rounds += 1
        for way in ways:
            turn = time.perf_counter()
            while (before := time.perf_counter()) - turn < TURN_S:
                way.tick(context)
                seconds[way.name].append(time.perf_counter() - before)
    return rounds, seconds


def _columns(
    a: argparse.Namespace,
    seconds: dict[str, list[float]],
    row: dict[str, Any],
    floor: float | None,
    difference: float | None,
    note: str,
) -> dict[str, Any]:
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    ours = medians.get("ours")
    columns: dict[str, Any] = {}
    for name in ("ours", "stateless", "loop", "restacked"):
        columns[f"{name}_ms"] = _rounded(1000 * medians[name]) if name in medians else None
    targets = TARGETS[torch.device(a.device).type].get(
        (row["model"], row["context"], row["stays"]), {}
    )
    for name in ("stateless", "loop", "restacked"):
        column = f"times_{name}"
        columns[column] = _rounded(medians[name] / ours) if ours and name in medians else None
        columns[f"target_{name}"] = targets.get(column)
    columns["floor_ms"] = None if floor is None else _rounded(1000 * floor)
    columns["times_floor"] = _rounded(ours / floor) if ours and floor else None
    columns["difference"] = None if difference is None else float(f"{difference:.1e}")
    columns["repeats"] = 0
    columns["note"] = note
    return columns


def _rounded(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")


def _backend(a: argparse.Namespace, network: Network, batch: int) -> Backend:
    """A backend whose ticks hold the whole batch, or as many rows as `--rows` says."""
    rows = max(min(batch, a.rows), MINIMUM_ROWS)
    sizes = {"n_slots": max(batch, rows), "max_rows": rows}
    if a.backend == "torch-cpu":
        return TorchCpuBackend(network, **sizes)
    if a.backend == "torch-cuda":
        return TorchCudaBackend(network, **sizes)
    kind: Literal["cpu", "cuda"] = "cuda" if a.device == "cuda" else "cpu"
    return OnnxBackend(network, GRAPH, **sizes, device=kind, threads=a.threads)


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--contexts", type=numbers, default=[24, 100, 200])
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32, 128, 512])
    parser.add_argument("--rows", type=int, default=512, help="most rows of a tick")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds, see above")
    parser.add_argument("--backend", default="torch-cpu", choices=BACKENDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="engine", help="results/NAME.json")
    parser.add_argument("--quick", action="store_true", help="one tiny cell, to see that it runs")
    a = parser.parse_args()
    a.device = "cuda" if a.backend.endswith("cuda") else "cpu"
    if a.quick:
        a.models, a.contexts, a.batches, a.repeats = ["tiny"], [3], [2], 2
    return a


if __name__ == "__main__":
    main()
