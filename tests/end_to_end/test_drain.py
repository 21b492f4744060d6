"""Told to stop under load: what was begun is finished, what was acknowledged is in the log."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from service.server import FATAL_STATUS
from service.times import format_time
from tests.end_to_end.checks import read_log
from tests.end_to_end.load import HOURS, Acknowledged, requests
from tests.end_to_end.server import PATIENCE_S, Server

N_CLIENTS = 4


class Clients:
    """Clients that post until an answer ends their connection, or the door is closed."""

    def __init__(self, port: int) -> None:
        self.acknowledged: list[Acknowledged] = []
        self.errors: list[BaseException] = []
        self._url = f"http://127.0.0.1:{port}"
        self._threads = [threading.Thread(target=self._post, args=(c,)) for c in range(N_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def wait_for(self, n: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while len(self.acknowledged) < n:
            assert not self.errors, self.errors
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _post(self, client: int) -> None:
        last: list[str] = []
        hooks = {"response": [lambda response: last.append(response.headers.get("connection", ""))]}
        admitted_at = datetime.now(UTC) - timedelta(hours=3 * HOURS)
        try:
            with httpx.Client(base_url=self._url, timeout=PATIENCE_S, event_hooks=hooks) as http:
                for request in requests(client, 1_000_000, admitted_at):
                    self.acknowledged += request.send(http)
                    if last.pop() == "close":
                        return
        except httpx.ConnectError:
            pass  # nothing was begun
        except BaseException as error:
            self.errors.append(error)


@contextmanager
def half_sent(port: int, episode: str) -> Iterator[tuple[socket.socket, bytes]]:
    """A POST of which the server has the beginning; and what is left to send."""
    observation = {"id": "o", "variable": "hr", "value": 80, "time": format_time(datetime.now(UTC))}
    admitted_at = format_time(datetime.now(UTC) - timedelta(hours=1))
    body = json.dumps({"admitted_at": admitted_at, "observations": [observation]}).encode()
    head = (
        f"POST /episodes/{episode}/observations HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        connection.sendall(head + body[:10])
        yield connection, body[10:]


def wait_until_closed(port: int) -> None:
    """Until no new connection is taken."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.02)
    raise AssertionError("the door is open")


def wait_until_draining(server: Server) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        response = server.http.get("/v2/health/ready")
        if response.status_code == 503:
            assert response.json() == {"error": "draining"}
            return
    raise AssertionError("it is ready")


@pytest.mark.slow
def test_a_drain_under_load_loses_and_resets_nothing(repository: Path, tmp_path: Path) -> None:
    with Server(repository, tmp_path) as server:
        clients = Clients(server.port)
        try:
            clients.wait_for(40)
            with half_sent(server.port, "slow") as (connection, rest):
                clients.wait_for(80)  # by then its beginning was read
                server.tell(signal.SIGTERM)
                wait_until_draining(server)  # while it is still answering
                wait_until_closed(server.port)
                connection.sendall(rest)
                answer = b"".join(iter(lambda: connection.recv(65536), b""))
        finally:
            clients.join()
        assert server.wait() == 0
        assert not clients.errors
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in answer
    log = read_log(server.log_path)
    assert [entry.item_id for entry in log["slow"][1:]] == ["o"]
    for ack in clients.acknowledged:
        assert log[ack.episode][ack.seq - 1].item_id == ack.item_id


@pytest.mark.slow
def test_a_client_that_never_finishes_does_not_keep_it(repository: Path, tmp_path: Path) -> None:
    with (
        Server(repository, tmp_path, drain_grace_seconds=0, drain_timeout_seconds=2) as server,
        half_sent(server.port, "slow"),
    ):
        server.http.get("/v2")
        assert server.terminate() == 0


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(repository: Path, tmp_path: Path) -> None:
    with Server(
        repository, tmp_path, drain_grace_seconds=600, drain_timeout_seconds=1200
    ) as server:
        server.tell(signal.SIGTERM)
        wait_until_draining(server)
        server.tell(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM


FAILS = """
import itertools, sys
from service.__main__ import main
from service.engine.backends.base import DeviceFault
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.engine.engine import OnlineEngine

tick, start, count = TorchCpuBackend.tick, OnlineEngine.start, itertools.count()

def failing(self, *arguments):
    if next(count) == 20:
        raise DeviceFault("gone")
    return tick(self, *arguments)

def started(self):
    TorchCpuBackend.tick = failing
    start(self)

OnlineEngine.start = started
sys.exit(main(["serve"]))
"""


@pytest.mark.slow
def test_a_broken_device_ends_it_with_a_status_of_its_own(repository: Path, tmp_path: Path) -> None:
    """At once, whoever waits for an answer; what was acknowledged is in the log."""
    server = Server(repository, tmp_path, drain_grace_seconds=600, drain_timeout_seconds=1200)
    server.command = [sys.executable, "-c", FAILS]
    with server:
        clients = Clients(server.port)
        try:
            assert server.wait() == FATAL_STATUS
        finally:
            clients.join()
        assert all(isinstance(error, httpx.TransportError) for error in clients.errors)
        assert "DeviceFault" in server.output
        assert "gone" not in server.output
    log = read_log(server.log_path)
    assert clients.acknowledged
    for ack in clients.acknowledged:
        assert log[ack.episode][ack.seq - 1].item_id == ack.item_id
