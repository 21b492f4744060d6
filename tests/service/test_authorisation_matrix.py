"""Every route of the service, asked by every kind of client."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.routing import APIRoute, iter_route_contexts

from service.access.clients import Client, Clients
from service.access.gateway import Gateways
from service.access.keys import digest, new_key
from service.access.opening import Configured
from service.access.principal import Scope, with_implied
from service.api.access import required_of
from tests.service.fakes import Client as Asking
from tests.service.fakes import hr, running, stamp

pytestmark = pytest.mark.anyio

INGEST, DELETE, READ, ADMIN, METRICS = (
    frozenset({Scope.INGEST}),
    frozenset({Scope.DELETE}),
    frozenset({Scope.READ}),
    frozenset({Scope.ADMIN}),
    frozenset({Scope.METRICS}),
)
ALL = frozenset(Scope)
NOTHING: frozenset[Scope] = frozenset()

_VERSION = "/models/{name}/versions/{version}"
_STAY = "/episodes/{episode_id}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one route requires, and how it answers a client that has it."""

    needs: frozenset[Scope]
    """Any of these; nothing: everybody is answered."""
    status: int = 200
    body: Any = None

    def is_for(self, scopes: frozenset[Scope]) -> bool:
        return not self.needs or bool(self.needs & with_implied(scopes))


ITEMS = {"admitted_at": stamp(0), "statics": {"unit_type": "medical"}, "observations": [hr(80)]}
ADMISSION = {"admitted_at": stamp(0), "statics": {"unit_type": "medical"}}

# Asked in this order: what deletes comes last.
TABLE: dict[tuple[str, str], Row] = {
    ("GET", "/openapi.json"): Row(needs=NOTHING),
    ("HEAD", "/openapi.json"): Row(needs=NOTHING),
    ("GET", "/v2/health/live"): Row(needs=NOTHING),
    ("GET", "/v2/health/ready"): Row(needs=NOTHING),
    ("GET", "/v2"): Row(needs=ALL),
    ("GET", "/v2/models/{model}"): Row(needs=ALL),
    ("GET", "/v2/models/{model}/ready"): Row(needs=ALL),
    ("GET", "/v2/models/{model}/versions/{version}"): Row(needs=ALL),
    ("GET", "/v2/models/{model}/versions/{version}/ready"): Row(needs=ALL),
    ("GET", "/metrics"): Row(needs=METRICS | ADMIN),
    ("GET", "/operator/summary"): Row(needs=METRICS | ADMIN),
    ("GET", "/models"): Row(needs=READ | ADMIN),
    ("GET", _VERSION): Row(needs=READ | ADMIN),
    ("POST", f"{_VERSION}/load"): Row(needs=ADMIN, status=202),
    ("POST", f"{_VERSION}/activate"): Row(needs=ADMIN),
    ("POST", f"{_VERSION}/unload"): Row(needs=ADMIN, status=409),
    ("PUT", "/models/shadow"): Row(needs=ADMIN, status=409, body={"model": "llm4ehr/1"}),
    ("DELETE", "/models/shadow"): Row(needs=ADMIN, status=204),
    ("GET", "/episodes"): Row(needs=READ),
    ("POST", f"{_STAY}/observations"): Row(needs=INGEST, body=ITEMS),
    ("PUT", _STAY): Row(needs=INGEST, body=ADMISSION),
    ("PATCH", _STAY): Row(needs=INGEST, body={"statics": {"height_cm": 170}}),
    ("GET", _STAY): Row(needs=READ),
    ("GET", f"{_STAY}/risk"): Row(needs=READ),
    ("GET", f"{_STAY}/embeddings"): Row(needs=READ),
    ("DELETE", _STAY): Row(needs=DELETE, status=204),
}

# Whom the stay "icu-1", which is in a medical unit, is closed to, and how they are answered.
RESTRICTED: dict[str, tuple[dict[str, Any], int | None]] = {
    "all": ({}, None),
    "its unit": ({"units": {"medical", "surgical"}}, None),
    "its id": ({"episodes": ("other", "icu-?")}, None),
    "its unit and id": ({"units": {"medical"}, "episodes": ("icu-1",)}, None),
    "another unit": ({"units": {"surgical"}}, 404),
    "another id": ({"episodes": ("icu-2", "ICU-*")}, 403),
    "another id in its unit": ({"units": {"medical"}, "episodes": ("icu-2*",)}, 403),
    "its id in another unit": ({"units": {"surgical"}, "episodes": ("icu-*",)}, 404),
}

KEYS = {
    name: new_key(f"c{i}")
    for i, name in enumerate([*(s.value for s in Scope), *RESTRICTED, "expired", "nothing of ours"])
}


def client_of(name: str, **more: Any) -> Client:
    scopes = frozenset({Scope(name)}) if name in set(Scope) else ALL
    key = KEYS[name]
    values = {"id": key.split("_")[1], "scopes": scopes, "key_sha256": (digest(key),)}
    return Client.model_validate(values | more, strict=False)


CLIENTS = Clients(
    [
        *(client_of(scope.value) for scope in Scope),
        *(client_of(name, **narrowed) for name, (narrowed, _) in RESTRICTED.items()),
        client_of("expired", expires="2020-01-01T00:00:00Z"),
    ]
)


@pytest.fixture
async def service(log_path: Path, anyio_backend: str) -> AsyncIterator[Asking]:
    """With a stay of a medical unit, asked by nobody so far."""
    authenticator = Configured(lambda: CLIENTS, None, Gateways((), ()))
    settings = {"model_control": True, "requests_per_second_per_client": None}
    async with running(log_path, authenticator=authenticator, **settings) as client:
        written = await client.http.post(
            "/episodes/icu-1/observations", json=ITEMS, headers=bearer("all")
        )
        assert written.status_code == 200
        yield client


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


async def ask(
    client: Asking, route: tuple[str, str], headers: dict[str, str]
) -> tuple[int, str | None]:
    """Status of the answer, and which problem it is."""
    method, path = route
    url = path.format(episode_id="icu-1", model="llm4ehr", name="llm4ehr", version="1")
    answer = await client.http.request(method, url, json=TABLE[route].body, headers=headers)
    is_problem = answer.headers.get("content-type") == "application/problem+json"
    return answer.status_code, answer.json()["type"].rpartition("/")[2] if is_problem else None


async def mismatches(
    client: Asking, headers: dict[str, str], expected: dict[tuple[str, str], int]
) -> dict[tuple[str, str], Any]:
    """Routes that answer otherwise than they should: what they should, and what they do."""
    found = {}
    for route, status in expected.items():
        got, problem = await ask(client, route, headers)
        names = {401: "unauthenticated", 403: "forbidden"}
        # Problems of /v2 have no type.
        if got != status or (problem is not None and problem != names.get(status, problem)):
            found[route] = (status, got, problem)
    return found


def test_the_table_has_every_route(service: Asking) -> None:
    routes = {
        (method, context.path)
        for context in iter_route_contexts(service.app.routes)
        for method in context.methods or {"any"}
    }
    assert routes == set(TABLE)


def test_every_route_declares_what_the_table_says(service: Asking) -> None:
    for context in iter_route_contexts(service.app.routes):
        route = context.original_route
        if isinstance(route, APIRoute):
            for method in context.methods or ():
                needs = TABLE[method, str(context.path)].needs
                assert frozenset(required_of(route)) == needs, context.path


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("nothing of ours"),
        bearer("expired"),
        {"Authorization": "Bearer a.b.c"},
        {"Authorization": f"Basic {KEYS['all']}"},
        {"X-Api-Key": KEYS["all"]},
        {"Cookie": f"key={KEYS['all']}"},
        bearer("all") | {"X-Client-Subject": "CN=feed"},
        bearer("all") | {"X-Gateway-Secret": "0123456789abcdef"},
    ],
    ids=[
        "none",
        "unknown key",
        "expired",
        "token",
        "basic",
        "header",
        "cookie",
        "subject",
        "secret",
    ],
)
async def test_who_is_not_recognised(service: Asking, headers: dict[str, str]) -> None:
    expected = {route: 401 if row.needs else row.status for route, row in TABLE.items()}
    assert await mismatches(service, headers, expected) == {}


@pytest.mark.parametrize("scope", [*Scope])
async def test_one_scope_alone(service: Asking, scope: Scope) -> None:
    expected = {
        route: row.status if row.is_for(frozenset({scope})) else 403 for route, row in TABLE.items()
    }
    assert await mismatches(service, bearer(scope.value), expected) == {}


@pytest.mark.parametrize("name", RESTRICTED)
async def test_all_scopes_within_a_restriction(service: Asking, name: str) -> None:
    _, closed = RESTRICTED[name]
    expected = {
        route: closed if closed is not None and _STAY in route[1] else row.status
        for route, row in TABLE.items()
    }
    if closed == 404:  # to admit a stay to that unit is refused, whether it is there or not
        expected |= {route: 403 for route, row in TABLE.items() if row.body in (ITEMS, ADMISSION)}
    assert await mismatches(service, bearer(name), expected) == {}


_ELSEWHERE = {"statics": {"unit_type": "medical"}}
_FUTURE = {"admitted_at": stamp(900)}

# How to ask for a stay that one must not know of: method, path below it, headers, body.
PROBES: list[tuple[str, str, dict[str, str], Any]] = [
    *(
        ("GET", f"{below}?{query}", headers, None)
        for below in ("", "/risk", "/embeddings")
        for headers in ({}, {"If-None-Match": "*"})
        for query in (
            *("", "min_seq=1", "min_seq=99", "as_of=1", "as_of=2", "as_of=99", "unknown=1"),
            *(f"as_of={quote(stamp(hours))}" for hours in (-1, 0.9, 1, 900)),
            *("model_version=1", "model_version=9", "hour=0", "hour=199", "hour=500"),
        )
    ),
    ("DELETE", "", {}, None),
    ("PATCH", "", {}, {}),
    ("PATCH", "", {}, _ELSEWHERE),
    ("PATCH", "", {}, {"statics": {"unit_type": "surgical"}}),
    ("PATCH", "", {}, {"statics": {"unit_type": None}}),
    ("PATCH", "", {}, {"discharged_at": stamp(900)}),
    ("PATCH", "", {}, _FUTURE | _ELSEWHERE),
    ("PUT", "", {}, ADMISSION),
    ("PUT", "", {}, _FUTURE | _ELSEWHERE),
    ("PUT", "", {}, {"admitted_at": stamp(0)}),
    ("PUT", "", {}, {}),
    ("PUT", "", {"If-Match": "*"}, ADMISSION),
    ("PUT", "", {"If-None-Match": "*"}, ADMISSION),
    *(
        ("POST", "/observations", {}, admission | {"observations": items})
        for admission in ({}, ADMISSION, _FUTURE | _ELSEWHERE, {"admitted_at": stamp(0)})
        for items in ([], [hr(80)], [hr(9999)], [hr(80, 900), hr(81, corrects="x")], [{}])
    ),
]


@pytest.mark.parametrize("name", ["another unit", "another id"])
@pytest.mark.parametrize("stay", ["icu-1", "icu-deleted"])
async def test_what_a_client_may_not_see_answers_as_what_is_not_there(
    service: Asking, name: str, stay: str
) -> None:
    deleted = "/episodes/icu-deleted"
    await service.http.put(deleted, json=ADMISSION, headers=bearer("all"))
    assert (await service.http.delete(deleted, headers=bearer("all"))).status_code == 204

    async def answer(probe: tuple[str, str, dict[str, str], Any], of: str) -> tuple[Any, ...]:
        method, below, headers, body = probe
        url = f"/episodes/{of}{below}"
        got = await service.http.request(method, url, json=body, headers=headers | bearer(name))
        told = {k: v for k, v in got.headers.items() if k != "x-request-id"}
        told["server-timing"] = re.sub(r"[\d.]+", "", told.get("server-timing", ""))
        assert got.status_code >= 400
        return got.status_code, got.json() | {"instance": ""}, told

    for probe in PROBES:
        assert await answer(probe, stay) == await answer(probe, "icu-none"), probe


async def test_nothing_is_judged_before_the_client_is(service: Asking) -> None:
    """Not even whether an id can be one, a parameter is known or a body is JSON."""
    for method, path in TABLE:
        if not TABLE[method, path].needs:
            continue
        bad = {"episode_id": "!", "model": "!", "name": "!", "version": "x"}
        url = path.format(**bad) + "?limit=x&hour=-1"
        answer = await service.http.request(method, url, content=b"{")
        assert answer.status_code == 401, (method, path)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert KEYS["all"] not in answer.text


async def test_a_client_cannot_write_itself_out_of_its_restriction(service: Asking) -> None:
    async def put(client: str, stay: str, unit: str | None) -> int:
        statics = {} if unit is None else {"unit_type": unit}
        body = {"admitted_at": stamp(0), "statics": statics}
        url = f"/episodes/{stay}"
        return (await service.http.put(url, json=body, headers=bearer(client))).status_code

    assert await put("another unit", "new", "surgical") == 201
    assert await put("another unit", "new", "medical") == 403
    assert await put("another unit", "new", None) == 403
    assert await put("another unit", "newer", "medical") == 403
    assert await put("another unit", "icu-1", "surgical") == 404
    assert await put("another id", "icu-3", "medical") == 403
    assert await put("another id", "icu-2", "medical") == 201
    moved = await service.http.patch(
        "/episodes/new", json={"statics": {"unit_type": "medical"}}, headers=bearer("another unit")
    )
    assert moved.status_code == 403


async def test_the_document_says_what_the_table_says(service: Asking) -> None:
    document = (await service.http.get("/openapi.json")).json()
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    told = {
        (method.upper(), path): operation
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    silent = {("GET", "/openapi.json"), ("HEAD", "/openapi.json"), ("GET", "/metrics")}
    assert set(told) == set(TABLE) - silent
    for route, operation in told.items():
        needs = TABLE[route].needs
        scopes = [need["bearer"] for need in operation.get("security", [])]
        assert sorted(scopes) == sorted([scope.value] for scope in needs), route
        refusals = {"401", "403", "429", "503"}
        if needs:
            assert refusals <= set(operation["responses"]), route
        else:
            assert not {"401", "403", "429"} & set(operation["responses"]), route
