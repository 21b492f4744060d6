"""Memory of a stay, part by part and as a whole, and a soak that shows whether memory grows.

    python -m benchmarks.memory [--stays 200] [--hours 100] [--minutes 60] [--rate 40] [--quick]

Three tables in one:

    part    allocated in this process for one stay of so many hours (15 items each): entries, view,
            features, answers; the slot by its size
    stay    resident memory of the service for each stay that is added to it and scored
    soak    a steady load in which stays are admitted and, after a few hours, discharged: slope of
            resident memory over the second half, and what the allocator says. Plotted to
            results/memory_soak.svg
"""

from __future__ import annotations

import argparse
import gc
import math
import time
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.report import progress, write
from benchmarks.serving import Stays
from benchmarks.serving_items import history_body, stay_id
from benchmarks.serving_process import Service, admitted_long_ago, history
from llm4ehr.bundle import Bundle
from service.engine.answers import Answers
from service.engine.backends.shapes import slot_bytes
from service.engine.stays import HeldStay, Reader
from service.log.rows import number
from service.state import EpisodeState

MIB, KIB = 1 << 20, 1 << 10
CHUNK_S = 60.0
PARTS = 20
"""Stays that the parts are averaged over."""


def main() -> None:
    a = _arguments()
    with progress() as bar:
        chunks = math.ceil(60 * a.minutes / a.chunk_seconds)
        task = bar.add_task("memory", total=2 + chunks)
        rows = parts(a.hours, a.parts)
        bar.advance(task)
        if a.stays:
            rows += by_stay(a)
        bar.advance(task)
        if chunks:
            lines, loads = soak(a, chunks, lambda: bar.advance(task))
            rows.append(growth(lines))
            plot(lines, a.name)
        else:
            loads = []
    write(a.name, rows, hours=a.hours, soak={"rate": a.rate, "loads": loads})


def parts(hours: int, n: int) -> list[dict[str, Any]]:
    """KiB that are allocated for one stay, by what they are for."""
    bundle, drafts = history(hours, admitted_long_ago())
    now = datetime.now(UTC)
    states: list[EpisodeState] = []
    held: list[HeldStay] = []
    reader, layout = Reader(bundle.network), Answers(bundle).layout

    def enter() -> None:
        # Fresh payloads, as they come from a request or from the log.
        for i in range(n):
            _, own = history(hours, admitted_long_ago(), bundle)
            states.append(EpisodeState(number(stay_id(i), 0, own, now)))

    def read() -> None:
        for state in states:
            stay = HeldStay(False, bundle.network.model.state_size, layout)
            reader.read(stay, state.view, hours)
            held.append(stay)

    measured = {
        "entries": _allocated(enter),
        "view": _allocated(lambda: [state.view for state in states]),
        "features": _allocated(read),
        "answers": _allocated(lambda: [_answer(bundle, stay) for stay in held]),
        "slot": n * slot_bytes(bundle.network),
    }
    assert len(drafts) == len(states[0].entries)
    return [
        {"table": "part", "what": name, "stays": n, "kib_a_stay": round(b / n / KIB, 1), "note": ""}
        for name, b in measured.items()
    ]


def _allocated(make: Callable[[], object]) -> int:
    """Bytes that are held more afterwards."""
    gc.collect()
    tracemalloc.start()
    made = make()
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del made
    return held


def _answer(bundle: Bundle, stay: HeldStay) -> None:
    """Write outputs of every hour, as ticks would."""
    model, n = bundle.network.model, stay.n_hours
    raw = {task: np.zeros((n, width), np.float32) for task, width in model.config.heads.items()}
    scores = Answers(bundle).rows(raw, np.arange(n), np.zeros(n))
    for score in scores:
        stay.write(score, np.zeros(model.state_size, np.float32))


def by_stay(a: argparse.Namespace) -> list[dict[str, Any]]:
    """Resident memory of the service for each stay, on a line through a few numbers of them."""
    admitted = admitted_long_ago()
    steps = [round(a.stays * share) for share in (0.25, 0.5, 0.75, 1.0)]
    sizes: list[float] = []
    with Service(kv_memory_mib=a.kv_memory_mib, cached_entries=2_000_000) as service:
        service.start()
        added = 0
        for step in steps:
            while added < step:
                body = history_body(added, a.hours, admitted)
                service.post(stay_id(added), body | {"admitted_at": admitted.isoformat()})
                added += 1
            service.wait_for(service.is_warm)
            sizes.append(service.rss_mib())
    slope = float(np.polyfit(steps, sizes, 1)[0])
    return [
        {
            "table": "stay",
            "what": "resident memory",
            "stays": a.stays,
            "kib_a_stay": round(slope * KIB, 1),
            "note": f"{sizes[-1]:.0f} MiB with all of them",
        }
    ]


def soak(
    a: argparse.Namespace, chunks: int, advance: Callable[[], None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A line a second of what `serving_watch` saw, and a row for each chunk of load."""
    loads = []
    with Service((), kv_memory_mib=a.kv_memory_mib, cached_entries=a.cached_entries) as service:
        service.start()
        beds = Stays(service, admitted_long_ago(), [0] * a.beds)
        for _ in range(chunks):
            row = beds.run(a.rate, a.chunk_seconds, leave_at=a.leave_at)
            kept = ("offered_per_s", "achieved_per_s", "refused", "errors", "readable_p99_ms")
            loads.append({"at": round(time.time())} | {name: row[name] for name in kept})
            advance()
        return service.watched(), loads


def growth(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Slope of memory over the second half."""
    late = lines[len(lines) // 2 :]
    hours = np.array([line["at"] for line in late]) / 3600
    slopes = {
        name: float(np.polyfit(hours - hours[0], [line["memory"][name] for line in late], 1)[0])
        for name in late[0]["memory"]
    }
    minutes = (lines[-1]["at"] - lines[0]["at"]) / 60
    told = ", ".join(f"{name} {slope:+.1f} MiB/h" for name, slope in slopes.items())
    return {
        "table": "soak",
        "what": f"second half of {minutes:.0f} minutes",
        "stays": None,
        "kib_a_stay": None,
        "note": f"{told}; at the end {late[-1]['memory']['rss']:.0f} MiB",
    }


def plot(lines: list[dict[str, Any]], name: str) -> None:
    """Memory over time, results/NAME_soak.svg."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    minutes = [(line["at"] - lines[0]["at"]) / 60 for line in lines]
    said = {"rss": "resident", "in_use": "allocated", "free": "free in heaps", "mapped": "mapped"}
    for key, label in said.items():
        if key in lines[0]["memory"]:
            axes.plot(minutes, [line["memory"][key] for line in lines], label=label, linewidth=1)
    axes.set_xlabel("minutes")
    axes.set_ylabel("MiB")
    axes.set_ylim(bottom=0)
    axes.legend()
    report.RESULTS.mkdir(exist_ok=True)
    figure.savefig(report.RESULTS / f"{name}_soak.svg", bbox_inches="tight")
    pyplot.close(figure)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stays", type=int, default=200, help="added to the service; 0: none")
    parser.add_argument("--hours", type=int, default=100, help="of each of them")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the soak; 0: none")
    parser.add_argument("--rate", type=float, default=40.0, help="requests a second of the soak")
    parser.add_argument("--beds", type=int, default=200, help="live stays of the soak")
    parser.add_argument("--leave-at", type=int, default=12, help="hours of a stay of the soak")
    parser.add_argument("--kv-memory-mib", type=int, default=256)
    parser.add_argument("--cached-entries", type=int, default=50_000, help="of the soak")
    parser.add_argument("--name", default="memory", help="results/NAME.json, NAME_soak.svg")
    parser.add_argument("--quick", action="store_true", help="a few stays and seconds")
    a = parser.parse_args()
    a.chunk_seconds, a.parts = CHUNK_S, PARTS
    if a.quick:
        a.stays, a.hours, a.minutes, a.rate, a.beds, a.leave_at = 0, 3, 0.1, 20.0, 8, 2
        a.chunk_seconds, a.parts, a.kv_memory_mib = 3.0, 2, 16
    return a


if __name__ == "__main__":
    main()
