"""A store as a MEDS 0.4 data set, which `training.data.meds.reader` reads back.

What is kept: observations, events, static facts, mortality, the exact time of a death, lengths of
stay and record, splits. What is not: phenotypes (they are labels, see `export`), a
time of death that is known only as an interval, and values beyond single precision.

A patient dies once. Where several ICU stays are of the hospital stay that ended in death, all have
it in the store, each in hours since its own admission; the calendar does not keep the time between
them, so only the last of them on it has `MEDS_DEATH`. The others keep that they ended in death.

`time` is when a value was known, so that whoever cuts the data at a prediction time sees no future;
`effective_time`, a column of our own, is when it was true, where that was earlier.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from llm4ehr import __version__
from llm4ehr.store import EpisodeStore, StoreError
from llm4ehr.variables import VARIABLES
from training.data.meds.calendar import EPOCH, US_PER_HOUR, new_folder, places
from training.data.meds.stays import DAYS_PER_YEAR, SPLITS

MEDS_VERSION = "0.4.1"
SUBJECTS_PER_FILE = 2048

_DATA = pa.schema(
    [
        pa.field("subject_id", pa.int64(), nullable=False),
        pa.field("time", pa.timestamp("us")),
        pa.field("code", pa.string(), nullable=False),
        pa.field("numeric_value", pa.float32()),
        pa.field("effective_time", pa.timestamp("us")),
        pa.field("priority", pa.int8()),  # of observations: 0 preferred, 1 fallback
    ]
)
_CODES = pa.schema(
    [
        pa.field("code", pa.string(), nullable=False),
        pa.field("description", pa.string()),
        pa.field("unit", pa.string()),  # UCUM
        pa.field("parent_codes", pa.list_(pa.string())),
    ]
)
_SPLITS = pa.schema(
    [
        pa.field("subject_id", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)
# Of data sets with splits of their own: those that nobody may train on.
_HELD_OUT = {"physionet2012": {"c": "held_out"}}
_OF_STAYS = {
    "MEDS_BIRTH": "birth",
    "MEDS_DEATH": "death, at a time that is known exactly",
    "GENDER//F": "female",
    "GENDER//M": "male",
    "ICU_ADMISSION//coronary": "admission to a coronary care unit",
    "ICU_ADMISSION//cardiac_surgery": "admission to a cardiac surgery unit",
    "ICU_ADMISSION//medical": "admission to a medical intensive care unit",
    "ICU_ADMISSION//surgical": "admission to a surgical intensive care unit",
    "ICU_ADMISSION//other": "admission to another intensive care unit",
    "ICU_ADMISSION//UNK": "admission to an intensive care unit",
    "ICU_DISCHARGE": "end of the labelled length of stay",
    "RECORD_END": "the record ends here",
    "HOSPITAL_DISCHARGE//ALIVE": "left hospital alive, not before this time",
    "HOSPITAL_DISCHARGE//DIED": "died in hospital, not before this time",
    "HEIGHT//cm": "height at admission",
    "WEIGHT//kg": "weight at admission",
}


def write_dataset(store: Path, out: Path) -> int:
    """Write a store as a MEDS data set in the folder `out`; returns the number of events.

    Files: `data/K.parquet` with all of some subjects, `metadata/` with `codes.parquet`,
    `subject_splits.parquet`, `dataset.json` and `stays.parquet` (which stay stands where). Memory
    holds one block of the store, or one file. Raises StoreError; also if `out` is in use.
    """
    opened = EpisodeStore.open(store)
    with new_folder(out) as folder:
        return _write(opened, folder)


def _write(store: EpisodeStore, out: Path) -> int:
    where = places(store)
    stays = (
        pl.DataFrame(store.labels)
        .join(
            where.drop("n_hours", "source_subject_id").rename({"subject_id": "_subject"}),
            on="episode_id",
            maintain_order="left",
        )
        .with_columns(_is_last=pl.col("start") == pl.col("start").max().over("_subject"))
    )
    file_of = stays.select("_subject").unique().sort("_subject")
    file_of = file_of.with_columns(_file=pl.int_range(pl.len()) // SUBJECTS_PER_FILE)
    parts = out / "parts"
    first = 0
    for k in range(store.n_blocks):
        tables = [
            _row_group(store.path / f"{name}.parquet", k) for name in ("observations", "events")
        ]
        n = pq.ParquetFile(store.path / "episodes.parquet").metadata.row_group(k).num_rows
        block = stays.slice(first, n)
        first += n
        rows = pl.concat(
            [_of_stays(block), _observations(tables[0], block), _events(tables[1], block)]
        )
        for (file,), part in (
            rows.join(file_of, left_on="subject_id", right_on="_subject")
            .partition_by("_file", as_dict=True, include_key=False)
            .items()
        ):
            (parts / str(file)).mkdir(parents=True, exist_ok=True)
            part.write_parquet(parts / str(file) / f"{k}.parquet")
    n_rows, used = _write_files(parts, out / "data")
    shutil.rmtree(parts)
    _write_metadata(store, stays, used, out / "metadata")
    where.write_parquet(out / "metadata" / "stays.parquet")
    return n_rows


def _write_files(parts: Path, data: Path) -> tuple[int, set[str]]:
    """Join the parts of each file, sorted; returns the number of rows and the codes used."""
    data.mkdir()
    n_rows = 0
    used: set[str] = set()
    for folder in parts.iterdir():
        rows = pl.concat(pl.read_parquet(part) for part in sorted(folder.iterdir()))
        rows = rows.sort(
            "subject_id", "time", "effective_time", "code", "numeric_value", "priority",
            nulls_last=False,
        )  # fmt: skip
        pq.write_table(rows.to_arrow().cast(_DATA), data / f"{folder.name}.parquet")
        n_rows += len(rows)
        used.update(rows["code"].unique())
    return n_rows, used


def _row_group(path: Path, k: int) -> pl.DataFrame:
    with pq.ParquetFile(path) as file:
        return pl.DataFrame(file.read_row_group(k))


def _microseconds(hours: pl.Expr) -> pl.Expr:
    """Hours as whole microseconds. Rounding never moves a time into the next hour."""
    nearest = (hours * US_PER_HOUR).round().cast(pl.Int64)
    return pl.min_horizontal(nearest, (hours.floor().cast(pl.Int64) + 1) * US_PER_HOUR - 1)


def _time(hours: pl.Expr) -> pl.Expr:
    return pl.col("start") + pl.duration(microseconds=_microseconds(hours))


def _rows(
    frame: pl.DataFrame,
    code: pl.Expr,
    time: pl.Expr,
    value: pl.Expr | None = None,
    effective: pl.Expr | None = None,
    priority: pl.Expr | None = None,
) -> pl.DataFrame:
    """Rows of `_DATA`; none where the code is null."""
    none = pl.lit(None)
    return frame.select(
        pl.col("_subject").alias("subject_id"),
        time.cast(pl.Datetime("us")).alias("time"),
        code.cast(pl.String).alias("code"),
        (none if value is None else value).cast(pl.Float32).alias("numeric_value"),
        (none if effective is None else effective).cast(pl.Datetime("us")).alias("effective_time"),
        (none if priority is None else priority).cast(pl.Int8).alias("priority"),
    ).drop_nulls("code")


def _items(frame: pl.DataFrame, stays: pl.DataFrame) -> tuple[pl.DataFrame, pl.Expr, pl.Expr]:
    """`frame` with subject and start, when each item was known, and when it was true if earlier."""
    frame = frame.with_columns(pl.col("episode_id").cast(pl.String))
    frame = frame.join(stays.select("episode_id", "_subject", "start"), on="episode_id")
    known = pl.max_horizontal("hours", "available_hours")
    effective = pl.when(pl.col("hours") < known).then(_time(pl.col("hours")))
    return frame, _time(known), effective


def _observations(frame: pl.DataFrame, stays: pl.DataFrame) -> pl.DataFrame:
    frame, time, effective = _items(frame, stays)
    code = pl.lit("OBSERVATION//") + pl.col("variable").cast(pl.String)
    return _rows(frame, code, time, pl.col("value"), effective, pl.col("priority"))


def _events(frame: pl.DataFrame, stays: pl.DataFrame) -> pl.DataFrame:
    frame, time, effective = _items(frame, stays)
    return _rows(frame, pl.col("code"), time, pl.col("value"), effective)


def _of_stays(stays: pl.DataFrame) -> pl.DataFrame:
    """What the store knows of stays and subjects themselves."""
    start = pl.col("start")
    age = (pl.col("age_years") * (DAYS_PER_YEAR * 24 * US_PER_HOUR)).round().cast(pl.Int64)
    # Up to the next number: the one time at which the death can have been.
    exact = pl.col("death_hours_high") - pl.col("death_hours_low") < 1e-9
    death = pl.when(exact & pl.col("_is_last")).then("death_hours_low")
    last = pl.max_horizontal(pl.col("n_hours").cast(pl.Float64), "los_hours", "death_hours_low")
    sex = pl.col("sex").replace_strict({"female": "GENDER//F", "male": "GENDER//M"}, default=None)
    mortality = pl.col("mortality")
    first = stays.filter(start == EPOCH)  # of each subject: one birth, one sex

    def if_known(column: pl.Expr, code: str) -> pl.Expr:
        return pl.when(column.is_not_null()).then(pl.lit(code))

    return pl.concat(
        [
            _rows(
                first,
                if_known(pl.col("age_years"), "MEDS_BIRTH"),
                start - pl.duration(microseconds=age),
            ),
            _rows(first, sex, pl.lit(None)),
            _rows(stays, "ICU_ADMISSION//" + pl.col("unit_type").fill_null("UNK"), start),
            _rows(
                stays, if_known(pl.col("los_hours"), "ICU_DISCHARGE"), _time(pl.col("los_hours"))
            ),
            _rows(stays, pl.lit("RECORD_END"), _time(pl.col("n_hours").cast(pl.Float64))),
            _rows(stays, if_known(death, "MEDS_DEATH"), _time(death)),
            _rows(
                stays,
                pl.when(mortality)
                .then(pl.lit("HOSPITAL_DISCHARGE//DIED"))
                .when(~mortality)
                .then(pl.lit("HOSPITAL_DISCHARGE//ALIVE")),
                _time(last),
            ),
            *(
                _rows(stays, if_known(pl.col(column), code), start, pl.col(column))
                for column, code in (("height_cm", "HEIGHT//cm"), ("weight_kg", "WEIGHT//kg"))
            ),
        ]
    )


def _write_metadata(store: EpisodeStore, stays: pl.DataFrame, used: set[str], out: Path) -> None:
    """Codes, splits and description. Raises StoreError for a subject in two splits."""
    out.mkdir()
    meanings: dict[str, tuple[str, str | None, list[str] | None]] = {
        code: (text, None, None) for code, text in _OF_STAYS.items()
    }
    for v in VARIABLES:
        meanings[f"OBSERVATION//{v.name}"] = (v.title.lower(), v.unit, [f"LOINC/{v.loinc}"])
    for code, (descriptor, unit) in store.codes.items():
        meanings[code] = (descriptor, unit, None)
    rows = [(code, *meanings[code]) for code in sorted(used)]
    codes = pa.Table.from_pylist(
        [dict(zip(_CODES.names, row, strict=True)) for row in rows], schema=_CODES
    )
    pq.write_table(codes, out / "codes.parquet")

    splits = stays.select("_subject", "split").unique().sort("_subject")
    if splits["_subject"].is_duplicated().any():
        raise StoreError(f"{store.path}: a subject is in two splits")
    theirs = {ours: theirs for theirs, ours in SPLITS.items()}
    theirs |= _HELD_OUT.get(store.info.source, {})
    split_rows = splits.select(
        subject_id="_subject", split=pl.col("split").replace(theirs)
    ).to_arrow()
    pq.write_table(split_rows.cast(_SPLITS), out / "subject_splits.parquet")

    description = {
        "dataset_name": store.info.source,
        "etl_name": "llm4ehr",
        "etl_version": __version__,
        "meds_version": MEDS_VERSION,
        "license": store.info.licence,
        "other_extension_columns": ["effective_time", "priority"],
    }
    text = json.dumps(description, indent=2) + "\n"
    (out / "dataset.json").write_text(text, encoding="utf-8")
