"""Where results go, and what is said about the machine that made them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

RESULTS = Path(__file__).parent / "results"


def write(name: str, rows: list[dict[str, Any]], **about: Any) -> Path:
    """Print rows as a table and write them with their origin to results/<name>.json.

    `about` is what holds for all rows: peaks, settings, targets.
    """
    columns = list(rows[0])
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join("" if row[c] is None else str(row[c]) for c in columns))
    body = {
        "command": _command(),
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {p: version(p) for p in ("torch", "transformers", "numpy", "fastapi")},
        "load_average_at_end": os.getloadavg(),
        **about,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(body, indent=1) + "\n")
    return path


def milliseconds(seconds: Sequence[float], *quantiles: float) -> dict[str, float | None]:
    """Quantiles of durations in milliseconds, as `p50_ms`, `p99_ms`; None of no durations."""
    if not len(seconds):
        return {f"p{q * 100:g}_ms": None for q in quantiles}
    values = np.quantile(seconds, quantiles) * 1000
    return {f"p{q * 100:g}_ms": round(float(v), 2) for q, v in zip(quantiles, values, strict=True)}


def progress() -> Progress:
    """A bar on the stream of errors: standard output holds the table alone."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _command() -> str:
    """As it was typed: `python -m benchmarks.NAME ...`, wherever the checkout lies."""
    spec = sys.modules["__main__"].__spec__
    name = spec.name if spec is not None else Path(sys.argv[0]).stem
    return " ".join(["python -m", name, *sys.argv[1:]])


def _commit() -> str | None:
    """The commit of the checkout, marked where files differ from it; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
