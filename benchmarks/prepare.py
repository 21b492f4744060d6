"""Time and memory of `training prepare mimic3`, by the size of the source.

`python -m benchmarks.prepare --source $LLM4EHR_DATA/mimic-iii-demo-1.4`

Sources of several sizes are made from the openly licensed demo of MIMIC-III: copies of its tables
with fresh subject, admission and stay ids, in the layout of the official files (gzip, upper-case
header, text in double quotes). Ids are spread so that every part of a table holds rows of stays
from the whole cohort, as in the official files. Each source is then prepared by a process of its
own; time and peak resident memory are what the kernel says of that process.

The alternative is prepare_pandas.py, the same cohort patient by patient in plain pandas, run in
turns with ours on the two smallest sources. It does less: see there.

The time for the full MIMIC-III is read off the line through the two largest sources.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import RESULTS, write

if TYPE_CHECKING:
    import polars as pl

ROOT = Path(__file__).parents[1]
MULTIPLIED = (
    "ICUSTAYS",
    "ADMISSIONS",
    "PATIENTS",
    "DIAGNOSES_ICD",
    "CHARTEVENTS",
    "LABEVENTS",
    "INPUTEVENTS_MV",
    "PROCEDUREEVENTS_MV",
)
DICTIONARIES = ("D_ITEMS", "D_LABITEMS", "D_ICD_DIAGNOSES")
IDS = ("subject_id", "hadm_id", "icustay_id")
# A fresh id is (id + copy * ID_STEP) * ID_FACTOR modulo ID_PRIME: unique, as ids are below the
# step, within 32 bits, and in no order, so neighbours by id are not copies of each other.
ID_STEP, ID_FACTOR, ID_PRIME = 300_000, 48_271, 2**31 - 1
MAX_SCALE = ID_PRIME // ID_STEP
NOT_TEXT = r"^[+-]?\d+(\.\d+)?([eE][+-]?\d+)?$|^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d$"

MIMIC3_CHART_ROWS = 330_712_483
TARGET_MINUTES = 15
TARGET_GIB = 4
SMALL = 10  # sources up to this scale are measured repeatedly, and with pandas
REPEATS = 3
# Disk for one copy of the demo: the source takes 12 MB, what `prepare` spills and writes 2 MB.
DISK_PER_COPY = 20 * 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    data = os.environ.get("LLM4EHR_DATA")
    parser.add_argument(
        "--source",
        type=Path,
        default=Path(data) / "mimic-iii-demo-1.4" if data else None,
        required=not data,
        help="folder of the MIMIC-III demo",
    )
    parser.add_argument("--scales", default="1,10,100,300", help="copies of the demo")
    parser.add_argument("--quick", action="store_true", help="scales 1 and 10 only")
    parser.add_argument("--scratch", type=Path, help="folder for sources and stores")
    parser.add_argument("--keep", action="store_true", help="leave the sources in the scratch")
    a = parser.parse_args()
    scales = sorted({int(s) for s in ("1,10" if a.quick else a.scales).split(",")})
    if not 0 < scales[0] <= scales[-1] <= MAX_SCALE:
        parser.error(f"scales must lie between 1 and {MAX_SCALE}")

    if a.scratch:
        a.scratch.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=a.scratch, prefix="prepare-"))
    try:
        small = [s for s in scales if s <= SMALL]
        _check_disk(scratch, sum(scales) if a.keep else max(sum(small), scales[-1]))
        rows = measure(a.source, small, scratch, REPEATS, pandas=True, keep=a.keep)
        for scale in scales[len(small) :]:
            rows += measure(a.source, [scale], scratch, 1, pandas=False, keep=a.keep)
    finally:
        if not a.keep:
            shutil.rmtree(scratch)
    _check_counts(rows)

    write("prepare", rows)
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {p: version(p) for p in ("polars", "pyarrow", "pandas")},
        **conclusions(rows),
    }
    print(json.dumps(about, indent=1))
    path = RESULTS / "prepare.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | about, indent=1) + "\n")


def measure(
    original: Path, scales: list[int], scratch: Path, repeats: int, *, pandas: bool, keep: bool
) -> list[dict[str, Any]]:
    """Rows of the table for these scales, which are run in turns; medians of the repeats."""
    sources = {}
    for scale in scales:
        _note(f"writing the source of scale {scale}")
        sources[scale] = make_source(original, scale, scratch / f"source-{scale}")
    programs = ("prepare", "pandas") if pandas else ("prepare",)
    runs: dict[tuple[str, int], list[Run]] = {(p, s): [] for p in programs for s in scales}
    for repeat in range(repeats):
        for (program, scale), done in runs.items():
            _note(f"{program}, scale {scale}, run {repeat + 1} of {repeats}")
            done.append(run(program, sources[scale].folder, scratch))
    if not keep:
        for source in sources.values():
            shutil.rmtree(source.folder)
    return [_row(program, scale, sources[scale], done) for (program, scale), done in runs.items()]


@dataclass(frozen=True, slots=True)
class Source:
    """A multiplied source: rows of each table, bytes of all files."""

    folder: Path
    rows: dict[str, int]
    bytes: int


def make_source(original: Path, copies: int, folder: Path) -> Source:
    """Write `copies` copies of the tables to `folder`."""
    # In a process of its own: a child counts the memory that its parent had at the fork as its own
    # peak, so this process has to stay small.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        rows = pool.submit(multiply, original, copies, folder).result()
    return Source(folder, rows, sum(file.stat().st_size for file in folder.iterdir()))


def multiply(original: Path, copies: int, folder: Path) -> dict[str, int]:
    """Write `copies` copies of the tables of `original` to `folder`; returns the rows of each.

    Memory holds one copy of one table, and the two that are being compressed.
    """
    folder.mkdir(parents=True)
    rows = {}
    with ThreadPoolExecutor(2) as pool:
        for name in (*MULTIPLIED, *DICTIONARIES):
            table = _read_as_text(original / f"{name}.csv.gz")
            n = copies if name in MULTIPLIED else 1
            rows[name] = n * len(table)
            with (folder / f"{name}.csv.gz").open("wb") as file:
                file.write(gzip.compress(_header(table), 1))
                for first in range(0, n, 2):
                    pair = range(first, min(first + 2, n))
                    for member in pool.map(lambda k, t=table: _copy(t, k), pair):
                        file.write(member)
    return rows


def _read_as_text(path: Path) -> pl.DataFrame:
    """A table whose fields are just as they shall be written; empty ones are null."""
    import polars as pl

    table = pl.read_csv(path, infer_schema=False).rename(str.lower)
    text = [c for c in table.columns if not table[c].drop_nulls().str.contains(NOT_TEXT).all()]
    quoted = [pl.format('"{}"', pl.col(c).str.replace_all('"', '""')).alias(c) for c in text]
    ids = [pl.col(c).cast(pl.Int64) for c in IDS if c in table.columns]
    return table.with_columns(quoted).with_columns(ids)


def _header(table: pl.DataFrame) -> bytes:
    return ",".join(f'"{c.upper()}"' for c in table.columns).encode() + b"\n"


def _copy(table: pl.DataFrame, k: int) -> bytes:
    """Copy number k of a table as a gzip member."""
    import polars as pl

    text = io.BytesIO()
    fresh_ids = [
        (pl.col(c) + k * ID_STEP) * ID_FACTOR % ID_PRIME for c in IDS if c in table.columns
    ]
    row_id = pl.int_range(pl.len()) + k * len(table) + 1
    table.with_columns(fresh_ids).with_columns(row_id=row_id).write_csv(
        text, include_header=False, quote_style="never"
    )
    return gzip.compress(text.getbuffer(), 1)


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a program took."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    passes: dict[str, float] = field(default_factory=dict)  # seconds
    spilled_bytes: int = 0
    stays: int = 0
    observations: int | None = None  # of `prepare`


def run(program: str, source: Path, scratch: Path) -> Run:
    """Run `prepare` or its baseline as a process of its own and remove what it wrote."""
    out = scratch / "out"
    work = scratch / "out.work"
    if program == "prepare":
        command = [sys.executable, "-m", "training", "prepare", "mimic3"]
    else:
        command = [sys.executable, str(Path(__file__).with_name("prepare_pandas.py"))]
    command += ["--source", str(source), "--out", str(out)]
    started = time.perf_counter()
    begun: dict[str, float] = {}  # the passes, by when they were first seen
    spilled = 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            seconds = time.perf_counter() - started
            if ended:
                break
            for name in _passes_begun(work):
                if name not in begun:
                    begun[name] = seconds
                    if name == "writing stays":
                        spilled = sum(f.stat().st_size for f in work.rglob("part-*"))
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{program} failed:\n{log.read().decode()}")
    passes = {}
    if program == "prepare":
        moments = [("start", 0.0), *begun.items(), ("", seconds)]
        passes = {name: end - began for (name, began), (_, end) in pairwise(moments)}
        counts = json.loads((out / "store.json").read_text())["counts"]
        stays, observations = counts["episodes"], counts["observations"]
    else:
        stays, observations = len(list(out.iterdir())) - 1, None  # and the labels
    shutil.rmtree(out)
    return Run(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
        passes=passes,
        spilled_bytes=spilled,
        stays=stays,
        observations=observations,
    )


def _passes_begun(work: Path) -> list[str]:
    """Names of the scans that have a spill, then of what comes after them."""
    try:
        with os.scandir(work) as entries:
            folders = {entry.name for entry in entries if entry.is_dir()}
    except FileNotFoundError:  # not made yet, or removed at the end
        return []
    spills = sorted(folders - {"store", "store.partial"})
    writing = ["writing stays"] if len(folders) > len(spills) else []
    return spills + writing + (["report and gates"] if "store" in folders else [])


def _row(program: str, scale: int, source: Source, runs: list[Run]) -> dict[str, Any]:
    chart_rows = source.rows["CHARTEVENTS"]
    seconds = statistics.median(r.seconds for r in runs)
    return {
        "program": program,
        "scale": scale,
        "chart_rows": chart_rows,
        "all_rows": sum(source.rows.values()),
        "source_mb": round(source.bytes / 1e6, 1),
        "stays": runs[0].stays,
        "observations": runs[0].observations,
        "runs": len(runs),
        "seconds": round(seconds, 2),
        "seconds_min_max": [round(f(r.seconds for r in runs), 2) for f in (min, max)],
        "cpu_seconds": round(statistics.median(r.cpu_seconds for r in runs), 2),
        "chart_rows_per_s": round(chart_rows / seconds),
        "peak_mib": round(max(r.peak_bytes for r in runs) / 2**20),
        "spilled_mb": round(runs[0].spilled_bytes / 1e6, 1),
        "pass_seconds": {
            name: round(statistics.median(r.passes[name] for r in runs), 2)
            for name in runs[0].passes
        },
    }


def conclusions(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours over pandas, and what the two largest scales say of the full MIMIC-III."""
    ours = {r["scale"]: r for r in rows if r["program"] == "prepare"}
    pandas = {r["scale"]: r for r in rows if r["program"] == "pandas"}
    found: dict[str, Any] = {
        "times_as_fast_as_pandas": {
            s: round(pandas[s]["seconds"] / ours[s]["seconds"], 2) for s in pandas
        },
        "memory_as_a_share_of_pandas": {
            s: round(ours[s]["peak_mib"] / pandas[s]["peak_mib"], 2) for s in pandas
        },
    }
    if len(ours) < 2:
        return found
    low, high = (ours[s] for s in sorted(ours)[-2:])
    per_row = (high["seconds"] - low["seconds"]) / (high["chart_rows"] - low["chart_rows"])
    fixed = high["seconds"] - per_row * high["chart_rows"]
    minutes = (fixed + per_row * MIMIC3_CHART_ROWS) / 60
    base = ours[SMALL] if SMALL in ours and high["scale"] > SMALL else low
    scaled = f"{high['scale']}x_over_{base['scale']}x"
    return found | {
        "fit": {"seconds": round(fixed, 2), "microseconds_per_chart_row": round(per_row * 1e6, 4)},
        "full_mimic3": {
            "chart_rows": MIMIC3_CHART_ROWS,
            "minutes": round(minutes, 1),
            "target_minutes": TARGET_MINUTES,
            "within_time": minutes < TARGET_MINUTES,
            "peak_gib_at_largest_scale": round(high["peak_mib"] / 1024, 2),
            "target_gib": TARGET_GIB,
            "within_memory": high["peak_mib"] < TARGET_GIB * 1024,
        },
        f"rows_per_s_{scaled}": round(high["chart_rows_per_s"] / base["chart_rows_per_s"], 3),
        f"peak_memory_{scaled}": round(high["peak_mib"] / base["peak_mib"], 3),
    }


def _check_counts(rows: list[dict[str, Any]]) -> None:
    """Raise RuntimeError unless each store has as many times the stays and items as its source."""
    ours = [r for r in rows if r["program"] == "prepare"]
    for count in ("stays", "observations"):
        each = {r["scale"]: r[count] / r["scale"] for r in ours}
        if len(set(each.values())) > 1:
            raise RuntimeError(f"{count} of one copy differ by the number of copies: {each}")


def _check_disk(folder: Path, copies: int) -> None:
    free = shutil.disk_usage(folder).free
    needed = copies * DISK_PER_COPY
    if free < needed:
        raise SystemExit(
            f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed; "
            "choose another --scratch or smaller --scales"
        )


def _note(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
