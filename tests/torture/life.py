"""Lives of the service, forked from a process that has everything imported: a start is cheap then.

This module is what that process imports, so all that a life needs is imported here.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# What a life would import as it goes.
import alembic.command  # noqa: F401
import torch  # noqa: F401
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
import uvicorn.lifespan.on
import uvicorn.protocols.http.auto
import uvicorn.protocols.websockets.auto  # noqa: F401

from service.runtime import build_app
from service.server import Server
from service.settings import Settings

ROWS = 4
"""Of a tick: so few that a start takes little time."""

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def small(repository: Path) -> dict[str, Any]:
    """Settings of a small service that everybody may use, without those of its log."""
    return {
        "model_repository": repository,
        "bundle": "tiny/1",
        "torch_threads": 1,
        "engine_rows": ROWS,
        "kv_memory_mib": 1,
        "staleness_limit_hours": None,
        "authentication": "open",
        "requests_per_second_per_client": None,
    }


def nursery() -> ForkServerContext:
    """Where lives are forked; its process starts with the first of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, f"{__package__}.nursery"])
    return context


def born(context: ForkServerContext, output: Path, settings: dict[str, Any]) -> BaseProcess:
    """A new life, at its very beginning."""
    life = context.Process(target=live, args=(output, settings), daemon=True)
    life.start()
    return life


def live(output: Path, settings: dict[str, Any]) -> None:
    """What `python -m service serve` does, with these settings and its output in a file."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    with output.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    read = Settings(**settings)
    Server(build_app(read), read, threading.Event()).run()
