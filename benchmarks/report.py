"""Where results go, and what is said about the machine that made them."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table and write them with their origin to results/<name>.json."""
    columns = list(rows[0])
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(str(row[c]) for c in columns))
    body = {
        "command": _command(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {p: version(p) for p in ("torch", "transformers", "numpy", "fastapi")},
        "load_average_at_end": os.getloadavg(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n")


def milliseconds(seconds: list[float], *quantiles: float) -> dict[str, float]:
    """Quantiles of durations in milliseconds, as `p50`, `p99`."""
    values = np.quantile(seconds, quantiles) * 1000
    return {f"p{q * 100:g}_ms": round(float(v), 2) for q, v in zip(quantiles, values, strict=True)}


def _command() -> str:
    """As it was typed: `python -m benchmarks.NAME ...`, wherever the checkout lies."""
    spec = sys.modules["__main__"].__spec__
    name = spec.name if spec is not None else Path(sys.argv[0]).stem
    return " ".join(["python -m", name, *sys.argv[1:]])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
