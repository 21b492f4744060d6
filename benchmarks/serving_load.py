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
import resource
import signal
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.serving_plan import Beds, Plan, Request, head_of

GRACE_S = 20.0
"""How long answers are waited for after the last request."""


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
    stays: list[int] = field(default_factory=list)


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
    """Value of a header; `name` in lower case."""
    at = head.lower().find(b"\r\n" + name + b": ")
    if at < 0:
        return None
    return head[at + len(name) + 4 :].partition(b"\r\n")[0].decode()


class Load:
    """Sends what is due over whatever connection is free, and keeps the times."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._tls = plan.authority and ssl.create_default_context(cafile=plan.authority)
        self._beds = Beds(plan)
        self._requests = self._beds.schedule()
        # First in, first out: none idles for so long that the server closes it.
        self._free: deque[Connection] = deque()
        self._all: list[Connection] = []
        self._opening: list[asyncio.Future[None]] = []
        self._queue: deque[Request] = deque()
        self._read_last: tuple[str, str] | None = None
        """Stay and entity tag of the last risk that was read."""
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
        self.result.hours, self.result.stays = self._beds.hours, self._beds.stays
        await self._close()
        return self.result

    def _check_idle(self) -> None:
        if self._sent and not self._under_way and not self._queue:
            self._idle.set()

    def _stop(self) -> None:
        self._stopped = True

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: Connection(self._answered), "127.0.0.1", self._plan.port, ssl=self._tls or None
        )
        self._all.append(connection)
        self._freed(connection)

    async def _close(self) -> None:
        await asyncio.gather(*self._opening)
        for connection in self._all:
            if connection.transport is not None:
                connection.transport.close()
        await asyncio.sleep(0)  # the transports close in the next turn of the loop

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
        extra = b""
        if request.conditional and self._read_last is not None:
            request.name, tag = self._read_last
            request.head = head_of("GET", f"{request.name}/risk")
            extra = f"If-None-Match: {tag}\r\n".encode()
        connection.send(request, extra)

    def _answered(
        self, connection: Connection, request: Request, status: int, head: bytes, body: bytes
    ) -> None:
        now = time.perf_counter()
        self._under_way -= 1
        self._keep(request, status, head, now)
        if request.follow and status == 200:
            seq = json.loads(body)["seq"]
            head = head_of("GET", f"{request.name}/risk?min_seq={seq}")
            self._queue.append(Request("readable", request.name, request.due, head))
        if connection.transport is not None:
            self._freed(connection)
        else:
            self._opening.append(asyncio.ensure_future(self._connect()))
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
        if request.kind in ("get", "readable"):
            self._read_last = request.name, header(head, b"etag") or ""


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    plan = Plan(**json.loads(Path(sys.argv[1]).read_text()))
    result: dict[str, Any] = asdict(uvloop.run(Load(plan).run()))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
