"""Pictures of calibration: observed against predicted risk, and how often intervals hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training.metrics import brier, calibration_error, calibration_line

Floats = NDArray[np.floating]
_Z95 = 1.959964


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shares:
    """Observed shares of bins [k] with 95 % intervals."""

    at: Floats
    """Mean predicted risk of the bin, or its first hour."""
    observed: Floats
    low: Floats
    high: Floats
    count: NDArray[np.int64]


def wilson(positives: NDArray[Any], count: NDArray[Any]) -> tuple[Floats, Floats]:
    """95 % score intervals of binomial shares (Wilson 1927)."""
    share = positives / count
    centre = (share + _Z95**2 / (2 * count)) / (1 + _Z95**2 / count)
    spread = _Z95 * np.sqrt(share * (1 - share) / count + _Z95**2 / (4 * count**2))
    half = spread / (1 + _Z95**2 / count)
    # At a share of 0 or 1 rounding could leave the share outside.
    return np.minimum(centre - half, share).clip(0), np.maximum(centre + half, share).clip(max=1)


def reliability(y: Floats, p: Floats, bins: int = 10) -> Shares:
    """Observed and mean predicted risk in bins of equal count, as `calibration_error` cuts them."""
    parts = [i for i in np.array_split(np.argsort(p, kind="stable"), bins) if len(i)]
    count = np.array([len(i) for i in parts])
    positives = np.array([y[i].sum() for i in parts])
    low, high = wilson(positives, count)
    at = np.array([p[i].mean() for i in parts])
    return Shares(at=at, observed=positives / count, low=low, high=high, count=count)


def draw_reliability(path: Path, title: str, y: Floats, p: Floats, bins: int = 10) -> None:
    """A PNG of one probability: labels y and risks p [n], which may be flattened.

    Above observed against predicted risk with 95 % intervals (of rows: where rows of one stay go
    together they are too narrow), below how many rows have which risk.
    """
    shares = reliability(y, p, bins)
    figure = Figure(figsize=(5, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    top.plot([0, 1], [0, 1], color="0.8", linewidth=1)
    errors = np.abs(np.stack([shares.low, shares.high]) - shares.observed)
    top.errorbar(shares.at, shares.observed, errors, fmt="o", markersize=4, capsize=2)
    edge = min(1.0, 1.05 * float(max(shares.at.max(), shares.high.max())))
    top.set(
        xlim=(0, edge),
        ylim=(0, edge),
        ylabel="observed",
        title=f"{title}, n {len(y):,}\n{_figures(y, p)}",
    )
    below.hist(p, bins=np.linspace(0, edge, 41), color="0.5")
    below.set(xlabel="predicted risk", ylabel="rows", yscale="log")
    figure.savefig(path, dpi=120)


def _figures(y: Floats, p: Floats) -> str:
    shown = f"ECE {calibration_error(y, p):.3f}, Brier {brier(y, p):.3f}"
    if not 0 < y.sum() < len(y):
        return shown
    intercept, slope = calibration_line(y, p)
    return f"{shown}, slope {slope:.2f}, intercept {intercept:.2f}"


def interval_coverage(inside: NDArray[np.bool_], hours: NDArray[np.integer]) -> Shares:
    """Share of intervals that hold the truth, by day of the stay: rows [n] at hours [n]."""
    day = np.minimum(hours // 24, 4)  # what is later stands in one bin
    days, of = np.unique(day, return_inverse=True)
    count = np.bincount(of)
    held = np.bincount(of, inside)
    low, high = wilson(held, count)
    return Shares(at=24.0 * days, observed=held / count, low=low, high=high, count=count)


def draw_interval_coverage(
    path: Path, title: str, inside: NDArray[np.bool_], hours: NDArray[np.integer], coverage: float
) -> None:
    """A PNG of `interval_coverage` against the `coverage` that was asked for."""
    shares = interval_coverage(inside, hours)
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(coverage, color="0.8", linewidth=1)
    errors = np.abs(np.stack([shares.low, shares.high]) - shares.observed)
    place = np.arange(len(shares.at))
    axes.errorbar(place, shares.observed, errors, fmt="o", markersize=4, capsize=2)
    names = [f"from {at:.0f} h\nn {n:,}" for at, n in zip(shares.at, shares.count, strict=True)]
    axes.set_xticks(place, names)
    axes.set(
        ylim=(0, 1.02),
        ylabel="intervals with the truth",
        title=f"{title}\n{inside.mean():.3f} of {len(inside):,}, asked for {coverage:g}",
    )
    figure.savefig(path, dpi=120)
