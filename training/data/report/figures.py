"""The figures of the extraction report: inline SVG that takes its colours from the page.

Every function returns markup whose variable parts are escaped. Classes are those of the style sheet
in `report.html.jinja`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

_LONGEST_HOUR = 336  # two weeks
_FEWEST_STAYS = 10  # and 1 % of the most: with fewer, single deaths make the curve jump
_LIMIT_NAMES = ("limits", "plausible")


def histogram(variable: Mapping[str, Any]) -> Markup:
    """Histogram of the hourly values of a variable, with the limits that lie near enough."""
    found = variable["histogram"]
    if found is None:
        return Markup("")
    width, height, left, right, top, base = 264, 104, 4, 260, 12, 84
    low, step, counts = found["start"], found["width"], found["counts"]
    high = low + step * len(counts)
    near = (high - low) * 0.15
    limits = [
        (name, x)
        for name in _LIMIT_NAMES
        for x in variable[name]
        if low - near <= x <= high + near
        # Of two limits at one place the hard one is drawn.
        and not (name == "plausible" and x in variable["limits"])
    ]
    first = min([low, *(x for _, x in limits)]) - near / 5
    last = max([high, *(x for _, x in limits)]) + near / 5

    def across(x: float) -> float:
        return left + (x - first) / (last - first) * (right - left)

    tallest = max(counts)
    bars = Markup("").join(
        Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
            across(low + k * step) + 0.25,
            base - n / tallest * (base - top),
            max(across(low + step) - across(low) - 0.5, 0.5),
            n / tallest * (base - top),
        )
        for k, n in enumerate(counts)
        if n
    )
    lines = Markup("").join(
        Markup('<line class="{}" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{}"/>').format(
            name, base, x=across(x)
        )
        for name, x in limits
    )
    ticks = Markup("").join(
        Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{:g}</text>').format(
            across(x), base + 13, x
        )
        for x in _ticks(first, last, 5)
    )
    return _figure(
        width,
        height,
        f"Histogram of {variable['title'].lower()}",
        f"{sum(counts):,} hourly values from {low:g} to {high:g} {variable['unit']} in "
        f"{len(counts)} bins; limits {variable['limits'][0]:g} to {variable['limits'][1]:g}, "
        f"plausible {variable['plausible'][0]:g} to {variable['plausible'][1]:g}.",
        Markup('<g class="bars">{}</g>{}<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>{}')
        .format(bars, lines, left, right, base, base, ticks),
    )  # fmt: skip


def decompensation(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Share of positive labels by hour of stay, above the number of stays still there."""
    rows = [row for row in rows if row["hour"] <= _LONGEST_HOUR]
    most = max((row["stays"] for row in rows), default=0)
    while rows and rows[-1]["stays"] < max(_FEWEST_STAYS, most / 100):
        rows = rows[:-1]
    certain = [row for row in rows if row["share"] is not None]
    if not certain:
        return Markup("")
    width, height, left, right = 720, 250, 52, 708
    first, last = 0, max(rows[-1]["hour"], 24)

    def across(hour: float) -> float:
        return left + (hour - first) / (last - first) * (right - left)

    highest = _ceiling(max(row["share"] for row in certain) or 0.01)

    def up(share: float) -> float:
        return 140 - share / highest * 120

    def area(stays: float) -> float:
        return 222 - stays / most * 52

    curve = " ".join(f"{across(r['hour']):.1f},{up(r['share']):.1f}" for r in certain)
    there = " ".join(f"{across(r['hour']):.1f},{area(r['stays']):.1f}" for r in rows)
    ends = f"{across(rows[-1]['hour']):.1f},222 {across(rows[0]['hour']):.1f},222"
    shares = Markup("").join(
        _grid_line(left, right, up(share), f"{100 * share:.3g} %")
        for share in _ticks(0, highest, 4)
    )
    every = 24 if last <= 192 else 48
    hours = Markup("").join(
        Markup('<text class="tick" x="{:.1f}" y="240" text-anchor="middle">{}</text>').format(
            across(hour), hour
        )
        for hour in range(0, last + 1, every)
    )
    body = Markup(
        '{shares}{stays}<polygon class="area" points="{there} {ends}"/>'
        '<polyline class="curve" points="{curve}"/>{hours}'
        '<text class="tick" x="{left}" y="12">positive labels</text>'
        '<text class="tick" x="{left}" y="164">stays still there</text>'
    ).format(
        shares=shares,
        stays=_grid_line(left, right, area(most), f"{most:,}") + _grid_line(left, right, 222, "0"),
        there=there,
        ends=ends,
        curve=curve,
        hours=hours,
        left=left,
    )
    peak = max(certain, key=lambda row: row["share"])
    return _figure(
        width,
        height,
        "Decompensation by hour of stay",
        f"Share of positive labels from hour {certain[0]['hour']} to {certain[-1]['hour']}; "
        f"highest at hour {peak['hour']} with {100 * peak['share']:.3g} %. "
        f"{rows[0]['stays']:,} stays at hour {rows[0]['hour']}, "
        f"{rows[-1]['stays']:,} at hour {rows[-1]['hour']}.",
        body,
    )


def bar(share: float | None, mark: float | None = None) -> Markup:
    """A bar of a share of 1, and a mark for another share; both stand as numbers beside it."""
    body = Markup('<rect class="track" width="100" height="9"/>')
    if share:
        body += Markup('<rect class="fill" width="{:.1f}" height="9"/>').format(
            100 * min(share, 1.0)
        )
    if mark is not None:
        body += Markup('<rect class="mark" x="{:.1f}" y="-2" width="1.6" height="13"/>').format(
            100 * min(mark, 1.0) - 0.8
        )
    return Markup('<svg class="bar" viewBox="0 -2 100 13" aria-hidden="true">{}</svg>').format(body)


def _figure(width: int, height: int, title: str, description: str, body: Markup) -> Markup:
    return Markup(
        '<svg class="figure" role="img" viewBox="0 0 {} {}"><title>{}</title><desc>{}</desc>'
        "{}</svg>"
    ).format(width, height, title, description, body)


def _grid_line(left: float, right: float, y: float, label: str) -> Markup:
    return Markup(
        '<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>'
        '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
    ).format(left, right, left - 6, y + 3.5, label, y=y)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers within [low, high]."""
    step = _round_step((high - low) / most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]


def _ceiling(value: float) -> float:
    """The next round number."""
    step = _round_step(value / 4)
    return math.ceil(value / step - 1e-9) * step


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))
