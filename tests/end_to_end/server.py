"""The service in a process of its own, spoken to over real HTTP."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0
"""Bounds every wait: far more than anything takes, so that only what hangs is ended by it."""


def environment(repository: Path, **settings: Any) -> dict[str, str]:
    """Of a command of the service that finds the tiny bundle, and no setting from outside."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LLM4EHR_")}
    own = {
        "model_repository": repository,
        "bundle": "tiny/1",
        "torch_threads": 1,
        "engine_rows": 16,
        "kv_memory_mib": 1,
        "staleness_limit_hours": "none",
        "authentication": "open",
        "requests_per_second_per_client": "none",
    } | settings
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return (
        kept
        | {f"LLM4EHR_{key.upper()}": str(value) for key, value in own.items()}
        | {"PYTHONPATH": path}
    )


def free_port() -> int:
    """A port of the loopback interface that nobody has, and that nobody gets by chance: those at
    the end of an outgoing connection lie elsewhere, and this process gives none away twice.
    """
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("there is no free port")


def _below_ephemeral() -> Iterator[int]:
    """Each port once, from a random one on, so that several processes do not meet."""
    told = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(told.read_text().split()[0]) if told.exists() else 32_768
    ports = range(10_000, first if first > 20_000 else 32_768)
    start = secrets.randbelow(len(ports))
    yield from ports[start:]
    yield from ports[:start]


_ports = _below_ephemeral()


class Server:
    """`python -m service serve`. As a context: started and ready, killed at the end; may be entered
    again.
    """

    def __init__(
        self,
        repository: Path,
        folder: Path,
        *arguments: str,
        port: int | None = None,
        **settings: Any,
    ) -> None:
        self.port = port or free_port()
        self.log_path = folder / "log.sqlite"
        self._folder = folder
        self.command = [sys.executable, "-m", "service", "serve", *arguments]
        self._environment = environment(
            repository, port=self.port, log_path=self.log_path, **settings
        )
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE_S)
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
        self.http.close()

    def start(self) -> None:
        with (self._folder / "output.txt").open("ab") as output:
            self._process = subprocess.Popen(
                self.command,
                env=self._environment,
                cwd=self._folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, with whatever it starts
            )

    def wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self.output
            try:
                if self.http.get("/v2/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready: {self.output}")

    def kill(self) -> None:
        """SIGKILL: nothing is finished, nothing is closed."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(PATIENCE_S)

    def leaves_processes(self) -> bool:
        """Whether anything that it started runs on."""
        assert self._process is not None
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to the process alone."""
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        """Until it has ended; returns the exit status."""
        assert self._process is not None
        return self._process.wait(PATIENCE_S)

    def terminate(self) -> int:
        """SIGTERM; returns the exit status."""
        self.tell(signal.SIGTERM)
        return self.wait()

    @property
    def output(self) -> str:
        return (self._folder / "output.txt").read_text()
