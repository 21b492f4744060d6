"""The directory of a run: what it was told, where it ran, what it logged and what came out."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch

from training.config import Strict
from training.loss_curves import loss_curves
from training.processes import n_processes, rank


class RunFolder:
    """A run's directory: resolved config as `<kind>.json`, environment, metrics log, TensorBoard,
    checkpoint, and in the end the network and the result."""

    def __init__(self, path: Path, kind: str, config: Strict) -> None:
        self.path = path
        self.config: dict[str, Any] = config.model_dump(mode="json")
        path.mkdir(parents=True, exist_ok=True)
        if rank() != 0:
            return
        existing = path / f"{kind}.json"
        if existing.exists() and json.loads(existing.read_text()) != self.config:
            raise FileExistsError(
                f"{path} holds a run with another configuration; choose another `run`"
            )
        existing.write_text(json.dumps(self.config, indent=2))
        (path / "environment.json").write_text(json.dumps(environment(), indent=2))

    @property
    def checkpoint(self) -> Path:
        """Folder of the newest checkpoint."""
        return self.path / "checkpoint"

    @property
    def metrics(self) -> Path:
        """The log of every step, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "result.json").exists()

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result and the curves, and drop the checkpoint."""
        if self.metrics.exists():
            steps = [json.loads(line) for line in self.metrics.read_text().splitlines()]
            loss_curves(steps, self.path / "curves.png")
        (self.path / "result.json").write_text(json.dumps(result, indent=2))
        shutil.rmtree(self.checkpoint, ignore_errors=True)


def environment() -> dict[str, Any]:
    """What a reader needs to judge a number: versions, hardware, revision."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "packages": {
            name: version(name) for name in ("torch", "transformers", "accelerate", "numpy")
        },
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "processes": n_processes(),
        "git": git.stdout.strip() or None,
    }


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """Append to the run's JSON-lines log, first dropping what a later resume would write again.

    Only the first of several processes writes.
    """

    def __init__(self, run: RunFolder, step: int) -> None:
        self._file: TextIO | None = None
        if rank() == 0:
            path = run.metrics
            kept = list(_kept_lines(path, step)) if path.exists() else []
            self._file = path.open("w", buffering=1)
            self._file.writelines(kept)

    def write(self, values: dict[str, Any]) -> None:
        """One line."""
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _kept_lines(path: Path, step: int) -> Iterator[str]:
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            yield line
