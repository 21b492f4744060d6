"""How the ways to calibrate the default bundle compare, on stays that chose nothing.

    python -m benchmarks.calibration --stores FOLDER

FOLDER holds the prepared stores by name. The maps are fitted on the fold that was held out when
the bundle was fine-tuned, as a fine-tuning run does it, and judged at hour 48 of set B of
PhysioNet 2012 and at all hours of the test splits of the demos. To tell a method from the luck of
that one fold, each is also fitted on random stays of set B and judged on the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import write
from llm4ehr.bundle import Bundle, load_bundle
from llm4ehr.calibration import OutputMap
from llm4ehr.offline import score_episodes
from training.calibrate import fit_interval, fit_map, one_row_a_stay
from training.config import FinetuneConfig, SourceConfig
from training.labels import LabelOptions, record_labels
from training.metrics import brier, calibration_error, calibration_line, physionet_h
from training.sources import open_sources, subject_fold

Rows = dict[str, NDArray[Any]]
"""One row an hour: `stay`, `hour`, `raw_TASK` and `label_TASK` (NaN = unknown)."""

DEMOS = ("eicu", "mimic3", "mimic4")
MORTALITY_HOUR = 47  # the last of the first 48
COVERAGE = 0.9
STAYS, DRAWS, SEED = 450, 200, 0
FITS: dict[str, tuple[Any, bool, bool]] = {
    "none": ("none", True, False),
    "Platt, every hour the same": ("platt", False, False),
    "Platt, every stay the same": ("platt", True, False),
    "temperature": ("temperature", True, False),
    "Platt by hour": ("platt", True, True),
    "isotonic by hour": ("isotonic", True, True),
    "Platt and isotonic by hour": ("platt_isotonic", True, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stores", type=Path, required=True)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--version", type=int, default=1)
    a = parser.parse_args()
    bundle = load_bundle(a.repository, "llm4ehr", a.version)
    data = bundle.metrics["provenance"]["finetuning"]["config"]["data"]
    of_run = [s | {"store": a.stores / Path(s["store"]).name} for s in data["sources"]]
    fold = data["validation_fold"]
    held_out = scored(bundle, of_run, lambda who: subject_fold(who, data["n_folds"]) == fold)
    challenge = {"store": a.stores / "physionet2012", "splits": ["b"], "labels": ["mortality"]}
    b = scored(bundle, [challenge])
    demos = scored(bundle, [{"store": a.stores / name, "splits": ["test"]} for name in DEMOS])
    fitted = {name: fitted_map(how, held_out) for name, how in FITS.items()}
    at_48 = b["hour"] == MORTALITY_HOUR
    rows = [
        {"calibration": name, "scored": "2012 B, hour 48"} | judged(of, taken(b, at_48))
        for name, of in fitted.items()
    ]
    rows += [
        {"calibration": name, "scored": "demos, all hours"} | judged(of, demos)
        for name, of in fitted.items()
    ]
    rows = [row | {"note": ""} for row in rows]
    rows += redrawn(b, STAYS, FITS) + redrawn(
        b, 2 * STAYS, {"Platt by hour": ("platt", True, True)}
    )
    write("calibration", rows + intervals(held_out, demos))


def scored(
    bundle: Bundle, configs: Sequence[dict[str, Any]], keep: Callable[[str], bool] = lambda _: True
) -> Rows:
    """Raw outputs and labels of the chosen patients of the sources."""
    parts: dict[str, list[NDArray[Any]]] = {}
    for source in open_sources([SourceConfig.model_validate(c) for c in configs], training=False):
        for block in source.store.blocks():
            records = [
                r
                for r in block
                if r.episode.episode_id in source.episode_ids and keep(source.key(r.subject_id))
            ]
            scores = score_episodes(bundle.network, [r.episode for r in records])
            for record, of in zip(records, scores, strict=True):
                n = len(of.hidden)
                made = record_labels(record, n, LabelOptions())
                columns: Rows = {
                    "stay": np.full(n, source.key(record.episode.episode_id)),
                    "hour": np.arange(n),
                }
                for task in ("mortality", "remaining_los"):
                    y = getattr(made, task)
                    columns[f"raw_{task}"] = of.raw[task][:, 0].astype(np.float64)
                    columns[f"label_{task}"] = y if source.labels_taken(task) else y * np.nan
                for name, column in columns.items():
                    parts.setdefault(name, []).append(column)
    return {name: np.concatenate(columns) for name, columns in parts.items()}


def taken(rows: Rows, which: NDArray[np.bool_]) -> Rows:
    return {name: column[which] for name, column in rows.items()}


def fitted_map(how: tuple[Any, bool, bool], rows: Rows) -> OutputMap:
    method, by_stay, by_hour = how
    return fit_map(
        method, rows["raw_mortality"], rows["label_mortality"], rows["stay"], rows["hour"],
        by_stay=by_stay, by_hour=by_hour,
    )  # fmt: skip


def judged(of: OutputMap, rows: Rows) -> dict[str, Any]:
    """Slope and intercept (ideal 1 and 0), calibration error, H and Brier score."""
    known = ~np.isnan(rows["label_mortality"])
    y = rows["label_mortality"][known].astype(np.float64)
    p = of(rows["raw_mortality"][known, None], rows["hour"][known])[:, 0]
    intercept, slope = calibration_line(y, p)
    # H is that of the challenge: one risk a patient.
    one_each = len(np.unique(rows["stay"][known])) == len(y)
    return {
        "rows": len(y),
        "slope": round(slope, 2),
        "intercept": round(intercept, 2),
        "ece": round(calibration_error(y, p), 4),
        "h": round(physionet_h(y, p), 1) if one_each else None,
        "brier": round(brier(y, p), 4),
    }


def redrawn(
    b: Rows, n_stays: int, fits: Mapping[str, tuple[Any, bool, bool]]
) -> list[dict[str, Any]]:
    """Fitted on random stays of set B, judged at hour 48 of the others: mean of DRAWS draws.

    `note` has the 2.5 and 97.5 percentiles of the slope; H is the median.
    """
    rng = np.random.default_rng(SEED)
    stays, of_row = np.unique(b["stay"], return_inverse=True)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in fits}
    for _ in range(DRAWS):
        drawn = np.zeros(len(stays), bool)
        drawn[rng.permutation(len(stays))[:n_stays]] = True
        fit_on = taken(b, drawn[of_row])
        others = taken(b, ~drawn[of_row] & (b["hour"] == MORTALITY_HOUR))
        for name, how in fits.items():
            found[name].append(judged(fitted_map(how, fit_on), others))
    rows = []
    for name, values in found.items():
        slopes = [v["slope"] for v in values]
        low, high = np.percentile(slopes, [2.5, 97.5])
        means = {k: round(float(np.mean([v[k] for v in values])), 4) for k in values[0]}
        rows.append(
            {"calibration": name, "scored": f"2012 B, hour 48, fitted on {n_stays} stays of it"}
            | means
            | {"rows": len(stays) - n_stays}
            | {"h": round(float(np.median([v["h"] for v in values])), 1)}
            | {"note": f"slope {low:.2f} to {high:.2f}"}
        )
    return rows


def intervals(held_out: Rows, demos: Rows) -> list[dict[str, Any]]:
    """Share of intervals of the remaining stay that hold the truth, one random hour a stay."""
    config = FinetuneConfig.model_validate(
        {
            "run": "run", "pretrained": "run", "tasks": {"remaining_los": 1.0}, "seed": SEED,
            "data": {"sources": [{"store": "s", "splits": ["a"]}], "cache": "c"},
            "coverage": COVERAGE,
        }
    )  # fmt: skip
    columns = ("raw_remaining_los", "label_remaining_los", "stay", "hour")
    interval = fit_interval(*(held_out[name] for name in columns), config)
    of = OutputMap(kind="log_days", interval=interval)
    low, high = of.bounds(demos["raw_remaining_los"][:, None], demos["hour"])
    y = demos["label_remaining_los"]
    inside = (low[:, 0] <= y) & (y <= high[:, 0])
    drawn = [one_row_a_stay(demos["stay"], ~np.isnan(y), seed) for seed in range(DRAWS)]
    rows = []
    starts = [0, *interval.first_hours[1:]]
    for start, end in [(0, 200), *zip(starts, [*starts[1:], 200], strict=True)]:
        among = [r[(demos["hour"][r] >= start) & (demos["hour"][r] < end)] for r in drawn]
        share = float(np.mean([inside[r].mean() for r in among]))
        n = round(float(np.mean([len(r) for r in among])))
        width = np.concatenate([(high - low)[r, 0] for r in among])
        error = 1.96 * np.sqrt(COVERAGE * (1 - COVERAGE) / n)
        rows.append(
            dict.fromkeys(("slope", "intercept", "ece", "h", "brier"))
            | {
                "calibration": f"interval, {COVERAGE:g}",
                "scored": f"demos, hours {start} to {end - 1}",
                "rows": n,
                "note": f"covers {share:.3f} (expected within {error:.3f} of {COVERAGE:g}); "
                f"median width {np.median(width):.0f} h",
            }
        )
    rows[0]["note"] += f"; bins {interval.first_hours}, stays {interval.stays}, half widths " + str(
        tuple(round(w, 3) for w in interval.half_widths)
    )
    return rows


if __name__ == "__main__":
    main()
