"""Tables of a unit: files, times and what values mean."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import polars as pl
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llm4ehr.variables import VARIABLES, UnitError, convert
from tests.training.data.user_table_source import (
    OBSERVATIONS,
    STAYS,
    read,
    reasons,
    refused_rows,
    tables_in,
)
from training.data.sources import SourceError
from training.data.unit_conversion import with_canonical
from training.data.user_table.check import with_moments
from training.data.user_table.reader import check


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    return tables_in(tmp_path)


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
