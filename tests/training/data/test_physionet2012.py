"""PhysioNet 2012: the official layout, and every documented quirk of the data."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from llm4ehr.episode import Episode, Statics
from llm4ehr.store import EpisodeRecord, EpisodeStore, Outcome, StoreError
from llm4ehr.variables import VARIABLE_INDEX, VARIABLES
from training.data import READERS
from training.data.physionet2012 import PhysioNet2012
from training.data.prepare import prepare
from training.data.sources import SourceError, Tally

FIXTURE = Path(__file__).parents[2] / "fixtures" / "physionet2012"
DIED = {"145361", "146576", "148573", "150733"}
HEADER = "Time,Parameter,Value\n"


def official_data() -> Path:
    folder = os.environ.get("LLM4EHR_DATA")
    if not folder:
        pytest.skip("LLM4EHR_DATA is not set: the folder with physionet2012/ and physionet2019/")
    return Path(folder) / "physionet2012"


def read(source: Path) -> tuple[list[EpisodeRecord], Tally]:
    tally = Tally()
    return list(PhysioNet2012(source).records(tally)), tally


def read_rows(
    tmp_path: Path, rows: Iterable[str], descriptors: str = "00:00,Age,50\n"
) -> tuple[Episode, Tally]:
    """The episode of one made-up record."""
    folder = tmp_path / "set-c"
    folder.mkdir(exist_ok=True)
    text = HEADER + "00:00,RecordID,200001\n" + descriptors + "".join(r + "\n" for r in rows)
    (folder / "200001.txt").write_text(text)
    (record,), tally = read(tmp_path)
    return record.episode, tally


def observed(episode: Episode, variable: str) -> list[tuple[float, float, int]]:
    """(hours, value, priority) of a variable."""
    of = episode.obs_variable == VARIABLE_INDEX[variable]
    columns = (episode.obs_hours[of], episode.obs_value[of], episode.obs_priority[of])
    return list(zip(*(c.tolist() for c in columns), strict=True))


def events(episode: Episode, code: str) -> list[tuple[float, float]]:
    of = episode.ev_code == code
    return list(zip(episode.ev_hours[of].tolist(), episode.ev_value[of].tolist(), strict=True))


class TestFixture:
    def test_every_stay_once_in_the_order_of_its_id(self) -> None:
        records, _ = read(FIXTURE)
        ids = [r.episode.episode_id for r in records]
        assert len(ids) == 15
        assert ids == sorted(ids)
        assert all(r.subject_id == r.episode.episode_id for r in records)
        assert [r.split for r in records] == ["a"] * 3 + ["b"] * 12
        assert {r.episode.n_hours for r in records} == {48}
        assert PhysioNet2012(FIXTURE).n_episodes == 15

    def test_labels(self) -> None:
        outcome = {r.episode.episode_id: r.outcome for r in read(FIXTURE)[0]}
        assert {i for i, o in outcome.items() if o.mortality} == DIED
        # Survival 6 days; Length_of_stay 7 days.
        assert outcome["145361"] == Outcome(
            mortality=True, los_hours=168.0, death_hours_low=144.0, death_hours_high=168.0
        )
        # Survival 1 day, though every patient lived through the 48 hours of the record.
        assert outcome["148573"].death_hours_low == 48.0
        assert outcome["148573"].death_hours_high == 72.0
        # Died 1160 days after admission, long after discharge: no death of this stay.
        assert outcome["143247"] == Outcome(mortality=False, los_hours=528.0)
        # Length_of_stay -1: not recorded.
        assert outcome["140501"] == Outcome(mortality=False)

    def test_a_stay_without_time_series_is_kept(self) -> None:
        record = next(r for r in read(FIXTURE)[0] if r.episode.episode_id == "140501")
        assert record.episode.obs_value.size == record.episode.ev_value.size == 0
        assert record.episode.statics == Statics(age_years=31.0, sex="male", unit_type="medical")

    def test_statics(self) -> None:
        statics = {r.episode.episode_id: r.episode.statics for r in read(FIXTURE)[0]}
        assert statics["143435"] == Statics(
            age_years=81.0, sex="female", unit_type="coronary", height_cm=162.6, weight_kg=71.4
        )
        assert {s.unit_type for s in statics.values()} == {
            "coronary",
            "cardiac_surgery",
            "medical",
            "surgical",
        }

    def test_every_row_is_stored_refused_or_a_descriptor(self) -> None:
        records, tally = read(FIXTURE)
        lines = sum(len(file.read_text().splitlines()) - 1 for file in FIXTURE.glob("set-?/*.txt"))
        stored = sum(r.episode.obs_value.size + r.episode.ev_value.size for r in records)
        assert stored + sum(tally.refused.values()) == lines - 6 * len(records)

    def test_values_are_those_of_the_file(self) -> None:
        episode = next(r.episode for r in read(FIXTURE)[0] if r.episode.episode_id == "143435")
        text = (FIXTURE / "set-b" / "143435.txt").read_text()
        rows = [line.split(",") for line in text.splitlines()[1:]]
        hours = [int(t[:2]) + int(t[3:]) / 60 for t, p, _ in rows if p == "RespRate"]
        rates = [float(v) for _, p, v in rows if p == "RespRate"]
        assert len(rates) > 40
        found = observed(episode, "rr")
        assert [value for _, value, _ in found] == rates
        assert [hour for hour, _, _ in found] == pytest.approx(hours)
        creatinine = [float(v) for _, p, v in rows if p == "Creatinine"]
        assert [v for _, v in events(episode, "LOINC/2160-0")] == creatinine

    def test_known_quirks_of_two_records(self) -> None:
        _, tally = read(FIXTURE / "set-a")
        # 141680: pH 187 and PaO2 7.47. 135603: readings of 0 where the line was flushed or open.
        assert tally.refused["impossible:pH"] == 1
        assert tally.repaired["tenth:PaO2"] == 1
        assert tally.refused["impossible:HR"] > 0
        assert tally.refused["impossible:Temp"] > 0
        assert tally.refused["superseded:Urine"] + tally.refused["superseded:Temp"] > 0


class TestMapping:
    def test_invasive_pressure_goes_before_the_cuff(self, tmp_path: Path) -> None:
        episode, _ = read_rows(
            tmp_path, ["01:00,SysABP,120", "01:00,NISysABP,110", "02:30,NIMAP,70", "02:30,MAP,75"]
        )
        assert observed(episode, "sbp") == [(1.0, 120.0, 0), (1.0, 110.0, 1)]
        assert sorted(observed(episode, "mbp")) == [(2.5, 70.0, 1), (2.5, 75.0, 0)]

    def test_ventilation_is_an_event_without_a_value(self, tmp_path: Path) -> None:
        episode, _ = read_rows(tmp_path, ["03:15,MechVent,1"])
        ((hours, value),) = events(episode, "SNOMED/40617009")
        assert hours == 3.25
        assert np.isnan(value)

    def test_weight_is_a_descriptor_first_and_an_event_later(self, tmp_path: Path) -> None:
        episode, _ = read_rows(tmp_path, ["00:00,Weight,80", "05:00,Weight,82.5"])
        assert episode.statics.weight_kg == 80.0
        assert events(episode, "LOINC/29463-7") == [(5.0, 82.5)]

    def test_a_repeated_weight_at_admission_counts_once(self, tmp_path: Path) -> None:
        """As in record 149509."""
        episode, tally = read_rows(tmp_path, ["00:00,Weight,-1", "00:00,Weight,70"])
        assert episode.statics.weight_kg == 70.0
        assert events(episode, "LOINC/29463-7") == []
        assert not tally.refused

    def test_the_last_minute_of_the_record_is_kept(self, tmp_path: Path) -> None:
        episode, _ = read_rows(tmp_path, ["47:37,HR,80", "48:00,HR,81"])
        assert observed(episode, "hr") == [(47 + 37 / 60, 80.0, 0), (48.0, 81.0, 0)]

    def test_missing_descriptors(self, tmp_path: Path) -> None:
        rows = "".join(f"00:00,{p},-1\n" for p in ("Gender", "Height", "Weight"))
        episode, tally = read_rows(tmp_path, [], "00:00,Age,90\n00:00,ICUType,4\n" + rows)
        assert episode.statics == Statics(age_years=90.0, unit_type="surgical")
        assert not tally.refused


class TestCleaning:
    @pytest.mark.parametrize(
        ("written", "height"),
        [(1.8, 180.0), (17.8, 178.0), (80, 176.0), (426.7, 168.0), (1780, 178.0), (172, 172.0)],
    )
    def test_heights_are_repaired(self, tmp_path: Path, written: float, height: float) -> None:
        episode, tally = read_rows(tmp_path, [], f"00:00,Height,{written}\n")
        assert episode.statics.height_cm == pytest.approx(height, abs=0.1)
        assert sum(tally.repaired.values()) == (written != 172)

    @pytest.mark.parametrize(
        ("row", "variable", "value"),
        [
            ("pH,0.74", "ph", 7.4),
            ("pH,73.5", "ph", 7.35),
            ("pH,735", "ph", 7.35),
            ("Temp,98.6", "temp", 37.0),
        ],
    )
    def test_scale_slips_are_repaired(
        self, tmp_path: Path, row: str, variable: str, value: float
    ) -> None:
        episode, tally = read_rows(tmp_path, [f"01:00,{row}"])
        assert observed(episode, variable) == [(1.0, pytest.approx(value), 0)]
        assert sum(tally.repaired.values()) == 1
        assert not tally.refused

    @pytest.mark.parametrize(("row", "value"), [("PaCO2,4.1", 41.0), ("PaO2,9.5", 95.0)])
    def test_gas_pressures_are_repaired(self, tmp_path: Path, row: str, value: float) -> None:
        episode, tally = read_rows(tmp_path, [f"01:00,{row}"])
        assert episode.ev_value.tolist() == [pytest.approx(value)]
        assert tally.repaired.total() == 1

    def test_an_impossible_age_is_that_of_the_very_old(self, tmp_path: Path) -> None:
        episode, _ = read_rows(tmp_path, [], "00:00,Age,200\n")
        assert episode.statics.age_years == 91.4

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ("HR,0", "impossible:HR"),
            ("HR,300", "impossible:HR"),
            ("NIDiasABP,-1", "impossible:NIDiasABP"),
            ("DiasABP,201", "impossible:DiasABP"),
            ("SysABP,0", "impossible:SysABP"),
            ("MAP,5", "outside-limits:MAP"),
            ("RespRate,0", "impossible:RespRate"),
            ("Temp,-17.8", "impossible:Temp"),
            ("Temp,25.5", "outside-limits:Temp"),
            ("pH,1", "impossible:pH"),
            ("Glucose,10", "outside-limits:Glucose"),
            ("FiO2,0.1", "outside-limits:FiO2"),
            ("WBC,0.1", "impossible:WBC"),
            ("PaO2,0", "impossible:PaO2"),
            ("Lactate,0", "impossible:Lactate"),
            ("Weight,472", "impossible:Weight"),
            ("HR,", "no-value:HR"),
            (",1.9", "unknown-parameter:(empty)"),
            ("Sodium,140", "unknown-parameter:Sodium"),
        ],
    )
    def test_bad_items_are_named_and_the_good_ones_kept(
        self, tmp_path: Path, row: str, reason: str
    ) -> None:
        episode, tally = read_rows(tmp_path, ["00:30,HR,80", f"01:00,{row}", "01:00,K,4.1"])
        assert tally.refused == {reason: 1}
        assert observed(episode, "hr") == [(0.5, 80.0, 0)]
        assert events(episode, "LOINC/2823-3") == [(1.0, 4.1)]

    def test_a_low_urine_output_is_a_result(self, tmp_path: Path) -> None:
        episode, tally = read_rows(tmp_path, ["01:00,Urine,0"])
        assert events(episode, "LOINC/9187-6") == [(1.0, 0.0)]
        assert not tally.refused

    def test_the_last_of_several_values_at_one_time_is_kept(self, tmp_path: Path) -> None:
        episode, tally = read_rows(
            tmp_path, ["01:18,Temp,36.1", "01:18,HR,80", "01:18,Temp,36.9", "01:18,Temp,0"]
        )
        assert observed(episode, "temp") == [(1.3, 36.9, 0)]
        # An impossible value corrects nothing.
        assert tally.refused == {"superseded:Temp": 1, "impossible:Temp": 1}


class TestSource:
    def tar(self, target: Path, set_name: str, *, unsorted: bool = False) -> Path:
        archive = target / f"{set_name}.tar.gz"
        files = sorted((FIXTURE / set_name).iterdir(), reverse=unsorted)
        with tarfile.open(archive, "w:gz") as tar:
            for file in files:
                data = file.read_bytes()
                member = tarfile.TarInfo(f"{set_name}/{file.name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return archive

    def test_folder_archive_and_unsorted_archive_are_the_same(self, tmp_path: Path) -> None:
        digests = [prepare("physionet2012", FIXTURE, tmp_path / "s0", progress=False).digests]
        for i, unsorted in enumerate((False, True), start=1):
            source = tmp_path / f"source{i}"
            source.mkdir()
            for s in "ab":
                self.tar(source, f"set-{s}", unsorted=unsorted)
                shutil.copy(FIXTURE / f"Outcomes-{s}.txt", source)
            info = prepare("physionet2012", source, tmp_path / f"s{i}", progress=False)
            digests.append(info.digests)
        assert digests[0] == digests[1] == digests[2]

    def test_one_set_is_a_source(self, tmp_path: Path) -> None:
        from_folder, _ = read(FIXTURE / "set-b")
        shutil.copy(FIXTURE / "Outcomes-b.txt", tmp_path)
        from_archive, _ = read(self.tar(tmp_path, "set-b"))
        for records in (from_folder, from_archive):
            assert len(records) == 12
            assert sum(r.outcome.mortality is True for r in records) == 4

    def test_without_outcomes_there_are_no_labels(self, tmp_path: Path) -> None:
        shutil.copytree(FIXTURE / "set-a", tmp_path / "set-a")
        records, _ = read(tmp_path)
        assert [r.outcome for r in records] == [Outcome()] * 3

    def test_windows_line_ends(self, tmp_path: Path) -> None:
        (tmp_path / "set-a").mkdir()
        text = (FIXTURE / "set-a" / "140501.txt").read_bytes().replace(b"\n", b"\r\n")
        (tmp_path / "set-a" / "140501.txt").write_bytes(text)
        (record,), _ = read(tmp_path)
        assert record.episode.statics.age_years == 31.0

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "first line"),
            ("Time;Parameter;Value\n", "first line"),
            (HEADER, "'' is not HH:MM"),
            (HEADER + "00:00,RecordID,140503\n", "agrees with the name"),
            (HEADER + "00:00,RecordID,140502\n00:00,RecordID,140502\n", "agrees with the name"),
            (HEADER + "00:00,RecordID,140502\n1 am,HR,80\n", "'1 am' is not HH:MM"),
            (HEADER + "00:00,RecordID,140502\n01:60,HR,80\n", "'01:60' is not HH:MM"),
            (HEADER + "00:00,RecordID,140502\n01:00,HR,eighty\n", "eighty"),
            (HEADER + "00:00,RecordID,140502\n01:00,HR\n", "Expected 3 columns"),
            (HEADER + "00:00,RecordID,140502\n\n01:00,HR,80\n", "'' is not HH:MM"),
        ],
    )
    def test_a_malformed_record_is_named(self, tmp_path: Path, text: str, message: str) -> None:
        shutil.copytree(FIXTURE / "set-a", tmp_path / "set-a")
        (tmp_path / "set-a" / "140502.txt").write_text(text)
        with pytest.raises(SourceError, match=rf"(?s)140502.*{message}"):
            prepare("physionet2012", tmp_path, tmp_path / "out", progress=False)
        assert [p.name for p in tmp_path.iterdir()] == ["set-a"]

    def test_a_record_without_its_outcome_is_an_error(self, tmp_path: Path) -> None:
        shutil.copytree(FIXTURE / "set-a", tmp_path / "set-a")
        rows = (FIXTURE / "Outcomes-a.txt").read_text().splitlines()
        (tmp_path / "Outcomes-a.txt").write_text("\n".join(rows[:-1]))
        with pytest.raises(SourceError, match=r"Outcomes-a\.txt: no row for record 141680"):
            read(tmp_path)

    def test_a_malformed_outcomes_file_is_named(self, tmp_path: Path) -> None:
        shutil.copytree(FIXTURE / "set-a", tmp_path / "set-a")
        (tmp_path / "Outcomes-a.txt").write_text("RecordID,In-hospital_death\n140501,0\n")
        with pytest.raises(SourceError, match=r"Outcomes-a\.txt: not an outcomes file"):
            read(tmp_path)

    def test_an_empty_source_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="holds none of set-a, set-b, set-c"):
            PhysioNet2012(tmp_path)
        (tmp_path / "set-a").mkdir()
        with pytest.raises(SourceError, match=r"holds no \*\.txt record"):
            PhysioNet2012(tmp_path)

    def test_a_broken_archive_is_named(self, tmp_path: Path) -> None:
        archive = self.tar(tmp_path, "set-a")
        archive.write_bytes(archive.read_bytes()[:3000])
        with pytest.raises(SourceError, match=r"set-a\.tar\.gz: not readable"):
            PhysioNet2012(tmp_path)


class TestPrepare:
    def test_store_of_the_fixture(self, tmp_path: Path) -> None:
        prepare("physionet2012", FIXTURE, tmp_path / "s", progress=False)
        store = EpisodeStore.open(tmp_path / "s", verify=True)
        assert store.n_episodes == 15
        assert store.info.counts["deaths"] == 4
        assert store.info.licence == "ODC-By-1.0"
        assert set(store.info.label_notes) == {
            "mortality",
            "length_of_stay",
            "decompensation",
            "phenotyping",
        }
        assert store.info.refused["impossible:pH"] == 1
        assert store.codes["LOINC/2160-0"] == ("creatinine in serum or plasma", "mg/dL")
        used = {code for r in store for code in r.episode.ev_code}
        assert used <= store.codes.keys()
        for record in store:
            for variable, value in zip(
                record.episode.obs_variable, record.episode.obs_value, strict=True
            ):
                assert VARIABLES[variable].low <= value <= VARIABLES[variable].high

    def test_a_store_in_use_is_left_alone(self, tmp_path: Path) -> None:
        first = prepare("physionet2012", FIXTURE, tmp_path / "s", progress=False)
        with pytest.raises(StoreError, match="not an empty folder"):
            prepare("physionet2012", FIXTURE, tmp_path / "s", progress=False)
        assert EpisodeStore.open(tmp_path / "s", verify=True).info == first

    def test_an_unknown_data_set_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"unknown data set 'mimic'.*physionet2012"):
            prepare("mimic", FIXTURE, tmp_path / "s")
        assert {"physionet2012", "physionet2019", "mimic3", "eicu"} < set(READERS)


# Median over the patients of set A of their medians; of their first value for fio2 and ph, and of
# the invasive series where a patient has one.
SET_A_MEDIANS = {
    "hr": 86.0,
    "dbp": 58.0,
    "mbp": 78.0,
    "rr": 19.0,
    "spo2": 97.5,
    "temp": 37.05,
    "fio2": 1.0,
    "ph": 7.38,
    "glucose": 127.0,
    "gcs_total": 14.0,
}


def test_official_set_a(tmp_path: Path) -> None:
    info = prepare("physionet2012", official_data() / "set-a.tar.gz", tmp_path / "s")
    store = EpisodeStore.open(tmp_path / "s")
    labels = store.labels
    assert (info.counts["episodes"], info.counts["deaths"]) == (4000, 554)
    # Length_of_stay -1 in 60 stays, and a day or less (though 48 hours are recorded) in one more.
    assert labels["los_hours"].null_count == 61
    assert labels["death_hours_low"].null_count == 4000 - 554
    assert pc.sum(pc.equal(labels["unit_type"], "medical")).as_py() == 1481
    assert labels["sex"].null_count == 3

    medians: dict[str, list[float]] = {name: [] for name in SET_A_MEDIANS}
    for record in store:
        for name, of_patients in medians.items():
            rows = observed(record.episode, name)
            best = min((priority for _, _, priority in rows), default=0)
            values = [value for _, value, priority in rows if priority == best]
            if values:
                of_patients.append(
                    values[0] if name in ("fio2", "ph") else float(np.median(values))
                )
    for name, expected in SET_A_MEDIANS.items():
        assert np.median(medians[name]) == pytest.approx(expected, rel=0.03), name
    # Stays with at least one value; the reader refuses all the values of a few.
    assert (len(medians["rr"]), len(medians["spo2"]), len(medians["hr"])) == (1101, 1792, 3937)
