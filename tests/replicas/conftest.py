"""Shared fixtures of the tests of several replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import repository as repository
from tests.torture.conftest import crashable as crashable
from tests.torture.conftest import lives as lives
from tests.torture.life import small


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def settings(repository: Path) -> dict[str, Any]:
    """Of a small service that everybody may use."""
    return small(repository)
