"""How the loss terms of a run went, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_SMOOTHED = 25  # steps of the running mean


def loss_curves(steps: list[dict[str, Any]], path: Path) -> None:
    """Draw every value of the log against the step, raw and as a running mean, into a PNG.

    `steps` are the lines of metrics.jsonl. Draws nothing when there are none.
    """
    if not steps:
        return
    names = [name for name in steps[0] if name not in ("step", "epoch")]
    x = np.array([line["step"] for line in steps])
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        y = np.array([line[name] for line in steps])
        axes.plot(x, y, linewidth=0.6, alpha=0.4)
        width = min(_SMOOTHED, len(y))
        smooth = np.convolve(y, np.ones(width) / width, mode="valid")
        axes.plot(x[width - 1 :], smooth, linewidth=1.4)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
