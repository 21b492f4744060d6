"""The extraction report as one HTML page: words and numbers of a report, laid out by a template."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from training.data.report import figures

_TEMPLATE = "report.html.jinja"
_MOST_LISTED = 5  # in the verdict
_UNITS = {
    "mm[Hg]": "mmHg",
    "Cel": "°C",
    "1": "fraction",
    "[pH]": "pH",
    "{score}": "points",
    "10*3/uL": "10³/µL",
}
_NONE = "–"


def render(report: Mapping[str, Any]) -> str:
    """The page: one file without scripts and without anything to load."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": _count,
        "percent": _percent,
        "number": _number,
        "duration": _duration,
        "ratio": lambda ratio: _NONE if ratio is None else f"{ratio:#.3g}".rstrip("."),
        "unit": lambda unit: _UNITS.get(unit, unit) if unit else "",
        "figure_name": _figure_name,
        "amount": _amount,
    }
    environment.globals |= {
        "bar": figures.bar,
        "histogram": figures.histogram,
        "decompensation": figures.decompensation,
    }
    template = environment.from_string(
        files("training.data.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    )
    return template.render(
        report,
        published_stays=next(
            (row["published"] for row in report["published"] if row["figure"] == "stays"), None
        ),
        published_of={row["figure"]: row["published"] for row in report["published"]},
        furthest=_furthest(report),
        most_refused=report["refused"]["reasons"][:_MOST_LISTED],
    )


def _furthest(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The figures furthest from the published ones, by the ratio per stay."""

    def distance(row: Mapping[str, Any]) -> float:
        ratio = row["per_stay"]
        return abs(math.log(ratio)) if ratio else math.inf

    # How many stays there are is no figure per stay; it is named beside the list.
    rows = [r for r in report["published"] if r["figure"] != "stays" and r["per_stay"] is not None]
    return sorted(rows, key=distance, reverse=True)[:_MOST_LISTED]


def _count(number: int | None) -> str:
    return _NONE if number is None else f"{number:,}"


def _percent(share: float | None) -> str:
    if share is None:
        return _NONE
    if share == 0:
        return "0 %"
    if share < 0.0001:
        return "< 0.01 %"
    return f"{100 * share:.2f} %" if share < 0.1 else f"{100 * share:.1f} %"


def _number(number: float | None) -> str:
    if number is None:
        return _NONE
    if abs(number) >= 10_000 or float(number).is_integer():
        return f"{number:,.0f}"
    return f"{number:.4g}"


def _duration(hours: float | None) -> str:
    if hours is None:
        return _NONE
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:.3g} h"


def _amount(row: Mapping[str, Any], key: str) -> str:
    """A published figure, or ours beside it: shares in percent."""
    if row["figure"].startswith(("observed.", "phenotype.")):
        return _percent(row[key])
    return _number(row[key])


def _figure_name(figure: str) -> str:
    """`decompensation.positive` in words."""
    what, _, of = figure.partition(".")
    if what == "observed":
        return f"share of stay-hours with {of}"
    if what == "mean":
        return f"mean of {of}"
    if what == "phenotype":
        return f"phenotype {of}"
    return " ".join((what, of)).replace("_", " ").strip()
