"""Clients as the whole application sees them: tokens, gateways, and a service that is open."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.access.opening import open_authenticator
from service.api.open_demo import warn
from service.settings import Settings
from tests.service.access.issuer import AUDIENCE, Issuer, serving
from tests.service.fakes import running

pytestmark = pytest.mark.anyio

SECRET = "0123456789abcdef"


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with serving() as issuer:
        yield issuer


@pytest.fixture
def settings(tmp_path: Path, issuer: Issuer) -> dict[str, Any]:
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "clients.yaml").write_text(
        "clients:\n- {id: pump, scopes: [read], certificate_subject: 'CN=pump'}\n"
        "- {id: ours, scopes: [ingest, read, metrics], token_subject: feed}\n"
    )
    return {
        "oidc_issuer": issuer.url,
        "oidc_audience": AUDIENCE,
        "clients_file": tmp_path / "clients.yaml",
        # What the transport of the tests says its address is.
        "trusted_gateways": ["127.0.0.1/32"],
        "gateway_secret_file": tmp_path / "secret",
    }


def known(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"authenticator": open_authenticator(Settings(**settings))}


async def test_a_token_opens_what_its_scopes_say(
    log_path: Path, settings: dict[str, Any], issuer: Issuer, anyio_backend: str
) -> None:
    async with running(log_path, **known(settings)) as client:

        async def status(path: str, text: str) -> int:
            headers = {"Authorization": f"Bearer {text}"}
            return (await client.http.get(path, headers=headers)).status_code

        read = issuer.token(scope="system/RiskAssessment.rs")
        assert await status("/episodes", read) == 200
        assert await status("/operator/summary", read) == 403
        assert await status("/episodes", issuer.token(scope="openid profile")) == 403
        assert await status("/episodes", issuer.token(scope="read", aud="x")) == 401
        assert await status("/episodes", issuer.token(scope="read", client_id="other")) == 401
        settings["clients_file"].write_text("clients: []\n")
        assert await status("/episodes", read) == 200  # until the file is looked at again
    async with running(log_path, **known(settings | {"clients_file": None})) as client:
        assert await status("/episodes", issuer.token(scope="read", client_id="other")) == 200
    async with running(log_path, **known(settings)) as client:
        assert await status("/episodes", read) == 401


async def test_an_issuer_that_is_away_is_no_fault_of_the_client(
    log_path: Path, settings: dict[str, Any], issuer: Issuer, anyio_backend: str
) -> None:
    issuer.answer["/keys"] = (500, b"", {})
    async with running(log_path, **known(settings)) as client:
        headers = {"Authorization": f"Bearer {issuer.token()}"}
        answer = await client.http.get("/episodes", headers=headers)
        assert answer.status_code == 503
        assert answer.json()["type"] == "/problems/issuer-unavailable"
        assert int(answer.headers["retry-after"]) > 0
        # Whoever needs no issuer is served.
        gateway = {"X-Gateway-Secret": SECRET, "X-Client-Subject": "CN=pump"}
        assert (await client.http.get("/episodes", headers=gateway)).status_code == 200
        assert (await client.http.get("/v2/health/ready")).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("X-Gateway-Secret", SECRET), ("X-Client-Subject", "CN=pump")], 200),
        ([("X-Client-Subject", "CN=pump")], 401),
        ([("X-Gateway-Secret", SECRET)], 401),
        ([("X-Gateway-Secret", SECRET), ("X-Client-Subject", "CN=nobody")], 401),
        (
            [("X-Gateway-Secret", SECRET), ("X-Client-Subject", "CN=nobody"),
             ("X-Client-Subject", "CN=pump")],
            401,
        ),
        ([("X-Gateway-Secret", "x"), ("X-Gateway-Secret", SECRET),
          ("X-Client-Subject", "CN=pump")], 401),
    ],
)  # fmt: skip
async def test_headers_of_a_gateway(
    log_path: Path,
    settings: dict[str, Any],
    headers: list[tuple[str, str]],
    status: int,
    anyio_backend: str,
) -> None:
    async with running(log_path, **known(settings)) as client:
        assert (await client.http.get("/episodes", headers=headers)).status_code == status


async def test_headers_that_are_there_twice_count_against_who_sent_them(
    log_path: Path, settings: dict[str, Any], anyio_backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = [("X-Gateway-Secret", SECRET), ("X-Client-Subject", "CN=pump")]
    twice = [("Authorization", "Bearer x"), ("Authorization", "Bearer y")]

    async def status(address: str, *more: tuple[str, str]) -> int:
        headers = [*gateway, ("X-Forwarded-For", address), *more]
        return (await client.http.get("/episodes", headers=headers)).status_code

    async with running(log_path, **known(settings)) as client:
        assert await status("192.0.2.7") == 200
        with caplog.at_level(logging.INFO, "service.requests"):
            assert await status("192.0.2.7", *twice) == 401
        assert "from 192.0.2.7" in caplog.text
        # Each is counted, and of the address that the gateway tells of.
        statuses = [await status("192.0.2.7", *twice) for _ in range(60)]
        assert 429 in statuses
        assert await status("192.0.2.8", *twice) == 401
        assert await status("192.0.2.7") == 200


async def test_two_authorizations_are_none(
    log_path: Path, settings: dict[str, Any], issuer: Issuer, anyio_backend: str
) -> None:
    text = f"Bearer {issuer.token(scope='read')}"
    async with running(log_path, **known(settings)) as client:
        for headers in ([("Authorization", text)] * 2, [("Authorization", f"{text}, {text}")]):
            assert (await client.http.get("/episodes", headers=headers)).status_code == 401


async def test_an_open_service_says_so_everywhere(
    log_path: Path, anyio_backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "service.api.open_demo"):
        async with running(log_path, authentication="open") as client:
            for path in ("/episodes", "/episodes/none", "/nowhere", "/v2/health/live"):
                answer = await client.http.get(f"http://localhost{path}")
                assert answer.headers["x-llm4ehr-mode"] == "open-demo"
            summary = (await client.http.get("http://localhost/operator/summary")).json()
            assert summary["service"]["authentication"] == "open"
    assert "OPEN" in caplog.text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LocalHost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("127.9.9.9", 200),
        ("[::1]:8000", 200),
        ("ward.example:8000", 200),
        ("WARD.example", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("ward.example.evil", 421),
        ("localhost@evil.example", 421),
        ("localhost:80:80", 421),
        ("10.0.0.1", 421),
        ("[::1", 421),
        ("", 421),
        ("\u00e9", 421),
    ],
)
async def test_an_open_service_answers_to_its_own_names_alone(
    log_path: Path, anyio_backend: str, host: str, status: int
) -> None:
    """A page of another name that leads here would be of the same origin."""
    async with running(log_path, authentication="open", host="ward.example") as client:
        headers = {"Host": host.encode()}
        for path in ("/episodes", "/openapi.json"):
            answer = await client.http.get(path, headers=headers)
            assert answer.status_code == status
            assert answer.headers["x-llm4ehr-mode"] == "open-demo"
            assert answer.headers["x-request-id"]
            if status == 421:
                assert answer.json()["type"] == "/problems/misdirected"
        twice = [("Host", "localhost"), ("Host", "localhost")]
        assert (await client.http.get("/episodes", headers=twice)).status_code == 421


async def test_a_closed_service_has_any_name(log_path: Path, anyio_backend: str) -> None:
    async with running(log_path) as client:
        headers = {"Host": "evil.example"}
        assert (await client.http.get("/episodes", headers=headers)).status_code == 200


async def test_a_closed_service_does_not(log_path: Path, anyio_backend: str) -> None:
    async with running(log_path) as client:
        answer = await client.http.get("/operator/summary")
        assert answer.json()["service"]["authentication"] == "required"
        assert "x-llm4ehr-mode" not in answer.headers


async def test_it_is_repeated(anyio_backend: str, caplog: pytest.LogCaptureFixture) -> None:
    task = asyncio.create_task(warn(every_s=0))
    for _ in range(10):
        await asyncio.sleep(0)
    task.cancel()
    assert len(caplog.records) > 2
    assert {record.levelname for record in caplog.records} == {"WARNING"}
