"""A tiny MEDS data set, and its extraction."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llm4ehr.episode import Episode, Statics, variable_indices
from llm4ehr.store import (
    CodeInfo,
    EpisodeRecord,
    Outcome,
    StoreInfo,
    StoreWriter,
)
from training.data.extraction import Cohort, Items
from training.data.meds.reader import Meds
from training.data.sources import Tally

ADMISSION = datetime.fromisoformat("2180-07-23T15:00")


Row = tuple[int, datetime | None, str, float | None]


def at(hours: float) -> datetime:
    return ADMISSION + timedelta(hours=hours)


# One subject with two ICU stays in one hospital stay; the second ends in death.
ROWS: list[Row] = [
    (7, None, "GENDER//F", None),
    (7, datetime.fromisoformat("2120-07-23T15:00"), "MEDS_BIRTH", None),
    (7, at(-3), "HOSPITAL_ADMISSION//URGENT//UNK", None),
    (7, at(-2), "LAB//226512//kg", 71.5),
    (7, at(-1), "LAB//220045//bpm", 60.0),  # before the ICU
    (7, at(0), "ICU_ADMISSION//Coronary Care Unit (CCU)", None),
    (7, at(1), "LAB//220045//bpm", 92.0),
    (7, at(1), "LAB//223761//°F", 100.4),
    (7, at(2), "LAB//220180//mmHg", 58.0),
    (7, at(2), "LAB//223835//UNK", 40.0),
    (7, at(2), "LAB//223835//UNK", 5.0),  # no fraction of oxygen
    (7, at(2), "LAB//50931//mg/dL", 120.0),
    (7, at(3), "LAB//220739//UNK", 3.0),  # eyes: voice and limbs were not charted
    (7, at(4), "LAB//50912//mg/dL", 1.4),
    (7, at(4), "LAB//50868//mEq/L", 12.0),
    (7, at(5), "INFUSION_START//221906", 0.1),
    (7, at(6), "LAB//220048//UNK", 1.0),  # a charted item that is not mapped
    (7, at(24), "ICU_DISCHARGE//Coronary Care Unit (CCU)", None),
    (7, at(30), "LAB//220045//bpm", 70.0),  # on the ward
    (7, at(48), "ICU_ADMISSION//Medical Intensive Care Unit (MICU)", None),
    (7, at(50), "LAB//220045//bpm", 110.0),
    (7, at(58), "ICU_DISCHARGE//Medical Intensive Care Unit (MICU)", None),
    (7, at(58), "MEDS_DEATH", None),
    (7, at(58), "HOSPITAL_DISCHARGE//DIED", None),
    (7, at(58), "DIAGNOSIS//ICD//9//5849", None),
    (7, at(58), "DIAGNOSIS//ICD//10//R6521", None),
]


def read(folder: Path, code_map: Path | None = None) -> tuple[Cohort, Items, Tally]:
    """Everything that the reader gives, as one block."""
    tally = Tally()
    reader = Meds(folder, code_map=code_map)
    cohort = reader.cohort(tally)
    stays = cohort.stays.with_row_index("stay").with_columns(pl.col("stay").cast(pl.Int32))
    (scan,) = reader.scans(cohort)
    items = pl.concat(scan.select(chunk.frame, tally) for chunk in scan.table.chunks())
    return cohort, reader.assemble(stays, {scan.name: items}, tally), tally


INFO = StoreInfo(source="test", licence="CC0-1.0", citation="", created_by="test", label_notes={})


CODES = {
    "LOINC/2160-0": CodeInfo("creatinine", "mg/dL"),
    "LOCAL/intubation": CodeInfo("tracheal intubation", None),
}


def record(
    name: str,
    subject: str,
    observations: Sequence[tuple[str, float, float, int]] = (("hr", 0.5, 80.0, 0),),
    events: Sequence[tuple[str, float, float]] = (),
    **choices: Any,
) -> EpisodeRecord:
    outcome = choices.pop("outcome", Outcome())
    statics = choices.pop("statics", Statics())
    episode = Episode(
        episode_id=name,
        n_hours=choices.pop("n_hours", 48),
        obs_variable=variable_indices([o[0] for o in observations]),
        obs_hours=np.array([o[1] for o in observations], np.float64),
        obs_value=np.array([o[2] for o in observations], np.float64),
        obs_priority=np.array([o[3] for o in observations], np.int8),
        ev_code=np.array([e[0] for e in events], dtype=object),
        ev_hours=np.array([e[1] for e in events], np.float64),
        ev_value=np.array([e[2] for e in events], np.float64),
        statics=statics,
    )
    split = choices.pop("split", "pretrain")
    return EpisodeRecord(episode=episode, subject_id=subject, split=split, outcome=outcome)


def write_store(
    path: Path, records: Sequence[EpisodeRecord], per_group: int = 2, info: StoreInfo = INFO
) -> Path:
    with StoreWriter(path, info, codes=CODES, episodes_per_group=per_group) as store:
        for r in sorted(records, key=lambda r: r.episode.episode_id):
            store.add(r)
    return path


EXACT = {"mortality": True, "death_hours_low": 60.5, "death_hours_high": np.nextafter(60.5, 99)}


STAYS = [
    record(
        "a",
        "12",
        [("hr", 0.25, 92.0, 0), ("sbp", 3.0, 120.0, 1), ("glucose", 3.999999999999, 100.0, 0)],
        [("LOINC/2160-0", 2.5, 1.4), ("LOCAL/intubation", 4.0, np.nan)],
        n_hours=60,
        statics=Statics(age_years=67.25, sex="female", unit_type="medical", weight_kg=70.5),
        outcome=Outcome(los_hours=59.5, phenotypes=("Shock",), **EXACT),
        split="test",
    ),
    record(
        "b",
        "12",
        n_hours=50,
        statics=Statics(age_years=66.75, sex="female"),
        outcome=Outcome(mortality=False, los_hours=49.5, phenotypes=()),
        split="test",
    ),
    record("c", "3", n_hours=5, outcome=Outcome(mortality=False, los_hours=4.5)),
]
