"""What a read pays for its line of the audit trail, which is on disk before the answer leaves.

    python -m benchmarks.trail [--requests 3000] [--quick]

Two services with the default bundle, one of which writes no lines of reads, answer the same client
in turns, a request at a time over a connection each: `GET risk` of a stay of 24 hours, whole and as
304. Put TMPDIR on the disk that counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from typing import Any

from starlette.types import ASGIApp

from benchmarks.report import milliseconds, progress, write
from benchmarks.serving_items import history_body
from benchmarks.serving_process import Service
from service.__main__ import main as service_main
from service.api import app as service_app
from service.times import format_time

WITHOUT = "serve-without"
HOURS = 24


def main() -> None:
    if sys.argv[1:] == [WITHOUT]:
        _serve_without()
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=3000, help="of each kind to each service")
    parser.add_argument("--quick", action="store_true", help="runs in seconds, measures nothing")
    a = parser.parse_args()
    n = 20 if a.quick else a.requests
    with Service() as writing, Service(run=("benchmarks.trail", WITHOUT)) as silent:
        for service in (writing, silent):
            service.start()
        clients = {"with a line": _Client(writing), "without": _Client(silent)}
        rows = [_measure(kind, n, clients) for kind in ("200", "304")]
    flat = [row for pair in rows for row in pair]
    if a.quick:
        print(flat)
        return
    write("trail", flat, hours=HOURS)


def _serve_without() -> None:
    def silent(app: ASGIApp, **given: Any) -> ASGIApp:
        return app

    service_app.AuditTrail = silent  # type: ignore[misc, assignment]
    service_main(["serve"])


class _Client:
    """A connection, and a stay behind it."""

    def __init__(self, service: Service) -> None:
        self._http = HTTPConnection("127.0.0.1", service.port)
        admitted = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=HOURS)
        service.post("e", history_body(1, HOURS, admitted) | {"admitted_at": format_time(admitted)})
        status, self._etag = self.risk("200")
        assert status == 200

    def risk(self, kind: str) -> tuple[int, str]:
        """Status and ETag."""
        headers = {"If-None-Match": self._etag} if kind == "304" else {}
        self._http.request("GET", "/episodes/e/risk", headers=headers)
        answer = self._http.getresponse()
        answer.read()
        return answer.status, answer.headers.get("ETag", "")


def _measure(kind: str, n: int, clients: dict[str, _Client]) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in clients}
    with progress() as bar:
        for _ in bar.track(range(n), description=f"GET risk, {kind}"):
            for name, client in clients.items():
                started = time.perf_counter()
                status, _ = client.risk(kind)
                seconds[name].append(time.perf_counter() - started)
                assert status == int(kind)
    return [
        {"answer": kind, "trail": name, "n": n, **milliseconds(found, 0.5, 0.99)}
        for name, found in seconds.items()
    ]


if __name__ == "__main__":
    main()
