"""A real process is sent marked values; nothing that it writes holds one but its log."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from service.access.keys import digest
from service.access.principal import Scope
from tests.end_to_end.server import PATIENCE_S, Server
from tests.planted import EPISODE, TEXT, Ask, bad, error_text, found_in, good

KEY = f"llm4ehr_ward-7_{TEXT}"
"""The key is a mark; the name of its client is not."""


@pytest.fixture(params=["text", "json"])
def server(request: pytest.FixtureRequest, repository: Path, tmp_path: Path) -> Server:
    clients = tmp_path / "clients.yaml"
    client = {
        "id": "ward-7", "scopes": [scope.value for scope in Scope], "key_sha256": [digest(KEY)],
    }  # fmt: skip
    clients.write_text(json.dumps({"clients": [client]}))  # JSON is YAML
    clients.chmod(0o600)
    return Server(
        repository,
        tmp_path,
        authentication="required",
        clients_file=clients,
        log_format=request.param,
        tracing="console",
        model_control=True,
        audit_interval_seconds=0.2,
    )


def ask(server: Server, asks: Iterable[Ask]) -> set[int]:
    """Send all; no error may tell anything."""
    statuses = set()
    for one in asks:
        headers = {"Authorization": f"Bearer {KEY}"} | dict(one.headers)
        answer: httpx.Response = server.http.request(
            one.method, one.url, headers=headers, content=one.body
        )
        statuses.add(answer.status_code)
        assert "server" not in answer.headers
        if answer.status_code >= 400:
            told = f"{answer.headers!r} {error_text(answer.text)}"
            assert not found_in(told), (one.method, one.url[:80], answer.status_code)
    return statuses


def send_no_http(server: Server) -> None:
    """What is no request, or none that comes to its end."""
    for data in (
        f"{TEXT}\r\n\r\n",
        f"GET /{TEXT} {TEXT}/9\r\n\r\n",
        f"GET /episodes/{EPISODE} HTTP/1.1\r\nHost: x\r\n{TEXT}\r\n\r\n",
        f"GET /episodes/{EPISODE} HTTP/1.1\r\nHost: x\r\nX: {TEXT * 20_000}\r\n\r\n",
        f"POST /episodes/{EPISODE}/observations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}"
        f"\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n{TEXT}",
        f"POST /episodes/{EPISODE}/observations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}"
        f"\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n{TEXT}\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as raw:
            answer = b""
            # Where the headers are too long the server is gone before all of them is sent.
            try:
                raw.sendall(data.encode())
                with contextlib.suppress(OSError):
                    raw.shutdown(socket.SHUT_WR)
                while chunk := raw.recv(65536):
                    answer += chunk
            except ConnectionError:
                pass
        assert not found_in(answer.decode("latin-1"))


def search(server: Server, folder: Path) -> None:
    for path in ("/metrics", "/operator/summary", "/models"):
        answer = server.http.get(path, headers={"Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200
        assert not found_in(answer.text), path
    assert server.terminate() == 0
    for file in folder.rglob("*"):
        if file.is_file() and not file.name.startswith("log.sqlite"):
            lines = file.read_bytes().decode("latin-1").splitlines()
            assert [line for line in lines if found_in(line)] == [], file
    # The search would find them.
    log = server.log_path.read_bytes().decode("latin-1")
    assert {TEXT, "47114711"} <= set(found_in(log))


def test_nothing_of_a_patient_is_written_beside_the_log(
    server: Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    admitted = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=2)
    with server:
        statuses = ask(server, good(admitted))
        statuses |= ask(server, bad(admitted))
        send_no_http(server)
        statuses |= ask(server, [Ask(method="DELETE", path=f"/episodes/{EPISODE}")])
        statuses |= ask(server, good(admitted, tag="-again"))
        statuses |= ask(server, good(admitted, f"{TEXT}-other"))
        server.kill()
    with server:  # all of the log is read, and scored again
        statuses |= ask(server, good(admitted, f"{TEXT}-other"))
        search(server, tmp_path)
    assert {200, 201, 204, 400, 401, 404, 405, 410, 413, 415, 422} <= statuses
    written = server.output
    assert "http.route" in written  # the spans
    assert "service.requests" in written
    if "json" in request.node.name:
        _only_json_and_spans(written)


def _only_json_and_spans(written: str) -> None:
    """The lines of the log are objects; the console's spans have several lines each."""
    lines = [line for line in written.splitlines() if line.startswith('{"')]
    assert len(lines) > 100
    for line in lines:
        told = json.loads(line)
        assert {"time", "level", "logger", "message"} <= told.keys()
        if told["logger"] == "service.requests":
            assert {"request_id", "route", "status", "ms", "principal"} <= told.keys()
    assert any(json.loads(line)["logger"] == "uvicorn.error" for line in lines)


def test_as_json_every_line_is_an_object(repository: Path, tmp_path: Path) -> None:
    """Those of libraries and of the server too, from the start to the end."""
    admitted = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=2)
    with Server(repository, tmp_path, log_format="json") as server:
        ask(server, good(admitted))
        send_no_http(server)
        assert server.terminate() == 0
        lines = [json.loads(line) for line in server.output.splitlines()]
    assert {"uvicorn.error", "service.requests", "service.api.open_demo"} <= {
        line["logger"] for line in lines
    }
    [id_] = {
        line["trace_id"] for line in lines if line["logger"] == "service.requests"
        and "trace_id" in line
    }  # fmt: skip
    assert id_ == "a" * 32
