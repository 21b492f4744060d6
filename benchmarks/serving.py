"""Latency of the whole HTTP path at 1, 32 and 256 live stays.

`python -m benchmarks.serving`

Starts the service as a process of its own with a log on disk (synchronous=FULL). Every stay has 24
hours on record; then, hour after hour, each stay posts the items of one more hour (12 observations,
3 events) and asks for the risk that includes them. Clients are 8 threads in this process, closed
loop, so they share the machine with the service.

    post          POST /episodes/{id}/observations until the durable acknowledgement
    post_to_risk  the same POST until GET .../risk?min_seq= has answered with the new hour
    get           GET .../risk again, answered from the last computed scores
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import milliseconds, write
from llm4ehr.variables import VARIABLES

HISTORY_HOURS = 24
CLIENTS = 8
_connections = threading.local()


def main() -> None:
    rows = [row for stays in (1, 32, 256) for row in measure(stays)]
    write("serving", rows)


def measure(stays: int) -> list[dict[str, Any]]:
    """Rows of the table for one number of live stays."""
    hours = max(10, min(200, 2000 // stays) if stays > 1 else 150)
    admitted = datetime.now(UTC) - timedelta(hours=HISTORY_HOURS + hours)
    with Service() as port:
        client = Client(port)
        pool = ThreadPoolExecutor(min(CLIENTS, stays))
        ids = [f"stay-{i}" for i in range(stays)]
        list(pool.map(lambda i: client.history(i, admitted), ids))
        times: dict[str, list[float]] = {"post": [], "post_to_risk": [], "get": []}
        started = time.perf_counter()
        for hour in range(HISTORY_HOURS, HISTORY_HOURS + hours):
            for result in pool.map(lambda i, h=hour: client.hour(i, admitted, h), ids):
                for name, seconds in result.items():
                    times[name].append(seconds)
        wall = time.perf_counter() - started
        pool.shutdown()
    rate = round(stays * hours / wall, 1)
    return [
        {
            "live_stays": stays,
            "what": name,
            "n": len(seconds),
            **milliseconds(seconds, 0.5, 0.99),
            "stay_hours_per_s": rate,
        }
        for name, seconds in times.items()
    ]


class Client:
    """Talks to the service over one connection a thread."""

    def __init__(self, port: int) -> None:
        self.port = port

    def history(self, episode: str, admitted: datetime) -> None:
        """Create a stay with its first hours and wait until it is scored."""
        rng = np.random.default_rng(hash_of(episode))
        body: dict[str, Any] = {"admitted_at": admitted.isoformat(), "observations": []}
        body["events"] = []
        for hour in range(HISTORY_HOURS):
            items = hourly_items(rng, admitted, hour)
            body["observations"] += items["observations"]
            body["events"] += items["events"]
        self.call("POST", f"/episodes/{episode}/observations", body)
        self.call("GET", f"/episodes/{episode}/risk")

    def hour(self, episode: str, admitted: datetime, hour: int) -> dict[str, float]:
        """Post one hour, read its risk, read it again; seconds of each."""
        body = hourly_items(np.random.default_rng([hash_of(episode), hour]), admitted, hour)
        started = time.perf_counter()
        answer = self.call("POST", f"/episodes/{episode}/observations", body)
        posted = time.perf_counter()
        risk = self.call("GET", f"/episodes/{episode}/risk?min_seq={answer['seq']}")
        read = time.perf_counter()
        self.call("GET", f"/episodes/{episode}/risk")
        again = time.perf_counter()
        assert risk["hours"][-1]["hour"] == hour
        return {"post": posted - started, "post_to_risk": read - started, "get": again - read}

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """One request; anything but 2xx is an error of the benchmark."""
        if not hasattr(_connections, "http") or _connections.port != self.port:
            _connections.http = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            _connections.http.connect()
            _connections.http.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _connections.port = self.port
        payload = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"} if payload else {}
        _connections.http.request(method, path, payload, headers)
        response = _connections.http.getresponse()
        answer = json.load(response)
        if response.status >= 300:
            raise RuntimeError(f"{method}: {response.status} {answer}")
        return answer


class Service:
    """The service as a process on a free port, with a fresh log."""

    def __enter__(self) -> int:
        self._folder = tempfile.TemporaryDirectory()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = int(s.getsockname()[1])
        environment = os.environ | {
            "LLM4EHR_PORT": str(port),
            "LLM4EHR_LOG_PATH": str(Path(self._folder.name) / "log.sqlite"),
            "LLM4EHR_STALENESS_LIMIT_HOURS": "none",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), 0.1).close()
                return port
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("the service did not start")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()


def hash_of(episode: str) -> int:
    """A seed for a stay, the same in every run."""
    return int(episode.rpartition("-")[2])


def hourly_items(
    rng: np.random.Generator, admitted: datetime, hour: int
) -> dict[str, list[dict[str, Any]]]:
    """12 observations and 3 laboratory results of one hour, near the normal values."""

    def when() -> str:
        return (admitted + timedelta(hours=hour + rng.uniform(0, 0.99))).isoformat()

    observations = []
    for _ in range(12):
        variable = VARIABLES[rng.integers(len(VARIABLES))]
        value = round(variable.normal * rng.uniform(0.97, 1.0), 3)
        item = {"variable": variable.name, "value": value, "unit": variable.unit, "time": when()}
        observations.append(item)
    events = []
    for code, value, unit in (
        ("2160-0", 1.1, "mg/dL"),
        ("2823-3", 4.2, "mmol/L"),
        ("2524-7", 1.7, "mmol/L"),
    ):
        item = {"code": code, "system": "http://loinc.org", "time": when()}
        events.append(item | {"value": round(value * rng.uniform(0.8, 1.2), 2), "unit": unit})
    return {"observations": observations, "events": events}


if __name__ == "__main__":
    main()
