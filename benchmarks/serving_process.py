"""The service as a process of its own, and a log for it that holds stays already."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from benchmarks.serving_items import history_body, stay_id
from llm4ehr.bundle import Bundle, load_bundle
from service.decisions import Admission, post
from service.entries import Draft
from service.ingest import Batch, Rules
from service.log import SqliteLog
from service.settings import Settings

TEMPLATES = 20
"""So many stays are judged item by item; the others say the same under other names."""

_TICKS = os.sysconf("SC_CLK_TCK")
_PATIENCE_S = 600.0


class Service:
    """`python -m service serve` on a free port, with a log in a temporary folder.

    `settings` are environment variables without their prefix. With `watch`, arguments of
    `benchmarks.serving_watch`, that looks at the process, and `watched` is what it saw. `run` is
    the module with its arguments, if another one is to begin it.
    """

    def __init__(
        self,
        watch: Sequence[str] | None = None,
        run: Sequence[str] = ("service", "serve"),
        **settings: Any,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="llm4ehr-benchmark-")
        self.log_path = Path(self._folder.name) / "log.sqlite"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = int(s.getsockname()[1])
        self.settings = {
            "staleness_limit_hours": "none",
            "authentication": "open",
            "requests_per_second_per_client": "none",
        } | settings
        own = {"port": self.port, "log_path": self.log_path} | self.settings
        self._environment = os.environ | {
            f"LLM4EHR_{name.upper()}": str(value) for name, value in own.items()
        }
        self._watch = self.log_path.with_name("watch.jsonl")
        if watch is not None:
            run = ["benchmarks.serving_watch", str(self._watch), *watch, "serve"]
        self._command = [sys.executable, "-m", *run]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()

    def start(self) -> float:
        """Start and wait until it is ready; returns the seconds it took."""
        started = time.perf_counter()
        with (Path(self._folder.name) / "output.txt").open("wb") as output:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=output, stderr=output
            )
        self.wait_for(lambda: self.get("/v2/health/ready") is not None, every=0.02)
        return time.perf_counter() - started

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()
            self._process = None

    def wait_for(self, condition: Callable[[], bool], every: float = 0.25) -> None:
        """Raises RuntimeError if the service ends, or is not there in ten minutes."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                output = (Path(self._folder.name) / "output.txt").read_text()
                raise RuntimeError(f"the service ended: {output}")
            if condition():
                return
            time.sleep(every)
        raise RuntimeError("the service did not get there")

    def get(self, path: str) -> Any:
        """A JSON answer, or None while there is none."""
        try:
            with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as response:
                body = response.read()
                return json.loads(body) if body else {}
        except (HTTPError, OSError):
            return None

    def post(self, episode_id: str, body: dict[str, Any]) -> None:
        """Record items. Raises HTTPError."""
        request = Request(
            f"http://127.0.0.1:{self.port}/episodes/{episode_id}/observations",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        urlopen(request, timeout=60).close()

    def metrics(self) -> dict[str, float]:
        """All samples of /metrics, labels as they stand in the text."""
        with urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def is_warm(self) -> bool:
        """Whether every open stay of the log has its score and nothing waits for the engine."""
        page = self.get("/episodes?sort=risk&order=asc&status=open&limit=500")
        if page is None or not page["complete"]:
            return False
        # Stays without a score come last in the list.
        while page["next_cursor"] is not None:
            cursor = page["next_cursor"]
            page = self.get(f"/episodes?sort=risk&order=asc&status=open&limit=500&cursor={cursor}")
        return all(e["score_withheld"] is None for e in page["episodes"])

    def watched(self) -> list[dict[str, Any]]:
        """The lines of `benchmarks.serving_watch` so far."""
        return [json.loads(line) for line in self._watch.read_text().splitlines()]

    def cpu_seconds(self) -> float:
        """What the process has used so far, of all its threads."""
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def rss_mib(self) -> float:
        """Memory of the process that is in use."""
        assert self._process is not None
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def admitted_long_ago() -> datetime:
    """An admission from which the 200 hours that a model reads have passed."""
    return datetime.now(UTC).replace(microsecond=0) - timedelta(hours=201)


def build_log(path: Path, n_stays: int, hours: int, admitted: datetime) -> int:
    """Write stays of so many hours through the service's own log; returns the entries."""
    bundle, first = history(hours, admitted)
    drafts = [first]
    for stay in range(1, min(n_stays, TEMPLATES)):
        drafts.append(history(hours, admitted, bundle, stay)[1])

    async def write() -> None:
        log = SqliteLog(path)
        now = datetime.now(UTC)
        for first in range(0, n_stays, 16):
            stays = range(first, min(first + 16, n_stays))
            await asyncio.gather(
                *(log.append(stay_id(i), drafts[i % len(drafts)], now, 0) for i in stays)
            )
        await log.close()

    asyncio.run(write())
    return sum(len(drafts[i % len(drafts)]) for i in range(n_stays))


def history(
    hours: int, admitted: datetime, bundle: Bundle | None = None, stay: int = 0
) -> tuple[Bundle, list[Draft]]:
    """An admission and what came in the first hours, as the service would record them.

    Returns the bundle whose vocabulary judged the items too, by default the one that is served.
    """
    bundle = bundle or load_bundle(Path("model_repository"), "llm4ehr", 1)
    settings = Settings()
    rules = Rules(
        vocabulary=bundle.network.vocabulary,
        future_tolerance=settings.future_tolerance,
        allowed_lateness=settings.allowed_lateness,
    )
    body = history_body(stay, hours, admitted)
    batch = Batch(observations=body["observations"], events=body["events"])
    drafts, posted = post(None, datetime.now(UTC), rules, batch, Admission(admitted_at=admitted))
    assert all(result.status == "accepted" for result in posted.results)
    return bundle, list(drafts)
