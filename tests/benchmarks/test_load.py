"""The load on the service: what is sent, what is kept of the answers, and what is read off them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from benchmarks.serving import row_of, sustained
from benchmarks.serving_items import hour_body
from benchmarks.serving_load import Load, Result
from benchmarks.serving_overhead import from_metrics, from_samples, from_timings
from benchmarks.serving_plan import Beds, Plan
from benchmarks.serving_process import history
from benchmarks.serving_watch import Profile, memory, part_of

ADMITTED = datetime(2026, 3, 1, 8, tzinfo=UTC)


def plan(**changes: Any) -> Plan:
    body = {"port": 0, "admitted": ADMITTED.isoformat(), "hours": [5] * 10, "rate": 100.0}
    return Plan(**body | {"seconds": 20.0} | changes)


def test_shares_and_times_of_requests() -> None:
    beds = Beds(plan(hours=[5] * 20, corrections=0.1, reads=0.2))
    requests = beds.schedule()
    kinds = [r.kind for r in requests]
    assert len(requests) == pytest.approx(2000, rel=0.1)
    assert kinds.count("get") == pytest.approx(400, rel=0.2)
    assert kinds.count("correction") == pytest.approx(200, rel=0.3)
    dues = [r.due for r in requests]
    assert dues == sorted(dues)
    assert dues[-1] < 20
    assert sum(beds.hours) - 100 == kinds.count("post")
    # Beds take turns, so nobody is more than an hour ahead.
    assert max(beds.hours) - min(beds.hours) <= 1
    assert [r.due for r in Beds(plan(seed=1)).schedule()] != dues


def test_a_correction_names_an_item_three_hours_back() -> None:
    requests = Beds(plan(corrections=1.0, reads=0.0, seconds=1.0)).schedule()
    for request in requests:
        bed = int(request.name.partition("-")[2])
        (item,) = json.loads(request.body)["observations"]
        sent = {o["id"]: o for o in hour_body(bed, 5 - 1 - 3, ADMITTED)["observations"]}
        target = sent[item["corrects"]]
        assert (item["variable"], item["time"]) == (target["variable"], target["time"])
    ids = [json.loads(r.body)["observations"][0]["id"] for r in requests]
    assert len(set(ids)) == len(ids)


def test_stays_leave_and_others_come() -> None:
    beds = Beds(plan(hours=[3, 3], leave_at=4, reads=0.0, corrections=0.0, seconds=0.2))
    requests = beds.schedule()
    leaving = [r for r in requests if r.kind == "discharge"]
    admitted = [r for r in requests if b"admitted_at" in r.body]
    assert len(leaving) == len(admitted) > 2
    assert admitted[0].name.endswith("-1")
    assert sum(beds.stays) == len(leaving)
    again = Beds(plan(hours=[2, 1], stays=beds.stays, reads=1.0, seconds=0.1)).schedule()
    reads = {r.name for r in again if r.kind == "get"}
    assert f"stay-0-{beds.stays[0]}" in reads


def test_no_stay_gets_more_hours_than_the_model_reads() -> None:
    with pytest.raises(ValueError, match="200"):
        Beds(plan(hours=[199])).schedule()


def test_items_are_accepted_by_the_service() -> None:
    _, drafts = history(5, ADMITTED)
    assert len(drafts) == 1 + 5 * 15


@asynccontextmanager
async def stub(drop_after: int | None = None) -> AsyncIterator[int]:
    """Answers as the service does, risk with a tag; drops a connection instead of one answer."""
    seen = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        while head := await reader.readuntil(b"\r\n\r\n"):
            _, _, length = head.partition(b"Content-Length: ")
            if length:
                await reader.readexactly(int(length.partition(b"\r\n")[0]))
            seen += 1
            if seen == drop_after:
                break
            extra = b"server-timing: engine;dur=1.5\r\n"
            status, body = b"200 OK", b'{"seq": 3}'
            if head.startswith(b"GET"):
                extra += b'etag: "1"\r\n'
                if b'If-None-Match: "1"' in head:
                    status, body = b"304 Not Modified", b""
            size = b"" if status.startswith(b"304") else b"content-length: %d\r\n" % len(body)
            answer = b"HTTP/1.1 " + status + b"\r\n" + extra + size + b"\r\n" + body
            writer.write(answer[:20])  # in pieces, as a network may
            await writer.drain()
            writer.write(answer[20:])

    async def until_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await serve(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    serving: list[Any] = []
    server = await asyncio.start_server(until_closed, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.gather(*serving)


def run(drop_after: int | None = None, **changes: Any) -> Result:
    async def go() -> Result:
        async with stub(drop_after) as port:
            return await Load(plan(port=port, rate=400.0, seconds=0.5, **changes)).run()

    return asyncio.run(go())


def test_every_answer_is_counted_and_timed() -> None:
    result = run(reads=0.5, corrections=0.1, followed=1.0)
    posts = result.statuses["post 200"] + result.statuses["correction 200"]
    reads = result.statuses["get 200"] + result.statuses["get 304"]
    assert result.completed == result.requests == posts + reads
    assert result.statuses["readable 200"] == posts  # every post is followed
    assert result.statuses["get 304"] == len(result.latencies["not_modified"]) > 0
    assert all(s > 0 for latencies in result.latencies.values() for s in latencies)
    assert len(result.lags) == result.requests + posts
    assert result.timings["post"][0] == "engine;dur=1.5"
    assert result.cpu_share > 0


def test_a_lost_connection_is_an_error_and_is_opened_again() -> None:
    result = run(drop_after=5, reads=0.0, corrections=0.0, followed=0.0)
    assert result.statuses["post 0"] == 1
    assert result.completed == result.requests - 1


def test_a_row_says_whether_the_rate_was_sustained() -> None:
    result = {
        "requests": 100, "completed": 100, "span": 10.0, "cpu_share": 0.1, "lags": [0.001],
        "statuses": {"post 200": 90, "get 304": 8, "post 503": 1, "get 0": 1},
        "latencies": {"post": [0.01] * 99, "correction": [0.03], "readable": [0.02]},
    }  # fmt: skip
    row = row_of(10.0, 10.0, result, cpu=5.0)
    assert (row["offered_per_s"], row["achieved_per_s"], row["post_n"]) == (10.0, 10.0, 100)
    assert (row["refused"], row["errors"], row["service_cpu"]) == (1, 1, 0.5)
    assert {f"{k}_p99.9_ms" for k in ("post", "readable", "get", "not_modified")} <= set(row)
    assert row["get_p50_ms"] is None
    assert sustained(row)
    assert not sustained(row_of(10.0, 10.0, result | {"span": 11.0}, cpu=5.0))
    assert not sustained(row_of(10.0, 10.0, result | {"completed": 90}, cpu=5.0))
    slow = {"latencies": {"readable": [2.0]}}
    assert not sustained(row_of(10.0, 10.0, result | slow, cpu=5.0))


def test_overhead_from_metrics_headers_and_samples() -> None:
    before = {"x_seconds_sum": 1.0, "x_seconds_count": 2.0, "other": 5.0}
    after = {"x_seconds_sum": 1.5, "x_seconds_count": 7.0, "other": 9.0}
    after |= {'y_seconds_sum{a="b"}': 0.2, 'y_seconds_count{a="b"}': 1.0}
    assert [(i["what"], i["n"], i["mean_ms"]) for i in from_metrics(before, after)] == [
        ("x", 5, 100.0),
        ('y{a="b"}', 1, 200.0),
    ]
    (log, tick) = from_timings({"post": ["tick;dur=2, log;dur=1.0", "tick;dur=4"]})
    assert (tick["what"], tick["n"], tick["mean_ms"]) == ("post: tick", 2, 3.0)
    assert (log["what"], log["mean_ms"]) == ("post: log", 1.0)
    seen = [
        {"thread": "engine", "part": "tick", "place": "torch_cpu.tick", "seconds": 0.3},
        {"thread": "main", "part": "answers", "place": "risk.get_risk", "seconds": 0.1},
    ]
    lines = [{"at": float(at), "cpu": seen} for at in range(4)]
    items = from_samples(lines, since=1.0, until=2.0, requests=10)
    assert [item["what"] for item in items] == [
        "tick", "answers", "tick: torch_cpu.tick", "answers: risk.get_risk",
    ]  # fmt: skip
    assert (items[0]["thread"], items[0]["cpu_ms_a_request"]) == ("engine", 60.0)
    assert items[1]["share"] == 0.25


def test_cpu_time_is_charged_to_where_threads_run() -> None:
    assert part_of(None)[0] == "rest"
    profile, stop = Profile(), threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    threads = [
        threading.Thread(target=spin, name="spinning"),
        threading.Thread(target=stop.wait, name="waiting"),
    ]
    for thread in threads:
        thread.start()
    try:
        found: list[dict[str, Any]] = []
        while not any(line["thread"] == "spinning" and line["seconds"] > 0 for line in found):
            profile.look()
            found = profile.take()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {line["thread"] for line in found} == {"spinning"}
    assert {"rss", "in_use"} <= set(memory())
