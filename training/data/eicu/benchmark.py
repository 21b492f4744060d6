"""What the eICU benchmark of Sheikhalishahi et al. (2020) does otherwise: cohort, values, times.

Its shift of glucose by one row is not repeated: it writes a result at an earlier time than it was
measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import polars as pl

from training.data.csv_table import CsvTable
from training.data.eicu.cohort import OLDEST_YEARS, PUBLISHED_ROWS, step
from training.data.eicu.files import KEY, number, whole
from training.data.eicu.observations import (
    LAB_VARIABLES,
    OBSERVATION_COLUMNS,
    charted_items,
    charted_values,
    of_labs,
)
from training.data.extraction import Step
from training.data.sources import Tally

PUBLISHED_STAYS = 73_718
RECORDS = (15, 200)
"""Hours with data that a stay has."""

CLIP: Mapping[str, tuple[float, float]] = {
    "dbp": (0, 375),
    "sbp": (0, 375),
    "mbp": (14, 330),
    "fio2": (0.15, 1.10),
    "hr": (0, 350),
    "temp": (26, 45),
    "ph": (6.3, 10),
    "rr": (0, 100),
    "spo2": (0, 100),
    "glucose": (33, 1200),
    "gcs_total": (2, 16),
}
"""Values beyond these become these."""


def benchmark_stays(
    patients: pl.DataFrame, charting: CsvTable, labs: CsvTable
) -> tuple[pl.DataFrame, tuple[Step, ...]]:
    """The cohort of the benchmark. Passes over both tables to count hours with data."""
    steps = [step("all unit stays", patients, PUBLISHED_ROWS)]
    stays = patients.filter(pl.col("age_years").is_between(18, OLDEST_YEARS - 1))
    steps.append(step("age 18 to 89", stays))
    stays = stays.filter(
        pl.len().over("uniquepid") == 1, pl.col("unitdischargeoffset").is_not_null()
    )
    steps.append(step("the only unit stay of its patient", stays))
    charted, drawn = _hours(_charted(charting), stays), _hours(_drawn(labs), stays)
    stays = stays.join(charted, on=KEY, how="semi").join(drawn, on=KEY, how="semi")
    steps.append(step("with nurse charting and laboratory", stays))
    records = pl.concat([charted, drawn]).unique().group_by(KEY).len("records")
    stays = stays.join(records.filter(pl.col("records").is_between(*RECORDS)), on=KEY, how="semi")
    steps.append(step("15 to 200 hourly records", stays, PUBLISHED_STAYS))
    return stays, tuple(steps)


def observations(items: Mapping[str, pl.DataFrame], tally: Tally) -> pl.DataFrame:
    """The observations of a block: nurse charting and laboratory alone, known at once, clipped."""
    columns = ("stay", "variable", "hours", "value")
    found = pl.concat(
        [
            charted_values(items["nurseCharting"]).select(columns),
            of_labs(items["lab"], tally).select(columns),
        ]
    )
    # Of values of one minute, arterial or cuff, the largest.
    largest = found.group_by("stay", "variable", "hours").agg(pl.col("value").max())
    if len(largest) < len(found):
        tally.refused["second-source:observation"] += len(found) - len(largest)
    percent = (pl.col("variable") == "fio2") & (pl.col("value") > 1)
    values = largest.with_columns(
        value=pl.when(percent).then(pl.col("value") / 100).otherwise("value")
    )
    low = pl.col("variable").replace_strict({v: float(low) for v, (low, _) in CLIP.items()})
    high = pl.col("variable").replace_strict({v: float(high) for v, (_, high) in CLIP.items()})
    clipped = values.with_columns(beyond=~pl.col("value").is_between(low, high)).with_columns(
        value=pl.col("value").clip(low, high)
    )
    for variable, n in clipped.filter("beyond").group_by("variable").len().iter_rows():
        tally.repaired[f"clipped:{variable}"] += n
    return clipped.with_columns(
        available_hours=pl.lit(None, pl.Float64), priority=pl.lit(0, pl.Int8)
    ).select(OBSERVATION_COLUMNS)


def _charted(charting: CsvTable) -> Iterator[pl.DataFrame]:
    for frame in whole(charting, "hours with nurse charting"):
        rows = charted_items(frame, benchmark=True).drop_nulls("value")
        yield rows.select(KEY, minutes="nursingchartoffset")


def _drawn(labs: CsvTable) -> Iterator[pl.DataFrame]:
    for frame in whole(labs, "hours with results"):
        value = pl.coalesce("labresult", number(pl.col("labresulttext")))
        rows = frame.filter(pl.col("labname").is_in(LAB_VARIABLES), value.is_not_null())
        yield rows.select(KEY, minutes="labresultoffset")


def _hours(rows: Iterator[pl.DataFrame], stays: pl.DataFrame) -> pl.DataFrame:
    """KEY and hour, of every hour of a stay with data.

    The benchmark cuts the decimals off, so the hour before admission and the one after it are one.
    """
    found = [
        part.join(stays, on=KEY, how="semi")
        .select(KEY, hour=(pl.col("minutes") / 60).cast(pl.Int32))
        .unique()
        for part in rows
    ]
    return pl.concat(found).unique()
