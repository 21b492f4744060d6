"""A unit's own tables: the documented example, line numbers and reasons, units, times, limits."""

from __future__ import annotations

import gzip
import re
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import polars as pl
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llm4ehr.episode import Statics
from llm4ehr.store import EpisodeStore
from llm4ehr.variables import VARIABLES, UnitError, convert
from training.cli import main
from training.data.extraction import Cohort, Expected, Items
from training.data.prepare import prepare
from training.data.sources import SourceError, Tally
from training.data.unit_conversion import with_canonical
from training.data.user_table.check import with_moments
from training.data.user_table.reader import UserTables, check

PAGE = Path(__file__).parents[3] / "docs" / "datasets" / "table.md"

STAYS = "episode_id,subject_id,end_hours,mortality,death_hours\n"
OBSERVATIONS = "episode_id,variable,hours,value,unit\n"


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """`folder(stays=..., observations=..., ...)`: text of the files, with usable defaults."""

    def make(**files: str) -> Path:
        defaults = {"stays": STAYS + "s1,p1,48,no,\n", "observations": OBSERVATIONS}
        for name, text in (defaults | files).items():
            (tmp_path / f"{name}.csv").write_text(text)
        return tmp_path

    return make


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


class TestFiles:
    def test_a_misspelt_column_is_an_error(self, folder: Callable[..., Path]) -> None:
        with pytest.raises(SourceError, match=r"stays\.csv: line 1: column 'age' is not one of"):
            check(folder(stays="episode_id,subject_id,end_hours,age\n"))

    def test_a_needed_column_or_table_is_missing(
        self, folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        with pytest.raises(SourceError, match=r"observations\.csv.*no column 'value'"):
            check(folder(observations="episode_id,variable,hours\n"))
        (tmp_path / "observations.csv").unlink()
        with pytest.raises(SourceError, match=r"there is no observations\.csv"):
            check(tmp_path)

    def test_wrong_delimiter(self, folder: Callable[..., Path]) -> None:
        with pytest.raises(SourceError, match="delimiter seems to be ';'"):
            check(folder(stays="episode_id;subject_id;end_hours\n"))

    def test_encoding(self, folder: Callable[..., Path], tmp_path: Path) -> None:
        source = folder()
        text = "episode_id,code,hours,descriptor\ns1,LOCAL/a,1,ok\ns1,LOCAL/a,1,gr\xfcn\n"
        (tmp_path / "events.csv").write_bytes(text.encode("latin-1"))
        with pytest.raises(SourceError, match=r"events\.csv: line 3: not valid UTF-8"):
            check(source)

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ("episode_id,subject_id,gr\xf6\xdfe\n".encode("latin-1"), "not valid UTF-8"),
            ("episode_id,subject_id,end_hours\ns1,p1,4\n".encode("utf-16"), "UTF-16; save it"),
            ("episode_id,subject_id,end_hours\n".encode("utf-16-le"), "perhaps UTF-16"),
            (b"episode_id,subject_id,end_hours\rs1,p1,48\r", "carriage return alone"),
            (b"episode_id,subject_id,end_hours,end_hours\n", "'end_hours' is there twice"),
            (b"episode_id,subject_id,end_hours,End_Hours \n", "'end_hours' is there twice"),
            (b"episode_id,subject_id,end_hours,Jane Doe\n", "column number 4 is not one of"),
        ],
    )
    @pytest.mark.parametrize("zipped", [False, True])
    def test_a_header_that_cannot_be_read(
        self,
        folder: Callable[..., Path],
        tmp_path: Path,
        header: bytes,
        message: str,
        *,
        zipped: bool,
    ) -> None:
        source = folder()
        (tmp_path / "stays.csv").unlink()
        name = "stays.csv.gz" if zipped else "stays.csv"
        (tmp_path / name).write_bytes(gzip.compress(header) if zipped else header)
        with pytest.raises(SourceError, match=rf"{name}: line 1: .*{message}") as raised:
            check(source)
        assert "jane" not in str(raised.value).lower()

    def test_blank_lines_at_the_end(self, folder: Callable[..., Path]) -> None:
        source = folder(observations=OBSERVATIONS + "s1,hr,1,80,\n\n")
        assert len(read(source)[1].observations) == 1
        assert reasons(source) == {}

    def test_columns_of_parquet_in_any_case_and_ids_as_floats(
        self, folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        source = folder(stays=STAYS + "1,p1,48,no,\n2.0,p2,48,no,\n")
        (tmp_path / "observations.csv").unlink()
        path = tmp_path / "observations.parquet"
        columns = {"Variable": ["hr"], " HOURS": [1.5], "value": [80], "UNIT": ["/min"]}
        pl.DataFrame({"Episode_ID": [1.0], **columns}).write_parquet(path)
        assert read(source)[1].observations.select("stay", "hours").rows() == [(0, 1.5)]
        pl.DataFrame({"episode_id": ["2.0"], **columns}).write_parquet(path)  # text stays as it is
        assert read(source)[1].observations["stay"].to_list() == [1]
        pl.DataFrame({"episode_id": ["1"], "Episode_id": ["1"], **columns}).write_parquet(path)
        with pytest.raises(SourceError, match=r"parquet: column 'episode_id' is there twice"):
            check(source)
        path.write_bytes(b"no Parquet")
        with pytest.raises(SourceError, match=r"observations\.parquet: not readable as Parquet"):
            check(source)

    def test_both_kinds_of_times(self, folder: Callable[..., Path]) -> None:
        with pytest.raises(SourceError, match="both hours and date-times"):
            check(folder(observations="episode_id,variable,value,hours,time\n"))
        with pytest.raises(SourceError, match="no times; give time or hours"):
            check(folder(observations="episode_id,variable,value\n"))
        with pytest.raises(SourceError, match="date-times need admission_time"):
            check(folder(observations="episode_id,variable,value,time\n"))

    def test_a_table_stands_there_once(self, folder: Callable[..., Path], tmp_path: Path) -> None:
        source = folder()
        pl.DataFrame({"episode_id": ["s1"]}).write_parquet(tmp_path / "stays.parquet")
        with pytest.raises(SourceError, match=r"both stays\.csv and stays\.parquet"):
            check(source)

    def test_gzip_and_parquet_read_the_same(
        self, folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        text = OBSERVATIONS + "s1,hr,1.25,80.5,\ns1,glucose,2,100,mg/dL\n"
        source = folder(observations=text)
        plain = read(source)[1].observations
        (tmp_path / "observations.csv").unlink()
        (tmp_path / "observations.csv.gz").write_bytes(gzip.compress(text.encode()))
        assert read(source)[1].observations.equals(plain)
        (tmp_path / "observations.csv.gz").unlink()
        pl.DataFrame(
            {
                "episode_id": ["s1", "s1"],
                "variable": ["hr", "glucose"],
                "hours": [1.25, 2.0],
                "value": [80.5, 100.0],
                "unit": [None, "mg/dL"],
            }
        ).write_parquet(tmp_path / "observations.parquet")
        assert read(source)[1].observations.equals(plain)


class TestTimes:
    COLUMNS = "episode_id,subject_id,admission_time,discharge_time\n"

    def test_offsets_are_exact_across_a_change_of_clocks(self, folder: Callable[..., Path]) -> None:
        source = folder(  # the clocks of central Europe go forward at 02:00 on 29 March 2026
            stays=self.COLUMNS + "s1,p1,2026-03-28T22:00+01:00,2026-03-29T22:00+02:00\n",
            observations="episode_id,variable,time,value\n"
            "s1,hr,2026-03-29T04:00:00+02:00,80\n"
            "s1,hr,2026-03-29T02:30:00Z,81\n"
            "s1,hr,2026-03-29T04:30:00.5+0200,82\n",
        )
        cohort, items, _ = read(source)
        assert cohort.stays["end_hours"].to_list() == [23.0]
        assert items.observations["hours"].to_list() == [5.0, 5.5, pytest.approx(5.5 + 0.5 / 3600)]

    def test_mixed_offsets_and_dates_alone_are_refused(
        self, folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        source = folder(
            stays=self.COLUMNS + "s1,p1,2026-03-28 22:00,2026-03-29 22:00\n",
            observations="episode_id,variable,time,value\n"
            "s1,hr,2026-03-28 22:30,80\n"
            "s1,hr,2026-03-28 22:30+01:00,80\n"
            "s1,hr,2026-03-28,80\n"
            "s1,hr,2026-02-30 10:00,80\n"
            "s1,hr,28.03.2026 22:30,80\n",
        )
        assert refused_rows(source, tmp_path) == [
            ("observations.csv", 3, "time", "time-zone-mixed"),
            ("observations.csv", 4, "time", "not-a-time"),
            ("observations.csv", 5, "time", "not-a-time"),
            ("observations.csv", 6, "time", "not-a-time"),
        ]

    def test_an_offset_that_is_none_on_earth(
        self, folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        source = folder(
            stays=self.COLUMNS + "s1,p1,2026-03-28 22:00+14:00,2026-03-29 22:00+14:00\n",
            observations="episode_id,variable,time,value\n"
            "s1,hr,2026-03-28 22:30+14:00,80\n"
            "s1,hr,2026-03-28 22:30+25:99,80\n"
            "s1,hr,2026-03-28 22:30+01:60,80\n",
        )
        assert refused_rows(source, tmp_path) == [
            ("observations.csv", 3, "time", "not-a-time"),
            ("observations.csv", 4, "time", "not-a-time"),
        ]

    def test_the_first_readable_admission_tells_whether_there_are_offsets(
        self, folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        source = folder(
            stays=self.COLUMNS + "s1,p1,soon,2026-03-29 22:00Z\n"
            "s2,p2,2026-03-28 22:00Z,2026-03-29 22:00Z\n",
            observations="episode_id,variable,time,value\ns2,hr,2026-03-28 22:30Z,80\n",
        )
        assert refused_rows(source, tmp_path) == [("stays.csv", 2, "admission_time", "not-a-time")]

    def test_timestamps_of_parquet(self, folder: Callable[..., Path], tmp_path: Path) -> None:
        source = folder(stays=self.COLUMNS + "s1,p1,2026-03-28T22:00Z,2026-03-29T22:00Z\n")
        (tmp_path / "observations.csv").unlink()
        pl.DataFrame(
            {
                "episode_id": ["s1"],
                "variable": ["hr"],
                "time": [datetime(2026, 3, 28, 23, 30, tzinfo=UTC)],
                "value": [80],
            }
        ).write_parquet(tmp_path / "observations.parquet")
        assert read(source)[1].observations["hours"].to_list() == [1.5]

    def test_discharge_before_admission(self, folder: Callable[..., Path], tmp_path: Path) -> None:
        source = folder(stays=self.COLUMNS + "s1,p1,2026-03-29 22:00,2026-03-28 22:00\n")
        assert refused_rows(source, tmp_path) == [
            ("stays.csv", 2, "discharge_time", "out-of-range")
        ]

    def test_available_before_true_is_at_once(self, folder: Callable[..., Path]) -> None:
        source = folder(
            observations="episode_id,variable,hours,available_hours,value\n"
            "s1,hr,5,4,80\ns1,hr,6,7,80\ns1,hr,7,7,80\n"
        )
        _, items, tally = read(source)
        assert items.observations["available_hours"].to_list() == [None, 7.0, 7.0]
        assert tally.repaired == {"available-before-true:observations": 1}


class TestMeaning:
    def test_one_code_is_one_unit(self, folder: Callable[..., Path]) -> None:
        source = folder(
            codes="code,descriptor,unit\nLOCAL/crp,C-reactive Protein,mg/L\n"
            "LOINC/2160-0,ours,umol/L\n",
            events="episode_id,code,hours,value,unit,descriptor\n"
            "s1,LOCAL/crp,1,5,mg/L,\n"
            "s1,LOCAL/crp,2,5,MG / L,\n"
            "s1,LOCAL/crp,3,5,mg/dL,\n"
            "s1,LOCAL/crp,4,,,\n"
            "s1,LOINC/2160-0,1,1.4,mg/dL,\n"
            "s1,LOINC/2160-0,1,124,,\n"  # without a unit: as the unit's own table of codes says
            "s1,LOCAL/odd_thing,1,5,U,Odd Thing\n",
        )
        _, items, _ = read(source)
        assert items.events["code"].to_list() == [
            "LOCAL/crp",
            "LOCAL/crp",
            "LOCAL/crp//mg/dL",
            "LOCAL/crp",
            "LOINC/2160-0",
            "LOINC/2160-0//umol/L",
            "LOCAL/odd_thing//U",
        ]
        meaning = items.codes.select("code", "descriptor", "unit").rows()
        assert {code: (words, unit) for code, words, unit in meaning} == {
            "LOCAL/crp": ("c-reactive protein", "mg/L"),
            "LOCAL/crp//mg/dL": ("c-reactive protein", "mg/dL"),
            "LOINC/2160-0": ("creatinine in serum or plasma", "mg/dL"),
            "LOINC/2160-0//umol/L": ("creatinine in serum or plasma", "umol/L"),
            "LOCAL/odd_thing//U": ("odd thing", "U"),
        }

    def test_codes_of_the_eleven_variables(self, folder: Callable[..., Path]) -> None:
        source = folder(
            observations="episode_id,variable,hours,value,unit,priority\n"
            "s1,8867-4,1,80,,\n"
            "s1,LOINC/76534-7,1,120,mmHg,\n"  # a cuff
            "s1,MDC/150021,1,120,mmHg,preferred\n"
            "s1,HR,1,80,,fallback\n"
        )
        rows = read(source)[1].observations.select("variable", "priority").rows()
        assert rows == [("hr", 0), ("sbp", 1), ("sbp", 0), ("hr", 1)]

    def test_a_death_counts_only_in_hospital(self, folder: Callable[..., Path]) -> None:
        source = folder(stays=STAYS + "a,p1,48,yes,30\nb,p2,48,no,900\nc,p3,48,,48.5\n")
        cohort, _, tally = read(source)
        assert cohort.stays["mortality"].to_list() == [True, False, None]
        assert cohort.stays["death_hours_low"].to_list() == [30.0, None, None]
        assert tally.refused == {"death-not-in-hospital:stays": 2}

    def test_a_death_in_the_stay_of_a_survivor_contradicts(
        self, folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        source = folder(
            stays=STAYS + "a,p1,48,yes,30\nb,p2,48,no,30\nc,p3,48,,48\nd,p4,48,no,48.5\n"
        )
        assert refused_rows(source, tmp_path) == [
            ("stays.csv", 3, "mortality", "contradiction"),
            ("stays.csv", 4, "mortality", "contradiction"),
        ]

    def test_stays_stand_in_the_order_of_their_ids_as_text(
        self, folder: Callable[..., Path]
    ) -> None:
        source = folder(
            stays=STAYS
            + "10,p1,48,no,\n9,p1,48,no,\n1,p2,48,no,\n"
            + "".join(f"x{i},q{i // 4},48,no,\n" for i in range(200)),
            observations=OBSERVATIONS + "9,hr,1,80,\n",
        )
        cohort, items, _ = read(source)
        assert cohort.stays["episode_id"].to_list()[:3] == ["1", "10", "9"]
        assert items.observations["stay"].to_list() == [2]
        of_patient = cohort.stays.group_by("subject_id").agg(pl.col("split").n_unique())
        assert of_patient["split"].to_list() == [1] * 52
        assert cohort.stays["split"].n_unique() == 3

    def test_without_diagnoses_phenotypes_are_not_known(self, folder: Callable[..., Path]) -> None:
        assert read(folder())[0].stays["phenotypes"].to_list() == [None]
        source = folder(
            stays=STAYS + "a,p1,48,no,\nb,p2,48,no,\n",
            diagnoses="episode_id,icd_version,icd_code\na,9,585.9\n",
        )
        assert read(source)[0].stays["phenotypes"].to_list() == [["Chronic kidney disease"], None]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([v.name for v in VARIABLES]),
            st.sampled_from([None, "%", "1", "/min", "mmHg", "kPa", "mmol/L", "mg/dL", "F", "x"]),
            st.floats(0, 400),
        ),
        min_size=1,
    )
)
def test_tables_are_converted_as_single_values_are(
    rows: list[tuple[str, str | None, float]],
) -> None:
    names = ["variable", "unit", "_value"]
    frame = with_canonical(
        pl.DataFrame(rows, schema=names, orient="row", schema_overrides={"unit": pl.String})
    )
    by_name = {v.name: v for v in VARIABLES}
    for (name, unit, value), row in zip(rows, frame.iter_rows(named=True), strict=True):
        try:
            expected = (convert(by_name[name], value, unit).value, None)
        except UnitError as error:
            expected = (None, error.reason)
        assert row["_canonical"] == expected[0]
        assert expected[1] in (None, row["_unit_reason"])


@given(
    st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)),  # noqa: DTZ001
    st.none() | st.timezones(),
    st.sampled_from(["T", " "]),
    st.sampled_from(["minutes", "seconds", "microseconds"]),
)
def test_date_times_are_read_as_python_reads_them(
    when: datetime, zone: ZoneInfo | None, separator: str, precision: str
) -> None:
    text = when.replace(tzinfo=zone).isoformat(separator, precision)
    expected = datetime.fromisoformat(text)
    if zone is not None:
        assume(expected.strftime("%z")[5:] == "")  # offsets with seconds, of long ago
        expected = expected.astimezone(UTC).replace(tzinfo=None)
    row = with_moments(pl.DataFrame({"time": [text]}), ["time"]).row(0, named=True)
    assert row["_time_at"] == expected
    assert row["_time_zone"] == (zone is not None)
