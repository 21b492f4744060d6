"""PhysioNet 2019: hourly records of two hospitals, without outcomes."""

from __future__ import annotations

import math
import os
import shutil
import tarfile
from itertools import islice
from pathlib import Path

import pytest

from llm4ehr.episode import Episode, Statics
from llm4ehr.store import EpisodeRecord, EpisodeStore, Outcome
from llm4ehr.variables import VARIABLE_INDEX
from training.data import physionet2012
from training.data.codes import CODES
from training.data.physionet2019 import COLUMNS, EVENTS, PhysioNet2019
from training.data.prepare import prepare
from training.data.sources import SourceError, Tally

FIXTURE = Path(__file__).parents[2] / "fixtures" / "physionet2019"
CALCIUM, IONIZED = "LOINC/17861-6", "LOINC/1994-3"


def official_data() -> Path:
    folder = os.environ.get("LLM4EHR_DATA")
    if not folder:
        pytest.skip("LLM4EHR_DATA is not set: the folder with physionet2012/ and physionet2019/")
    return Path(folder) / "physionet2019"


def read(source: Path) -> tuple[dict[str, EpisodeRecord], Tally]:
    tally = Tally()
    records = PhysioNet2019(source).records(tally)
    return {r.episode.episode_id: r for r in records}, tally


def row(**values: float) -> str:
    """One hour of a made-up record; what is not given is missing."""
    defaults = {"Age": 60.0, "Gender": 1.0, "ICULOS": 1.0, "SepsisLabel": 0.0}
    values = defaults | values
    return "|".join(f"{values.get(name, math.nan):g}".replace("nan", "NaN") for name in COLUMNS)


def read_rows(tmp_path: Path, *rows: str) -> tuple[Episode, Tally]:
    folder = tmp_path / "training_setA"
    folder.mkdir(exist_ok=True)
    (folder / "p9.psv").write_text("\n".join(["|".join(COLUMNS), *rows]) + "\n")
    records, tally = read(tmp_path)
    return records["p9"].episode, tally


def observed(episode: Episode, variable: str) -> list[tuple[float, float, int]]:
    """(hours, value, priority) of a variable."""
    of = episode.obs_variable == VARIABLE_INDEX[variable]
    columns = (episode.obs_hours[of], episode.obs_value[of], episode.obs_priority[of])
    return list(zip(*(c.tolist() for c in columns), strict=True))


def events(episode: Episode, code: str) -> list[tuple[float, float]]:
    of = episode.ev_code == code
    return list(zip(episode.ev_hours[of].tolist(), episode.ev_value[of].tolist(), strict=True))


class TestFixture:
    def test_stays_splits_and_absent_labels(self) -> None:
        records, _ = read(FIXTURE)
        assert list(records) == ["p000048", "p007161", "p100200", "p101215"]
        assert [r.split for r in records.values()] == ["a", "a", "b", "b"]
        assert all(r.outcome == Outcome() for r in records.values())
        assert all(r.subject_id == name for name, r in records.items())

    def test_length_is_the_last_hour_not_the_number_of_rows(self) -> None:
        episode = read(FIXTURE)[0]["p000048"].episode
        assert episode.n_hours == 19  # 16 rows, from ICULOS 4 on
        assert episode.obs_hours.min() == 3.5
        assert episode.obs_hours.max() == 18.5

    def test_statics(self) -> None:
        records, _ = read(FIXTURE)
        statics = {name: r.episode.statics for name, r in records.items()}
        assert statics["p101215"] == Statics(age_years=85.0, sex="female", unit_type="medical")
        assert statics["p000048"].unit_type == "surgical"
        assert statics["p007161"].unit_type is None

    def test_every_value_is_stored_or_refused(self) -> None:
        records, tally = read(FIXTURE)
        n_values = 0
        for file in FIXTURE.glob("training_set?/*.psv"):
            for line in file.read_text().splitlines()[1:]:
                n_values += sum(v != "NaN" for v in line.split("|")[: COLUMNS.index("Age")])
        stored = sum(r.episode.obs_value.size + r.episode.ev_value.size for r in records.values())
        assert stored + tally.refused.total() == n_values

    def test_noise_of_two_records(self) -> None:
        records, tally = read(FIXTURE)
        fio2 = [value for _, value, _ in observed(records["p101215"].episode, "fio2")]
        assert fio2 == [1.0]  # the 2 of hour 9 is neither a fraction nor a percentage
        assert tally.refused["outside-limits:FiO2"] == 2
        calcium = records["p100200"].episode
        assert [v for _, v in events(calcium, CALCIUM)] == [6.9, 6.3]
        assert [v for _, v in events(calcium, IONIZED)] == [1.05, 1.08, 1.85, 1.1]
        assert tally.refused["unit-unclear:Calcium"] == 3


class TestMapping:
    def test_a_row_stands_in_the_middle_of_its_hour(self, tmp_path: Path) -> None:
        episode, _ = read_rows(tmp_path, row(ICULOS=1, HR=80), row(ICULOS=2, HR=82, BUN=20))
        assert observed(episode, "hr") == [(0.5, 80.0, 0), (1.5, 82.0, 0)]
        assert events(episode, "LOINC/3094-0") == [(1.5, 20.0)]
        assert episode.n_hours == 2

    def test_pulse_oximetry_goes_before_the_blood_gas(self, tmp_path: Path) -> None:
        episode, _ = read_rows(tmp_path, row(O2Sat=95, SaO2=97))
        assert observed(episode, "spo2") == [(0.5, 95.0, 0), (0.5, 97.0, 1)]

    @pytest.mark.parametrize(
        ("written", "fraction"), [(0.21, 0.21), (1, 1.0), (21, 0.21), (60, 0.6), (100, 1.0)]
    )
    def test_inspired_oxygen(self, tmp_path: Path, written: float, fraction: float) -> None:
        episode, tally = read_rows(tmp_path, row(FiO2=written))
        assert observed(episode, "fio2") == [(0.5, pytest.approx(fraction), 0)]
        assert tally.repaired == ({"percent:FiO2": 1} if written > 1 else {})

    @pytest.mark.parametrize("written", [-50, 0, 0.2, 1.2, 20, 101, 4000])
    def test_impossible_inspired_oxygen(self, tmp_path: Path, written: float) -> None:
        episode, tally = read_rows(tmp_path, row(FiO2=written, HR=80))
        assert observed(episode, "fio2") == []
        assert observed(episode, "hr") != []
        assert tally.refused == {"outside-limits:FiO2": 1}

    @pytest.mark.parametrize(
        ("written", "code"),
        [(1.12, IONIZED), (2.49, IONIZED), (2.5, None), (5.49, None), (5.5, CALCIUM), (9, CALCIUM)],
    )
    def test_calcium(self, tmp_path: Path, written: float, code: str | None) -> None:
        episode, tally = read_rows(tmp_path, row(Calcium=written))
        assert episode.ev_code.tolist() == ([code] if code else [])
        assert tally.refused == ({} if code else {"unit-unclear:Calcium": 1})

    def test_base_excess_may_be_negative_and_concentrations_not(self, tmp_path: Path) -> None:
        episode, tally = read_rows(tmp_path, row(BaseExcess=-5, HCO3=0))
        assert events(episode, "LOINC/1925-7") == [(0.5, -5.0)]
        assert tally.refused == {"outside-limits:HCO3": 1}

    def test_one_analyte_in_one_unit_has_one_code_in_both_challenges(self) -> None:
        for name_2012, name_2019 in {
            "Mg": "Magnesium",  # documented as mmol/L and mmol/dL, both in fact mg/dL
            "Lactate": "Lactate",
            "K": "Potassium",
            "Bilirubin": "Bilirubin_total",
            "HCT": "Hct",
            "Platelets": "Platelets",
        }.items():
            assert physionet2012.EVENTS[name_2012] == EVENTS[name_2019]
        assert CODES[EVENTS["Magnesium"]].unit == "mg/dL"
        assert CODES[EVENTS["Calcium"]].unit != CODES[IONIZED].unit

    def test_missing_descriptors(self, tmp_path: Path) -> None:
        episode, _ = read_rows(tmp_path, row(Age=math.nan, Gender=math.nan))
        assert episode.statics == Statics()
        episode, _ = read_rows(tmp_path, row(Age=100, Gender=0, Unit1=0, Unit2=1))
        assert episode.statics == Statics(age_years=100.0, sex="female", unit_type="surgical")


class TestSource:
    def test_archive_and_folder_are_the_same(self, tmp_path: Path) -> None:
        for name in ("training_setA", "training_setB"):
            with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as tar:
                tar.add(FIXTURE / name, name)
        folder = prepare("physionet2019", FIXTURE, tmp_path / "s0", progress=False)
        archive = prepare("physionet2019", tmp_path, tmp_path / "s1", progress=False)
        assert folder == archive
        assert len(EpisodeStore.open(tmp_path / "s1", verify=True)) == 4
        assert len(read(tmp_path / "training_setB.tar.gz")[0]) == 2

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("HR|O2Sat\n80|95\n", "does not name the 41 columns"),
            ("|".join(COLUMNS) + "\n", "CSV"),
            ("|".join(COLUMNS) + "\n1|2\n", "Expected 41 columns"),
            ("\n".join(["|".join(COLUMNS), row(ICULOS=2), row(ICULOS=2)]), "does not rise"),
            ("\n".join(["|".join(COLUMNS), row(ICULOS=0)]), "whole number of hours"),
            ("\n".join(["|".join(COLUMNS), row(ICULOS=math.nan)]), "whole number of hours"),
            ("\n".join(["|".join(COLUMNS), row().replace("NaN", "n/a", 1)]), "n/a"),
        ],
    )
    def test_a_malformed_record_is_named(self, tmp_path: Path, text: str, message: str) -> None:
        shutil.copytree(FIXTURE / "training_setA", tmp_path / "training_setA")
        (tmp_path / "training_setA" / "p000050.psv").write_text(text)
        with pytest.raises(SourceError, match=rf"(?s)p000050.*{message}"):
            prepare("physionet2019", tmp_path, tmp_path / "out", progress=False)
        assert [p.name for p in tmp_path.iterdir()] == ["training_setA"]

    def test_an_empty_source_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="neither training_setA nor training_setB"):
            PhysioNet2019(tmp_path)


def test_official_hospital_b() -> None:
    source = PhysioNet2019(official_data() / "training_setB.tar.gz")
    assert source.n_episodes == 20_000
    # Shares of hours with a value in the whole set are .88, .86, .02 and .22.
    shares = {"hr": 0.88, "dbp": 0.86, "ph": 0.02, "glucose": 0.22}
    seen = dict.fromkeys(shares, 0)
    hours = 0
    for record in islice(source.records(Tally()), 2048):
        episode = record.episode
        hours += episode.n_hours
        assert record.split == "b"
        assert episode.obs_hours.size == 0 or episode.obs_hours.max() < episode.n_hours <= 336
        for name in shares:
            seen[name] += len(observed(episode, name))
    for name, share in shares.items():
        assert seen[name] / hours == pytest.approx(share, abs=0.02), name
