"""serve: the HTTP service."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

from service import logs
from service.access.hosts import is_loopback
from service.commands.parsers import Commands
from service.engine.backends.base import DeviceFault
from service.log.opening import wait_for_log
from service.runtime import build_app
from service.server import FATAL_STATUS, Server
from service.settings import Settings

_DEMO_NOTICE = """\
DEMO: a dozen stays of PhysioNet 2012 (ODC-BY 1.0) are replayed, their clock compressed; the log is
temporary, no score is withheld as stale, and everybody on this machine may read and change
everything. For research only, not a medical device.
  curl -s {url}/episodes?sort=risk
"""


def add(commands: Commands) -> None:
    """`serve`."""
    serve = commands.add_parser("serve", help="run the HTTP service; settings are LLM4EHR_*")
    serve.add_argument("--demo", action="store_true", help="replay a dozen real stays into it")
    serve.add_argument("--seconds-per-hour", type=float, default=5.0, help="pace of the demo")
    serve.set_defaults(run_command=_serve)


def _serve(a: argparse.Namespace) -> None:
    if not a.demo:
        _run(Settings())
        return
    with tempfile.TemporaryDirectory(prefix="llm4ehr-demo-") as folder:
        settings = _demo_settings(Path(folder))
        url = f"http://{settings.host}:{settings.port}"
        print(_DEMO_NOTICE.format(url=url), flush=True)
        with _Replay(url, a.seconds_per_hour) as demo:
            _run(settings, demo.begin_when_started)


def _demo_settings(folder: Path) -> Settings:
    """Open to everybody on this machine, whatever is said of clients and logs elsewhere.

    Raises ValueError for a host that others can reach.
    """
    settings = Settings(
        authentication="open",
        clients_file=None,
        oidc_issuer=None,
        oidc_audience=None,
        oidc_jwks_url=None,
        trusted_gateways=(),
        gateway_secret_file=None,
        log_url=None,
        log_path=folder / "log.sqlite",
        staleness_limit_hours=None,
    )
    if not is_loopback(settings.host):
        raise ValueError("the demonstration is open to everybody: it runs on loopback alone")
    return settings


def _run(settings: Settings, beside: Callable[[Server], None] | None = None) -> None:
    logs.configure(settings.log_format)
    # The server stops in order on SIGTERM, then raises the signal again for the handler that was
    # there before: being told to stop and stopping is a success.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    fatal = threading.Event()

    def on_fatal(error: BaseException) -> None:
        if isinstance(error, DeviceFault):
            # Other engines may hang in the same device: nothing is waited for.
            os._exit(FATAL_STATUS)
        fatal.set()

    wait_for_log(settings)
    server = Server(build_app(settings, on_fatal), settings, fatal)
    if beside is not None:
        beside(server)
    try:
        server.run()  # ends by the signal's own handler if it was told to stop
    finally:
        if server.failed:
            # What touches a broken device may hang, the end of the interpreter included.
            os._exit(FATAL_STATUS)
    if not server.started:
        raise OSError(f"the service could not start on {settings.host}:{settings.port}")


class _Replay:
    """The demo's client: a process of its own, so that it does not slow the service it talks to."""

    def __init__(self, url: str, seconds_per_hour: float) -> None:
        self._command = [
            *(sys.executable, "-m", "service", "replay"),
            *("--url", url, "--seconds-per-hour", str(seconds_per_hour)),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()

    def begin_when_started(self, server: Server) -> None:
        """Start once this very server listens: another one may be on the port already."""

        def wait() -> None:
            while not server.started:
                if self._over.wait(0.1):
                    return
            self._process = subprocess.Popen(self._command)

        threading.Thread(target=wait, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
