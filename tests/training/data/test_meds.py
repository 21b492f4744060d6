"""The MEDS reader: stays, items and the code map."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from llm4ehr.variables import VARIABLES
from tests.training.data.meds_source import ROWS, Row, at, read
from training.data.meds.code_map import SHIPPED, load_code_map, shipped_code_map
from training.data.meds.reader import Meds
from training.data.sources import SourceError, Tally


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
