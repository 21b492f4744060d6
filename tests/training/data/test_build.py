"""The road from tables to a store: resumable, complete, the same whatever the chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm4ehr.episode import hourly_grid
from llm4ehr.store import EpisodeStore, StoreInfo
from training.data import spill
from training.data.build import build_store
from training.data.csv_table import CsvTable
from training.data.extraction import (
    Chunk,
    Cohort,
    Expected,
    Items,
    Scan,
    Step,
    exact_death,
    split_by_subject,
)
from training.data.sources import SourceError, Tally

N_STAYS = 1100  # three blocks


class Toy:
    """A ward that charts the heart rate: one CSV file."""

    info = StoreInfo(source="toy", licence="none", citation="", created_by="test", label_notes={})
    limits = True
    expected = Expected()

    def __init__(self, path: Path, n_stays: int = N_STAYS, chunk_rows: int = 250) -> None:
        columns = {"stay_id": pl.Int32, "minute": pl.Int64, "hr": pl.Float64}
        self.table = CsvTable(path, columns, chunk_rows=chunk_rows)
        self.n_stays = n_stays
        self.chunks_selected = 0

    def cohort(self, tally: Tally) -> Cohort:
        ids = [f"{i:05d}" for i in range(self.n_stays)]
        subjects = pl.Series("subject_id", [f"s{i // 2}" for i in range(self.n_stays)])
        stays = pl.DataFrame({"episode_id": ids, "subject_id": subjects}).with_columns(
            split_by_subject("toy", subjects),
            benchmark_split=pl.lit(None, pl.String),
            n_hours=pl.lit(3, pl.Int16),
            age_years=pl.lit(60.0),
            sex=pl.lit("female"),
            unit_type=pl.lit(None, pl.String),
            height_cm=pl.lit(None, pl.Float64),
            weight_kg=pl.lit(None, pl.Float64),
            mortality=pl.lit(value=False),
            los_hours=pl.lit(3.0),
            _death=pl.lit(None, pl.Float64),
            phenotypes=pl.lit(None, pl.List(pl.String)),
            end_hours=pl.lit(3.0),
        )
        stays = stays.with_columns(exact_death(pl.col("_death")))
        return Cohort(stays, (Step("all", self.n_stays, subjects.n_unique()),))

    def scans(self, cohort: Cohort) -> Sequence[Scan]:
        return [Scan("vitals", self.table, self._select)]

    def _select(self, chunk: pl.DataFrame, tally: Tally) -> pl.DataFrame:
        self.chunks_selected += 1
        tally.repaired["seen"] += len(chunk)
        return chunk.select("hr", stay="stay_id", hours=pl.col("minute") / 60)

    def assemble(
        self, stays: pl.DataFrame, items: Mapping[str, pl.DataFrame], tally: Tally
    ) -> Items:
        vitals = items["vitals"].filter(pl.col("stay").is_in(stays["stay"].implode()))
        assert len(vitals) == len(items["vitals"])
        observations = vitals.select(
            "stay",
            "hours",
            variable=pl.lit("hr"),
            available_hours=pl.lit(None, pl.Float64),
            value="hr",
            priority=pl.lit(0),
        )
        high = vitals.filter(pl.col("hr") > 150)
        events = high.select(
            "stay",
            "hours",
            code=pl.lit("TOY/ALARM"),
            available_hours=pl.lit(None, pl.Float64),
            value=pl.lit(None, pl.Float64),
        )
        codes = pl.DataFrame({"code": ["TOY/ALARM"], "descriptor": ["alarm"], "unit": [None]})
        return Items(observations, events, codes)


def write(path: Path, rows: Sequence[tuple[int, int, float]]) -> Path:
    path.write_text("stay_id,minute,hr\n" + "".join(f"{s},{m},{v}\n" for s, m, v in rows))
    return path


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    charted = rng.permutation([s for s in range(N_STAYS) if s not in (7, 600)] * 3)
    rows = [(int(s), int(rng.integers(0, 180)), float(rng.integers(50, 160))) for s in charted]
    return write(tmp_path / "vitals.csv", rows)


def digests(store: Path) -> Mapping[str, str]:
    return EpisodeStore.open(store, verify=True).info.digests


def test_every_row_arrives_at_its_stay(ward: Path, tmp_path: Path) -> None:
    waterfall = build_store(Toy(ward), tmp_path / "store", tmp_path / "work", progress=False)
    store = EpisodeStore.open(tmp_path / "store", verify=True)
    assert [(s.stays, s.subjects) for s in waterfall] == [(1100, 550), (1098, 550)]
    assert store.n_blocks == 3
    rows = pl.read_csv(ward).unique()
    assert store.info.counts["observations"] == len(rows)
    assert store.info.counts["events"] == (rows["hr"] > 150).sum()
    by_stay = {int(k[0]): f for k, f in rows.group_by("stay_id")}
    for record in store:
        sent = by_stay[int(record.episode.episode_id)].sort("minute", "hr")
        assert record.episode.obs_value.tolist() == sent["hr"].to_list()
        assert np.allclose(record.episode.obs_hours, sent["minute"] / 60)
    assert "00007" not in {r.episode.episode_id for r in store}


@pytest.mark.parametrize("chunk_rows", [40, 10**6])
def test_chunks_and_parts_do_not_show(
    ward: Path, tmp_path: Path, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_store(Toy(ward), tmp_path / "a", tmp_path / "work-a", progress=False)
    monkeypatch.setattr(spill, "PART_BYTES", 2000)
    build_store(
        Toy(ward, chunk_rows=chunk_rows), tmp_path / "b", tmp_path / "work-b", progress=False
    )
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


class Stopped(Exception):
    """What a kill looks like from inside."""


class StopsAt:
    """A table that cannot be read beyond a chunk."""

    def __init__(self, table: CsvTable, chunk: int) -> None:
        self.path, self.size = table.path, table.size
        self._table, self._stop = table, chunk

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        for number, chunk in enumerate(self._table.chunks(start)):
            if number == self._stop:
                raise Stopped
            yield chunk


@pytest.mark.parametrize("stop", [0, 1, 5, 8])
def test_a_stopped_run_goes_on_where_it_was(
    ward: Path, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "PART_BYTES", 5000)
    whole = Toy(ward)
    build_store(whole, tmp_path / "whole", tmp_path / "work-whole", progress=False)
    work = tmp_path / "work"
    stopped = Toy(ward)
    stopped.table = StopsAt(stopped.table, stop)  # type: ignore[assignment]
    with pytest.raises(Stopped):
        build_store(stopped, tmp_path / "store", work, progress=False)
    assert not (tmp_path / "store").exists()
    resumed = Toy(ward)
    build_store(resumed, tmp_path / "store", work, progress=False)
    assert digests(tmp_path / "store") == digests(tmp_path / "whole")
    info = EpisodeStore.open(tmp_path / "store").info
    assert info.repaired["seen"] == 3 * (N_STAYS - 2)
    if stop >= 5:
        assert resumed.chunks_selected < whole.chunks_selected


def test_a_finished_pass_is_not_repeated(ward: Path, tmp_path: Path) -> None:
    build_store(Toy(ward), tmp_path / "a", tmp_path / "work", progress=False)
    again = Toy(ward)
    build_store(again, tmp_path / "b", tmp_path / "work", progress=False)
    assert again.chunks_selected == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_cohort_without_any_value_is_an_error(tmp_path: Path) -> None:
    empty = write(tmp_path / "vitals.csv", [])
    with pytest.raises(SourceError, match="no stay has a single observation"):
        build_store(Toy(empty), tmp_path / "store", tmp_path / "work", progress=False)
    assert not (tmp_path / "store").exists()


minutes = st.integers(0, 179)
charts = st.lists(
    st.tuples(st.integers(0, 1), minutes, st.integers(40, 180)), min_size=1, max_size=20
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(rows=charts, order=st.randoms(use_true_random=False))
def test_hours_are_half_open_whatever_the_order_and_the_copies(
    rows: list[tuple[int, int, int]], order: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From raw rows to the grid: hour t holds [t, t + 1), its last time counts, ties by median."""
    folder = tmp_path_factory.mktemp("toy")
    sent = [(s, m, float(v)) for s, m, v in rows * 2]
    order.shuffle(sent)  # type: ignore[attr-defined]
    path = write(folder / "vitals.csv", sent)
    build_store(Toy(path, n_stays=2, chunk_rows=2), folder / "s", folder / "w", progress=False)
    for record in EpisodeStore.open(folder / "s"):
        stay = int(record.episode.episode_id)
        grid = hourly_grid(record.episode, 3)
        for hour in range(3):
            inside = [(m, v) for s, m, v in set(rows) if s == stay and m // 60 == hour]
            assert grid.observed[hour].any() == bool(inside)
            if inside:
                last = max(m for m, _ in inside)
                expected = np.median([v for m, v in inside if m == last])
                assert grid.values[hour, grid.observed[hour]] == [expected]


def test_the_split_is_by_subject_and_does_not_move() -> None:
    subjects = pl.Series("subject_id", [str(i) for i in range(20_000)])
    split = split_by_subject("toy", subjects)
    share = split.value_counts(normalize=True)
    of = dict(share.iter_rows())
    assert of["pretrain"] == pytest.approx(0.7, abs=0.015)
    assert of["finetune"] == pytest.approx(0.2, abs=0.015)
    assert of["test"] == pytest.approx(0.1, abs=0.015)
    some = subjects.gather([5, 17, 5, 9999])
    assert split_by_subject("toy", some).to_list() == split.gather([5, 17, 5, 9999]).to_list()
    assert split_by_subject("other", subjects).to_list() != split.to_list()


def test_an_exact_death_is_the_narrowest_interval() -> None:
    made = pl.DataFrame({"d": [30.5, None]}).select(exact_death(pl.col("d")))
    assert made["death_hours_low"].to_list() == [30.5, None]
    assert made["death_hours_high"].to_list() == [np.nextafter(30.5, 100), None]
