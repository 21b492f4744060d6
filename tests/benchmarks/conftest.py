"""Benchmarks run in small, with their results in a folder of the test."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report


@pytest.fixture
def run_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`run_benchmark(name, *arguments)` runs `python -m benchmarks.NAME`; returns its results."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    threads = torch.get_num_threads()

    def run(name: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        importlib.import_module(f"benchmarks.{name}").main()
        torch.set_num_threads(threads)
        return dict(json.loads((tmp_path / f"{name}.json").read_text()))

    return run
