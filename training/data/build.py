"""Build the store of a relational data set: pass over its tables, then write block by block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pyarrow as pa
from rich.progress import Progress

from llm4ehr.store import EPISODES_PER_GROUP, CodeInfo, StoreWriter
from llm4ehr.store_tables import SCHEMAS
from llm4ehr.variables import VARIABLE_INDEX, VARIABLES
from training.data.cleaning import finish
from training.data.extraction import Cohort, Items, Step, TableReader
from training.data.sources import SourceError, Tally
from training.data.spill import Spill
from training.progress import progress_bar


def build_store(
    reader: TableReader, store: Path, work: Path, *, progress: bool = True
) -> tuple[Step, ...]:
    """Write the store of a reader to `store`; returns the waterfall of the cohort.

    Spills stay in `work`, where a later run finds them. Raises SourceError.
    """
    tally = Tally()
    cohort = reader.cohort(tally)
    if cohort.stays.is_empty():
        raise SourceError(f"{reader.info.source}: no stay is left by the rules of the cohort")
    with progress_bar(disable=not progress) as bar:
        spills = {}
        for scan in reader.scans(cohort):
            spill = spills[scan.name] = Spill(scan, work / scan.name)
            task = bar.add_task(scan.name, total=scan.table.size, note="")
            spill.fill(
                lambda done, rows, task=task: bar.update(  # type: ignore[misc]
                    task, completed=done, note=f"{rows:,} rows"
                )
            )
            spill.add_to(tally)
        kept = _write_blocks(reader, cohort, spills, store, tally, bar)
    subjects = kept["subject_id"].n_unique()
    return (*cohort.waterfall, Step("with at least one observation", len(kept), subjects))


def _write_blocks(
    reader: TableReader,
    cohort: Cohort,
    spills: Mapping[str, Spill],
    store: Path,
    tally: Tally,
    bar: Progress,
) -> pl.DataFrame:
    """Write every block of stays; returns the stays that are in the store."""
    stays = cohort.stays.with_row_index("stay").with_columns(pl.col("stay").cast(pl.Int32))
    task = bar.add_task("writing stays", total=len(stays), note="")
    written = []
    with StoreWriter(store, reader.info) as writer:
        for first in range(0, len(stays), EPISODES_PER_GROUP):
            block = stays.slice(first, EPISODES_PER_GROUP)
            items = {name: s.read(first, first + len(block)) for name, s in spills.items()}
            made = reader.assemble(block, items, tally)
            made = finish(made, block, tally, limits=reader.limits)
            observed = block.join(made.observations, on="stay", how="semi", maintain_order="left")
            lost = made.events.join(observed, on="stay", how="anti")
            if not lost.is_empty():
                tally.refused["stay-without-observation:event"] += len(lost)
            if not observed.is_empty():
                writer.add_block(*_arrow_tables(observed, made))
                written.append(observed)
            bar.advance(task, len(block))
        if not written:
            raise SourceError(f"{reader.info.source}: no stay has a single observation")
        writer.close(refused=tally.refused, repaired=tally.repaired)
    return pl.concat(written)


def _arrow_tables(
    stays: pl.DataFrame, items: Items
) -> tuple[pa.Table, pa.Table, pa.Table, dict[str, CodeInfo]]:
    """A block as the tables of the store, and its codes."""
    ids = stays["episode_id"].to_list()
    row = stays.select("stay", _row=pl.int_range(pl.len(), dtype=pl.Int32))
    observations = items.observations.join(row, on="stay", maintain_order="left")
    events = items.events.join(row, on="stay", maintain_order="left")
    names = [v.name for v in VARIABLES]
    variable = observations["variable"].replace_strict(VARIABLE_INDEX, return_dtype=pl.Int32)
    codes = items.codes.sort("code")
    code_index = {code: i for i, code in enumerate(codes["code"].to_list())}
    code = events["code"].replace_strict(code_index, return_dtype=pl.Int32)

    def terms(index: pl.Series, of: list[str]) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(
            index.cast(pl.Int32).to_arrow(), pa.array(of, pa.string())
        )

    def table(name: str, columns: Mapping[str, pa.Array | pl.Series]) -> pa.Table:
        schema = SCHEMAS[name]
        arrays = [columns[field.name] for field in schema]
        arrow = [a.to_arrow() if isinstance(a, pl.Series) else a for a in arrays]
        return pa.Table.from_arrays(
            [a.cast(field.type) for a, field in zip(arrow, schema, strict=True)], schema=schema
        )

    return (
        table("episodes.parquet", {n: stays[n] for n in SCHEMAS["episodes.parquet"].names}),
        table(
            "observations.parquet",
            {
                "episode_id": terms(observations["_row"], ids),
                "variable": terms(variable, names),
                **{c: observations[c] for c in ("hours", "available_hours", "value", "priority")},
            },
        ),
        table(
            "events.parquet",
            {
                "episode_id": terms(events["_row"], ids),
                "code": terms(code, codes["code"].to_list()),
                **{c: events[c] for c in ("hours", "available_hours", "value")},
            },
        ),
        {c: CodeInfo(descriptor, unit) for c, descriptor, unit in codes.iter_rows()},
    )
