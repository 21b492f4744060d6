"""A repository of three tiny models, and the service on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llm4ehr.bundle import Bundle, Network, save_bundle
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.settings import Settings
from tests.online import tiny_bundle
from tests.service.models.house import House, serving

VERSIONS = (1, 2, 3)
"""Of equal architecture and other weights; version 3 reads lactate in other units."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def repository(
    tiny_network: Callable[..., Network], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    for version in VERSIONS:
        bundle = tiny_bundle(tiny_network, seed=version)
        network = bundle.network
        if version == 3:
            vocabulary = network.vocabulary
            entries = [
                replace(e, unit="mg/dL") if e.code == "LOINC/2524-7" else e
                for e in vocabulary.entries
            ]
            network = replace(network, vocabulary=type(vocabulary)(entries))
        save_bundle(
            folder, "tiny", version, network, calibration=bundle.calibration,
            labels=bundle.labels, metrics={}, card="# Tiny\n",
        )  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends whose rows are not checked at the start, which takes most of a second each."""

    def quick(bundle: Bundle, settings: Settings) -> TorchCpuBackend:
        return TorchCpuBackend(bundle.network, n_slots=8, max_rows=settings.engine_rows)

    monkeypatch.setattr("service.models.bundles.make_backend", quick)


@pytest.fixture
async def house(repository: Path, tmp_path: Path, anyio_backend: str) -> AsyncIterator[House]:
    async with serving(repository, tmp_path / "log.sqlite") as house:
        yield house
