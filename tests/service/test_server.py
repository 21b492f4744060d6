"""How the process ends: in time, and with the status that says why."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

import service.commands.serve as command
from service import server
from service.settings import Settings
from tests.service.fakes import running

pytestmark = pytest.mark.anyio


class Ended(BaseException):
    """In the place of the end of the process."""


def ends(monkeypatch: pytest.MonkeyPatch, where: Any) -> list[int]:
    statuses: list[int] = []

    def end(status: int) -> None:
        statuses.append(status)
        raise Ended

    monkeypatch.setattr(where.os, "_exit", end)
    return statuses


async def test_a_blocked_terminal_does_not_hold_the_end(
    log_path: Path, monkeypatch: pytest.MonkeyPatch, anyio_backend: str
) -> None:
    monkeypatch.setattr(server, "_SAY_S", 0.01)
    statuses = ends(monkeypatch, server)
    reads = threading.Event()

    class Blocked(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reads.wait(60)

    blocked = Blocked()
    server._logger.addHandler(blocked)
    try:
        async with running(log_path) as client:
            stopping = server.Server(client.app, Settings(), threading.Event())
            with pytest.raises(Ended):
                stopping._give_up()
        assert not reads.is_set()
    finally:
        reads.set()
        server._logger.removeHandler(blocked)
    assert statuses == [server.TIMEOUT_STATUS]


def test_a_fault_while_the_service_stops_shows_in_its_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server raises the signal again when it has stopped, and the handler ends the process."""

    class Stopped:
        started, failed = True, True

        def __init__(self, app: FastAPI, *_: object) -> None: ...

        def run(self) -> None:
            raise SystemExit(0)

    monkeypatch.setattr(command, "Server", Stopped)
    monkeypatch.setattr(command, "build_app", lambda *_: None)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    statuses = ends(monkeypatch, command)
    with pytest.raises(Ended):
        command._run(Settings())
    assert statuses == [server.FATAL_STATUS]
    Stopped.failed = False
    with pytest.raises(SystemExit):
        command._run(Settings())
    assert len(statuses) == 1
