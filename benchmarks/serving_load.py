"""An open-loop client of the service, light enough to share a machine with it.

    python -m benchmarks.serving_load PLAN.json

sends hourly data, corrections and reads at Poisson times, whatever becomes of earlier requests, and
prints what it measured as JSON. Bodies are made before the first request; connections are plain
sockets that stay open. Every latency begins at the time a request was due, so that a service that
stalls cannot hide the requests that would have come meanwhile. SIGTERM ends the sending early.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.serving_items import correction_body, hour_body, stay_id

GRACE_S = 20.0
"""How long answers are waited for after the last request."""

CORRECTED_HOURS_BACK = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to send. `hours` are the next hour of each stay, `admitted` when all began."""

    port: int
    admitted: str
    hours: list[int]
    rate: float
    seconds: float
    seed: int = 0
    corrections: float = 0.01  # shares of all requests; the rest are hours
    reads: float = 0.05
    followed: float = 0.2  # share of the posts whose risk is asked for at once
    connections: int = 64  # at most, and one for each request a second


@dataclass(slots=True)
class Request:
    """One request and when it was due."""

    kind: str  # post, correction, get, readable
    stay: int
    due: float
    head: bytes
    body: bytes = b""
    follow: bool = False


@dataclass
class Result:
    """What came of a plan. Times in seconds."""

    requests: int = 0
    completed: int = 0
    span: float = 0.0  # from the first due time to the last answer of a scheduled request
    statuses: dict[str, int] = field(default_factory=dict)
    latencies: dict[str, list[float]] = field(default_factory=dict)
    lags: list[float] = field(default_factory=list)  # due to handed over
    timings: dict[str, list[str]] = field(default_factory=dict)  # Server-Timing as it came
    cpu_share: float = 0.0
    hours: list[int] = field(default_factory=list)


def schedule(plan: Plan) -> tuple[list[Request], list[int]]:
    """All requests with due times from 0, and the next hour of each stay afterwards."""
    rng = random.Random(plan.seed)
    admitted, hours = datetime.fromisoformat(plan.admitted), list(plan.hours)
    turn: list[int] = []
    requests, due = [], rng.expovariate(plan.rate)
    while due < plan.seconds:
        chance = rng.random()
        if chance < plan.reads:
            stay = rng.randrange(len(hours))
            requests.append(Request("get", stay, due, _head("GET", f"{stay_id(stay)}/risk")))
        else:
            if chance < plan.reads + plan.corrections:
                kind, stay = "correction", rng.randrange(len(hours))
                at = max(hours[stay] - 1 - CORRECTED_HOURS_BACK, 0)
                serial = plan.seed * 1_000_000 + len(requests)
                body = correction_body(stay, at, serial, admitted)
            else:
                kind = "post"
                turn = turn or rng.sample(range(len(hours)), len(hours))
                stay = turn.pop()
                body = hour_body(stay, hours[stay], admitted)
                hours[stay] += 1
            data = json.dumps(body).encode()
            head = _head("POST", f"{stay_id(stay)}/observations", len(data))
            requests.append(Request(kind, stay, due, head, data, rng.random() < plan.followed))
        due += rng.expovariate(plan.rate)
    if max(hours) > 200:
        raise ValueError("a stay would get more than 200 hours")
    return requests, hours


def _head(method: str, path: str, length: int | None = None) -> bytes:
    """Request line and headers, without the empty line that ends them."""
    lines = [f"{method} /episodes/{path} HTTP/1.1", "Host: 127.0.0.1"]
    if length is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join(lines).encode() + b"\r\n"


class Connection(asyncio.Protocol):
    """One request at a time; answers have a Content-Length, or no body at all."""

    def __init__(self, done: Callable[[Connection, Request, int, bytes, bytes], None]) -> None:
        self._done = done
        self._request: Request | None = None
        self._got = b""
        self._head: bytes | None = None
        self._missing = 0
        self.transport: Any = None
        """None before and after the connection is open."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def send(self, request: Request, extra: bytes = b"") -> None:
        self._request = request
        self.transport.write(request.head + extra + b"\r\n" + request.body)

    def data_received(self, data: bytes) -> None:
        self._got += data
        if self._head is None:
            head, found, rest = self._got.partition(b"\r\n\r\n")
            if not found:
                return
            self._head, self._got = head + b"\r\n", rest
            self._missing = int(header(self._head, b"content-length") or 0)
        if len(self._got) >= self._missing:
            head, body, request = self._head, self._got, self._request
            self._head, self._got, self._request = None, b"", None
            assert request is not None
            self._done(self, request, int(head[9:12]), head, body)

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self._request is not None:
            request, self._request = self._request, None
            self._done(self, request, 0, b"", b"")


def header(head: bytes, name: bytes) -> str | None:
    """Value of a header; names as the server writes them, in lower case."""
    _, found, rest = head.partition(b"\r\n" + name + b": ")
    return rest.partition(b"\r\n")[0].decode() if found else None


class Load:
    """Sends what is due over whatever connection is free, and keeps the times."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._requests, self._hours = schedule(plan)
        # First in, first out: none idles for so long that the server closes it.
        self._free: deque[Connection] = deque()
        self._queue: deque[Request] = deque()
        self._tags: dict[int, str] = {}
        self._under_way = 0
        self._stopped = self._sent = False
        self._idle = asyncio.Event()
        self._origin = 0.0
        self.result = Result()

    async def run(self) -> Result:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        for _ in range(max(4, min(self._plan.connections, int(self._plan.rate)))):
            await self._connect()
        used, wall = _cpu_seconds(), time.perf_counter()
        self._origin = time.perf_counter() + 0.01
        for request in self._requests:
            request.due += self._origin
            if (wait := request.due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            if self._stopped:
                break
            self.result.requests += 1
            self._send(request)
        self._sent = True
        self._check_idle()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), GRACE_S)
        self.result.cpu_share = (_cpu_seconds() - used) / (time.perf_counter() - wall)
        self.result.hours = self._hours
        return self.result

    def _check_idle(self) -> None:
        if self._sent and not self._under_way and not self._queue:
            self._idle.set()

    def _stop(self) -> None:
        self._stopped = True

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: Connection(self._answered), "127.0.0.1", self._plan.port
        )
        self._freed(connection)

    def _freed(self, connection: Connection) -> None:
        self._free.append(connection)
        if self._queue:
            self._send(self._queue.popleft())

    def _send(self, request: Request) -> None:
        if not self._free:
            self._queue.append(request)
            return
        connection = self._free.popleft()
        self._under_way += 1
        self.result.lags.append(time.perf_counter() - request.due)
        tag = self._tags.get(request.stay) if request.kind == "get" else None
        connection.send(request, f"If-None-Match: {tag}\r\n".encode() if tag else b"")

    def _answered(
        self, connection: Connection, request: Request, status: int, head: bytes, body: bytes
    ) -> None:
        now = time.perf_counter()
        self._under_way -= 1
        self._keep(request, status, head, now)
        if request.follow and status == 200:
            seq = json.loads(body)["seq"]
            path = f"{stay_id(request.stay)}/risk?min_seq={seq}"
            self._queue.append(Request("readable", request.stay, request.due, _head("GET", path)))
        if connection.transport is not None:
            self._freed(connection)
        else:
            self._opening = asyncio.ensure_future(self._connect())
        self._check_idle()

    def _keep(self, request: Request, status: int, head: bytes, now: float) -> None:
        kind = "not_modified" if status == 304 else request.kind
        answer = f"{request.kind} {status}"
        self.result.statuses[answer] = self.result.statuses.get(answer, 0) + 1
        if kind != "readable":
            self.result.span = now - self._origin
        if status not in (200, 304):
            return
        if kind != "readable":
            self.result.completed += 1
        self.result.latencies.setdefault(kind, []).append(now - request.due)
        timing = header(head, b"server-timing")
        if timing is not None:
            self.result.timings.setdefault(kind, []).append(timing)
        # Every second stay is polled with the tag of its last answer.
        if request.kind in ("get", "readable") and request.stay % 2:
            self._tags[request.stay] = header(head, b"etag") or ""


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    plan = Plan(**json.loads(Path(sys.argv[1]).read_text()))
    result: dict[str, Any] = asdict(uvloop.run(Load(plan).run()))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
