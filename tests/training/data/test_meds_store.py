"""A store as a MEDS data set, and the way back."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
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

from llm4ehr.episode import Statics
from llm4ehr.store import (
    EpisodeStore,
    Outcome,
    StoreWriter,
)
from llm4ehr.variables import VARIABLES
from tests.training.data.meds_source import CODES, INFO, STAYS, read, record, write_store
from training.data.meds.calendar import EPOCH, places
from training.data.meds.dataset import write_dataset
from training.data.prepare import prepare


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", STAYS)


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
