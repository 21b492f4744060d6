"""Requests that are wrong as a whole: each gets its named problem, none repeats what was sent."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.api.problems import MEDIA_TYPE, PROBLEMS
from service.api.schemas import ProblemOut
from tests.service.fakes import Client, hr, running, stamp

pytestmark = pytest.mark.anyio

CANARY = "CANARY-0815"
POST = "/episodes/e/observations"
JSON = {"content-type": "application/json"}


def assert_problem(response: Any, name: str) -> dict[str, Any]:
    body: dict[str, Any] = response.json()
    ProblemOut.model_validate(body)
    assert response.headers["content-type"] == MEDIA_TYPE
    assert body["type"] == f"/problems/{name}"
    assert (response.status_code, body["title"]) == PROBLEMS[name]
    assert body["status"] == response.status_code
    assert body["instance"].startswith("urn:uuid:")
    assert CANARY not in response.text
    return body


BODIES: list[tuple[str, Any]] = [
    ("malformed-json", b""),
    ("malformed-json", b"{"),
    ("malformed-json", b'{"observations": [}'),
    ("malformed-json", b'{"observations": []} trailing'),
    ("malformed-json", b"\xff\xfe"),
    ("malformed-json", b'{"a": "\xff"}'),
    ("malformed-json", b'{"a": "\\ud800"}'),
    ("malformed-json", b"[" * 100_000),
    ("malformed-json", b'{"observations": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    ("malformed-json", CANARY.encode()),
    ("invalid-request", b"null"),
    ("invalid-request", b"[]"),
    ("invalid-request", b'"text"'),
    ("invalid-request", b'{"observations": {}}'),
    ("invalid-request", b'{"observations": null}'),
    ("invalid-request", b'{"events": "none"}'),
    ("invalid-request", b'{"withdrawals": 3}'),
    ("invalid-request", json.dumps({CANARY: 1}).encode()),
    ("invalid-request", json.dumps({"admitted_at": CANARY}).encode()),
    ("invalid-request", b'{"admitted_at": "2026-03-01T08:00:00"}'),
    ("invalid-request", b'{"admitted_at": "2026-03-01T08:00:00Z", "statics": {"age_years": NaN}}'),
    (
        "invalid-request",
        json.dumps({"admitted_at": stamp(0), "statics": {CANARY: CANARY}}).encode(),
    ),
    (
        "invalid-request",
        json.dumps({"admitted_at": stamp(0), "statics": {"sex": CANARY}}).encode(),
    ),
    ("invalid-request", json.dumps({"admitted_at": stamp(2)}).encode()),
]


@pytest.mark.parametrize(("name", "body"), BODIES)
async def test_bodies(client: Client, name: str, body: bytes) -> None:
    problem = assert_problem(await client.http.post(POST, content=body, headers=JSON), name)
    if name == "invalid-request":
        assert all(set(error) == {"path", "type", "detail"} for error in problem["errors"])
    assert await client.log.heads() == {}


@pytest.mark.parametrize("n", [99, 100, 101, 50_000])
async def test_not_all_of_many_errors_are_listed(client: Client, n: int) -> None:
    await client.admit()
    many = {f"k{i}": 0 for i in range(n)}
    admission = {"admitted_at": stamp(0)}
    for method, path, body in (
        ("PUT", "/episodes/e", admission | many),
        ("PATCH", "/episodes/e", {"statics": many}),
        ("POST", POST, {"observations": [hr()], "statics": many} | admission),
        ("POST", POST, many),
    ):
        answer = await client.http.request(method, path, json=body)
        problem = assert_problem(answer, "invalid-request")
        assert problem.get("more", False) == (n > 100 or len(body) > 100)
        assert 1 <= len(problem["errors"]) <= 100
        assert len(answer.content) < 20_000


async def test_both_levels_together_are_cut(client: Client) -> None:
    many = {f"k{i}": 0 for i in range(90)}
    body = {"admitted_at": stamp(0), "statics": many} | many
    problem = assert_problem(await client.http.put("/episodes/e", json=body), "invalid-request")
    assert (len(problem["errors"]), problem["more"]) == (100, True)


@pytest.mark.parametrize("path", ["/episodes", "/episodes/e/risk"])
async def test_many_parameters_are_not_looked_at(client: Client, path: str) -> None:
    query = "&".join(f"a{i}=1" for i in range(5_000))
    problem = assert_problem(await client.http.get(f"{path}?{query}"), "invalid-request")
    assert (len(problem["errors"]), problem["more"]) == (1, True)
    query = "&".join(f"a{i}=1" for i in range(100))
    problem = assert_problem(await client.http.get(f"{path}?{query}"), "invalid-request")
    assert (len(problem["errors"]), "more" in problem) == (100, False)


async def test_deep_nesting_within_an_item_is_malformed_not_a_crash(client: Client) -> None:
    value = b"[" * 400 + b"]" * 400
    body = b'{"observations": [{"variable": "hr", "value": ' + value + b"}]}"
    assert_problem(await client.http.post(POST, content=body, headers=JSON), "malformed-json")


async def test_a_body_of_ten_megabytes_is_not_read(client: Client) -> None:
    await client.admit()
    taken = 0

    def stream() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(160):
            taken += 1
            yield b" " * 65536

    async def chunks() -> AsyncIterator[bytes]:
        for chunk in stream():
            yield chunk

    response = await client.http.post(POST, content=chunks(), headers=JSON)
    assert_problem(response, "body-too-large")
    assert taken <= 17 + 1
    declared = await client.http.post(POST, content=b" " * (10 << 20), headers=JSON)
    assert_problem(declared, "body-too-large")
    for method in ("PUT", "PATCH"):
        response = await client.http.request(
            method, "/episodes/e", content=b" " * (2 << 20), headers=JSON
        )
        assert_problem(response, "body-too-large")


async def test_a_lying_content_length_does_not_help(log_path: Path) -> None:
    """The stream is counted, whatever was declared."""
    async with running(log_path, max_body_bytes=1024) as client:
        sent: list[dict[str, Any]] = []
        parts = [{"type": "http.request", "body": b" " * 600, "more_body": True}] * 3

        async def receive() -> dict[str, Any]:
            return parts.pop()

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-length", b"10")]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": POST,
            "raw_path": POST.encode(),
            "query_string": b"",
            "headers": headers,
            "client": None,
            "server": None,
        }
        await client.app(scope, receive, send)
        assert sent[0]["status"] == 413
        assert len(parts) == 1


async def test_a_body_at_the_limit_is_read(log_path: Path) -> None:
    async with running(log_path, max_body_bytes=1024) as client:
        body = json.dumps({"admitted_at": stamp(0)}).encode()
        for size, status in ((1024, 200), (1025, 413)):
            response = await client.http.post(POST, content=body.ljust(size), headers=JSON)
            assert response.status_code == status


async def test_too_many_items(log_path: Path) -> None:
    async with running(log_path, max_items=3) as client:
        await client.admit()
        items: dict[str, Any] = {"observations": [hr(), hr(81)], "withdrawals": [{}, {}]}
        assert_problem(await client.post(**items), "too-many-items")
        items["withdrawals"].pop()
        assert (await client.post(**items)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
async def test_other_media_types(client: Client, headers: dict[str, str]) -> None:
    for method, path in (("POST", POST), ("PUT", "/episodes/e"), ("PATCH", "/episodes/e")):
        response = await client.http.request(method, path, content=b"{}", headers=headers)
        assert_problem(response, "unsupported-media-type")


@pytest.mark.parametrize(
    "media_type", ["application/json; charset=utf-8", "Application/JSON", "application/fhir+json"]
)
async def test_spellings_of_json(client: Client, media_type: str) -> None:
    body = json.dumps({"admitted_at": stamp(0)}).encode()
    response = await client.http.post(POST, content=body, headers={"content-type": media_type})
    assert response.status_code == 200


@pytest.mark.parametrize("episode_id", ["a b", "ü", "x" * 129, "a*b", "a%0Ab", "a%00", "a@b"])
async def test_episode_ids(client: Client, episode_id: str) -> None:
    for method, suffix in (
        ("GET", ""),
        ("PUT", ""),
        ("DELETE", ""),
        ("GET", "/risk"),
        ("POST", "/observations"),
    ):
        response = await client.http.request(
            method, f"/episodes/{episode_id}{suffix}", json={"admitted_at": stamp(0)}
        )
        assert_problem(response, "episode-id-invalid")


async def test_an_id_may_be_an_oid_or_a_urn_like_name(client: Client) -> None:
    for episode_id in ("1.2.840.10008", "icu:7_A-3", "x" * 128):
        assert (await client.admit(episode_id)).status_code == 201


@pytest.mark.parametrize("body", [{}, {"admitted_at": None}, {"statics": {}}])
async def test_an_admission_needs_its_time(client: Client, body: dict[str, Any]) -> None:
    assert_problem(await client.http.put("/episodes/e", json=body), "admission-missing")


@pytest.mark.parametrize(
    "path", ["/", "/episode", "/episodes/e/risks", "/v1/episodes", "/episodes/"]
)
async def test_other_paths(client: Client, path: str) -> None:
    assert_problem(await client.http.get(path), "not-found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", POST, "POST"),
        ("POST", "/episodes", "GET"),
        ("DELETE", "/episodes/e/risk", "GET"),
        ("POST", "/episodes/e", "DELETE, GET, PATCH, PUT"),
        ("GET", "/models/shadow", "DELETE, PUT"),
    ],
)
async def test_other_methods(client: Client, method: str, path: str, allowed: str) -> None:
    response = await client.http.request(method, path)
    assert_problem(response, "method-not-allowed")
    assert allowed in response.headers["allow"]


async def test_no_problem_or_log_line_carries_an_id_or_a_value(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="service")
    await client.admit(CANARY)
    requests = [
        ("GET", f"/episodes/{CANARY}x", None),
        ("GET", f"/episodes/{CANARY}/risk?hour=5", None),
        ("GET", f"/episodes/{CANARY}/risk?as_of={CANARY}", None),
        ("GET", f"/episodes?cursor={CANARY}", None),
        ("PATCH", f"/episodes/{CANARY}", {"discharged_at": CANARY}),
        ("POST", f"/episodes/{CANARY}/observations", {"observations": [hr(CANARY)]}),
        ("GET", f"/{CANARY}", None),
    ]
    for method, path, body in requests:
        response = await client.http.request(method, path, json=body)
        assert response.status_code >= 400
        assert CANARY not in response.text
    assert CANARY not in caplog.text
    assert CANARY not in (await client.http.get("/metrics")).text
