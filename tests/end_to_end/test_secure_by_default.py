"""A service that was told nothing of clients: a key of its own, and nobody else on the network."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.server import PATIENCE_S, Server, environment, free_port

pytestmark = pytest.mark.slow


def refused(repository: Path, folder: Path, *arguments: str, **settings: str) -> str:
    """What a service says that does not start."""
    done = subprocess.run(
        [sys.executable, "-m", "service", "serve", *arguments],
        env=environment(repository, port=free_port(), log_path=folder / "log.sqlite", **settings),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_it_answers_this_machine_and_who_has_the_key(repository: Path, tmp_path: Path) -> None:
    server = Server(repository, tmp_path, authentication="required")
    path = tmp_path / "log.sqlite.key"
    with server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        key = path.read_text().strip()
        assert server.http.get("/episodes").status_code == 401
        assert server.http.get("/metrics").status_code == 401
        headers = {"Authorization": f"Bearer {key}"}
        assert server.http.get("/episodes", headers=headers).status_code == 200
        # The address is the peer's, whatever a client says of itself.
        told = headers | {"X-Forwarded-For": "192.0.2.9"}
        assert server.http.get("/episodes", headers=told).status_code == 200
        assert "x-llm4ehr-mode" not in server.http.get("/v2/health/live").headers
        assert "192.0.2.9" not in server.output
        assert str(path) in server.output
        assert server.terminate() == 0
    assert key[-64:] not in server.output
    with server:
        assert path.read_text().strip() == key
        assert server.http.get("/episodes", headers=headers).status_code == 200


def test_it_listens_on_no_other_address(repository: Path, tmp_path: Path) -> None:
    with Server(repository, tmp_path, authentication="required") as server:
        with socket.socket() as probe:
            probe.connect(("127.0.0.1", server.port))
        with socket.socket() as probe, pytest.raises(OSError, match="refused"):
            probe.connect(("127.0.0.2", server.port))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_it_does_not_start_where_others_could_reach_it(
    repository: Path, tmp_path: Path, host: str
) -> None:
    said = refused(repository, tmp_path, host=host, authentication="required")
    assert "LLM4EHR_CLIENTS_FILE" in said
    assert list(tmp_path.glob("*.key")) == []


def test_a_demonstration_does_not_start_there_either(repository: Path, tmp_path: Path) -> None:
    assert "loopback" in refused(repository, tmp_path, "--demo", host="0.0.0.0")


def test_an_open_service_is_loud(repository: Path, tmp_path: Path) -> None:
    with Server(repository, tmp_path) as server:
        answer = server.http.get("/episodes")
        assert answer.status_code == 200
        assert answer.headers["x-llm4ehr-mode"] == "open-demo"
        assert "OPEN" in server.output


def test_stays_are_replayed_with_a_key(repository: Path, tmp_path: Path) -> None:
    with Server(repository, tmp_path, authentication="required") as server:
        path = tmp_path / "log.sqlite.key"
        command = [
            *(sys.executable, "-m", "service", "replay", "--seconds-per-hour", "0"),
            *("--url", f"http://127.0.0.1:{server.port}"),
        ]

        def run(*more: str) -> int:
            return subprocess.run(
                [*command, *more], env=environment(repository), capture_output=True, check=False,
                timeout=PATIENCE_S,
            ).returncode  # fmt: skip

        assert run() == 1
        assert run("--key-file", str(path)) == 0
        headers = {"Authorization": f"Bearer {path.read_text().strip()}"}
        assert len(server.http.get("/episodes", headers=headers).json()["episodes"]) == 12
