"""Tables of a unit: the documented example, refused rows, what is expected, the command."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from llm4ehr.episode import Statics
from llm4ehr.store import EpisodeStore
from llm4ehr.variables import VARIABLES
from tests.training.data.user_table_source import (
    OBSERVATIONS,
    PAGE,
    STAYS,
    read,
    refused_rows,
    tables_in,
)
from training.cli import main
from training.data.extraction import Expected
from training.data.prepare import prepare
from training.data.sources import SourceError, Tally
from training.data.user_table.reader import UserTables, check


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    return tables_in(tmp_path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    place = tmp_path_factory.mktemp("example")
    block = re.search(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    files, command = block[1].rstrip().rsplit("\n", 1)
    subprocess.run(["bash", "-ec", files], cwd=place, check=True)
    words = command.split()
    assert words[:5] == ["python", "-m", "training", "prepare", "table"]
    source, out = (place / words[words.index(o) + 1] for o in ("--source", "--out"))
    prepare("table", source, out, progress=False)
    return EpisodeStore.open(out, verify=True)


class TestDocumentedExample:
    def test_stays(self, store: EpisodeStore) -> None:
        first, second = list(store)
        assert first.episode.episode_id == "s1"
        assert first.subject_id == "p1"
        assert first.episode.n_hours == 55  # 10:00 to 16:30 two days later
        assert first.episode.statics == Statics(
            age_years=67, sex="female", unit_type="medical", height_cm=165, weight_kg=71.5
        )
        assert first.outcome.mortality is False
        assert first.outcome.los_hours == 54.5
        assert first.outcome.phenotypes == (
            "Pneumonia (except that caused by tuberculosis or sexually transmitted disease)",
        )
        assert second.outcome.mortality is True
        assert second.outcome.death_hours_low == pytest.approx(35 + 25 / 60)
        assert "Shock" in (second.outcome.phenotypes or ())
        assert "Septicemia (except in labor)" in (second.outcome.phenotypes or ())

    def test_values_in_canonical_units(self, store: EpisodeStore) -> None:
        rows = pl.read_parquet(store.path / "observations.parquet").filter(episode_id="s1")
        value = dict(rows.select(pl.col("variable").cast(str), "value").rows())
        assert value["sbp"] == pytest.approx(15.2 / 0.133322387415)
        assert value["temp"] == pytest.approx(38)
        assert value["glucose"] == pytest.approx(7.5 * 18.0156)
        assert value["fio2"] == 0.4
        glucose = rows.filter(pl.col("variable").cast(str) == "glucose").row(0, named=True)
        assert glucose["hours"] == 1.5
        assert glucose["available_hours"] == pytest.approx(2 + 10 / 60)

    def test_an_infusion_is_two_events(self, store: EpisodeStore) -> None:
        second = list(store)[1].episode
        assert list(zip(second.ev_code, second.ev_hours.round(6), strict=True)) == [
            ("LOCAL/norepinephrine//START", pytest.approx(25 / 60, abs=1e-6)),
            ("LOCAL/intubation", pytest.approx(35 / 60, abs=1e-6)),
            ("LOCAL/norepinephrine//END", 8.75),
        ]
        assert second.ev_value[0] == 0.15
        start = store.codes["LOCAL/norepinephrine//START"]
        assert start == ("norepinephrine infusion start", "ug/kg/min")
        assert store.codes["LOINC/2160-0"] == ("creatinine in serum or plasma", "mg/dL")


class TestRefusedRows:
    def test_observations_are_named_by_line_and_reason(
        self, folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        source = folder(
            observations=OBSERVATIONS + "s1,hr,1,80,\n"  # line 2, sound
            "s1,hr,1,high,\n"
            "s1,hr,,80,\n"
            "s1,hr,soon,80,\n"
            "s9,hr,1,80,\n"
            ",hr,1,80,\n"
            "s1,pulse,1,80,\n"
            "s1,5803-2,1,5.5,\n"
            "s1,1234-5,1,5.5,\n"
            "s1,glucose,1,7.5,\n"
            "s1,sbp,1,120,\n"
            "s1,sbp,1,120,mg/dL\n"
            "s1,sbp,1,120,furlong\n"
            "s1,hr,1,999,\n"
            "s1,hr,1,,\n"
            "s1,fio2,1,5,\n"
            "s1,hr,1,nan,\n"
        )
        assert refused_rows(source, tmp_path) == [
            ("observations.csv", 3, "value", "not-a-number"),
            ("observations.csv", 4, "hours", "missing-value"),
            ("observations.csv", 5, "hours", "not-a-number"),
            ("observations.csv", 6, "episode_id", "unknown-episode"),
            ("observations.csv", 7, "episode_id", "missing-value"),
            ("observations.csv", 8, "variable", "unknown-variable"),
            ("observations.csv", 9, "variable", "code-refused"),
            ("observations.csv", 10, "variable", "code-unknown"),
            ("observations.csv", 11, "unit", "unit-missing"),
            ("observations.csv", 12, "unit", "unit-missing"),
            ("observations.csv", 13, "unit", "unit-not-convertible"),
            ("observations.csv", 14, "unit", "unit-unknown"),
            ("observations.csv", 15, "value", "outside-limits"),
            ("observations.csv", 16, "value", "missing-value"),
            ("observations.csv", 17, "unit", "unit-missing"),
            ("observations.csv", 18, "value", "not-a-number"),
        ]

    def test_stays(self, folder: Callable[..., Path], tmp_path: Path) -> None:
        columns = "episode_id,subject_id,end_hours,sex,unit_type,mortality,age_years,split\n"
        source = folder(
            stays=columns + "a,p,24,f,medical,1,50,x\n"  # line 2, sound
            "a,p,24,f,medical,1,50,x\n"
            "b,,24,f,medical,1,50,x\n"
            "c,p3,0,f,medical,1,50,x\n"
            "d,p4,40000,f,medical,1,50,x\n"
            "e,p5,24,girl,medical,1,50,x\n"
            "f,p6,24,f,ward,1,50,x\n"
            "g,p7,24,f,medical,maybe,50,x\n"
            "h,p8,24,f,medical,1,500,x\n"
            "i,p,24,f,medical,1,50,y\n"
            "j,p9,24,f,medical,1,50,\n"
        )
        assert refused_rows(source, tmp_path) == [
            ("stays.csv", 3, "episode_id", "duplicate-episode"),
            ("stays.csv", 4, "subject_id", "missing-value"),
            ("stays.csv", 5, "end_hours", "out-of-range"),
            ("stays.csv", 6, "end_hours", "out-of-range"),
            ("stays.csv", 7, "sex", "unknown-value"),
            ("stays.csv", 8, "unit_type", "unknown-value"),
            ("stays.csv", 9, "mortality", "unknown-value"),
            ("stays.csv", 10, "age_years", "out-of-range"),
            ("stays.csv", 11, "split", "split-conflict"),
            ("stays.csv", 12, "split", "missing-value"),
        ]

    def test_events_codes_and_diagnoses(self, folder: Callable[..., Path], tmp_path: Path) -> None:
        source = folder(
            events="episode_id,code,hours,end_hours,value,unit\n"
            "s1,crp,1,,5,\n"
            "s1,ICD10/A41.9,1,,,\n"
            "s1,ICD-9-CM/038,1,,,\n"
            "s1,LOCAL/a,2,1,,\n"
            "s1,LOINC/2160-0,1,,1.4,\n"
            "s1,ICDSC/total,1,,4,\n",  # a delirium score
            codes="code,descriptor\ncrp,c-reactive protein\nLOCAL/a,one\nLOCAL/a,two\n",
            diagnoses="episode_id,icd_version,icd_code\ns1,8,A41\ns1,10,\ns7,10,A41\ns1,10,A41\n",
        )
        assert refused_rows(source, tmp_path) == [
            ("codes.csv", 2, "code", "code-without-system"),
            ("codes.csv", 4, "code", "duplicate-code"),
            ("events.csv", 2, "code", "code-without-system"),
            ("events.csv", 3, "code", "diagnosis-code"),
            ("events.csv", 4, "code", "diagnosis-code"),
            ("events.csv", 5, "end_hours", "end-before-start"),
            ("events.csv", 6, "unit", "unit-missing"),
            ("diagnoses.csv", 2, "icd_version", "unknown-value"),
            ("diagnoses.csv", 3, "icd_code", "missing-value"),
            ("diagnoses.csv", 4, "episode_id", "unknown-episode"),
        ]

    def test_lines_count_the_breaks_inside_quotes(
        self, folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        source = folder(
            events='episode_id,code,hours,descriptor\ns1,LOCAL/a,1,"two\nlines"\ns1,bad,1,\n'
        )
        assert refused_rows(source, tmp_path) == [("events.csv", 4, "code", "code-without-system")]

    def test_nothing_of_the_row_is_repeated(
        self, folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        source = folder(observations=OBSERVATIONS + "s1,hr,1,SECRET,\ns1,SECRET,1,80,SECRET\n")
        report = check(source, tmp_path / "rejected")
        assert "SECRET" not in (tmp_path / "rejected").read_text() + str(report)

    def test_without_refused_rows_there_is_no_list_of_them(
        self, folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        source = folder(observations=OBSERVATIONS + "s1,hr,1,80,\n")
        (tmp_path / "rejected").write_text("of an earlier run")
        assert check(source, tmp_path / "rejected").passed
        assert not (tmp_path / "rejected").exists()

    def test_good_rows_are_kept_up_to_one_percent(self, folder: Callable[..., Path]) -> None:
        rows = [f"s1,hr,{i / 10},80,\n" for i in range(199)]
        source = folder(observations=OBSERVATIONS + "".join(rows) + "s1,hr,1,?,\n")
        _, items, tally = read(source)
        assert len(items.observations) == 199
        assert tally.refused == {"not-a-number:observations": 1}

    def test_more_than_one_percent_fails_the_run_and_lists_the_rows(
        self, folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        rows = [f"s1,hr,{i / 10},80,\n" for i in range(97)]
        source = folder(observations=OBSERVATIONS + "".join(rows) + "s1,hr,1,?,\n" * 2)
        rejected = tmp_path / "out.rejected.csv"
        with pytest.raises(SourceError, match=r"1 %.*observations\.csv.*line 99 \(value: not-a-nu"):
            UserTables(source, rejected=rejected).cohort(Tally())
        assert rejected.read_text().splitlines()[1:] == [
            f"observations.csv,{line},value,not-a-number,not a finite number" for line in (99, 100)
        ]

    def test_rows_of_a_refused_stay_do_not_count_as_refused(
        self, folder: Callable[..., Path]
    ) -> None:
        good = "".join(f"s{i},p{i},24,no,\n" for i in range(150))
        source = folder(
            stays=STAYS + good + "bad,p,-1,no,\n",
            observations=OBSERVATIONS + "s1,hr,1,80,\n" + "bad,hr,1,80,\n" * 9,
        )
        cohort, items, tally = read(source)
        assert len(cohort.stays) == 150
        assert [(s.rule, s.stays) for s in cohort.waterfall] == [
            ("rows of the table of stays", 151),
            ("whose row is sound", 150),
        ]
        assert len(items.observations) == 1
        assert tally.refused["refused-episode:observations"] == 9


class TestExpected:
    def expected(self, source: Path) -> Expected:
        reader = UserTables(source)
        reader.check()
        return reader.expected

    def test_a_variable_is_absent_only_if_the_file_never_names_it(
        self, folder: Callable[..., Path]
    ) -> None:
        source = folder(
            observations=OBSERVATIONS + "s1,hr,1,80,\n"
            "s1,2345-7,1,7.5,\n"  # glucose, whose unit is missing
            "s1,ph,1,99,\n"
            "s1,2756-5,1,5.5,\n"  # a pH of urine, which is none of the variables
        )
        named = {"hr", "glucose", "ph"}
        assert self.expected(source).absent_variables == {v.name for v in VARIABLES} - named

    def test_tasks_are_those_that_have_any_label(self, folder: Callable[..., Path]) -> None:
        assert self.expected(folder()).tasks == {"mortality"}
        nothing = folder(stays="episode_id,subject_id,end_hours,mortality\ns1,p1,48,\n")
        assert self.expected(nothing).tasks == frozenset()
        everything = folder(
            stays="episode_id,subject_id,end_hours,mortality,death_hours,los_hours\n"
            "s1,p1,48,yes,30,40\n",
            diagnoses="episode_id,icd_version,icd_code\ns1,9,585.9\n",
        )
        assert self.expected(everything).tasks == {
            "mortality", "decompensation", "remaining_los", "phenotyping",
        }  # fmt: skip

    def test_labels_of_one_class_and_lost_variables_fail_the_run(
        self, folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        many = "".join(f"s1,hr,{i / 10},80,\n" for i in range(200))
        source = folder(observations=OBSERVATIONS + many + "s1,ph,1,99,\n")
        with pytest.raises(SourceError, match=r"ph is not observed.*all 1 labelled stays are neg"):
            prepare("table", source, tmp_path / "out" / "store", progress=False)


class TestCommand:
    """`python -m training prepare table --check`."""

    def run(self, *words: str | Path) -> int:
        return main(["prepare", "table", "--check", *map(str, words)])

    @pytest.fixture
    def unit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        unit = tmp_path / "unit"
        unit.mkdir()
        (unit / "stays.csv").write_text(STAYS + "s1,p1,48,no,\n")
        (unit / "observations.csv").write_text(OBSERVATIONS + "s1,hr,1,80,\ns1,hr,1,?,\n")
        monkeypatch.chdir(tmp_path)
        return unit

    def test_every_refused_row_is_listed_beside_the_store_to_be(
        self, unit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run("--source", unit, "--out", "stores/mine") == 1
        listed = tmp_path / "stores" / "mine.rejected.csv"
        assert f"refused rows: {listed}" in capsys.readouterr().out
        assert listed.read_text().splitlines()[1:] == [
            "observations.csv,3,value,not-a-number,not a finite number"
        ]

    @pytest.mark.parametrize("where", ["", "unit", "elsewhere"])
    def test_without_a_store_in_the_current_folder_but_never_among_the_tables(
        self, unit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        (tmp_path / where).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / where)
        assert self.run("--source", "." if where == "unit" else unit) == 1
        folder = tmp_path / "elsewhere" if where == "elsewhere" else tmp_path
        assert (folder / "unit.rejected.csv").exists()
        assert {p.name for p in unit.iterdir()} == {"stays.csv", "observations.csv"}
        assert self.run("--source", unit, "--out", unit / "store") == 1
        assert {p.name for p in unit.iterdir()} == {"stays.csv", "observations.csv"}

    def test_nothing_refused_leaves_no_file(
        self, unit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.run("--source", unit)
        (unit / "observations.csv").write_text(OBSERVATIONS + "s1,hr,1,80,\n")
        assert self.run("--source", unit) == 0
        assert not (tmp_path / "unit.rejected.csv").exists()
        assert capsys.readouterr().out.splitlines()[-1] == "observations.csv: 1 rows, 0 refused"

    def test_it_is_for_tables_alone(self, unit: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["prepare", "meds", "--check", "--source", str(unit)]) == 1
        assert "--check is for the data set table, not meds" in capsys.readouterr().err
