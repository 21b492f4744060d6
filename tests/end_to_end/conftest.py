"""A tiny bundle on disk for services in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llm4ehr.bundle import Network
from tests.online import save_tiny


@pytest.fixture(scope="session")
def repository(
    tiny_network: Callable[..., Network], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model repository that holds `tiny/1`."""
    path = tmp_path_factory.mktemp("model_repository")
    save_tiny(tiny_network, path)
    return path
