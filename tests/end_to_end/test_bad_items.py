"""Every kind of bad item over real HTTP: its named error, and the good items beside it are kept."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.times import format_time
from tests.end_to_end.server import PATIENCE_S, Server

JSON = {"content-type": "application/json"}
ADMITTED = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=230)
_counter = itertools.count()


def stamp(hours: float) -> str:
    return format_time(ADMITTED + timedelta(hours=hours))


def observation(**changes: Any) -> dict[str, Any]:
    """A good one, new every time; a change to `...` leaves a field out."""
    item = {"variable": "hr", "value": 60 + next(_counter) / 1024, "time": stamp(1.5)} | changes
    return {key: value for key, value in item.items() if value is not ...}


def event(**changes: Any) -> dict[str, Any]:
    item = {"code": "2160-0", "system": "http://loinc.org", "unit": "mg/dL", "time": stamp(1.5)}
    item |= {"value": 1 + next(_counter) / 1024} | changes
    return {key: value for key, value in item.items() if value is not ...}


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(repository, tmp_path_factory.mktemp("bad-items")) as server:
        yield server


@pytest.fixture
def episode(server: Server) -> str:
    """A stay that was admitted 230 hours ago."""
    name = f"e{next(_counter)}"
    answer = server.http.put(f"/episodes/{name}", json={"admitted_at": stamp(0)})
    assert answer.status_code == 201
    return name


def post(server: Server, episode: str, **lists: list[Any]) -> httpx.Response:
    """As text, for NaN and Infinity are not JSON, though many clients write them."""
    url = f"/episodes/{episode}/observations"
    return server.http.post(url, content=json.dumps(lists), headers=JSON)


def seq_of(server: Server, episode: str) -> int:
    seq: int = server.http.get(f"/episodes/{episode}").json()["seq"]
    return seq


NAN, INFINITY = float("nan"), float("inf")

OBSERVATIONS: list[tuple[str, Any]] = [
    ("unknown-variable", observation(variable="heart_rate_of_the_moon")),
    ("unknown-variable", observation(variable=...)),
    ("unknown-variable", observation(variable=7)),
    ("unknown-variable", observation(code="8867-4")),  # both
    ("code-unknown", observation(variable=..., code="0000-0", system="http://loinc.org")),
    ("unit-unknown", observation(unit="furlongs")),
    ("unit-unknown", observation(unit=5)),
    ("unit-not-convertible", observation(unit="mm[Hg]")),
    ("unit-missing", observation(variable="glucose", value=100)),
    ("value-not-finite", observation(value=NAN)),
    ("value-not-finite", observation(value=INFINITY)),
    ("value-not-finite", observation(value=-INFINITY)),
    ("value-not-finite", observation(value=10**400)),
    ("value-not-a-number", observation(value="72")),
    ("value-not-a-number", observation(value="seventy-two")),
    ("value-not-a-number", observation(value=True)),
    ("value-not-a-number", observation(value=[72])),
    ("value-not-a-number", observation(value={"value": 72})),
    ("value-missing", observation(value=None)),
    ("value-missing", observation(value=...)),
    ("value-out-of-range", observation(value=-1)),
    ("value-out-of-range", observation(value=1e6)),
    ("before-admission", observation(time=stamp(-0.001))),
    ("before-admission", observation(time=stamp(-1), available_at=stamp(-0.5))),
    ("in-the-future", observation(time=stamp(231))),
    ("in-the-future", observation(available_at=stamp(1000))),
    ("beyond-horizon", observation(time=stamp(200))),
    ("beyond-horizon", observation(available_at=stamp(200.5))),
    ("time-missing", observation(time=...)),
    ("time-missing", observation(time=None)),
    ("time-invalid", observation(time="yesterday")),
    ("time-invalid", observation(time=1700000000)),
    ("time-invalid", observation(time="2026-02-30T08:00:00Z")),
    ("time-naive", observation(time="2026-03-01T08:00:00")),
    ("id-invalid", observation(id="")),
    ("id-invalid", observation(id=5)),
    ("id-invalid", observation(id="two words")),
    ("id-invalid", observation(id="sha256:" + "0" * 32)),
    ("id-invalid", observation(id="self", corrects="self")),
    ("unknown-field", observation(comment="well")),
    ("item-not-an-object", "hr 72"),
    ("item-not-an-object", 72),
    ("item-not-an-object", None),
    ("item-not-an-object", [observation()]),
]  # fmt: skip

EVENTS: list[tuple[str, Any]] = [
    ("code-unknown", event(code=...)),
    ("code-unknown", event(code=2160)),
    ("code-unknown", event(code="21 60")),
    ("unit-missing", event(unit=...)),
    ("unit-unknown", event(unit="furlongs")),
    ("unit-not-convertible", event(unit="mm[Hg]")),
    ("value-not-finite", event(value=NAN)),
    ("value-not-finite", event(value=-INFINITY)),
    ("value-not-a-number", event(value="1.0")),
    ("value-not-a-number", event(value=False)),
    ("display-invalid", event(display=7)),
    ("before-admission", event(time=stamp(-1))),
    ("in-the-future", event(time=stamp(231))),
    ("beyond-horizon", event(time=stamp(200))),
    ("time-missing", event(time=...)),
    ("time-naive", event(time="2026-03-01T08:00:00")),
    ("id-invalid", event(id=["x"])),
    ("unknown-field", event(variable="hr")),
    ("item-not-an-object", "creatinine"),
]

WITHDRAWALS: list[tuple[str, Any]] = [
    ("id-invalid", {}),
    ("id-invalid", {"withdraws": 7}),
    ("id-invalid", {"withdraws": "x", "id": "x"}),
    ("unknown-field", {"withdraws": "x", "reason": "typo"}),
    ("item-not-an-object", "x"),
]


def cases() -> Iterator[Any]:
    for list_, bad in (
        ("observations", OBSERVATIONS), ("events", EVENTS), ("withdrawals", WITHDRAWALS),
    ):  # fmt: skip
        for i, (kind, item) in enumerate(bad):
            yield pytest.param(list_, kind, item, id=f"{list_}-{i}-{kind}")


@pytest.mark.parametrize(("list_", "kind", "bad"), list(cases()))
def test_a_bad_item_is_named_and_good_ones_are_kept(
    server: Server, episode: str, list_: str, kind: str, bad: Any
) -> None:
    good = {
        "observations": [observation(), observation()],
        "events": [event(), event()],
        "withdrawals": [{"withdraws": "a"}, {"withdraws": "b"}],
    }
    lists = {name: list(items) for name, items in good.items()}
    lists[list_].insert(1, bad)
    response = post(server, episode, **lists)
    body = response.json()
    assert response.status_code == 200
    assert (body["accepted"], body["rejected"], body["duplicates"]) == (6, 1, 0)
    [refused] = [item for item in body["items"] if item["status"] == "rejected"]
    assert (refused["list"], refused["index"], refused["seq"]) == (list_, 1, None)
    assert refused["error"]["type"] == kind
    assert refused["error"]["detail"]
    assert body["seq"] == 7 == seq_of(server, episode)
    # Nothing of the bad item stayed: without it the same stay says the same.
    again = post(server, episode, **good).json()
    assert (again["duplicates"], again["seq"]) == (6, 7)

    alone = post(server, episode, **{list_: [bad]})
    assert alone.status_code == 422
    assert alone.headers["content-type"] == "application/problem+json"
    assert alone.json()["type"] == "/problems/all-items-rejected"
    assert alone.json()["items"][0]["error"]["type"] == kind
    assert seq_of(server, episode) == 7


def test_items_after_the_discharge_are_refused(server: Server, episode: str) -> None:
    url = f"/episodes/{episode}"
    discharge = {"discharged_at": stamp(20)}
    assert server.http.patch(url, json=discharge).status_code == 200
    late = {"time": stamp(20.01)}
    body = post(
        server, episode, observations=[observation(**late), observation()], events=[event(**late)]
    ).json()
    kinds = [item.get("error", {}).get("type") for item in body["items"]]
    assert kinds == ["after-discharge", None, "after-discharge"]


def test_an_id_says_one_thing(server: Server, episode: str) -> None:
    first = observation(id="one")
    assert post(server, episode, observations=[first]).json()["accepted"] == 1
    body = post(server, episode, observations=[first, observation(id="one"), observation()]).json()
    assert [item["status"] for item in body["items"]] == ["duplicate", "rejected", "accepted"]
    assert body["items"][1]["error"]["type"] == "id-conflict"


def test_the_edges_of_what_is_possible_are_kept(server: Server, episode: str) -> None:
    items = [
        observation(time=stamp(0)),
        observation(time=stamp(199.999)),
        observation(time=stamp(1), available_at=stamp(0.5)),
        observation(value=330),
        observation(variable="temp", value=37.0),
    ]
    body = post(server, episode, observations=items).json()
    assert body["accepted"] == len(items)
    assert [item["flags"] for item in body["items"]] == [
        [],
        [],
        ["available-before-effective"],
        ["implausible-high"],
        ["unit-inferred"],
    ]


# Bodies of which nothing can be read.

MALFORMED = [
    b"", b"{", b"{'observations': []}", b'{"observations": [}', b'{"a": 1} x', b"\xff\xfe",
    b'{"observations": [{"variable": "hr", "value": 07}]}', b"[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("content", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_json(server: Server, episode: str, content: bytes) -> None:
    url = f"/episodes/{episode}/observations"
    response = server.http.post(url, content=content, headers=JSON)
    assert (response.status_code, response.json()["type"]) == (400, "/problems/malformed-json")
    assert seq_of(server, episode) == 1


def test_a_body_of_ten_megabytes(server: Server, episode: str) -> None:
    """Refused by its declared length, before any of it is sent, and by what came of it."""
    url = f"/episodes/{episode}/observations"
    body = json.dumps({"observations": [observation(id="x" * 100)] * 60_000}).encode()
    assert len(body) > 10 << 20
    limit = 1 << 20
    for length, sent in (
        ({"content-length": str(len(body))}, b""),
        ({"transfer-encoding": "chunked"}, b"%x\r\n%s\r\n" % (limit + 1, body[: limit + 1])),
    ):
        connection = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
        connection.putrequest("POST", url)
        for name, value in (JSON | length).items():
            connection.putheader(name, value)
        connection.endheaders(sent)
        response = connection.getresponse()
        assert response.status == 413
        assert json.load(response)["type"] == "/problems/body-too-large"
        connection.close()
    # Sent as a whole: the service may hang up before it has taken in what it will not read.
    with contextlib.suppress(httpx.TransportError):
        assert server.http.post(url, content=body, headers=JSON).status_code == 413
    assert seq_of(server, episode) == 1
    assert post(server, episode, observations=[observation()]).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        [], 7, "text", None,
        {"observations": {}}, {"observations": "hr"}, {"events": 3}, {"surprise": []},
        {"admitted_at": "soon", "observations": []}, {"admitted_at": 3, "observations": []},
        {"statics": {"age_years": "old"}, "admitted_at": "2026-03-01T08:00:00Z"},
        {"statics": {"age_years": NAN}, "admitted_at": "2026-03-01T08:00:00Z"},
        {"statics": {"star_sign": "lion"}, "admitted_at": "2026-03-01T08:00:00Z"},
    ],
    ids=str,
)  # fmt: skip
def test_a_body_of_the_wrong_shape(server: Server, episode: str, body: Any) -> None:
    url = f"/episodes/{episode}/observations"
    response = server.http.post(url, content=json.dumps(body), headers=JSON)
    assert (response.status_code, response.json()["type"]) == (422, "/problems/invalid-request")
    assert response.json()["errors"]
    assert seq_of(server, episode) == 1


def test_other_requests_that_are_refused(server: Server, episode: str) -> None:
    url, good = f"/episodes/{episode}/observations", json.dumps({"observations": [observation()]})
    many = json.dumps({"withdrawals": [{"withdraws": f"i{i}"} for i in range(5001)]})
    for status, kind, method, path, content, headers in (
        (413, "too-many-items", "POST", url, many, JSON),
        (415, "unsupported-media-type", "POST", url, good, {"content-type": "text/plain"}),
        (415, "unsupported-media-type", "POST", url, good, JSON | {"content-encoding": "gzip"}),
        (404, "episode-unknown", "POST", "/episodes/nobody/observations", good, JSON),
        (422, "episode-id-invalid", "POST", "/episodes/a%20b/observations", good, JSON),
        (422, "admission-missing", "PUT", f"/episodes/{episode}", "{}", JSON),
        (405, "method-not-allowed", "PUT", url, good, JSON),
        (404, "not-found", "POST", f"{url}/more", good, JSON),
    ):
        response = server.http.request(method, path, content=content, headers=headers)
        assert (response.status_code, response.json()["type"]) == (status, f"/problems/{kind}")
    assert seq_of(server, episode) == 1


def test_what_is_refused_is_not_printed(server: Server, episode: str) -> None:
    told = ("furlongs-4711", "unheard-of", "two words", "2026-02-31")
    bad = [
        observation(unit=told[0]),
        observation(variable=told[1]),
        observation(id=told[2]),
        observation(time=told[3]),
    ]
    response = post(server, episode, observations=bad)
    assert response.status_code == 422
    assert server.output
    for text in told:
        assert text not in response.text
        assert text not in server.output
