"""The service with somebody who looks at its process: memory, and where its threads spend CPU.

    python -m benchmarks.serving_watch FILE [--profile] serve

runs `python -m service serve` and appends one JSON line a second to FILE: resident memory, what the
allocator holds and, with --profile, CPU seconds of every thread by the part of the code it was in.
A thread is charged with the CPU time that passed for it since it was last looked at.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from service.__main__ import main as serve

EVERY_S = 0.004
_PAGE = os.sysconf("SC_PAGE_SIZE")
# The first part whose place occurs in the path of a frame, from the innermost frame outwards.
PARTS = (
    ("log commit", ("/service/log/",)),
    ("projection", ("/service/projection", "/service/state")),
    ("featurise", ("/llm4ehr/episode", "/llm4ehr/hourly", "/llm4ehr/vocabulary")),
    ("tick", ("/service/engine/backends/", "/torch/", "/transformers/", "/llm4ehr/model",
              "/llm4ehr/backbone", "/onnxruntime/")),
    ("scores", ("/service/engine/answers", "/llm4ehr/calibration")),
    ("engine, rest", ("/service/engine/",)),
    ("parse and validate", ("/service/api/body", "/service/api/schemas", "/service/ingest",
                            "/service/items", "/service/decisions", "/service/units",
                            "/service/times", "/llm4ehr/variables", "/pydantic")),
    ("metrics and traces", ("/prometheus_client/", "/opentelemetry/", "/service/api/metrics")),
    ("answers", ("/service/api/", "/service/answers")),
    ("service, rest", ("/service/",)),
    ("HTTP and ASGI", ("/fastapi/", "/starlette/", "/uvicorn/", "/anyio/", "/httptools/")),
    ("event loop", ("/asyncio/", "/uvloop/", "selectors.py")),
)  # fmt: skip


def part_of(frame: FrameType | None) -> str:
    """The part of the code that a thread is in."""
    while frame is not None:
        path = frame.f_code.co_filename
        for part, places in PARTS:
            if any(place in path for place in places):
                return part
        frame = frame.f_back
    return "rest"


class Profile:
    """CPU seconds by thread and part since the last `take`."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, defaultdict[str, float]]
        self._seconds = defaultdict(lambda: defaultdict(float))
        self._before: dict[int, float] = {}

    def look(self) -> None:
        """Charge every thread but this one with its CPU time since the last look."""
        me = threading.get_ident()
        names = {t.ident: t.name for t in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            if ident == me or ident not in names:
                continue
            try:
                now = time.clock_gettime(time.pthread_getcpuclockid(ident))
            except OSError:  # it ended meanwhile
                continue
            used = now - self._before.get(ident, now)
            self._before[ident] = now
            if used > 0:
                self._seconds[names[ident]][part_of(frame)] += used

    def take(self) -> dict[str, dict[str, float]]:
        taken = {thread: dict(parts) for thread, parts in self._seconds.items()}
        self._seconds.clear()
        return taken


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def memory() -> dict[str, float]:
    """MiB: resident; of the allocator: in use, free in its heaps, mapped on their own."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    found = {"rss": resident}
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallinfo2"):  # glibc 2.33 and later
        libc.mallinfo2.restype = _Mallinfo2
        of = libc.mallinfo2()
        found |= {"in_use": of.uordblks, "free": of.fordblks, "mapped": of.hblkhd}
    return {name: round(n / (1 << 20), 3) for name, n in found.items()}


def watch(out: TextIO, profile: Profile | None) -> None:
    """Write a line a second, for ever."""
    while True:
        line: dict[str, Any] = {"at": time.time(), "memory": memory()}
        if profile is None:
            time.sleep(1.0)
        else:
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                profile.look()
                time.sleep(EVERY_S)
            line["cpu"] = profile.take()
        out.write(json.dumps(line) + "\n")
        out.flush()


def main() -> int:
    path, *rest = sys.argv[1:]
    profile = None
    if rest[0] == "--profile":
        rest = rest[1:]
        profile = Profile()
        # A look waits for the interpreter lock: the sooner it gets it, the less it is at places
        # where threads give it up by themselves.
        sys.setswitchinterval(0.0005)
    with Path(path).open("a") as out:
        threading.Thread(target=watch, args=(out, profile), name="watch", daemon=True).start()
        return serve(rest)


if __name__ == "__main__":
    raise SystemExit(main())
