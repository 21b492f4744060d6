"""What every answer carries: the id of the request, headers for browsers, nothing for CORS."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import httpx
import pytest

from service.access.authenticator import Credentials, Unauthenticated
from service.access.principal import Principal
from tests.service.fakes import Client, hr, running, stamp

pytestmark = pytest.mark.anyio

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Nobody:
    """Recognises no client."""

    def address(self, credentials: Credentials) -> str:
        return "10.1.2.3"  # as a gateway tells it

    async def recognise(self, credentials: Credentials) -> Principal:
        raise Unauthenticated("nobody is known here")


async def answers(client: Client) -> list[httpx.Response]:
    """One of every kind: good, not modified, refused, without a route, too large, broken."""
    http = client.http
    posted = await client.post(admitted_at=stamp(0), observations=[hr(), hr(81)])
    risk = await client.risk()
    found = [
        posted,
        risk,
        await http.get("/episodes/e/risk", headers={"if-none-match": risk.headers["etag"]}),
        await http.get("/episodes"),
        await http.delete("/episodes/unknown"),
        await http.get("/nowhere"),
        await http.post("/episodes"),
        await http.post("/episodes/e/observations", content=b"{"),
        await http.post(
            "/episodes/e/observations",
            content=b" " * (1 << 21),
            headers={"content-type": "application/json"},
        ),
        await http.get("/v2/health/live"),
        await http.get("/metrics"),
        await http.get("/openapi.json"),
    ]
    client.engine.broken = True
    found.append(await client.risk(as_of=2))
    client.engine.dead = True
    found.append(await http.get("/episodes/e/embeddings", params={"as_of": 2}))
    return found


async def test_every_answer_has_an_id_and_the_headers(client: Client) -> None:
    found = await answers(client)
    assert {200, 304, 404, 405, 413, 415, 500} <= {a.status_code for a in found}
    for answer in found:
        assert HEADERS.items() <= dict(answer.headers).items(), answer.request.url
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
        assert "no-store" in answer.headers["cache-control"] or answer.status_code in (200, 304)
        assert "server" not in answer.headers
    assert len({a.headers["x-request-id"] for a in found}) == len(found)


async def test_a_route_that_says_how_it_may_be_kept_is_left_alone(client: Client) -> None:
    await client.admit()
    answer = await client.http.get("/episodes/e")
    assert answer.headers.get_list("cache-control") == ["private, no-store"]
    assert (await client.http.get("/v2")).headers["cache-control"] == "no-store"


@pytest.mark.parametrize("given", ["a", "A.b_c-9", "x" * 64])
async def test_a_usable_id_is_kept(client: Client, given: str) -> None:
    answer = await client.http.get("/nowhere", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", "ä", "a;b", "<script>"])
async def test_another_one_is_replaced(client: Client, given: str) -> None:
    answer = await client.http.get("/nowhere", headers={"x-request-id": given.encode("latin-1")})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


async def test_no_other_origin_may_read(client: Client) -> None:
    await client.admit()
    origin = {"origin": "https://elsewhere.example"}
    preflight = origin | {
        "access-control-request-method": "PUT",
        "access-control-request-headers": "authorization",
    }
    asked = [
        await client.http.get("/episodes/e", headers=origin),
        await client.http.options("/episodes/e", headers=preflight),
        await client.http.options("/episodes", headers=preflight),
    ]
    assert [a.status_code for a in asked] == [200, 405, 405]
    for answer in asked:
        assert not [name for name in answer.headers if name.startswith("access-control-")]


async def test_one_line_a_request_without_path_query_or_episode(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="service.requests")
    await client.post("CANARY-0815", admitted_at=stamp(0), observations=[hr()])
    await client.http.get("/episodes/CANARY-0815/risk?CANARY-0815=1")
    await client.http.get("/CANARY-0815")
    lines = [r.getMessage() for r in caplog.records if r.name == "service.requests"]
    assert [re.sub(r"[0-9.]+ ms", "? ms", line) for line in lines] == [
        "POST /episodes/{episode_id}/observations 200 ? ms anyone",
        "GET /episodes/{episode_id}/risk 422 ? ms anyone",
        "GET unmatched 404 ? ms -",
    ]


async def test_who_is_not_recognised_is_counted_and_named_by_address(
    log_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="service.requests")
    async with running(log_path, authenticator=Nobody()) as client:
        answer = await client.http.get("/episodes/e/risk")
        assert (answer.status_code, answer.headers["x-request-id"] != "") == (401, True)
        assert HEADERS.items() <= dict(answer.headers).items()
        registry = client.app.state.context.metrics.registry
        assert registry.get_sample_value("llm4ehr_unauthenticated_total") == 1
    [line] = [r.getMessage() for r in caplog.records if r.name == "service.requests"]
    assert re.fullmatch(r"GET /episodes/\{episode_id\}/risk 401 \S+ ms - from 10\.1\.2\.3", line)
