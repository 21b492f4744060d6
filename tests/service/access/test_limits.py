"""How much one client may ask."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.access.clients import Clients, parse
from service.access.gateway import Gateways
from service.access.keys import digest, new_key
from service.access.opening import Configured
from service.access.principal import Principal, Scope
from service.api.limits import BURST_S, FAILURES_AT_ONCE, Buckets, Limits
from service.api.problems import Problem
from tests.service.access.issuer import Now
from tests.service.fakes import Client, hr, running, stamp

pytestmark = pytest.mark.anyio

KEYS = {name: new_key(name) for name in ("a", "b", "reader")}
SCOPES = {"reader": "[read]"}
CLIENTS = Clients(
    parse(
        "clients:\n"
        + "".join(
            f"- {{id: {n}, scopes: {SCOPES.get(n, '[ingest, read, metrics]')}, "
            f"key_sha256: [{digest(k)}]}}\n"
            for n, k in KEYS.items()
        )
    )
)
AUTHENTICATOR = Configured(lambda: CLIENTS, None, Gateways((), ()))


def limited(
    path: Path, per_second: float, clock: Callable[[], float]
) -> AbstractAsyncContextManager[Client]:
    """A service with a limit of requests of one client, counted by a clock of its own."""
    return running(
        path,
        authenticator=AUTHENTICATOR,
        monotonic=clock,
        requests_per_second_per_client=per_second,
    )


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


def principal(name: str, method: str = "api-key") -> Principal:
    return Principal(id=name, method=method, scopes=frozenset(Scope))


@given(
    per_s=st.floats(0.1, 100),
    size=st.floats(0.1, 50),
    steps=st.lists(st.floats(0, 5), min_size=1, max_size=60),
)
def test_never_more_than_the_rate_allows(per_s: float, size: float, steps: list[float]) -> None:
    now = Now()
    buckets = Buckets(per_s, size, now)
    taken = 0
    for step in steps:
        now.seconds += step
        if (wait := buckets.wait_s("x")) == 0:
            buckets.take("x")
            taken += 1
        else:
            assert 0 < wait <= 1 / per_s + 1e-9
    assert taken <= max(size, 1) + sum(steps[1:]) * per_s + 1e-6


def test_names_are_bounded_and_apart() -> None:
    now = Now()
    buckets = Buckets(1, 1, now, most=3)
    buckets.take("x")
    assert buckets.wait_s("x") == 1
    assert buckets.wait_s("y") == 0
    for i in range(100):
        buckets.take(str(i))
    assert len(buckets) == 3
    now.seconds += 1000
    assert buckets.wait_s("99") == 0


def test_an_ipv6_network_is_one_address() -> None:
    limits = Limits(10, None, Now())
    for i in range(int(FAILURES_AT_ONCE)):
        limits.may_try(f"2001:db8:0:1::{i:x}", b"guess")
        limits.failed(f"2001:db8:0:1::{i:x}", b"guess")
    with pytest.raises(Problem, match="too-many-requests"):
        limits.may_try("2001:db8:0:1:ffff::1", b"guess")
    limits.may_try("2001:db8:0:2::1", b"guess")
    limits.may_try("192.0.2.1", b"guess")


def test_clients_are_told_apart_by_name_and_open_ones_by_address() -> None:
    limits = Limits(None, 1, Now())
    with limits.holding(principal("a"), "1"):
        with pytest.raises(Problem), limits.holding(principal("a"), "2"):
            pass
        with limits.holding(principal("b"), "1"), limits.holding(principal("a", "bearer"), "1"):
            pass
    with limits.holding(principal("anyone", "open"), "1"):
        with pytest.raises(Problem), limits.holding(principal("anyone", "open"), "1"):
            pass
        with limits.holding(principal("anyone", "open"), "2"):
            pass
    with limits.holding(principal("a"), "1"):
        pass


async def test_one_client_does_not_use_up_what_another_has(
    log_path: Path, anyio_backend: str
) -> None:
    now = Now()
    async with limited(log_path, 2, now) as client:
        for _ in range(int(2 * BURST_S)):
            assert (await client.http.get("/episodes", headers=bearer("a"))).status_code == 200
        refused = await client.http.get("/episodes", headers=bearer("a"))
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["type"] == "/problems/too-many-requests"
        assert (await client.http.get("/episodes", headers=bearer("b"))).status_code == 200
        now.seconds += 0.5
        assert (await client.http.get("/episodes", headers=bearer("a"))).status_code == 200
        assert (await client.http.get("/v2/health/ready")).status_code == 200
        metrics = (await client.http.get("/metrics", headers=bearer("b"))).text
        assert 'llm4ehr_refusals_total{reason="too-many-requests"} 1.0' in metrics


@pytest.mark.parametrize("name", ["nobody", "a", "reader"])
async def test_the_body_is_not_read_of_who_is_refused(
    log_path: Path, anyio_backend: str, name: str
) -> None:
    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async with limited(log_path, 0.1, Now()) as client:
        await client.http.get("/episodes", headers=bearer("a"))  # its only one for a while
        key = KEYS.get(name, "wrong")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "client": ("192.0.2.1", 1),
            "path": "/episodes/e/observations",
            "raw_path": b"/episodes/e/observations",
            "root_path": "",
            "query_string": b"",
            "server": ("localhost", 80),
            "headers": [
                (b"authorization", f"Bearer {key}".encode()),
                (b"content-type", b"application/json"),
            ],
        }
        await client.app(scope, receive, send)
    assert sent[0]["status"] == {"nobody": 401, "a": 429, "reader": 403}[name]


async def test_who_asks_too_often_is_named_in_the_log_alone(
    log_path: Path, anyio_backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.requests")
    async with limited(log_path, 0.1, Now()) as client:
        for status in (404, 429, 429):
            answer = await client.http.get("/episodes/none", headers=bearer("a"))
            assert answer.status_code == status
        lines = [record.getMessage() for record in caplog.records if "429" in record.getMessage()]
        assert len(lines) == 2
        assert all(line.endswith(" ms a") for line in lines)
        with apsw.Connection(str(log_path), flags=apsw.SQLITE_OPEN_READONLY) as db:
            assert list(db.execute("SELECT count(*) FROM audit")) == [(1,)]


async def test_guessing_is_slow(log_path: Path, anyio_backend: str) -> None:
    now = Now()
    async with limited(log_path, 1000, now) as client:
        statuses = [
            (await client.http.get("/episodes", headers={"Authorization": f"Bearer {i}"}))
            .status_code
            for i in range(int(FAILURES_AT_ONCE) + 5)
        ]  # fmt: skip
        assert statuses == [401] * int(FAILURES_AT_ONCE) + [429] * 5
        # Also a right key that is new, or guesses would be told apart all the same.
        assert (await client.http.get("/episodes", headers=bearer("a"))).status_code == 429
        now.seconds += 1
        assert (await client.http.get("/episodes", headers=bearer("a"))).status_code == 200


async def test_a_neighbour_with_a_wrong_key_shuts_nobody_out(
    log_path: Path, anyio_backend: str
) -> None:
    async with limited(log_path, 1000, Now()) as client:
        assert (await client.http.get("/episodes", headers=bearer("a"))).status_code == 200
        for _ in range(int(FAILURES_AT_ONCE)):
            assert (await client.http.get("/episodes")).status_code == 401
        assert (await client.http.get("/episodes")).status_code == 429
        assert (await client.http.get("/episodes", headers=bearer("a"))).status_code == 200


def test_what_was_right_is_forgotten_once_it_is_wrong() -> None:
    limits = Limits(10, None, Now())
    limits.succeeded(b"key")
    for _ in range(int(FAILURES_AT_ONCE)):
        limits.failed("192.0.2.1", b"guess")
    limits.may_try("192.0.2.1", b"key")
    limits.failed("192.0.2.1", b"key")
    with pytest.raises(Problem, match="too-many-requests"):
        limits.may_try("192.0.2.1", b"key")


async def test_a_place_is_held_by_client_and_given_back(log_path: Path, anyio_backend: str) -> None:
    async with running(log_path, authenticator=AUTHENTICATOR, max_in_flight_per_client=1) as client:
        for wrong in ("/episodes/none", "/episodes?limit=x", "/episodes/!"):
            assert (await client.http.get(wrong, headers=bearer("a"))).status_code >= 400
        posted = await client.http.post(
            "/episodes/e/observations",
            json={"admitted_at": stamp(0), "observations": [hr(80)]},
            headers=bearer("a"),
        )
        assert posted.status_code == 200
        assert client.app.state.context.limits._in_flight == {}
