"""A unit's own tables, and their extraction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl

from training.data.extraction import Cohort, Items
from training.data.sources import Tally
from training.data.user_table.reader import UserTables, check

PAGE = Path(__file__).parents[3] / "docs" / "datasets" / "table.md"


STAYS = "episode_id,subject_id,end_hours,mortality,death_hours\n"


OBSERVATIONS = "episode_id,variable,hours,value,unit\n"


def read(source: Path) -> tuple[Cohort, Items, Tally]:
    """Everything that the reader gives, as one block."""
    tally = Tally()
    reader = UserTables(source)
    cohort = reader.cohort(tally)
    items = {
        scan.name: pl.concat(scan.select(chunk.frame, tally) for chunk in scan.table.chunks())
        for scan in reader.scans(cohort)
    }
    return cohort, reader.assemble(cohort.stays, items, tally), tally


def reasons(source: Path, rejected: Path | None = None) -> dict[str, dict[str, int]]:
    return {f.file: dict(f.refused) for f in check(source, rejected).files if f.refused}


def refused_rows(source: Path, tmp_path: Path) -> list[tuple[str, int, str, str]]:
    check(source, tmp_path / "rejected")
    rows = pl.read_csv(tmp_path / "rejected")
    return rows.select("file", "line", "column", "reason").rows()


def tables_in(tmp_path: Path) -> Callable[..., Path]:
    """`make(stays=..., observations=..., ...)`: text of the files, with usable defaults."""

    def make(**files: str) -> Path:
        defaults = {"stays": STAYS + "s1,p1,48,no,\n", "observations": OBSERVATIONS}
        for name, text in (defaults | files).items():
            (tmp_path / f"{name}.csv").write_text(text)
        return tmp_path

    return make
