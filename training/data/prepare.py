"""From a data set as published to an episode store, with its report and its quality gates."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm4ehr.store import StoreError, StoreInfo, StoreWriter
from training.data import reader_for
from training.data.build import build_store
from training.data.extraction import Step
from training.data.gates import check
from training.data.report import build_report, write_report
from training.data.sources import Dataset, SourceError, Tally
from training.progress import track


def prepare(
    dataset: str, source: Path, out: Path, *, progress: bool = True, **options: Any
) -> StoreInfo:
    """Read the data set of that name at `source` into a new store at `out`.

    `options` are those of its reader (`profile`, ...). The same source and options always give the
    same Parquet digests. Beside the store's files stand `report.html` and `report.json`. A run that
    was stopped leaves `out`.work and goes on from it. `progress` shows bars with the time left.

    Raises StoreError if `out` is in use, and SourceError for an unknown data set or option, a
    malformed source, or one that fails the quality gates; then the report is at `out`.work.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out}: exists and is not an empty folder")
    refused_rows = out.absolute().with_name(out.name + ".rejected.csv")
    extra = {"rejected": refused_rows} if dataset == "table" else {}
    reader = reader_for(dataset, source, **options, **extra)
    work = out.absolute().with_name(out.name + ".work")
    store = work / "store"
    _keep_if_same(work, dataset, source, options)
    if store.exists():
        shutil.rmtree(store)
    if isinstance(reader, Dataset):
        waterfall = _from_records(reader, store, dataset, progress)
    else:
        waterfall = build_store(reader, store, work, progress=progress)
    report = build_report(store, waterfall, reader.expected)
    if failed := check(report, store, reader.expected):
        write_report(report, work)
        raise SourceError(f"{dataset}: {'; '.join(failed)}. See {work / 'report.html'}")
    write_report(report, store)
    if out.exists():
        out.rmdir()
    store.replace(out)
    shutil.rmtree(work)
    return StoreInfo.from_json((out / "store.json").read_text())


def _keep_if_same(work: Path, dataset: str, source: Path, options: Mapping[str, Any]) -> None:
    """Keep the work of an earlier run only if it is of the same source, options and program."""
    program = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*")):
        if file.suffix in (".py", ".csv", ".yaml"):
            program.update(file.read_bytes())
    named = [value for value in options.values() if isinstance(value, Path)]
    files = {
        str(file): [file.stat().st_size, file.stat().st_mtime_ns]
        for file in (*named, source, *sorted(source.rglob("*")))
        if file.is_file()
    }
    options = {k: str(v) for k, v in options.items()}
    of = json.dumps([dataset, str(source.absolute()), options, files, program.hexdigest()])
    mark = work / "made_of.json"
    if work.exists() and (not mark.exists() or mark.read_text() != of):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    mark.write_text(of)


def _from_records(reader: Dataset, store: Path, dataset: str, progress: bool) -> tuple[Step, ...]:
    tally = Tally()
    records = reader.records(tally)
    try:
        with StoreWriter(store, reader.info, codes=reader.codes) as writer:
            for record in track(records, dataset, reader.n_episodes) if progress else records:
                writer.add(record)
            info = writer.close(refused=tally.refused, repaired=tally.repaired)
    except BaseException:
        shutil.rmtree(store.parent)  # there is nothing that a later run could go on from
        raise
    n = info.counts["episodes"]
    return (Step("stays of the source", n, n),)
