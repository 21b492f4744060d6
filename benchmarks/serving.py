"""The whole HTTP path under an open load: how much it takes, and how soon a risk can be read.

    python -m benchmarks.serving [--stays 1000] [--history 24] [--rates 25,50,100,...] [--quick]
                                 [--seconds 20] [--profile-seconds 20]

Starts the service as a process of its own, with a log on disk (synchronous=FULL) in which every
stay has its first hours. Then a client process sends, at Poisson times and fixed rates, the next
hours of the stays (12 observations and 3 events each), 1 % corrections of an item three hours back
and 5 % reads. Latencies begin when a request was due.

    post          until the durable acknowledgement; a correction is a post
    readable      until GET .../risk?min_seq= has answered with what was posted (every fifth post)
    get           GET .../risk; half of them ask again what was read last, with its entity tag
    not_modified  those that were answered 304

A rate is sustained if 98 % of it was answered in its time and p99 of `readable` stayed below a
second. The knee is the highest sustained rate; the last row is at half of it, where the overhead
is itemised as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.report import milliseconds, progress, write
from benchmarks.serving_overhead import from_metrics, from_samples, from_timings
from benchmarks.serving_plan import Plan
from benchmarks.serving_process import Service, admitted_long_ago, build_log

RATES = (25.0, 50.0, 75.0, 100.0, 150.0, 200.0, 300.0, 400.0, 600.0, 800.0)
SUSTAINED, BOUND_S = 0.98, 1.0
TARGET_MS = 30.0
KINDS = ("post", "readable", "get", "not_modified")


def main() -> None:
    a = _arguments()
    settings = {"kv_memory_mib": a.kv_memory_mib, "cached_entries": a.cached_entries}
    admitted = admitted_long_ago()
    with Service(**settings) as service, progress() as bar:
        task = bar.add_task("serving", total=len(a.rates) + 4)
        entries = build_log(service.log_path, a.stays, a.history, admitted)
        bar.advance(task)
        start = service.start()
        service.wait_for(service.is_warm)
        stays = Stays(service, admitted, [a.history] * a.stays)
        stays.run(a.rates[0], min(a.seconds, 5))  # first requests load what later ones find
        bar.advance(task)
        rows = []
        for rate in a.rates:
            rows.append(stays.run(rate, a.seconds))
            bar.advance(task)
            if not sustained(rows[-1]):
                break
        knee = max((r["rate_per_s"] for r in rows if sustained(r)), default=None)
        half = (knee or rows[0]["rate_per_s"]) / 2
        before = service.metrics()
        rows.append(stays.run(half, 2 * a.seconds) | {"note": "half the knee"})
        overhead = from_metrics(before, service.metrics()) + from_timings(stays.last["timings"])
        bar.advance(task)
        service.stop()
        overhead += profiled(a, service, stays, half)
        bar.advance(task)
    write(
        a.name,
        rows,
        stays=a.stays,
        entries_at_the_start=entries,
        start_seconds=round(start, 2),
        settings=settings,
        knee_per_s=knee,
        target={"readable_p99_ms_at_half_the_knee": TARGET_MS},
        overhead=overhead,
    )
    for item in overhead:
        print(json.dumps(item))


class Stays:
    """The live stays of a service: which hour each posts next, and how a load on them went."""

    def __init__(self, service: Service, admitted: datetime, hours: list[int]) -> None:
        self.service, self.admitted, self.hours = service, admitted, hours
        self._stays: list[int] = []
        self.last: dict[str, Any] = {}
        self._runs = 0

    def run(self, rate: float, seconds: float, **options: Any) -> dict[str, Any]:
        """A row of the table: `rate` requests a second for so long, then wait until all is done."""
        self._runs += 1
        plan = Plan(
            admitted=self.admitted.isoformat(),
            hours=self.hours,
            stays=self._stays,
            rate=rate,
            seconds=seconds,
            **{"port": self.service.port, "seed": self._runs} | options,
        )
        used = self.service.cpu_seconds()
        self.last = run_load(plan)
        used = self.service.cpu_seconds() - used
        self.hours, self._stays = self.last["hours"], self.last["stays"]
        self.service.wait_for(self.service.is_warm)
        return row_of(rate, seconds, self.last, used)


def run_load(plan: Plan) -> dict[str, Any]:
    """What `benchmarks.serving_load` measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_text(json.dumps(asdict(plan)))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.serving_load", str(path)],
            capture_output=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"the client failed: {done.stderr.decode()}")
    return dict(json.loads(done.stdout))


def row_of(rate: float, seconds: float, result: dict[str, Any], cpu: float) -> dict[str, Any]:
    """One row of the table. What was offered is the number of requests, not the planned rate."""
    statuses: dict[str, int] = result["statuses"]
    refused = sum(n for name, n in statuses.items() if name.endswith((" 429", " 503")))
    fine = sum(n for name, n in statuses.items() if name.endswith((" 200", " 304")))
    row: dict[str, Any] = {
        "rate_per_s": round(rate, 1),
        "offered_per_s": round(result["requests"] / seconds, 1),
        "achieved_per_s": round(result["completed"] / max(result["span"], seconds), 1),
        "requests": result["requests"],
        "answered": result["completed"],
        "refused": refused,
        "errors": sum(statuses.values()) - fine - refused,
    }
    for kind in KINDS:
        latencies = result["latencies"].get(kind, [])
        if kind == "post":
            latencies = latencies + result["latencies"].get("correction", [])
        row[f"{kind}_n"] = len(latencies)
        for name, value in milliseconds(latencies, 0.5, 0.99, 0.999).items():
            row[f"{kind}_{name}"] = value
    row["client_lag_p99_ms"] = milliseconds(result["lags"], 0.99)["p99_ms"]
    row["client_cpu"] = round(result["cpu_share"], 3)
    row["service_cpu"] = round(cpu / max(result["span"], seconds), 3)
    row["note"] = ""
    return row


def sustained(row: dict[str, Any]) -> bool:
    """Whether the service kept up with the rate of a row."""
    kept = row["achieved_per_s"] >= SUSTAINED * row["offered_per_s"]
    return bool(kept and (row["readable_p99_ms"] or 0) < 1000 * BOUND_S)


def profiled(
    a: argparse.Namespace, service: Service, stays: Stays, rate: float
) -> list[dict[str, Any]]:
    """Where the threads of the service are at that rate, sampled in a second run of it."""
    with Service(("--profile",), **service.settings) as watched:
        for file in service.log_path.parent.glob("log.sqlite*"):
            file.rename(watched.log_path.with_name(file.name))
        watched.start()
        watched.wait_for(watched.is_warm)
        again = Stays(watched, stays.admitted, stays.hours)
        again.run(rate, 2, seed=10**6)
        since = time.time()
        row = again.run(rate, a.profile_seconds, seed=10**6 + 1)
        until = time.time()
        watched.stop()
        return from_samples(watched.watched(), since, until, row["requests"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rates = {"type": lambda text: [float(part) for part in text.split(",")]}
    parser.add_argument("--stays", type=int, default=1000)
    parser.add_argument("--history", type=int, default=24, help="hours on record at the start")
    parser.add_argument("--rates", default=list(RATES), help="requests a second", **rates)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each rate")
    parser.add_argument("--profile-seconds", type=float, default=20.0)
    parser.add_argument("--kv-memory-mib", type=int, default=1024)
    parser.add_argument("--cached-entries", type=int, default=2_000_000)
    parser.add_argument("--name", default="serving", help="results/NAME.json")
    parser.add_argument("--quick", action="store_true", help="a few stays and seconds")
    a = parser.parse_args()
    if a.quick:
        a.stays, a.history, a.rates, a.seconds, a.profile_seconds = 8, 2, [10.0], 2.0, 2.0
        a.kv_memory_mib = 16
    return a


if __name__ == "__main__":
    main()
