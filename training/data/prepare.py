"""From a data set as published to an episode store, with its report and its quality gates."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm4ehr import variables
from llm4ehr.store import StoreError, StoreInfo, StoreWriter
from training.data import READERS, reader_for
from training.data.build import build_store
from training.data.extraction import Step
from training.data.report.build import build_report, write_report
from training.data.report.gates import check
from training.data.sources import Dataset, SourceError, Tally
from training.progress import track

OWN_DATA = ("meds", "table")
"""Formats rather than data sets: their stores can be given a name of their own."""

_MARK = "made_of.json"  # in the work folder
_NAME = re.compile("[a-z0-9][a-z0-9_.-]*")


def prepare(
    dataset: str,
    source: Path,
    out: Path,
    *,
    name: str | None = None,
    progress: bool = True,
    **options: Any,
) -> StoreInfo:
    """Read the data set of that name at `source` into a new store at `out`.

    `name` is what the store is called: for `OWN_DATA` alone, since rules and licences of a
    published data set hang on its name. `options` are those of its reader (`profile`, ...). The
    same source and options always give the same Parquet digests. Beside the store's files stand
    `report.html` and `report.json`. A run that was stopped leaves `out`.work and goes on from it.
    `progress` shows bars with the time left.

    Raises StoreError if `out` is in use, and SourceError for an unknown data set or option, a name
    that cannot be given, a malformed source, or one that fails the quality gates; then the report
    is at `out`.work.
    """
    if name is not None:
        _check_name(name, dataset)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out}: exists and is not an empty folder")
    refused_rows = out.absolute().with_name(out.name + ".rejected.csv")
    extra = {"rejected": refused_rows} if dataset == "table" else {}
    reader = reader_for(dataset, source, **options, **extra)
    if name is not None and not isinstance(reader, Dataset):
        reader.info = replace(reader.info, source=name)
    work = out.absolute().with_name(out.name + ".work")
    store = work / "store"
    _keep_if_same(work, dataset, source, {"name": name, **options})
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


def _check_name(name: str, dataset: str) -> None:
    if dataset not in OWN_DATA:
        raise SourceError(
            f"{dataset} keeps its name: a name can be given to {' and '.join(OWN_DATA)} only"
        )
    if not _NAME.fullmatch(name):
        raise SourceError(
            f"name {name!r}: use a to z, 0 to 9, '.', '_' and '-', a letter or digit first"
        )
    if name in READERS and name != dataset:
        raise SourceError(f"name {name!r}: that is the name of another data set")


def _keep_if_same(work: Path, dataset: str, source: Path, options: Mapping[str, Any]) -> None:
    """Keep the work of an earlier run only if it is of the same source, options and program.

    Raises StoreError if the folder is not one of ours.
    """
    program = hashlib.sha256()
    for file in (Path(variables.__file__), *sorted(Path(__file__).parent.rglob("*"))):
        if file.suffix in (".py", ".csv", ".yaml"):
            program.update(file.read_bytes())
    named = [value for value in options.values() if isinstance(value, Path)]
    files = {
        str(file): [file.stat().st_size, file.stat().st_mtime_ns]
        for file in (*named, source, *sorted(source.rglob("*")))
        if file.is_file() and not file.absolute().is_relative_to(work)
    }
    options = {k: str(v) for k, v in options.items()}
    of = json.dumps([dataset, str(source.absolute()), options, files, program.hexdigest()])
    mark = work / _MARK
    if work.exists() and not mark.exists() and any(work.iterdir()):
        raise StoreError(f"{work}: holds files of another origin")
    if mark.exists() and mark.read_text() != of:
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
