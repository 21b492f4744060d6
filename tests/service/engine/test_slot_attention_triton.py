"""The Triton kernel without a device: interpreted, and compiled. Where Triton is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton comes with torch for CUDA only"
)


def run(tmp_path: Path, *arguments: str, **environment: str) -> None:
    """In a process of its own: Triton looks at its settings once."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_kernel", *arguments],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_every_row_is_its_own_attention(tmp_path: Path) -> None:
    run(tmp_path, TRITON_INTERPRET="1")


def test_it_compiles_without_tensor_cores(tmp_path: Path) -> None:
    run(tmp_path, "compile")
