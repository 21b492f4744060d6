"""A restart with a full log: how soon it answers, how soon all is warm, live requests meanwhile.

    python -m benchmarks.restart [--stays 1000] [--hours 100] [--rate 10] [--quick]

Builds a log in which every stay has its hours on record (15 items each), starts the service on it,
and sends hourly data and reads at a low rate until every stay has its score.

    ready_s    from the start of the process until /v2/health/ready answers 200
    warm_s     from there until every open stay in `GET /episodes` shows a score of its last entry
    post, ...  latencies of the requests that came meanwhile, as in `benchmarks.serving`
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.report import progress, write
from benchmarks.serving import row_of
from benchmarks.serving_plan import Plan
from benchmarks.serving_process import Service, admitted_long_ago, build_log


def main() -> None:
    a = _arguments()
    admitted = admitted_long_ago()
    settings = {"kv_memory_mib": a.kv_memory_mib, "cached_entries": a.cached_entries}
    with Service(**settings) as service, progress() as bar:
        task = bar.add_task("restart", total=3)
        began = time.perf_counter()
        entries = build_log(service.log_path, a.stays, a.hours, admitted)
        build = time.perf_counter() - began
        bar.advance(task)
        ready = service.start()
        bar.advance(task)
        plan = Plan(
            port=service.port, admitted=admitted.isoformat(), hours=[a.hours] * a.stays,
            rate=a.rate, seconds=a.most_seconds, followed=1.0, reads=0.2,
        )  # fmt: skip
        used, began = service.cpu_seconds(), time.perf_counter()
        with background(plan) as result:
            service.wait_for(service.is_warm, every=0.5)
            warm = time.perf_counter() - began
            time.sleep(max(0.0, a.least_seconds - warm))
        used = service.cpu_seconds() - used
        row = {
            "stays": a.stays,
            "hours": a.hours,
            "entries": entries,
            "log_mib": round(service.log_path.stat().st_size / (1 << 20)),
            "build_log_s": round(build, 1),
            "ready_s": round(ready, 2),
            "warm_s": round(warm, 2),
            "rss_mib": round(service.rss_mib()),
        }
        bar.advance(task)
    row |= row_of(a.rate, max(warm, a.least_seconds), result, used)
    write(a.name, [row], settings=settings)


@contextmanager
def background(plan: Plan) -> Iterator[dict[str, Any]]:
    """A load that ends with the block; the dictionary has its result afterwards."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_text(json.dumps(asdict(plan)))
        output = Path(folder) / "result.json"
        with output.open("wb") as out:
            client = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.serving_load", str(path)], stdout=out
            )
        try:
            yield result
        finally:
            client.send_signal(signal.SIGTERM)
            client.wait()
        result |= json.loads(output.read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stays", type=int, default=1000)
    parser.add_argument("--hours", type=int, default=100)
    parser.add_argument("--rate", type=float, default=10.0, help="live requests a second")
    parser.add_argument("--least-seconds", type=float, default=10.0, help="of live requests")
    parser.add_argument("--most-seconds", type=float, default=600.0)
    parser.add_argument("--kv-memory-mib", type=int, default=1024)
    parser.add_argument("--cached-entries", type=int, default=2_000_000)
    parser.add_argument("--name", default="restart", help="results/NAME.json")
    parser.add_argument("--quick", action="store_true", help="a few stays of a few hours")
    a = parser.parse_args()
    if a.quick:
        a.stays, a.hours, a.least_seconds, a.most_seconds, a.kv_memory_mib = 8, 4, 2.0, 10.0, 16
    return a


if __name__ == "__main__":
    main()
