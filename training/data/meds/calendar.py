"""Where the stays of a store stand on the calendar of its exports to MEDS.

A store has hours since ICU admission and no dates, so stays are laid out on a calendar of their
own: the first stay of every subject begins at `EPOCH`, the next ones follow one after another, each
on the day after the day that follows the end of what is known of the one before. The calendar
depends on the store alone, so labels, predictions and data of one store fit together.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import polars as pl

from llm4ehr.store import EpisodeStore, StoreError

EPOCH = datetime(2000, 1, 1)  # noqa: DTZ001 MEDS has no time zones
US_PER_HOUR = 3_600_000_000
_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")


def places(store: EpisodeStore) -> pl.DataFrame:
    """Where each stay stands on the calendar, in the order of the store.

    `episode_id`, `source_subject_id` (as in the store), `subject_id` (Int64, as in MEDS), `start`
    (ICU admission), `n_hours`. The MEDS id of a subject is its own id if all ids of the store are
    whole numbers, else the first 63 bits of the SHA-256 digest of its id.
    """
    stays = pl.DataFrame(store.labels.drop_columns(["phenotypes"]))
    hours = pl.max_horizontal("n_hours", "los_hours", "death_hours_high")
    days = (hours / 24).ceil().cast(pl.Int64) + 1
    # The true order of the stays of a subject, as far as a death and ages tell it: those of the
    # hospital stay that ended in death come last, and of these the one nearest to the death.
    fatal = pl.col("mortality").fill_null(value=False)
    ordered = stays.sort(
        ["subject_id", fatal, "age_years", -pl.col("death_hours_low"), "episode_id"],
        nulls_last=[False, False, True, False, False],
    )
    start = days.cum_sum().shift(1, fill_value=0).over("subject_id")
    placed = ordered.select(
        "episode_id",
        source_subject_id="subject_id",
        subject_id=pl.col("subject_id").replace_strict(
            subject_numbers(stays["subject_id"].unique().to_list()), return_dtype=pl.Int64
        ),
        start=pl.lit(EPOCH, pl.Datetime("us")) + pl.duration(days=start),
        n_hours="n_hours",
    )
    return stays.select("episode_id").join(placed, on="episode_id", maintain_order="left")


def subject_numbers(subjects: list[str]) -> dict[str, int]:
    """A 64-bit number for each subject; see `places`."""
    if all(_NUMBER.fullmatch(s) for s in subjects):
        return {s: int(s) for s in subjects}
    numbers = {
        s: int.from_bytes(hashlib.sha256(s.encode()).digest()[:8], "big") >> 1 for s in subjects
    }
    if len(set(numbers.values())) < len(numbers):
        raise StoreError("two subjects have the same hash; rename one of them")
    return numbers


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` if all goes well and is removed if not.

    Raises StoreError if `out` is in use.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out}: exists and is not an empty folder")
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(out)  # also in place of an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)
