"""MEDS data sets: stays and items from coded events, stores and labels written as MEDS."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import meds
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm4ehr.episode import Episode, Statics, variable_indices
from llm4ehr.store import (
    CodeInfo,
    EpisodeRecord,
    EpisodeStore,
    Outcome,
    StoreError,
    StoreInfo,
    StoreWriter,
)
from llm4ehr.variables import VARIABLES
from training.cli import _parser, main
from training.data.extraction import Cohort, Items
from training.data.meds.calendar import EPOCH, places, subject_numbers
from training.data.meds.code_map import SHIPPED, load_code_map, shipped_code_map
from training.data.meds.dataset import write_dataset
from training.data.meds.export import task_folder, write_labels, write_predictions
from training.data.meds.reader import Meds
from training.data.phenotypes import PHENOTYPES
from training.data.prepare import prepare
from training.data.sources import SourceError, Tally

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


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    """`source(rows, ...)`: an official folder, one file a subject."""

    def make(rows: Sequence[Row] = ROWS, splits: dict[int, str] | None = None) -> Path:
        schema = {"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String}
        frame = pl.DataFrame(
            list(rows), schema=schema | {"numeric_value": pl.Float32}, orient="row"
        )
        folder = tmp_path / "meds"
        (folder / "data" / "train").mkdir(parents=True)
        (folder / "metadata").mkdir()
        for (subject,), part in frame.partition_by("subject_id", as_dict=True).items():
            part.write_parquet(folder / "data" / "train" / f"{subject}.parquet")
        if splits is not None:
            pl.DataFrame(
                {"subject_id": list(splits), "split": list(splits.values())}
            ).write_parquet(folder / "metadata" / "subject_splits.parquet")
        return folder

    return make


def read(folder: Path, code_map: Path | None = None) -> tuple[Cohort, Items, Tally]:
    """Everything that the reader gives, as one block."""
    tally = Tally()
    reader = Meds(folder, code_map=code_map)
    cohort = reader.cohort(tally)
    stays = cohort.stays.with_row_index("stay").with_columns(pl.col("stay").cast(pl.Int32))
    (scan,) = reader.scans(cohort)
    items = pl.concat(scan.select(chunk.frame, tally) for chunk in scan.table.chunks())
    return cohort, reader.assemble(stays, {scan.name: items}, tally), tally


class TestStays:
    def test_admissions_with_their_discharges(self, source: Callable[..., Path]) -> None:
        stays = read(source())[0].stays
        assert stays["episode_id"].to_list() == ["7-1", "7-2"]
        assert stays["subject_id"].to_list() == ["7", "7"]
        assert stays["los_hours"].to_list() == [24.0, 10.0]
        assert stays["n_hours"].to_list() == [24, 10]
        assert stays["unit_type"].to_list() == ["coronary", "medical"]
        assert stays["sex"].to_list() == ["female", "female"]
        assert stays["age_years"].to_list() == pytest.approx([60, 60 + 2 / 365.2425], abs=2e-3)
        assert stays["weight_kg"].to_list() == [71.5, 71.5]
        assert stays["height_cm"].to_list() == [None, None]

    def test_labels(self, source: Callable[..., Path]) -> None:
        stays = read(source())[0].stays
        assert stays["mortality"].to_list() == [True, True]
        assert stays["death_hours_low"].to_list() == [58.0, 10.0]
        assert stays["death_hours_high"].to_list() == [np.nextafter(58, 99), np.nextafter(10, 99)]
        both = ["Acute and unspecified renal failure", "Septicemia (except in labor)", "Shock"]
        assert stays["phenotypes"].to_list() == [both, both]

    def test_a_stay_without_discharge_is_left_out(self, source: Callable[..., Path]) -> None:
        cohort, _, _ = read(source([r for r in ROWS if r[1] != at(24)]))
        assert cohort.stays["episode_id"].to_list() == ["7-2"]
        assert [(s.stays, s.subjects) for s in cohort.waterfall] == [(2, 1), (1, 1)]

    def test_each_stay_has_the_first_death_after_it(self, source: Callable[..., Path]) -> None:
        rows: list[Row] = [*ROWS, (7, at(5), "MEDS_DEATH", None)]  # of another life
        stays = read(source(sorted(rows, key=lambda r: (r[1] is not None, r[1]))))[0].stays
        assert stays["death_hours_low"].to_list() == [5.0, 10.0]

    def test_a_stay_and_its_record_end_at_an_exact_death(self, source: Callable[..., Path]) -> None:
        rows = [(s, at(55.5) if c == "MEDS_DEATH" else t, c, v) for s, t, c, v in ROWS]
        stays = read(source(rows))[0].stays
        columns = ("end_hours", "los_hours", "n_hours", "death_hours_low")
        assert stays.select(columns).rows() == [(24.0, 24.0, 24, 55.5), (7.5, 7.5, 8, 7.5)]

    def test_of_a_death_on_a_day_the_stay_does_not_end(self, source: Callable[..., Path]) -> None:
        rows = [(s, at(57) if c == "MEDS_DEATH" else t, c, v) for s, t, c, v in ROWS]
        assert read(source(rows))[0].stays["los_hours"].to_list() == [24.0, 10.0]

    @pytest.mark.parametrize("admission", ["HOSPITAL_ADMISSION//URGENT//UNK", None])
    def test_nothing_is_taken_from_another_hospital_stay(
        self, source: Callable[..., Path], admission: str | None
    ) -> None:
        rows: list[Row] = [*ROWS]
        if admission is not None:  # the first stay has no discharge of its own
            rows.append((7, at(40), admission, None))
        first, second = read(source(rows))[0].stays.iter_rows(named=True)
        assert second["mortality"] is True
        assert len(second["phenotypes"]) == 3
        known = (first["mortality"], first["death_hours_low"], first["phenotypes"])
        # Without that admission both are of one hospital stay.
        assert known == ((None, None, None) if admission else (True, 58.0, second["phenotypes"]))

    def test_an_admission_to_hospital_during_the_icu_stay_is_its_own(
        self, source: Callable[..., Path]
    ) -> None:
        rows = [(s, at(1) if "ADMISSION//URGENT" in c else t, c, v) for s, t, c, v in ROWS]
        assert read(source(rows))[0].stays["mortality"].to_list() == [True, True]

    @pytest.mark.parametrize(("hours", "first"), [(0.0, 71.5), (0.5, None)])
    def test_a_weight_after_admission_is_no_static_fact(
        self, source: Callable[..., Path], hours: float, first: float | None
    ) -> None:
        rows = [(s, at(hours) if "226512" in c else t, c, v) for s, t, c, v in ROWS]
        assert read(source(rows))[0].stays["weight_kg"].to_list() == [first, 71.5]

    @pytest.mark.parametrize(("code", "died"), [("HOME", False), ("DIED", True)])
    def test_a_discharge_counts_for_more_than_the_day_of_a_death(
        self, source: Callable[..., Path], code: str, died: bool
    ) -> None:
        rows = [
            (s, at(57) if c == "MEDS_DEATH" else t, c.replace("DIED", code), v)
            for s, t, c, v in ROWS
        ]
        assert at(57).hour == 0
        assert read(source(rows))[0].stays["mortality"].to_list() == [died, died]

    def test_survivors(self, source: Callable[..., Path]) -> None:
        alive = [
            (s, t, "HOSPITAL_DISCHARGE//HOME" if "DIED" in c else c, v)
            for s, t, c, v in ROWS
            if c != "MEDS_DEATH"
        ]
        assert read(source(alive))[0].stays["mortality"].to_list() == [False, False]

    def test_a_later_death_is_none_of_the_stay(self, source: Callable[..., Path]) -> None:
        rows = [
            (s, at(90) if c == "MEDS_DEATH" else t, c.replace("DIED", "HOME"), v)
            for s, t, c, v in ROWS
        ]
        stays = read(source(rows))[0].stays
        assert stays["mortality"].to_list() == [False, False]
        assert stays["death_hours_low"].to_list() == [None, None]

    def test_without_a_hospital_discharge_survival_is_not_known(
        self, source: Callable[..., Path]
    ) -> None:
        rows = [r for r in ROWS if not r[2].startswith("HOSPITAL_DISCHARGE")]
        assert read(source(rows))[0].stays["mortality"].to_list() == [None, True]

    def test_of_a_death_at_midnight_the_day_is_known(self, source: Callable[..., Path]) -> None:
        rows = [(s, at(57) if c == "MEDS_DEATH" else t, c, v) for s, t, c, v in ROWS]
        assert at(57).hour == 0
        stays = read(source(rows))[0].stays
        assert stays["death_hours_low"].to_list() == [57.0, 9.0]
        assert stays["death_hours_high"].to_list() == [81.0, 33.0]

    def test_splits_are_those_of_the_data_set(self, source: Callable[..., Path]) -> None:
        stays = read(source(splits={7: "held_out"}))[0].stays
        assert stays["benchmark_split"].unique().to_list() == ["held_out"]
        assert stays["split"].unique().to_list() == ["test"]

    def test_whoever_is_in_an_unknown_split_is_for_testing(
        self, source: Callable[..., Path]
    ) -> None:
        rows: list[Row] = [
            row
            for subject in range(60)
            for row in (
                (subject, at(0), "ICU_ADMISSION//X", None),
                (subject, at(9), "ICU_DISCHARGE//X", None),
            )
        ]
        stays = read(source(rows, splits=dict.fromkeys(range(30), "validation")))[0].stays
        unknown = stays["benchmark_split"].is_not_null()
        assert stays.filter(unknown)["split"].unique().to_list() == ["test"]
        assert set(stays.filter(~unknown)["split"]) == {"pretrain", "finetune", "test"}

    def test_tasks_are_those_that_have_any_label(
        self, source: Callable[..., Path], tmp_path: Path
    ) -> None:
        def tasks(rows: Sequence[Row], name: str) -> frozenset[str]:
            reader = Meds(source(rows).rename(tmp_path / name))
            reader.cohort(Tally())
            return reader.expected.tasks

        every = {"mortality", "decompensation", "remaining_los", "phenotyping"}
        assert tasks(ROWS, "1") == every
        plain = [r for r in ROWS if not r[2].startswith(("MEDS_DEATH", "HOSPITAL", "DIAGNOSIS"))]
        assert tasks(plain, "2") == {"remaining_los"}


class TestItems:
    def test_observations(self, source: Callable[..., Path]) -> None:
        _, items, tally = read(source())
        columns = ("stay", "variable", "hours", "value", "priority")
        rows = items.observations.sort("stay", "hours", "variable").select(columns).rows()
        assert rows == [
            (0, "hr", 1.0, 92.0, 0),
            (0, "temp", 1.0, pytest.approx(38.0), 0),
            (0, "dbp", 2.0, 58.0, 1),  # a cuff
            (0, "fio2", 2.0, 0.4, 0),
            (0, "glucose", 2.0, 120.0, 0),
            (0, "gcs_total", 3.0, 3 + 5 + 6, 0),
            (1, "hr", 2.0, 110.0, 0),
        ]
        assert tally.refused == {"unit-missing:fio2": 1, "outside-stay:data": 2}

    def test_laboratory_results_are_known_later(self, source: Callable[..., Path]) -> None:
        _, items, _ = read(source())
        glucose = items.observations.filter(variable="glucose").row(0, named=True)
        assert (glucose["hours"], glucose["available_hours"]) == (2.0, 4.0)
        creatinine = items.events.filter(code="LOINC/2160-0").row(0, named=True)
        assert (creatinine["hours"], creatinine["available_hours"]) == (4.0, 6.0)
        charted = items.observations.filter(variable="hr")
        assert charted["available_hours"].to_list() == [None, None]

    def test_everything_else_that_is_no_outcome_is_an_event(
        self, source: Callable[..., Path]
    ) -> None:
        _, items, _ = read(source())
        assert items.events.sort("hours", "code").select("code", "value").rows() == [
            ("LOINC/2160-0", pytest.approx(1.4)),
            ("MEDS/LAB//50868//mEq/L", 12.0),
            ("MEDS/INFUSION_START//221906", pytest.approx(0.1)),
        ]
        assert sorted(items.codes.rows()) == [
            ("LOINC/2160-0", "creatinine in serum or plasma", "mg/dL"),
            ("MEDS/INFUSION_START//221906", "infusion start 221906", None),
            ("MEDS/LAB//50868//mEq/L", "lab 50868 meq/l", "mEq/L"),
        ]

    def test_single_precision_is_read_as_the_decimal_it_was(
        self, source: Callable[..., Path]
    ) -> None:
        assert read(source())[1].events.filter(code="LOINC/2160-0")["value"].item() == 1.4

    def test_a_folder_of_events_alone(self, source: Callable[..., Path]) -> None:
        folder = source()
        whole = read(folder)[1]
        assert read(folder / "data")[1].observations.equals(whole.observations)

    def test_words_of_codes_come_from_the_metadata(self, source: Callable[..., Path]) -> None:
        folder = source()
        pl.DataFrame(
            {"code": ["INFUSION_START//221906"], "description": ["Norepinephrine"]}
        ).write_parquet(folder / "metadata" / "codes.parquet")
        codes = read(folder)[1].codes
        assert ("MEDS/INFUSION_START//221906", "norepinephrine", None) in codes.rows()

    def test_no_data(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"there is no data/\*\*/\*\.parquet"):
            Meds(tmp_path)


class TestCodeMap:
    MAP = """
version: 1
name: ours
event_prefix: OURS/
stays: {admission: [IN], record_end: [OUT]}
variables:
  - {code: "HR?", variable: hr, unit: null}
  - {code: GLU, variable: glucose, unit: mmol/L}
gcs: [{code: EYES, component: eye}]
events: [{code: "X*", event: OURS/x, descriptor: the x, unit: mL}]
ignored: [NOISE*]
"""

    def test_a_site_has_its_own(self, source: Callable[..., Path], tmp_path: Path) -> None:
        (tmp_path / "map.yaml").write_text(self.MAP)
        folder = source(
            [
                (1, at(0), "IN", None),
                (1, at(1), "HR1", 80.0),
                (1, at(1), "HR22", 80.0),
                (1, at(1), "GLU", 10.0),
                (1, at(1), "X1", 5.0),
                (1, at(2), "NOISE//1", 5.0),
                (1, at(3), "OUT", None),
            ]
        )
        cohort, items, _ = read(folder, tmp_path / "map.yaml")
        assert cohort.stays["los_hours"].to_list() == [None]
        assert items.observations.select("variable", "value").rows() == [
            ("hr", 80.0),
            ("glucose", pytest.approx(180.156)),
        ]
        assert items.events["code"].to_list() == ["OURS/HR22", "OURS/x"]
        assert ("OURS/x", "the x", "mL") in items.codes.rows()

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("unit: mmol/L", "unit: null", "variables.1.*never guessed"),
            ("unit: mmol/L", "unit: furlong", "variables.1.*unit is not known"),
            ("variable: hr", "variable: pulse", "variables.0.variable"),
            ("record_end: [OUT]", "female: [F]", "discharge or record_end"),
            ("ignored:", "ignore:", "ignore: Extra inputs"),
            (", descriptor: the x", "", "no shared code: give a descriptor"),
            ("version: 1", "version: 2", "version"),
            ("stays: {", "stays: {{", "not valid YAML"),
        ],
    )
    def test_mistakes_are_named(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        path = tmp_path / "map.yaml"
        path.write_text(self.MAP.replace(old, new))
        with pytest.raises(SourceError, match=rf"map\.yaml: (.|\n)*{message}"):
            load_code_map(path)

    def test_the_documented_example_is_valid(self, tmp_path: Path) -> None:
        page = Path(__file__).parents[3] / "docs" / "datasets" / "meds.md"
        block = re.search(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
        assert block is not None
        (tmp_path / "map.yaml").write_text(block[1])
        assert load_code_map(tmp_path / "map.yaml").roles["LAB//50912//mg/dL"].delay == 2

    @pytest.mark.parametrize("name", SHIPPED)
    def test_shipped_maps_have_every_variable(self, name: str) -> None:
        assert shipped_code_map(name).roles.variables == {v.name for v in VARIABLES}

    def test_outcomes_and_diagnoses_are_never_events(self) -> None:
        roles = shipped_code_map("mimic").roles
        for code in (
            "MEDS_DEATH", "MEDS_DEATH//X", "MEDS_BIRTH", "HOSPITAL_DISCHARGE//HOME",
            "ICU_DISCHARGE//Neuro Stepdown", "DIAGNOSIS//ICD//9//4019", "DRG//APR//283//X",
            "TRANSFER_TO//discharge//UNK", "PROCEDURE//ICD//9//5491", "GENDER//M",
        ):  # fmt: skip
            assert roles[code].kind == "ignored", code


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


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", STAYS)


class TestCalendar:
    def test_stays_of_a_subject_do_not_overlap(self, store: Path) -> None:
        rows = places(EpisodeStore.open(store)).select("episode_id", "subject_id", "start").rows()
        # Known of stay b until hour 50, on the third day: a starts on the fifth.
        assert rows == [
            ("a", 12, EPOCH + timedelta(days=4)),
            ("b", 12, EPOCH),
            ("c", 3, EPOCH),
        ]

    def test_stays_that_ended_in_death_come_last_and_the_nearest_to_it_at_the_end(
        self, tmp_path: Path
    ) -> None:
        died = {
            name: Outcome(
                mortality=True,
                death_hours_low=hours,
                death_hours_high=float(np.nextafter(hours, 999)),
            )
            for name, hours in (("near", 10.5), ("far", 58.5))
        }
        old = Statics(age_years=91.4)  # as data sets give the age of everybody above 89
        records = [
            record("unknown", "1", statics=old),
            record("near", "1", n_hours=11, statics=old, outcome=died["near"]),
            record("far", "1", n_hours=48, statics=old, outcome=died["far"]),
            record("first", "1", statics=old, outcome=Outcome(mortality=False)),
        ]
        order = places(EpisodeStore.open(write_store(tmp_path / "store", records)))
        assert order.sort("start")["episode_id"].to_list() == ["first", "unknown", "far", "near"]

    def test_numbers_of_subjects(self) -> None:
        assert subject_numbers(["3", "-7", "12"]) == {"3": 3, "-7": -7, "12": 12}
        hashed = subject_numbers(["3", "p7"])
        assert hashed == subject_numbers(["p7", "3"])
        assert all(0 <= n < 2**63 for n in hashed.values())
        assert hashed["3"] != 3
        assert subject_numbers(["007", "7"])["007"] != 7


class TestLabels:
    @pytest.fixture
    def labels(self, store: Path, tmp_path: Path) -> Path:
        write_labels(store, tmp_path / "labels")
        return tmp_path / "labels"

    def test_every_task_validates(self, labels: Path) -> None:
        files = sorted(labels.glob("**/labels.parquet"))
        assert len(files) == 3 + len(PHENOTYPES)
        for file in files:
            meds.LabelSchema.validate(pq.read_table(file))

    def test_times_are_the_last_microsecond_of_what_may_be_used(self, labels: Path) -> None:
        risk = pl.read_parquet(labels / "decompensation" / "labels.parquet")
        start = EPOCH + timedelta(days=4)
        of_last = risk.filter(pl.col("prediction_time") >= start, subject_id=12)
        first = start + timedelta(hours=5, microseconds=-1)  # after the first four hours
        assert of_last["prediction_time"].min() == first
        assert of_last["prediction_time"].max() == start + timedelta(hours=59, microseconds=-1)
        # Death at hour 60.5: true from time 37 (at 36 it is 24.5 hours away) on.
        onset = of_last.filter("boolean_value")["prediction_time"].min()
        assert onset == start + timedelta(hours=37, microseconds=-1)

    def test_mortality_is_asked_once_at_48_hours(self, labels: Path) -> None:
        rows = pl.read_parquet(labels / "mortality" / "labels.parquet")
        at_48 = timedelta(hours=48, microseconds=-1)
        assert rows.rows() == [
            (12, EPOCH + timedelta(days=4) + at_48, True),
            (12, EPOCH + at_48, False),
        ]

    def test_phenotypes_at_the_end_of_coded_stays(self, labels: Path) -> None:
        rows = pl.read_parquet(labels / task_folder("Shock") / "labels.parquet").rows()
        assert rows == [
            (12, EPOCH + timedelta(days=4, hours=60, microseconds=-1), True),
            (12, EPOCH + timedelta(hours=50, microseconds=-1), False),
        ]

    def test_remaining_stay(self, labels: Path) -> None:
        rows = pl.read_parquet(labels / "remaining_los" / "labels.parquet")
        first = rows.filter(subject_id=12).row(0)
        assert first == (12, EPOCH + timedelta(days=4, hours=5, microseconds=-1), 54.5)

    def test_the_folder_must_be_free(self, labels: Path, store: Path) -> None:
        with pytest.raises(StoreError, match="not an empty folder"):
            write_labels(store, labels)

    @pytest.mark.parametrize("write", [write_labels, write_dataset])
    def test_nothing_is_left_of_a_run_that_failed(
        self, store: Path, tmp_path: Path, write: Callable[[Path, Path], Any]
    ) -> None:
        before = sorted(tmp_path.iterdir())
        path = store / "observations.parquet"
        with path.open("r+b") as file:  # the pages, not the footer
            file.seek(4)
            file.write(b"\xff" * 200)
        with pytest.raises((OSError, StoreError)):
            write(store, tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == before

    def test_names_of_tasks_are_distinct(self) -> None:
        assert len({task_folder(name) for name in PHENOTYPES}) == len(PHENOTYPES)
        assert task_folder("Gastrointestinal hemorrhage") == "phenotype/gastrointestinal_hemorrhage"


class TestPredictions:
    @pytest.fixture
    def scores(self, tmp_path: Path) -> Path:
        """What `service score` writes: here the probability tells stay and hour."""
        rows = [
            {"episode_id": name, "hour": hour, "decompensation": k / 10 + hour / 1000}
            | {"mortality": 0.5, "phenotype_Shock": hour / 100}
            for k, (name, n) in enumerate([("a", 60), ("b", 50), ("c", 5)])
            for hour in range(n)
        ]
        schema = {"hour": pl.Int16, "decompensation": pl.Float32, "mortality": pl.Float32}
        frame = pl.DataFrame(rows, schema_overrides=schema | {"phenotype_Shock": pl.Float32})
        frame.write_parquet(tmp_path / "scores.parquet")
        return tmp_path / "scores.parquet"

    def test_answers_beside_their_labels(self, store: Path, scores: Path, tmp_path: Path) -> None:
        counts = write_predictions(scores, store, tmp_path / "out")
        assert set(counts) == {"decompensation", "mortality", "phenotype/shock"}
        table = pq.read_table(tmp_path / "out" / "decompensation.parquet")
        assert [(f.name, f.type) for f in table.schema] == [
            ("subject_id", pa.int64()),
            ("prediction_time", pa.timestamp("us")),
            ("boolean_value", pa.bool_()),
            ("predicted_boolean_value", pa.bool_()),
            ("predicted_boolean_probability", pa.float32()),
        ]
        meds.LabelSchema.validate(table.select(["subject_id", "prediction_time", "boolean_value"]))
        write_labels(store, tmp_path / "labels")
        assert counts["decompensation"] == len(
            pq.read_table(tmp_path / "labels" / "decompensation" / "labels.parquet")
        )
        rows = pl.DataFrame(table)
        time = EPOCH + timedelta(hours=11, microseconds=-1)  # hour bin 10 of stay b
        answer = rows.filter(prediction_time=time)["predicted_boolean_probability"].item()
        assert answer == pytest.approx(0.11)
        assert rows["predicted_boolean_value"].any() is False
        mortality = pl.read_parquet(tmp_path / "out" / "mortality.parquet")
        assert mortality["predicted_boolean_value"].to_list() == [True, True]

    def test_a_phenotype_has_the_last_answer(
        self, store: Path, scores: Path, tmp_path: Path
    ) -> None:
        cut = tmp_path / "cut.parquet"
        pl.read_parquet(scores).filter(pl.col("hour") < 55).write_parquet(cut)
        write_predictions(cut, store, tmp_path / "out")
        rows = pl.read_parquet(tmp_path / "out" / "phenotype" / "shock.parquet")
        assert rows["predicted_boolean_probability"].to_list() == pytest.approx([0.54, 0.49])

    def test_no_predictions(self, store: Path, tmp_path: Path) -> None:
        pl.DataFrame({"episode_id": ["a"], "hour": [0]}).write_parquet(tmp_path / "s.parquet")
        with pytest.raises(StoreError, match="holds no predictions"):
            write_predictions(tmp_path / "s.parquet", store, tmp_path / "out")


class TestStoreAsDataSet:
    @pytest.fixture
    def folder(self, store: Path, tmp_path: Path) -> Path:
        write_dataset(store, tmp_path / "meds")
        return tmp_path / "meds"

    def test_it_validates(self, folder: Path) -> None:
        (file,) = folder.glob("data/*.parquet")
        data = pq.read_table(file)
        meds.DataSchema.validate(data)
        codes = pq.read_table(folder / "metadata" / "codes.parquet")
        meds.CodeMetadataSchema.validate(codes)
        meds.SubjectSplitSchema.validate(
            pq.read_table(folder / "metadata" / "subject_splits.parquet")
        )
        about = json.loads((folder / "metadata" / "dataset.json").read_text())
        meds.DatasetMetadataSchema.validate(about)
        assert set(data["code"].to_pylist()) == set(codes["code"].to_pylist())
        rows = pl.DataFrame(data)
        assert rows["subject_id"].is_sorted()
        timed = rows.drop_nulls("time")
        assert timed.equals(timed.sort("subject_id", "time", maintain_order=True))

    def test_splits(self, folder: Path) -> None:
        splits = pl.read_parquet(folder / "metadata" / "subject_splits.parquet")
        assert splits.sort("subject_id").rows() == [(3, "train"), (12, "held_out")]

    def test_nobody_trains_on_set_c_of_physionet_2012(self, tmp_path: Path) -> None:
        sets = [record(name, name, split=name) for name in ("a", "b", "c")]
        info = replace(INFO, source="physionet2012")
        write_dataset(write_store(tmp_path / "store", sets, info=info), tmp_path / "meds")
        splits = pl.read_parquet(tmp_path / "meds" / "metadata" / "subject_splits.parquet")
        assert sorted(splits["split"]) == ["a", "b", "held_out"]
        prepare("meds", tmp_path / "meds", tmp_path / "back", progress=False)
        back = EpisodeStore.open(tmp_path / "back")
        assert [(r.split, r.episode.episode_id[-2:]) for r in back] == [("test", "-1")] * 3

    def test_a_subject_dies_once_and_has_no_data_after_it(self, tmp_path: Path) -> None:
        """Two ICU stays of one hospital stay that ended in death, and an earlier one."""
        outcomes = {
            "1": Outcome(mortality=None, los_hours=9.0),
            "2": Outcome(
                mortality=True, los_hours=24.0, death_hours_low=58.0,
                death_hours_high=float(np.nextafter(58, 99)),
            ),
            "3": Outcome(
                mortality=True, los_hours=9.5, death_hours_low=9.5,
                death_hours_high=float(np.nextafter(9.5, 99)),
            ),
        }  # fmt: skip
        records = [
            record(name, "7", n_hours=10 if name != "2" else 24, outcome=outcome)
            for name, outcome in outcomes.items()
        ]
        write_dataset(write_store(tmp_path / "store", records), tmp_path / "meds")
        rows = pl.read_parquet(tmp_path / "meds" / "data" / "*.parquet")
        (death,) = rows.filter(code="MEDS_DEATH")["time"]
        observed = rows.filter(pl.col("code").str.starts_with("OBSERVATION"))
        assert observed["time"].max() < death
        stays = read(tmp_path / "meds")[0].stays
        columns = ("mortality", "los_hours", "death_hours_low")
        assert stays.select(columns).rows() == [
            (None, 9.0, None),
            (True, 24.0, None),
            (True, 9.5, 9.5),
        ]

    def test_nothing_stands_before_it_was_known(self, tmp_path: Path) -> None:
        path = tmp_path / "late"
        with StoreWriter(path, INFO) as writer:
            tables = _tables_with_a_late_value()
            writer.add_block(*tables, {})
        write_dataset(path, tmp_path / "meds")
        rows = pl.read_parquet(tmp_path / "meds" / "data" / "*.parquet")
        value = rows.filter(code="OBSERVATION//glucose").row(0, named=True)
        assert value["time"] == EPOCH + timedelta(hours=3)
        assert value["effective_time"] == EPOCH + timedelta(hours=1)
        back = read(tmp_path / "meds")[1].observations.filter(variable="glucose")
        assert back.select("hours", "available_hours").rows() == [(1.0, 3.0)]

    def test_it_is_read_back(self, folder: Path, tmp_path: Path) -> None:
        prepare("meds", folder, tmp_path / "back", progress=False)
        first, second, third = EpisodeStore.open(tmp_path / "back")
        assert [r.episode.episode_id for r in (first, second, third)] == ["12-1", "12-2", "3-1"]
        assert [r.split for r in (first, second, third)] == ["test", "test", "pretrain"]
        assert second.episode.n_hours == 60
        # The subject is born once: four days of the calendar after its first stay.
        assert second.episode.statics == replace(
            STAYS[0].episode.statics, age_years=pytest.approx(66.75 + 4 / 365.2425)
        )
        assert second.outcome == Outcome(
            los_hours=59.5, mortality=True, death_hours_low=60.5,
            death_hours_high=float(np.nextafter(60.5, 99)),
        )  # fmt: skip
        assert first.outcome == Outcome(mortality=False, los_hours=49.5)
        assert third.episode.statics == Statics()

    def test_without_ages_lengths_and_outcomes(self, tmp_path: Path) -> None:
        path = write_store(tmp_path / "bare", [record("x", "p-1")])
        write_dataset(path, tmp_path / "meds")
        cohort, items, _ = read(tmp_path / "meds")
        stay = cohort.stays.row(0, named=True)
        assert stay["mortality"] is None
        assert stay["los_hours"] is None
        assert stay["end_hours"] == 48
        assert items.observations.select("variable", "value").rows() == [("hr", 80.0)]
        where = pl.read_parquet(tmp_path / "meds" / "metadata" / "stays.parquet")
        assert where["source_subject_id"].to_list() == ["p-1"]


class TestCommand:
    """`python -m training meds`."""

    def run(self, capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
        assert main(["meds", *map(str, words)]) == 0
        return capsys.readouterr().out

    def test_dataset(self, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.run(capsys, "dataset", "--store", store, "--out", tmp_path / "out")
        n = len(pl.read_parquet(tmp_path / "out" / "data" / "*.parquet"))
        assert out == f"{n} events\n"

    def test_labels(self, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.run(capsys, "labels", "--store", store, "--out", tmp_path / "out")
        assert json.loads(out)["mortality"] == 2
        assert len(pl.read_parquet(tmp_path / "out" / "mortality" / "labels.parquet")) == 2

    def test_predictions(
        self, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["predictions", "--store", store, "--out", tmp_path / "out"]
        assert main(["meds", *map(str, words)]) == 1
        assert "--predictions is missing" in capsys.readouterr().err
        scores = {"episode_id": ["a", "b"], "hour": [47, 47], "mortality": [0.3, 0.2]}
        pl.DataFrame(scores).write_parquet(tmp_path / "scores.parquet")
        words += ["--predictions", tmp_path / "scores.parquet", "--threshold", "0.25"]
        assert json.loads(self.run(capsys, *words)) == {"mortality": 2}
        rows = pl.read_parquet(tmp_path / "out" / "mortality.parquet")
        assert rows["predicted_boolean_value"].to_list() == [True, False]

    def test_an_error_is_one_line(
        self, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["meds", "labels", "--store", str(store), "--out", str(store)]) == 1
        assert "exists and is not an empty folder" in capsys.readouterr().err

    def test_the_documented_commands_exist(self) -> None:
        page = Path(__file__).parents[3] / "docs" / "datasets" / "meds.md"
        lines = re.findall(r"^python -m training (meds .*)$", page.read_text(), re.MULTILINE)
        parsed = [_parser().parse_args(line.split()) for line in lines]
        assert [a.what for a in parsed] == ["dataset", "labels", "predictions"]


def _tables_with_a_late_value() -> tuple[pa.Table, pa.Table, pa.Table]:
    from llm4ehr.store_tables import tables_from_records

    late = record("a", "1", [("glucose", 1.0, 100.0, 0)], n_hours=5)
    episodes, observations, events = tables_from_records([late])
    place = observations.schema.get_field_index("available_hours")
    return episodes, observations.set_column(place, "available_hours", [[3.0]]), events


_items = st.lists(
    st.tuples(
        st.sampled_from(VARIABLES),
        st.floats(0, 47.999),
        st.floats(0, 1),
        st.integers(0, 1),
    ),
    max_size=30,
)
_happenings = st.lists(
    st.tuples(
        st.sampled_from(sorted(CODES)),
        st.floats(0, 47.999),
        st.one_of(st.just(float("nan")), st.floats(-1e6, 1e6, width=32)),
    ),
    max_size=20,
)


@settings(max_examples=25)
@given(st.lists(st.tuples(_items, _happenings), min_size=1, max_size=5), st.integers(1, 3))
def test_a_store_survives_the_way_to_meds_and_back(
    tmp_path_factory: pytest.TempPathFactory,
    stays: list[tuple[list[Any], list[Any]]],
    subjects: int,
) -> None:
    """Times to the microsecond and never in another hour; values in single precision."""
    path = tmp_path_factory.mktemp("round")
    records = [
        record(
            f"{k}",
            f"{k % subjects}",
            [(v.name, h, v.low + share * (v.high - v.low), p) for v, h, share, p in items],
            happened,
        )
        for k, (items, happened) in enumerate(stays)
    ]
    write_dataset(write_store(path / "store", records), path / "meds")
    cohort, items, _ = read(path / "meds")
    order = places(EpisodeStore.open(path / "store")).sort("subject_id", "start")
    back = cohort.stays.select(
        "_admission", pl.col("subject_id").cast(pl.Int64), stay=pl.int_range(pl.len())
    ).sort("subject_id", "_admission")
    assert back["_admission"].to_list() == order["start"].to_list()
    by_name = {r.episode.episode_id: r.episode for r in records}
    for name, stay in zip(order["episode_id"], back["stay"], strict=True):
        was = by_name[name]
        _same(
            [VARIABLES[i].name for i in was.obs_variable],
            was.obs_hours,
            was.obs_value,
            items.observations.filter(stay=stay).select("variable", "hours", "value"),
        )
        _same(
            was.ev_code.tolist(),
            was.ev_hours,
            was.ev_value,
            items.events.filter(stay=stay).select("code", "hours", "value"),
        )


def _same(names: list[str], hours: Any, values: Any, found: pl.DataFrame) -> None:
    def rows(what: Any, when: Any, value: Any) -> list[tuple[str, int, int, float]]:
        when = np.asarray(when, np.float64)
        micro = np.minimum(np.round(when * 3.6e9), (np.floor(when) + 1) * 3.6e9 - 1)
        single = np.nan_to_num(np.asarray(value, np.float64), nan=-1e9).astype(np.float32)
        return sorted(zip(what, np.floor(when).astype(int), micro, single, strict=True))

    was = rows(names, hours, values)
    name, when, value = found.to_dict(as_series=False).values()
    now = rows(name, when, [np.nan if v is None else v for v in value])
    assert [(r[0], r[1], r[3]) for r in was] == [(r[0], r[1], r[3]) for r in now]
    assert [r[2] for r in was] == pytest.approx([r[2] for r in now], abs=1)


@pytest.fixture(scope="module")
def demo(llm4ehr_data: Path) -> Path:
    folder = llm4ehr_data / "mimic-iv-demo-2.2"
    if not (folder / "meds").is_dir():
        pytest.skip(f"{folder} has no meds/")
    return folder


@pytest.fixture(scope="module")
def extracted(demo: Path) -> tuple[Cohort, Items, Tally]:
    return read(demo / "meds")


class TestDemo:
    """The open demo of MIMIC-IV as MEDS: 100 patients."""

    def test_stays_are_those_of_icustays(
        self, demo: Path, extracted: tuple[Cohort, Items, Tally]
    ) -> None:
        stays = extracted[0].stays
        theirs = pl.read_csv(demo / "icu" / "icustays.csv.gz", try_parse_dates=True)
        assert len(stays) == len(theirs) == 140
        ours = stays.select(pl.col("subject_id").cast(pl.Int64), intime="_admission")
        assert len(theirs.join(ours, on=["subject_id", "intime"])) == 140
        days = theirs.with_columns(pl.col("subject_id").cast(pl.String)).join(
            stays, left_on=["subject_id", "intime"], right_on=["subject_id", "_admission"]
        )
        too_long = days["los"] * 24 - days["los_hours"]
        assert too_long.min() > -1e-2
        after_death = days.filter(too_long > 1e-2)
        assert len(after_death) == 12  # discharged from the ICU up to 5 hours after they died
        assert after_death["los_hours"].to_list() == after_death["death_hours_low"].to_list()

    def test_deaths_are_those_of_admissions(
        self, demo: Path, extracted: tuple[Cohort, Items, Tally]
    ) -> None:
        stays = extracted[0].stays
        icu = pl.read_csv(demo / "icu" / "icustays.csv.gz", try_parse_dates=True)
        died = pl.read_csv(demo / "hosp" / "admissions.csv.gz").select(
            "hadm_id", "hospital_expire_flag"
        )
        theirs = icu.join(died, on="hadm_id").select(
            pl.col("subject_id").cast(pl.String), _admission="intime", died="hospital_expire_flag"
        )
        both = stays.join(theirs, on=["subject_id", "_admission"])
        assert len(both) == 140
        assert both["mortality"].cast(pl.Int64).to_list() == both["died"].to_list()
        assert both["died"].sum() == 20

    def test_heart_rates_are_those_of_chartevents(
        self, demo: Path, extracted: tuple[Cohort, Items, Tally]
    ) -> None:
        cohort, items, _ = extracted
        charted = pl.read_csv(demo / "icu" / "chartevents.csv.gz", infer_schema=False).filter(
            itemid="220045"
        )
        charted = charted.select(
            "subject_id",
            pl.col("charttime").str.to_datetime("%Y-%m-%d %H:%M:%S"),
            pl.col("valuenum").cast(pl.Float64),
        )
        for name in ("10000032-1", "10001217-2", "10019003-1"):
            row = cohort.stays.with_row_index("stay").row(
                by_predicate=pl.col("episode_id") == name, named=True
            )
            inside = charted.filter(
                pl.col("charttime").is_between(
                    row["_admission"], row["_admission"] + timedelta(hours=row["end_hours"])
                ),
                subject_id=row["subject_id"],
            )
            ours = items.observations.filter(variable="hr", stay=row["stay"])
            assert len(ours) >= 10
            assert sorted(ours["value"]) == sorted(inside["valuenum"])

    def test_first_hours_of_a_stay(self, extracted: tuple[Cohort, Items, Tally]) -> None:
        """Row numbers are those of the event file, from 0."""
        cohort, items, _ = extracted
        stay = cohort.stays.with_row_index("stay").row(
            by_predicate=pl.col("episode_id") == "10000032-1", named=True
        )
        assert stay["_admission"] == datetime.fromisoformat("2180-07-23T14:00")  # row 568
        assert stay["los_hours"] == pytest.approx(9 + 50 / 60 + 47 / 3600)  # row 1094
        assert stay["age_years"] == pytest.approx(52.56, abs=0.01)  # row 0: born 2128-01-01
        assert stay["unit_type"] == "medical"
        assert stay["mortality"] is False
        rates = items.observations.filter(variable="hr", stay=stay["stay"]).sort("hours")
        # Rows 576, 668, 741 and 756; the first three are lines 13, 97 and 157 of chartevents.
        assert rates["value"].head(4).to_list() == [91.0, 93.0, 94.0, 105.0]
        assert rates["hours"].head(4).to_list() == pytest.approx([0.2, 0.5, 1.0, 2.0])
        creatinine = items.events.filter(code="LOINC/2160-0", stay=stay["stay"])
        assert creatinine.select("hours", "available_hours", "value").rows() == [
            (7.75, 9.75, 0.5)  # row 1052
        ]

    def test_counts(self, extracted: tuple[Cohort, Items, Tally]) -> None:
        _, items, tally = extracted
        counts = dict(items.observations["variable"].value_counts().rows())
        assert counts == {
            "dbp": 14333, "fio2": 1855, "gcs_total": 3269, "glucose": 2737, "hr": 13863,
            "mbp": 14357, "ph": 816, "rr": 15175, "sbp": 14332, "spo2": 13596, "temp": 3753,
        }  # fmt: skip
        assert not items.events["code"].str.contains("DIAGNOSIS|DEATH|DISCHARGE|DIED").any()
        assert tally.refused["no-value:glucose"] == 0
