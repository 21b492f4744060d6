"""The service with somebody who looks at its process: memory, and where its threads spend CPU.

    python -m benchmarks.serving_watch FILE [--profile] serve

runs `python -m service serve` and appends one JSON line a second to FILE: resident memory, what the
allocator holds and, with --profile, CPU seconds of every thread by the part of the code it was in.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from service.__main__ import main as serve

EVERY_S, GLANCE_S = 0.003, 0.0001
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


def part_of(frame: FrameType | None) -> tuple[str, str]:
    """The part of the code that a thread is in, and the function there."""
    while frame is not None:
        path = frame.f_code.co_filename
        for part, places in PARTS:
            if any(place in path for place in places):
                return part, f"{Path(path).stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "rest", ""


class Profile:
    """Where threads are when they run, and the CPU time of each since the last `take`.

    Only a thread whose CPU clock moves while it is looked at counts: one that waits would be found
    where it waits, after a burst of work that was somewhere else.
    """

    def __init__(self) -> None:
        self._seen: defaultdict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        self._taken = self._clocks()

    def look(self) -> None:
        before = self._clocks()
        time.sleep(GLANCE_S)
        frames, after = sys._current_frames(), self._clocks()
        for thread, seconds in after.items():
            if seconds > before.get(thread, seconds) and thread.ident in frames:
                self._seen[thread.name][part_of(frames[thread.ident])] += 1

    def take(self) -> list[dict[str, Any]]:
        """CPU seconds by thread, part and place, shared out by how often it was seen there."""
        clocks, lines = self._clocks(), []
        for thread, seconds in clocks.items():
            seen = self._seen.pop(thread.name, Counter())
            used = seconds - self._taken.get(thread, seconds)
            for (part, place), n in seen.items():
                share = used * n / seen.total()
                line = {"thread": thread.name, "part": part, "place": place}
                lines.append(line | {"seconds": round(share, 6)})
        self._taken = clocks
        return lines

    @staticmethod
    def _clocks() -> dict[threading.Thread, float]:
        """CPU seconds of every thread but this one."""
        clocks = {}
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and thread.ident is not None:
                with contextlib.suppress(OSError):  # it ended meanwhile
                    clock = time.pthread_getcpuclockid(thread.ident)
                    clocks[thread] = time.clock_gettime(clock)
        return clocks


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
        sys.setswitchinterval(0.00002)
    with Path(path).open("a") as out:
        threading.Thread(target=watch, args=(out, profile), name="watch", daemon=True).start()
        return serve(rest)


if __name__ == "__main__":
    raise SystemExit(main())
