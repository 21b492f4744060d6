"""How much one client may ask."""

from __future__ import annotations

from pathlib import Path

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
from tests.service.fakes import hr, running, stamp

pytestmark = pytest.mark.anyio

KEYS = {name: new_key(name) for name in ("a", "b")}
CLIENTS = Clients(
    parse(
        "clients:\n"
        + "".join(
            f"- {{id: {n}, scopes: [ingest, read, metrics], key_sha256: [{digest(k)}]}}\n"
            for n, k in KEYS.items()
        )
    )
)
AUTHENTICATOR = Configured(lambda: CLIENTS, None, Gateways((), ()))


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
    async with running(log_path, authenticator=AUTHENTICATOR) as client:
        client.app.state.context.limits.__init__(2, None, now)
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


async def test_the_body_is_not_read_of_who_is_refused(log_path: Path, anyio_backend: str) -> None:
    read: list[int] = []

    async def body() -> object:
        read.append(1)
        yield b"{}"

    async with running(log_path, authenticator=AUTHENTICATOR) as client:
        client.app.state.context.limits.__init__(0.1, None, Now())
        post = "/episodes/e/observations"
        assert (await client.http.post(post, content=body())).status_code == 401
        read.clear()
        await client.http.get("/episodes", headers=bearer("a"))
        refused = await client.http.post(post, content=body(), headers=bearer("a"))
        assert refused.status_code == 429
        assert (await client.http.get("/episodes/e")).status_code == 401


async def test_guessing_is_slow(log_path: Path, anyio_backend: str) -> None:
    now = Now()
    async with running(log_path, authenticator=AUTHENTICATOR) as client:
        client.app.state.context.limits.__init__(1000, None, now)
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
    async with running(log_path, authenticator=AUTHENTICATOR) as client:
        client.app.state.context.limits.__init__(1000, None, Now())
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
