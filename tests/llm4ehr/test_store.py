"""The episode store: round trip, blocks, atomic writing, and errors that name what is wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm4ehr.episode import SEXES, UNIT_TYPES, Episode, Statics
from llm4ehr.store import (
    CodeInfo,
    EpisodeRecord,
    EpisodeStore,
    Outcome,
    StoreError,
    StoreInfo,
    StoreWriter,
)
from llm4ehr.store_tables import SCHEMAS, records_from_tables
from llm4ehr.variables import VARIABLES

CODES = {
    "LOINC/2160-0": CodeInfo("creatinine in serum or plasma", "mg/dL"),
    "LOCAL/übung": CodeInfo("a code of the house", None),
    "SNOMED/40617009": CodeInfo("mechanical ventilation", None),
}
INFO = StoreInfo(
    source="made up",
    licence="none",
    citation="nobody",
    created_by="test_store",
    label_notes={"mortality": "at random"},
)

finite = st.floats(allow_nan=False, allow_infinity=False)
possible = st.none() | finite


@st.composite
def episodes(draw: st.DrawFn, episode_id: str = "e") -> Episode:
    observations = draw(
        st.lists(
            st.tuples(st.integers(0, len(VARIABLES) - 1), finite, finite, st.integers(-128, 127)),
            max_size=6,
        )
    )
    events = draw(
        st.lists(
            st.tuples(st.sampled_from(sorted(CODES)), finite, finite | st.just(float("nan"))),
            max_size=6,
        )
    )
    variable, hours, value, priority = zip(*observations, strict=True) if observations else [()] * 4
    code, ev_hours, ev_value = zip(*events, strict=True) if events else [()] * 3
    return Episode(
        episode_id=episode_id,
        n_hours=draw(st.integers(0, 2**15 - 1)),
        obs_variable=np.array(variable, dtype=np.int16),
        obs_hours=np.array(hours, dtype=np.float64),
        obs_value=np.array(value, dtype=np.float64),
        obs_priority=np.array(priority, dtype=np.int8),
        ev_code=np.array(code, dtype=object),
        ev_hours=np.array(ev_hours, dtype=np.float64),
        ev_value=np.array(ev_value, dtype=np.float64),
        statics=Statics(
            age_years=draw(possible),
            sex=draw(st.none() | st.sampled_from(SEXES)),
            unit_type=draw(st.none() | st.sampled_from(UNIT_TYPES)),
            height_cm=draw(possible),
            weight_kg=draw(possible),
        ),
    )


@st.composite
def record_lists(draw: st.DrawFn) -> list[EpisodeRecord]:
    ids = draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=9, unique=True))
    return [
        EpisodeRecord(
            episode=draw(episodes(episode_id)),
            subject_id=draw(st.text(st.characters(codec="utf-8"))),
            split=draw(st.sampled_from("abc")),
            benchmark_split=draw(st.none() | st.sampled_from(["train", "test"])),
            outcome=Outcome(
                mortality=draw(st.none() | st.booleans()),
                los_hours=draw(possible),
                phenotypes=draw(
                    st.none() | st.lists(st.sampled_from(["Shock", "Acute"])).map(tuple)
                ),
                **draw(
                    st.sampled_from(
                        [{}, {"death_hours_low": 48.0, "death_hours_high": 72.0}],
                    )
                ),
            ),
        )
        for episode_id in sorted(ids)
    ]


def simple(episode_id: str, n_obs: int = 2, n_events: int = 1) -> EpisodeRecord:
    episode = Episode(
        episode_id=episode_id,
        n_hours=48,
        obs_variable=np.zeros(n_obs, dtype=np.int16),
        obs_hours=np.arange(n_obs, dtype=np.float64),
        obs_value=np.full(n_obs, 60.0),
        obs_priority=np.zeros(n_obs, dtype=np.int8),
        ev_code=np.array(["LOINC/2160-0"] * n_events, dtype=object),
        ev_hours=np.arange(n_events, dtype=np.float64),
        ev_value=np.ones(n_events),
    )
    return EpisodeRecord(
        episode=episode, subject_id=episode_id, split="a", outcome=Outcome(mortality=False)
    )


def write(path: Path, records: Sequence[EpisodeRecord], per_group: int = 512) -> StoreInfo:
    writer = StoreWriter(path, INFO, codes=CODES, episodes_per_group=per_group)
    for record in records:
        writer.add(record)
    return writer.close()


def assert_same(a: EpisodeRecord, b: EpisodeRecord) -> None:
    assert (a.subject_id, a.split, a.outcome) == (b.subject_id, b.split, b.outcome)
    assert a.benchmark_split == b.benchmark_split
    for field in dataclasses.fields(Episode):
        x, y = getattr(a.episode, field.name), getattr(b.episode, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype, field.name
            np.testing.assert_array_equal(x, y, err_msg=field.name)
        else:
            assert x == y, field.name


@settings(max_examples=60, deadline=None)
@given(records=record_lists(), per_group=st.integers(1, 4))
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, records: list[EpisodeRecord], per_group: int
) -> None:
    path = tmp_path_factory.mktemp("store") / "s"
    info = write(path, records, per_group)

    store = EpisodeStore.open(path, verify=True)

    assert store.info == info
    assert store.codes == CODES
    assert store.n_episodes == len(store) == len(records) == store.labels.num_rows
    assert store.n_blocks == -(-len(records) // per_group)
    read = list(store)
    assert len(read) == len(records)
    for a, b in zip(records, read, strict=True):
        assert_same(a, b)


def test_a_block_is_one_row_group_of_whole_episodes_in_every_file(tmp_path: Path) -> None:
    sizes = {"p0": (3, 0), "p1": (0, 0), "p2": (0, 0), "p3": (1, 4), "p4": (2, 1)}
    write(tmp_path / "s", [simple(name, *n) for name, n in sizes.items()], per_group=2)

    store = EpisodeStore.open(tmp_path / "s")
    expected = [["p0", "p1"], ["p2", "p3"], ["p4"]]
    assert [[r.episode.episode_id for r in block] for block in store.blocks()] == expected
    assert [r.episode.episode_id for r in store.block(1)] == expected[1]
    for name in ("observations.parquet", "events.parquet"):
        with pq.ParquetFile(tmp_path / "s" / name) as file:
            found = [
                set(file.read_row_group(k)["episode_id"].to_pylist()) for k in range(len(expected))
            ]
        which = 0 if name.startswith("obs") else 1
        assert found == [{i for i in ids if sizes[i][which]} for ids in expected]


def test_info_counts_items_and_reasons(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", INFO, codes=CODES)
    writer.add(simple("p0"))
    dead = dataclasses.replace(simple("p1", 3, 0), outcome=Outcome(mortality=True))
    writer.add(dead)
    writer.close(refused={"impossible:HR": 2}, repaired={"tenfold:pH": 1})

    info = EpisodeStore.open(tmp_path / "s").info
    assert info.counts == {"episodes": 2, "observations": 5, "events": 1, "deaths": 1}
    assert (info.refused, info.repaired) == ({"impossible:HR": 2}, {"tenfold:pH": 1})
    assert info.label_notes == INFO.label_notes


def test_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    records = [simple(f"p{i}", i, i) for i in range(5)]
    first, second = write(tmp_path / "1", records, 2), write(tmp_path / "2", records, 2)
    assert first.digests == second.digests
    assert first == second


def test_an_item_stands_where_it_became_known(tmp_path: Path) -> None:
    """A source that knows when a result was available says so in a column of its own."""
    write(tmp_path / "s", [simple("p0", n_obs=3, n_events=2)])
    for name, available in (
        ("observations.parquet", [None, 0.5, 7.0]),
        ("events.parquet", [0.25, None]),
    ):
        table = pq.read_table(tmp_path / "s" / name)
        index = table.schema.get_field_index("available_hours")
        table = table.set_column(index, "available_hours", pa.array(available, pa.float64()))
        pq.write_table(table, tmp_path / "s" / name)

    (record,) = EpisodeStore.open(tmp_path / "s")
    assert record.episode.obs_hours.tolist() == [0.0, 1.0, 7.0]
    assert record.episode.ev_hours.tolist() == [0.25, 1.0]


class TestWriterRefuses:
    def test_a_folder_in_use(self, tmp_path: Path) -> None:
        (tmp_path / "keep.txt").write_text("mine")
        with pytest.raises(StoreError, match="not an empty folder"):
            write(tmp_path, [simple("p0")])
        assert (tmp_path / "keep.txt").read_text() == "mine"

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "s").write_text("mine")
        with pytest.raises(StoreError, match="not an empty folder"):
            write(tmp_path / "s", [])

    def test_a_partial_folder_of_another_origin(self, tmp_path: Path) -> None:
        (tmp_path / "s.partial").mkdir()
        (tmp_path / "s.partial" / "thesis.txt").write_text("mine")
        with pytest.raises(StoreError, match="another origin"):
            write(tmp_path / "s", [])
        assert (tmp_path / "s.partial" / "thesis.txt").exists()

    @pytest.mark.parametrize("second", ["p1", "p0"])
    def test_ids_that_do_not_increase(self, tmp_path: Path, second: str) -> None:
        with pytest.raises(StoreError, match="ids must increase"):
            write(tmp_path / "s", [simple("p1"), simple(second)])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"obs_value": np.ones(1)}, "observation arrays differ in length"),
            ({"ev_hours": np.ones(2)}, "event arrays differ in length"),
            ({"obs_variable": np.array([0, len(VARIABLES)], np.int16)}, "variable index outside"),
            ({"obs_value": np.array([1.0, np.nan])}, "not finite"),
            ({"obs_hours": np.array([1.0, np.inf])}, "not finite"),
            ({"ev_value": np.array([np.inf])}, "infinite"),
            ({"ev_code": np.array(["LOINC/0-0"], object)}, "'LOINC/0-0' is not in the table"),
            ({"n_hours": -1}, "n_hours is -1"),
        ],
    )
    def test_a_malformed_episode(
        self, tmp_path: Path, change: dict[str, object], message: str
    ) -> None:
        record = simple("p7")
        bad = dataclasses.replace(record, episode=dataclasses.replace(record.episode, **change))
        with pytest.raises(StoreError, match=f"'p7'.*{message}"):
            write(tmp_path / "s", [bad])


Row = tuple[str, float, float | None, float, int]


def tables(ids: Sequence[str], rows: Sequence[tuple[str, Row]]) -> tuple[pa.Table, ...]:
    """A block of stays with observations (stay, (variable, hours, available, value, priority)).

    Every observation is also an event of a code of the same name.
    """
    by_stay = sorted(rows, key=lambda r: ids.index(r[0]))
    observed = [
        {"episode_id": i, "variable": v, "hours": h, "available_hours": a}
        | {"value": x, "priority": p}
        for i, (v, h, a, x, p) in by_stay
    ]
    happened = [
        {"episode_id": i, "code": v, "hours": h, "available_hours": a, "value": x}
        for i, (v, h, a, x, _) in by_stay
    ]
    stays = [
        {"episode_id": i, "subject_id": i, "split": "a", "n_hours": 48, "mortality": True}
        for i in ids
    ]
    names = ("episodes", "observations", "events")
    return tuple(
        pa.Table.from_pylist(rows, schema=SCHEMAS[f"{name}.parquet"])
        for name, rows in zip(names, (stays, observed, happened), strict=True)
    )


TWO = {"hr": CodeInfo("heart rate", "/min"), "sbp": CodeInfo("pressure", "mm[Hg]")}


def test_blocks_of_tables_keep_both_times(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", INFO) as writer:
        writer.add_block(*tables(["a", "b"], [("a", ("hr", 1.0, 1.5, 80.0, 0))]), TWO)
        writer.add_block(*tables(["c"], []), {})
        writer.add(EpisodeRecord(episode=simple("d", 1, 0).episode, subject_id="d", split="a"))
        info = writer.close()
    store = EpisodeStore.open(tmp_path / "s", verify=True)
    assert info.counts == {"episodes": 4, "observations": 2, "events": 1, "deaths": 3}
    assert store.n_blocks == 3
    assert sorted(store.codes) == ["hr", "sbp"]
    observations = pq.read_table(tmp_path / "s" / "observations.parquet")
    assert observations["available_hours"].to_pylist() == [1.5, None]
    assert [len(r.episode.obs_value) for r in store] == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("ids", "codes", "message"),
    [
        (["b", "a"], TWO, "'a' after 'b'"),
        (["a"], {}, "'hr' is not in the table of codes"),
        (["a"], TWO | {"hr": CodeInfo("heart rate", "/h")}, "'hr' in '/min' and in '/h'"),
    ],
)
def test_a_bad_block_is_refused(
    tmp_path: Path, ids: list[str], codes: dict[str, CodeInfo], message: str
) -> None:
    writer = StoreWriter(tmp_path / "s", INFO, codes={} if not codes else {"hr": TWO["hr"]})
    with pytest.raises(StoreError, match=message):
        writer.add_block(*tables(ids, [("a", ("hr", 1.0, None, 80.0, 0))]), codes)
    writer.abort()


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.tuples(
                st.sampled_from(["hr", "sbp"]),
                st.integers(0, 4).map(float),
                st.none() | st.integers(0, 6).map(float),
                st.sampled_from([60.0, 70.0, 80.0]),
                st.integers(0, 1),
            ),
        ),
        max_size=25,
    )
)
def test_what_was_history_when_it_came_does_not_count(rows: list[tuple[str, Row]]) -> None:
    """A nurse who files three hours at once tells the state of the last one."""
    records = records_from_tables(*tables(["a", "b"], rows), where="here")
    for record in records:
        episode = record.episode
        mine = [r for stay, r in rows if stay == episode.episode_id]
        expected = []
        for name, hours, available, value, priority in mine:
            known = max(hours, available or 0.0)
            peers = [
                h
                for n, h, a, _, p in mine
                if (n, p) == (name, priority) and max(h, a or 0.0) <= known
            ]
            if hours == max(peers):
                expected.append((name, known, value, priority))
        found = zip(
            [VARIABLES[v].name for v in episode.obs_variable],
            episode.obs_hours.tolist(),
            episode.obs_value.tolist(),
            episode.obs_priority.tolist(),
            strict=True,
        )
        assert sorted(found) == sorted(expected)
        events = zip(episode.ev_code, episode.ev_hours, episode.ev_value, strict=True)
        assert sorted(events) == sorted(
            (n, max(h, a or 0.0), x)
            for n, h, a, x, _ in mine
            if h == max(h2 for n2, h2, a2, _, _ in mine if n2 == n and _known_by(h2, a2, h, a))
        )


def _known_by(hours: float, available: float | None, of: float, of_available: float | None) -> bool:
    return max(hours, available or 0.0) <= max(of, of_available or 0.0)


def test_an_outcome_needs_a_whole_interval_of_death() -> None:
    for low, high in ((48.0, None), (None, 72.0), (72.0, 72.0)):
        with pytest.raises(ValueError, match="no interval"):
            Outcome(death_hours_low=low, death_hours_high=high)


def test_a_failing_source_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with StoreWriter(tmp_path / "s", INFO, codes=CODES, episodes_per_group=1) as writer:
            writer.add(simple("p0"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    killed = StoreWriter(tmp_path / "s", INFO, codes=CODES, episodes_per_group=1)
    killed.add(simple("p0"))
    with pytest.raises(StoreError, match=r"store\.json"):
        EpisodeStore.open(tmp_path / "s")

    (tmp_path / "s").mkdir()  # an empty folder is as good as none
    with StoreWriter(tmp_path / "s", INFO, codes=CODES) as writer:
        writer.add(simple("p1"))
    assert [r.episode.episode_id for r in EpisodeStore.open(tmp_path / "s")] == ["p1"]
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def edit_info(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        body = json.loads((path / "store.json").read_text())
        change(body)
        (path / "store.json").write_text(json.dumps(body))

    return edit


def drop_column(path: Path) -> None:
    file = path / "events.parquet"
    pq.write_table(pq.read_table(file).drop_columns("value"), file)


def change_type(path: Path) -> None:
    file = path / "codes.parquet"
    pq.write_table(pa.table({"code": [1], "descriptor": ["x"], "unit": ["g"]}), file)


def drop_rows(path: Path) -> None:
    file = path / "observations.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)


def merge_groups(path: Path) -> None:
    file = path / "events.parquet"
    pq.write_table(pq.read_table(file), file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "store.json").unlink(), r"store\.json: No such file"),
        (lambda p: (p / "store.json").write_text("{"), r"store\.json: not valid JSON"),
        (lambda p: (p / "store.json").write_text("[]"), r"store\.json: not a JSON object"),
        (edit_info(lambda b: b.update(schema_version=3)), "schema_version is 3, .* reads 2"),
        (edit_info(lambda b: b.pop("licence")), "'licence' is missing"),
        (edit_info(lambda b: b.update(extra=1)), "unknown key 'extra'"),
        (edit_info(lambda b: b.update(counts=3)), "'counts' is not of type dict"),
        (lambda p: (p / "codes.parquet").unlink(), r"codes\.parquet: missing"),
        (lambda p: (p / "events.parquet").write_bytes(b"x" * 99), r"events\.parquet: not readable"),
        (drop_column, r"events\.parquet: column 'value' is missing"),
        (change_type, r"codes\.parquet: column 'code' is int64, not string"),
        (drop_rows, r"observations\.parquet: 3 rows"),
        (merge_groups, r"events\.parquet: 1 row groups, not 2"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    write(tmp_path / "s", [simple("p0"), simple("p1")], per_group=1)
    damage(tmp_path / "s")
    with pytest.raises(StoreError, match=message):
        EpisodeStore.open(tmp_path / "s")


@pytest.mark.parametrize(
    "name", ["codes.parquet", "episodes.parquet", "events.parquet", "observations.parquet"]
)
def test_a_wrong_digest_names_the_file(tmp_path: Path, name: str) -> None:
    write(tmp_path / "s", [simple("p0")])
    table = pq.read_table(tmp_path / "s" / name)
    pq.write_table(table, tmp_path / "s" / name, compression="none")  # same rows, other bytes

    EpisodeStore.open(tmp_path / "s")
    with pytest.raises(StoreError, match=rf"{name}: SHA-256 differs"):
        EpisodeStore.open(tmp_path / "s", verify=True)


def test_rows_of_another_block_are_not_taken_for_those_of_this_one(tmp_path: Path) -> None:
    write(tmp_path / "s", [simple("p0"), simple("p1")])
    file = tmp_path / "s" / "observations.parquet"
    table = pq.read_table(file)
    pq.write_table(table.take([2, 3, 0, 1]), file)
    with pytest.raises(StoreError, match="row group 0: observations are not those"):
        list(EpisodeStore.open(tmp_path / "s"))
