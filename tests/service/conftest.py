"""Shared fixtures of the service's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.service.fakes import Client, running


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "log.sqlite"


@pytest.fixture
async def client(log_path: Path, anyio_backend: str) -> AsyncIterator[Client]:
    """A running app with a fake engine; its clock stands one hour after the examples' admission."""
    async with running(log_path) as client:
        yield client
