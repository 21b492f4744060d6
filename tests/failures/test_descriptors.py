"""The process may open no more files and connections."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from llm4ehr.bundle import Network
from tests.end_to_end.server import PATIENCE_S, Server
from tests.online import save_tiny
from tests.service.fakes import hr, stamp

SPARE = 4


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts them in /proc")
def test_without_descriptors_open_connections_are_served(
    tiny_network: Callable[..., Network], tmp_path: Path
) -> None:
    save_tiny(tiny_network, tmp_path / "repository")
    with Server(tmp_path / "repository", tmp_path) as server, contextlib.ExitStack() as stack:
        assert server.http.get("/v2/health/ready").status_code == 200  # is connected from now on
        assert server._process is not None
        pid = server._process.pid
        used = max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 1 + SPARE, hard))
        for _ in range(10 * SPARE):
            # The system accepts them; the service cannot.
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), PATIENCE_S))
        for i in range(5):
            answer = server.http.post(
                "/episodes/e/observations",
                json={"admitted_at": stamp(0), "observations": [hr(80 + i)]},
            )
            assert answer.status_code == 200, server.output
            assert answer.json()["accepted"] == 1
        assert server.http.get("/episodes/e/risk").status_code == 200
        stack.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        with httpx.Client(base_url=server.http.base_url, timeout=PATIENCE_S) as another:
            assert another.get("/episodes/e").json()["seq"] == 6
        assert server.terminate() == 0
