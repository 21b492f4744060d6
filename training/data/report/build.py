"""The extraction report: what is in an episode store, beside what was expected of its source.

`build_report` reads a store once and returns the report as JSON-able values, with the results of
the quality gates (`gates`); `write_report` writes it as JSON and as one HTML page.
The same store always gives the same report. It holds no row and no id of a patient, but small
counts are not suppressed: it falls under the same agreement as its source.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from llm4ehr.store_tables import INFO_FILE, StoreInfo
from llm4ehr.variables import VARIABLES, Variable
from training.data.phenotypes import PHENOTYPES
from training.data.report.gates import is_unreadable, judge, short_digests
from training.data.report.labels import (
    COUNTS,
    LOS_BUCKETS,
    LabelCounts,
    count_labels,
    los_bucket,
    phenotype_counts,
)
from training.data.report.page import render
from training.data.report.scan import Scanned, histogram, quantiles, scan_store

if TYPE_CHECKING:
    from training.data.extraction import Expected, Step

JSON_FILE = "report.json"
HTML_FILE = "report.html"
TOP_CODES = 30
_SPLITS = ("split", "benchmark_split")
_NO_ROWS = ("table-absent",)  # reasons that count something else


def build_report(store: Path, waterfall: Sequence[Step], expected: Expected) -> dict[str, Any]:
    """The report of a store. Memory: one row group, the table of stays, and counts."""
    info = StoreInfo.from_json((store / INFO_FILE).read_text(encoding="utf-8"))
    scanned = scan_store(store)
    stays = pl.read_parquet(store / "episodes.parquet").join(
        scanned.first_hours, on="episode_id", how="left", maintain_order="left"
    )
    group = "split" if stays["benchmark_split"].is_null().all() else "benchmark_split"
    stay_hours = int(stays["n_hours"].cast(pl.Int64).sum())
    report: dict[str, Any] = {
        "description": _description(info, stays, stay_hours),
        "waterfall": _waterfall(waterfall),
        "splits": _splits(stays),
        "stays": _stays(stays),
        "variables": [_variable(v, scanned, len(stays), stay_hours, expected) for v in VARIABLES],
        "events": _events(scanned, store, len(stays)),
        "labels": _labels(stays, count_labels(stays, group), group),
        "refused": _refused(info),
        "repaired": [_reason(key, rows) for key, rows in sorted(info.repaired.items())],
        "faults": _faults(scanned.faults),
    }
    report["published"] = _published(report, expected)
    report["gates"] = judge(report, store, expected)
    return report


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write `report.json` and `report.html` into an existing folder."""
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / JSON_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / HTML_FILE).write_text(render(report), encoding="utf-8")


def _description(info: StoreInfo, stays: pl.DataFrame, stay_hours: int) -> dict[str, Any]:
    counts = {
        "stays": len(stays),
        "subjects": stays["subject_id"].n_unique(),
        "stay_hours": stay_hours,
        "observations": info.counts["observations"],
        "events": info.counts["events"],
    }
    return {
        "source": info.source,
        "licence": info.licence,
        "citation": info.citation,
        "created_by": info.created_by,
        "schema_version": info.schema_version,
        "options": dict(sorted(info.options.items())),
        "label_notes": dict(sorted(info.label_notes.items())),
        "counts": counts,
        "digests": short_digests(info.digests),
    }


def _waterfall(steps: Sequence[Step]) -> list[dict[str, Any]]:
    rows = []
    for before, step in zip((None, *steps), steps, strict=False):
        rows.append(
            {
                "rule": step.rule,
                "stays": step.stays,
                "subjects": step.subjects,
                "dropped_stays": before.stays - step.stays if before else None,
                "dropped_subjects": before.subjects - step.subjects if before else None,
                "published_stays": step.published_stays,
                "ratio": _ratio(step.stays, step.published_stays),
            }
        )
    return rows


def _splits(stays: pl.DataFrame) -> dict[str, Any]:
    parts: dict[str, Any] = {"overlap": {}}
    for column in _SPLITS:
        counted = (
            stays.group_by(name=pl.col(column))
            .agg(
                stays=pl.len(),
                subjects=pl.n_unique("subject_id"),
                stay_hours=pl.col("n_hours").cast(pl.Int64).sum(),
                mortality=pl.col("mortality").mean(),
            )
            .sort("name", nulls_last=True)
        )
        named = counted["name"].is_not_null().any()
        parts[column] = _rounded_rows(counted) if named else []
        splits_of = stays.drop_nulls(column).group_by("subject_id").agg(pl.n_unique(column))
        parts["overlap"][column] = splits_of.filter(pl.col(column) > 1).height
    return parts


def _stays(stays: pl.DataFrame) -> dict[str, Any]:
    """Static facts: quantiles of the numbers, shares of the categories."""
    numbers = []
    for column in ("age_years", "n_hours", "los_hours", "height_cm", "weight_kg"):
        known = stays[column].drop_nulls().cast(pl.Float64)
        low, mid, high = (known.quantile(q, "lower") for q in (0.05, 0.5, 0.95))
        numbers.append(
            {"name": column, "known": _ratio(len(known), len(stays)), "mean": _g(known.mean())}
            | {"q05": _g(low), "q50": _g(mid), "q95": _g(high)}
        )
    categories = {
        column: [
            {"name": name, "stays": n, "share": _ratio(n, len(stays))}
            for name, n in stays.group_by(column)
            .len()
            .sort("len", column, descending=[True, False], nulls_last=True)
            .iter_rows()
        ]
        for column in ("sex", "unit_type")
    }
    return {"numbers": numbers, "categories": categories}


def _variable(
    variable: Variable, scanned: Scanned, n_stays: int, stay_hours: int, expected: Expected
) -> dict[str, Any]:
    name = variable.name
    found = scanned.variables.row(by_predicate=pl.col("variable") == name, named=True) if (
        name in scanned.variables["variable"]
    ) else dict.fromkeys(scanned.variables.columns, 0)  # fmt: skip
    counts = scanned.values.filter(pl.col("variable") == name)
    hours = found["hours"]
    mean = variable.normal + found["sum"] / hours if hours else None
    variance = found["squares"] / hours - (found["sum"] / hours) ** 2 if hours else None
    q01, q50, q99 = quantiles(counts, "value", (0.01, 0.5, 0.99))
    published = {
        figure: expected.published.get(f"{figure}.{name}") for figure in ("observed", "mean")
    }
    return {
        "name": name,
        "title": variable.title,
        "unit": variable.unit,
        "absent_in_source": name in expected.absent_variables,
        "values": found["n"],
        "values_per_hour": _ratio(found["n"], stay_hours),
        "stays_share": _ratio(found["stays"], n_stays),
        "hours_observed": hours,
        "observed_share": _ratio(hours, stay_hours),
        "charted_share": _ratio(found["charted_hours"], stay_hours),
        "mean": _g(mean),
        "std": _g(None if variance is None else math.sqrt(max(variance, 0.0))),
        "quantiles": {"q01": q01, "q50": q50, "q99": q99},
        "limits": [variable.low, variable.high],
        "plausible": [variable.plausible_low, variable.plausible_high],
        "implausible_share": _ratio(found["implausible"], found["n"]),
        "histogram": histogram(counts),
        "delay": _delay(scanned.delays, name, found["n"]),
        "published": published,
    }


def _delay(delays: pl.DataFrame, item: str, n_items: int) -> dict[str, Any]:
    """How long items were not known yet; of the rows that tell when they were available."""
    counts = delays.filter(pl.col("item") == item)
    median, p95 = quantiles(counts, "minutes", (0.5, 0.95))
    rows = int(counts["n"].sum())
    return {
        "rows": rows,
        "share": _ratio(rows, n_items),
        "median_hours": _g(None if median is None else median / 60),
        "p95_hours": _g(None if p95 is None else p95 / 60),
    }


def _events(scanned: Scanned, store: Path, n_stays: int) -> dict[str, Any]:
    meaning = pl.read_parquet(store / "codes.parquet")
    ranked = scanned.codes.sort("n", "code", descending=[True, False])
    total = int(ranked["n"].sum())
    top = []
    for row in ranked.head(TOP_CODES).join(meaning, on="code", how="left").iter_rows(named=True):
        values = scanned.code_values.filter(pl.col("code") == row["code"])
        top.append(
            {key: row[key] for key in ("code", "descriptor", "unit", "n", "stays")}
            | {
                "stays_share": _ratio(row["stays"], n_stays),
                "valued_share": _ratio(row["valued"], row["n"]),
                "median": quantiles(values, "value", (0.5,))[0],
            }
        )
    return {
        "rows": total,
        "codes": len(ranked),
        "codes_described": len(meaning),
        "top_share": _ratio(sum(row["n"] for row in top), total),
        "delay": _delay(scanned.delays, "event", total),
        "top": top,
    }


def _labels(stays: pl.DataFrame, counted: LabelCounts, group: str) -> dict[str, Any]:
    died, known = stays["mortality"], stays["los_hours"].drop_nulls()
    groups = counted.instances.rename({"group": "name"}).to_dicts()
    everything = {count: sum(g[count] for g in groups) for count in COUNTS}
    having = phenotype_counts(stays)
    coded = everything["phenotyping_stays"]
    names = (*PHENOTYPES, *sorted(having.keys() - set(PHENOTYPES))) if coded else ()
    by_bucket = dict(
        known.to_frame().group_by(bucket=los_bucket("los_hours")).len().iter_rows()
    )  # fmt: skip
    return {
        "outcomes": {
            "died": int(died.sum() or 0),
            "survived": int((~died).sum() or 0),
            "death_time_known": stays.filter(pl.col("mortality"))["death_hours_low"].count(),
            "los_known": len(known),
        },
        "instances": {"column": group, "all": everything, "groups": groups},
        "decompensation_by_hour": _rounded_rows(
            counted.by_hour.with_columns(
                share=pl.col("positive") / (pl.col("positive") + pl.col("negative"))
            ).fill_nan(None)
        ),
        "los_days": [
            {"days": b, "stays": by_bucket.get(b, 0), "hours_left": counted.remaining_days[b]}
            for b in LOS_BUCKETS
        ],
        "phenotypes": [
            {"name": n, "stays": having.get(n, 0), "share": _ratio(having.get(n, 0), coded)}
            for n in names
        ],
    }


def _refused(info: StoreInfo) -> dict[str, Any]:
    """Rows that were left out, by reason; shares are of all rows that were looked at."""
    refused = sum(n for key, n in info.refused.items() if not key.startswith(_NO_ROWS))
    seen = info.counts["observations"] + info.counts["events"] + refused
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for key, rows in info.refused.items():
        detail = _reason(key, rows)
        by_reason.setdefault(detail.pop("reason"), []).append(detail)
    reasons = [
        {
            "reason": reason,
            "rows": (rows := sum(d["rows"] for d in details)),
            "share": None if reason in _NO_ROWS else _ratio(rows, seen),
            "unreadable": is_unreadable(reason),
            "details": sorted(details, key=lambda d: (-d["rows"], d["name"])),
        }
        for reason, details in by_reason.items()
    ]
    reasons.sort(key=lambda r: (-r["rows"], r["reason"]))
    return {"rows": refused, "rows_seen": seen, "share": _ratio(refused, seen), "reasons": reasons}


def _reason(key: str, rows: int) -> dict[str, Any]:
    reason, _, name = key.partition(":")
    return {"reason": reason, "name": name, "rows": rows}


def _faults(faults: pl.DataFrame) -> list[dict[str, Any]]:
    return (
        faults.group_by("fault", "item")
        .agg(rows=pl.col("n").sum(), patients=pl.n_unique("subject_id"))
        .sort("fault", "item")
        .to_dicts()
    )


def figures(report: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a report that can be compared with published ones, by name.

    Counts are those of the whole store; `observed`, `mean` and `phenotype` are rates, which do not
    grow with it. `observed` goes by the time of the values, as published shares do: they know of no
    time at which a value became available.
    """
    counts, instances = report["description"]["counts"], report["labels"]["instances"]["all"]
    return (
        {
            "stays": counts["stays"],
            "subjects": counts["subjects"],
            "mortality.stays": instances["mortality_stays"],
            "mortality.positive": instances["mortality_positive"],
            "decompensation.positive": instances["decompensation_positive"],
            "decompensation.negative": instances["decompensation_negative"],
            "remaining_los.hours": instances["remaining_los_hours"],
            "phenotyping.stays": instances["phenotyping_stays"],
        }
        | {f"phenotype.{p['name']}": p["share"] for p in report["labels"]["phenotypes"]}
        | {f"observed.{v['name']}": v["charted_share"] for v in report["variables"]}
        | {f"mean.{v['name']}": v["mean"] for v in report["variables"]}
    )


def _published(report: Mapping[str, Any], expected: Expected) -> list[dict[str, Any]]:
    """Published figures beside ours.

    `ratio` is ours / published. `per_stay` compares counts per stay of the store, so that a part of
    a data set can be held against the whole; of a rate it is the ratio itself.
    """
    ours = figures(report)
    scale = _ratio(ours["stays"], expected.published.get("stays"))
    rows = []
    for figure, published in expected.published.items():
        ratio = _ratio(ours.get(figure), published)
        is_rate = figure.startswith(("phenotype.", "observed.", "mean."))
        rows.append(
            {
                "figure": figure,
                "ours": ours.get(figure),
                "published": published,
                "is_rate": is_rate,
                "ratio": ratio,
                "per_stay": ratio if is_rate else _ratio(ratio, scale),
            }
        )
    return rows


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else _g(part / whole)


def _g(number: Any) -> float | None:
    """Six significant digits: the order in which a sum was taken does not show."""
    return None if number is None else float(f"{number:.6g}")


def _rounded_rows(frame: pl.DataFrame) -> list[dict[str, Any]]:
    rows: Iterable[dict[str, Any]] = frame.iter_rows(named=True)
    return [{k: _g(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
