"""The tiny bundle on disk, and a process to fork services from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext

import pytest

from tests.end_to_end.conftest import repository as repository
from tests.end_to_end.server import ROOT
from tests.postgres import Cluster
from tests.torture.life import nursery


@pytest.fixture(scope="session")
def lives() -> Iterator[ForkServerContext]:
    """Where services are forked."""
    with pytest.MonkeyPatch.context() as patch:
        # The process that is forked from begins with the paths of the environment alone.
        path = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), path])))
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        yield nursery()


@pytest.fixture
def crashable(postgres: Cluster, postgres_server: str) -> Cluster:
    """A PostgreSQL of our own, in which databases can be made, to be stopped and disturbed."""
    if postgres.server != postgres_server:
        pytest.skip("a PostgreSQL was named by LLM4EHR_TEST_POSTGRES: it is not to be crashed")
    return postgres
