"""A service whose engine is broken ends, with a status of its own, and loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from llm4ehr.bundle import Network
from service.core import Entry
from service.log import SqliteLog
from tests.end_to_end.server import PATIENCE_S, ROOT, environment, free_port
from tests.online import save_tiny
from tests.service.fakes import hr, stamp

# The command line, with a backend that breaks at the second hour of a stay.
BROKEN = """
import sys
from service.engine.backends import base
from service.engine.backends.torch_cpu import TorchCpuBackend
import service.models.bundles as bundles
made = bundles.make_backend
def make(*arguments):
    backend = made(*arguments)
    tick = backend.tick
    def broken(series, events, slots, hours, latest=None):
        if 1 in hours:
            raise {fault}
        return tick(series, events, slots, hours, latest)
    backend.tick = broken
    return backend
bundles.make_backend = make
from service.__main__ import main
sys.exit(main(["serve"]))
"""


async def entries(path: Path) -> list[Entry]:
    log = SqliteLog(path)
    try:
        return await log.entries("e")
    finally:
        await log.close()


@pytest.mark.parametrize("fault", ["base.DeviceFault('gone')", "RuntimeError('patient 0815')"])
def test_a_fatal_fault_ends_the_process(
    tiny_network: Callable[..., Network], tmp_path: Path, fault: str
) -> None:
    save_tiny(tiny_network, tmp_path)
    port = free_port()
    settings = environment(tmp_path, port=port, log_path=tmp_path / "log.sqlite")
    process = subprocess.Popen(
        [sys.executable, "-c", BROKEN.format(fault=fault)],
        env=settings, cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "running on" in line:
                break
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http:
            body = {"admitted_at": stamp(0), "observations": [hr(80), hr(81, hours=1.5)]}
            with contextlib.suppress(httpx.TransportError):  # it may end before it has answered
                http.post("/episodes/e/observations", json=body)
        assert process.wait(PATIENCE_S) == 70
        text = process.stderr.read()
        assert "the engine stopped: " in text
        assert ", model tiny/1" in text
        assert "0815" not in text
        # Logged before the engine was asked.
        assert len(asyncio.run(entries(tmp_path / "log.sqlite"))) == 3
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
