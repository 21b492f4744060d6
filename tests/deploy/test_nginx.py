"""The gateway's configuration as nginx reads it, and what it answers without any replica."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.gateway import Gateway
from tests.end_to_end.server import free_port


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose replicas are all down."""
    folder = tmp_path_factory.mktemp("gateway")
    with Gateway(folder, [free_port(), free_port()]) as gateway:
        yield gateway


@pytest.mark.parametrize(
    "words", [{}, {"verify_client": "on"}, {"resolver": "resolver 127.0.0.1;"}]
)
def test_the_configuration_is_valid(tmp_path: Path, words: dict[str, str]) -> None:
    Gateway(tmp_path, [8001, 8002], **words).check()


def test_no_replica_is_a_problem_that_says_when_to_come_back(lonely: Gateway) -> None:
    with lonely.client() as http:
        answer = http.get("/episodes/icu-1/risk")
    assert answer.status_code == 502
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["Retry-After"] == "1"
    assert answer.json()["type"] == "/problems/no-replica"
    assert answer.headers["Strict-Transport-Security"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Server"] == "nginx"


@pytest.mark.parametrize(
    "path",
    [
        "/metrics", "//metrics", "/metrics/", "/%6Detrics", "/episodes/../metrics",
        "/episodes/%2e%2e/metrics", "/operator/summary", "/operator/", "/v2/../operator/summary",
        "/docs", "/", "/episodesx", "/v2x",
    ],
)  # fmt: skip
def test_what_is_for_the_inside_is_hidden(lonely: Gateway, path: str) -> None:
    with lonely.client() as http:
        url = http.base_url.copy_with(raw_path=path.encode())
        assert http.get(url).status_code == 404, path


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", ["/models/shadow", "/models/a/versions/1/load", "/v2/models/a"])
def test_models_are_not_switched_through_the_gateway(
    lonely: Gateway, method: str, path: str
) -> None:
    with lonely.client() as http:
        answer = http.request(method, path)
    assert answer.status_code == 403
    assert answer.json()["type"] == "/problems/forbidden"


def test_no_episode_is_named_in_what_the_gateway_writes(lonely: Gateway) -> None:
    with lonely.client() as http:
        http.get("/episodes/planted-4711/risk?as_of=planted-4712")
        http.post("/episodes/planted-4713/observations", content=b"planted-4714")
        http.get("/planted-4715", headers={"User-Agent": "planted-4716", "Referer": "planted-4717"})
        http.get("/episodes", headers={"X-Request-ID": "planted 4718"})
    written = [path for path in lonely.folder.rglob("*") if path.is_file()]
    assert any(path.name == "access.log" for path in written)
    assert not [path.name for path in written if b"planted" in path.read_bytes()]
    assert '"area":"episodes","status":502' in lonely.access_log
    assert '"client":"127.0.0.1","method":"GET"' in lonely.access_log
