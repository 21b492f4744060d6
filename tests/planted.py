"""Requests full of marks, and where no mark may be found again.

Every route is asked in good and bad ways with everything that is a patient's or a secret marked:
ids, values, codes, units, static facts, times, queries, headers, keys, bodies that are none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

TEXT = "QZMARKQZ"
NUMBER = "47114711"
"""Digits after the point of every value."""
FRACTION = ".471147"
"""Of the seconds of every time."""

_MARKS = re.compile(rf"{TEXT}|{NUMBER}|:\d\d\{FRACTION}|\d{{10}}{FRACTION[1:]}", re.IGNORECASE)

EPISODE = f"{TEXT}-episode"
KEY = f"llm4ehr_{TEXT}_{TEXT}"

_GATEWAY = {
    "X-Client-Subject": f"CN={TEXT}",
    "X-Gateway-Secret": TEXT,
    "X-Forwarded-For": TEXT,
}
"""Said by who is no gateway."""

_HEADERS = {
    "X-Request-ID": f"{TEXT} is none",
    "User-Agent": TEXT,
    "Cookie": f"{TEXT}={TEXT}",
    "Origin": f"https://{TEXT}.example",
    "Referer": f"https://{TEXT}.example/{TEXT}",
    "traceparent": f"00-{'a' * 32}-{'b' * 16}-01",
    "tracestate": f"{TEXT.lower()}={TEXT}",
    "baggage": f"{TEXT}={TEXT}",
    "If-None-Match": f'"{TEXT}"',
    "Prefer": f"wait={TEXT}",
    TEXT: TEXT,
}

_JSON = {"Content-Type": "application/json"}


def found_in(text: str) -> list[str]:
    """The marks in a text."""
    return _MARKS.findall(text)


def error_text(text: str) -> str:
    """The body of an error without the ids of refused items, by which a client finds its own."""
    try:
        body = json.loads(text)
    except ValueError:
        return text
    if isinstance(body, dict):
        for item in body.get("items", ()):
            item["item_id"] = None
    return json.dumps(body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request."""

    method: str
    path: str
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None

    @property
    def url(self) -> str:
        return self.path + (f"?{self.query}" if self.query else "")


def _stamp(admitted: datetime, hours: float) -> str:
    return (admitted + timedelta(hours=hours)).strftime(f"%Y-%m-%dT%H:%M:%S{FRACTION}Z")


def _json(method: str, path: str, body: Any, headers: Mapping[str, str] = _JSON) -> Ask:
    return Ask(method=method, path=path, headers=headers, body=json.dumps(body).encode())


def admission(admitted: datetime, **more: Any) -> dict[str, Any]:
    return {
        "admitted_at": _stamp(admitted, 0),
        "statics": {"age_years": float(f"61.{NUMBER}"), "sex": "female"},
    } | more


def _items(admitted: datetime, tag: str) -> dict[str, Any]:
    """Good and bad ones."""
    time, other = _stamp(admitted, 0.2), _stamp(admitted, 0.4)
    hr = {"variable": "hr", "value": float(f"61.{NUMBER}"), "time": time}
    lab = {"system": "http://loinc.org", "value": float(f"1.{NUMBER}"), "unit": "mg/dL"}
    good = [
        hr | {"id": f"{TEXT}-1{tag}"},
        hr | {"id": f"{TEXT}-2{tag}", "value": float(f"62.{NUMBER}"), "time": other},
        hr | {"id": f"{TEXT}-3{tag}", "corrects": f"{TEXT}-1{tag}", "value": float(f"63.{NUMBER}")},
    ]
    bad = [
        hr | {"variable": TEXT},
        hr | {"unit": TEXT},
        hr | {"value": TEXT},
        hr | {"value": float(f"99999.{NUMBER}")},
        hr | {"time": TEXT},
        hr | {"time": _stamp(admitted, 10_000)},
        hr | {TEXT: TEXT},
        hr | {"id": f"{TEXT} {TEXT}"},
        {"code": TEXT, "system": f"http://{TEXT}.example", "value": 1, "time": time},
        TEXT,
        [TEXT],
    ]
    event = lab | {"id": f"{TEXT}-e{tag}", "code": "2160-0", "display": TEXT, "time": time}
    events = [event, event | {"id": None, "code": TEXT, "unit": TEXT}, event | {"unit": TEXT}]
    return {
        "observations": good + bad,
        "events": events,
        "withdrawals": [{"target": f"{TEXT}-2{tag}"}, {"target": TEXT}, {TEXT: TEXT}],
    }


def good(admitted: datetime, episode: str = EPISODE, tag: str = "") -> Iterator[Ask]:
    """What a client that knows the interface sends; a stay of scores comes of it."""
    path = f"/episodes/{episode}"
    body = admission(admitted) | _items(admitted, tag)
    yield _json("PUT", path, admission(admitted), _JSON | _HEADERS)
    yield _json("POST", f"{path}/observations", body)
    yield _json("POST", f"{path}/observations", body)
    yield _json("PATCH", path, {"statics": {"age_years": float(f"62.{NUMBER}")}})
    for what in ("", "/risk", "/embeddings"):
        for query in ("", f"as_of={_stamp(admitted, 0.9)}", "min_seq=1", "as_of=3"):
            yield Ask(method="GET", path=path + what, query=query, headers=_HEADERS)
    yield Ask(method="GET", path="/episodes", query="sort=episode_id&limit=1", headers=_HEADERS)


def bad(admitted: datetime, episode: str = EPISODE) -> Iterator[Ask]:
    """Every route, in ways that it refuses."""
    path = f"/episodes/{episode}"
    for name in ("as_of", "min_seq", "hour", "from", "to", "model_version", "limit", "cursor",
                 "sort", "status", "min_risk", TEXT):  # fmt: skip
        for route in (path, f"{path}/risk", f"{path}/embeddings", "/episodes"):
            yield Ask(method="GET", path=route, query=f"{name}={TEXT}", headers=_HEADERS)
    for route in ("", "/risk", "/embeddings"):
        yield Ask(method="GET", path=f"/episodes/{TEXT}-unknown{route}")
        yield Ask(method="GET", path=f"/episodes/{TEXT}%00{route}")
        yield Ask(method="GET", path=path + route, query="min_seq=4711471147114711")
    for method, route in (
        ("PUT", path), ("PATCH", path), ("POST", f"{path}/observations"), ("PUT", "/models/shadow"),
    ):  # fmt: skip
        yield from _bad_bodies(method, route)
    body = {"observations": [{"id": TEXT, "variable": TEXT, "value": TEXT, "time": TEXT}]}
    yield _json("POST", f"{path}/observations", body)
    yield _json("POST", f"/episodes/{TEXT}-unknown/observations", body)
    yield _json("PATCH", path, {"admitted_at": TEXT, "discharged_at": TEXT})
    yield _json("PATCH", path, {"statics": {"age_years": TEXT, "sex": TEXT, "unit_type": TEXT}})
    yield Ask(method="DELETE", path=f"/episodes/{TEXT}-unknown")
    yield Ask(method=TEXT, path=path)
    yield Ask(method="POST", path="/episodes", query=f"{TEXT}={TEXT}")
    for name, value in _GATEWAY.items():
        yield Ask(method="GET", path=path, headers=_HEADERS | {name: value})
    yield Ask(method="GET", path=path, headers=_GATEWAY | {"Authorization": ""})
    yield Ask(method="GET", path=f"/{TEXT}/{TEXT}", query=f"{TEXT}={TEXT}")
    yield from _others()


def _bad_bodies(method: str, path: str) -> Iterator[Ask]:
    for body in (
        TEXT, f'{{"{TEXT}": ', f'{{"{TEXT}": "{TEXT}"}}', f'["{TEXT}"]', f'"{TEXT}"',
        f'{{"statics": {{"{TEXT}": {{"{TEXT}": 1}}}}}}', f'{{"admitted_at": "{TEXT}"}}',
        f'{{"observations": "{TEXT}", "events": {"[" * 200}"{TEXT}"{"]" * 200}}}',
        "[" * 100_000 + TEXT, f'{{"a": 1.{NUMBER}, "b": "\\ud800{TEXT}"}}',
    ):  # fmt: skip
        yield Ask(method=method, path=path, headers=_JSON, body=body.encode())
    yield Ask(method=method, path=path, headers=_JSON, body=TEXT.encode() * 200_000)
    for headers in (
        {"Content-Type": f"application/{TEXT}"},
        _JSON | {"Content-Encoding": TEXT},
        _JSON | {"Authorization": f"Bearer {TEXT}"},
        _JSON | {"Authorization": f"Bearer {KEY}"},
        _JSON | {"Authorization": TEXT},
    ):
        yield Ask(method=method, path=path, headers=headers, body=f'{{"{TEXT}": 1}}'.encode())


def _others() -> Iterator[Ask]:
    """Models, platform, operators."""
    for name in (TEXT, f"{TEXT}%00"):
        for version in ("1", TEXT):
            path = f"/models/{name}/versions/{version}"
            yield Ask(method="GET", path=path, headers=_HEADERS)
            for verb in ("load", "activate", "unload", TEXT):
                yield Ask(method="POST", path=f"{path}/{verb}", headers=_HEADERS)
            yield Ask(method="GET", path=f"/v2/models/{name}/versions/{version}")
            yield Ask(method="GET", path=f"/v2/models/{name}/versions/{version}/ready")
        yield Ask(method="GET", path=f"/v2/models/{name}", query=f"{TEXT}={TEXT}")
        yield Ask(method="GET", path=f"/v2/models/{name}/ready")
    yield _json("PUT", "/models/shadow", {"model": f"{TEXT}/1"})
    yield Ask(method="DELETE", path="/models/shadow", query=TEXT)
    for path in ("/models", "/v2", "/v2/health/live", "/v2/health/ready", "/metrics",
                 "/operator/summary", "/openapi.json"):  # fmt: skip
        yield Ask(method="GET", path=path, query=f"{TEXT}={TEXT}", headers=_HEADERS)
