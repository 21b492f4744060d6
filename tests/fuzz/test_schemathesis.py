"""The OpenAPI document against the service, over HTTP, asked by every kind of client.

Every check of schemathesis is on: no status, content type, header or body that is not documented;
nothing accepted that the document forbids, nothing refused that it allows.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from schemathesis import openapi
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, events, from_schema
from schemathesis.engine.recorder import CheckFailureInfo, ScenarioRecorder

from service.access.authenticator import Authenticator
from service.access.clients import Client, Clients
from service.access.gateway import Gateways
from service.access.keys import digest, new_key
from service.access.opening import Configured
from service.access.principal import Scope
from service.api import limits
from tests.fuzz.house import FACTOR, TRIED
from tests.service.fakes import running
from tests.service.shelf import Shelf
from tests.service.test_deadlines import listening

ROLES: dict[str, Mapping[str, Any]] = {
    "nobody": {},
    **{scope.value: {"scopes": (scope,)} for scope in Scope},
    "all": {"scopes": tuple(Scope)},
    "restricted": {"scopes": tuple(Scope), "units": {"medical"}, "episodes": ("m-*", "icu-*")},
}


@contextmanager
def served(folder: Path, authenticator: Authenticator) -> Iterator[str]:
    """The service on a loopback port, on a loop and thread of its own."""
    loop, stop, ports = asyncio.new_event_loop(), asyncio.Event(), SimpleQueue[int]()

    async def serve() -> None:
        async with (
            running(
                folder / "log.sqlite",
                loader=Shelf(),
                model_control=True,
                authenticator=authenticator,
                requests_per_second_per_client=None,
            ) as client,
            listening(client.app) as port,
        ):
            ports.put(port)
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield f"http://127.0.0.1:{ports.get(timeout=60)}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        loop.close()


def configured(n: int, key: str) -> SchemathesisConfig:
    return SchemathesisConfig.from_dict(
        {
            "headers": {"Authorization": f"Bearer {key}"},
            "generation": {
                "max-examples": n,
                "deterministic": FACTOR == 1,
                "database": "none",
                "no-shrink": FACTOR == 1,
            },
        }
    )


@pytest.mark.parametrize("role", ROLES)
def test_the_service_does_what_its_document_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    # Requests without credentials are many here, and would soon be kept off.
    monkeypatch.setattr(limits, "FAILURES_AT_ONCE", 1e9)
    key = new_key("client")
    values = {"id": "client", "key_sha256": (digest(key),), **ROLES[role]}
    entries = [Client.model_validate(values, strict=False)] if role != "nobody" else []
    failures: list[str] = []
    authenticator = Configured(lambda: Clients(entries), None, Gateways((), ()))
    with served(tmp_path, authenticator) as url:
        schema = openapi.from_url(f"{url}/openapi.json", config=configured(3 * FACTOR, key))
        for event in from_schema(schema).execute():
            if isinstance(event, events.ScenarioFinished):
                TRIED["requests fuzzed by schemathesis"] += len(event.recorder.interactions)
                failures += failures_of(event.recorder)
            elif isinstance(event, events.NonFatalError | events.FatalError):
                failures.append(str(event))
    assert not failures, "\n\n".join(failures)


def failures_of(recorder: ScenarioRecorder) -> list[str]:
    """What the checks found, each with the request and the answer."""
    found = []
    for case, checks in recorder.checks.items():
        response = recorder.interactions[case].response
        content = b"" if response is None else response.content
        for check in checks:
            info = check.failure_info
            if check.status is Status.FAILURE and not is_meant(check.name, info, content):
                sample = f"{info.failure.message}\n{info.code_sample}"
                found.append(f"{check.name}: {sample}\n{content!r}")
    return found


def is_meant(check: str, info: CheckFailureInfo, content: bytes) -> bool:
    """Whether the service is right where a check cannot know it."""
    match check:
        case "positive_data_acceptance":
            return is_about_meaning(content)
        case "negative_data_rejection":
            return refuses_an_item(content)
        case "ensure_resource_availability":
            return "/unload" in info.code_sample  # is a POST that makes nothing
        case _:
            return False


# What no schema can say: how fields and what is on record go together.
MEANING = {
    *["episode-deleted", "all-items-rejected", "hour-out-of-range", "hour-in-the-future"],
    *["in-the-future", "before-admission", "after-discharge"],
}


def is_about_meaning(content: bytes) -> bool:
    """Whether a problem is about what a request that is well formed means."""
    problem = json.loads(content)
    name = problem["type"].removeprefix("/problems/")
    if name != "invalid-request":
        return name in MEANING
    return all(error["type"] in MEANING for error in problem.get("errors", ()))


def refuses_an_item(content: bytes) -> bool:
    """Whether what was wrong was refused by itself, beside items that are good."""
    return bool(content) and json.loads(content).get("rejected", 0) > 0
