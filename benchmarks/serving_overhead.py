"""Where the time of requests goes: from the service's own metrics and headers, and from samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.report import milliseconds

PLACES = 25


def from_metrics(before: Mapping[str, float], after: Mapping[str, float]) -> list[dict[str, Any]]:
    """Mean of every histogram in seconds between two readings of /metrics."""
    items = []
    for name, total in after.items():
        family, found, labels = name.partition("_seconds_sum")
        if not found:
            continue
        count = f"{family}_seconds_count{labels}"
        n = after[count] - before.get(count, 0.0)
        if n > 0:
            mean = 1000 * (total - before.get(name, 0.0)) / n
            items.append(
                {"by": "metrics", "what": family + labels, "n": int(n), "mean_ms": round(mean, 3)}
            )
    return items


def from_timings(timings: Mapping[str, Iterable[str]]) -> list[dict[str, Any]]:
    """Durations of the Server-Timing headers, by kind of request and by name."""
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for kind, headers in timings.items():
        for header in headers:
            for entry in header.split(","):
                name, *parameters = (part.strip() for part in entry.split(";"))
                for parameter in parameters:
                    key, _, value = parameter.partition("=")
                    if key == "dur":
                        found[kind, name].append(float(value.strip('"')) / 1000)
    return [
        {
            "by": "Server-Timing",
            "what": f"{kind}: {name}",
            "n": len(seconds),
            "mean_ms": round(1000 * sum(seconds) / len(seconds), 3),
            **milliseconds(seconds, 0.5, 0.99),
        }
        for (kind, name), seconds in sorted(found.items())
    ]


def from_samples(
    lines: Iterable[Mapping[str, Any]], since: float, until: float, requests: int
) -> list[dict[str, Any]]:
    """CPU milliseconds of a request by part of the code, then by the function where most is spent,
    from lines of `serving_watch`.
    """
    parts: defaultdict[tuple[str, str], float] = defaultdict(float)
    places: defaultdict[tuple[str, str], float] = defaultdict(float)
    for line in lines:
        if since <= line["at"] <= until:
            for seen in line.get("cpu", ()):
                parts[seen["part"], seen["thread"]] += seen["seconds"]
                places[f"{seen['part']}: {seen['place']}", seen["thread"]] += seen["seconds"]
    everything = sum(parts.values()) or 1.0
    shown = sorted(parts.items(), key=lambda item: -item[1])
    shown += sorted(places.items(), key=lambda item: -item[1])[:PLACES]
    return [
        {
            "by": "samples",
            "what": what,
            "thread": thread,
            "cpu_ms_a_request": round(1000 * seconds / max(requests, 1), 4),
            "share": round(seconds / everything, 3),
        }
        for (what, thread), seconds in shown
    ]
