"""Stores as training data: what may be read, how it is split, batched and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from llm4ehr.episode import (
    Episode,
    Preprocessing,
    event_tokens,
    featurise,
    preprocessing_digest,
)
from llm4ehr.store import CodeInfo, EpisodeRecord, Outcome, StoreInfo, StoreWriter
from llm4ehr.variables import VARIABLE_INDEX, VARIABLES
from llm4ehr.vocabulary import Vocabulary
from training import dataset
from training.config import PreprocessingOptions, SourceConfig
from training.dataset import LABEL_COLUMNS, FeatureSet, batches, build_features, fit_preprocessing
from training.labels import LabelOptions, hourly_labels
from training.sources import LeakageError, open_sources, subject_fold

Stay = Callable[..., Episode]
LENGTHS = (12, 30, 0, 7, 30, 1)
SPLITS = ("a", "a", "a", "b", "b", "c")


def write_store(
    path: Path,
    episodes: Sequence[Episode],
    vocabulary: Vocabulary,
    source: str = "made up",
    licence: str = "none",
) -> Path:
    """Every second stay is of the same patient as the one before."""
    codes = {e.code: CodeInfo(e.descriptor, e.unit) for e in vocabulary.entries}
    codes["LOCAL/rare"] = CodeInfo("a rare code", None)
    info = StoreInfo(
        source=source, licence=licence, citation="nobody", created_by="a test", label_notes={}
    )
    with StoreWriter(path, info, codes=codes, episodes_per_group=2) as writer:
        for i, episode in enumerate(episodes):
            outcome = Outcome(
                mortality=True, los_hours=40.0, death_hours_low=30.0, death_hours_high=40.0
            )
            writer.add(
                EpisodeRecord(
                    episode=episode,
                    subject_id=f"p{i // 2}",
                    split=SPLITS[i % len(SPLITS)],
                    benchmark_split="test" if i % 2 else "train",
                    outcome=outcome if i % 2 else Outcome(mortality=False),
                )
            )
    return path


@pytest.fixture(scope="module")
def stays(random_episode: Stay) -> list[Episode]:
    return [random_episode(seed, n) for seed, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def store(
    stays: list[Episode], vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "made-up", stays, vocabulary)


def opened(store: Path, *splits: str) -> list:
    return open_sources([SourceConfig(store=store, splits=splits)], training=True)


def opened_ids(sources: list[SourceConfig], training: bool = True) -> frozenset[str]:
    return open_sources(sources, training=training)[0].episode_ids


@pytest.fixture
def features(
    store: Path, preprocessing: Preprocessing, vocabulary: Vocabulary, tmp_path: Path
) -> FeatureSet:
    return build_features(opened(store, "a", "b"), preprocessing, vocabulary, tmp_path)


# What may be read.


def test_the_evaluation_set_of_the_challenge_is_never_trained_on(
    stays: list[Episode], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", stays, vocabulary, source="physionet2012")
    for splits in (("c",), ("a", "c")):
        sources = [SourceConfig(store=store, splits=splits)]
        with pytest.raises(LeakageError, match="split 'c' of physionet2012 is for evaluation only"):
            open_sources(sources, training=True)
        (source,) = open_sources(sources, training=False)
        assert {r.split for r in source.store if r.episode.episode_id in source.episode_ids} == set(
            splits
        )
    assert len(opened(store, "a", "b")[0].episode_ids) == 5


def test_the_evaluation_set_is_found_under_another_name(
    stays: list[Episode], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", stays, vocabulary, source="physionet2012")

    def source(*splits: str) -> list[SourceConfig]:
        return [SourceConfig(store=store, splits=splits, split_column="benchmark_split")]

    assert opened_ids(source("train")) == {"stay-000", "stay-002", "stay-004"}
    # Among the odd stays is stay-005 of split c.
    with pytest.raises(LeakageError, match="split 'c' of physionet2012 is for evaluation only"):
        open_sources(source("train", "test"), training=True)
    assert "stay-005" in opened_ids(source("test"), training=False)
    # A benchmark's split may be called c.
    with pytest.raises(ValueError, match="benchmark_split 'c' has no episodes"):
        open_sources(source("c"), training=True)


def test_a_split_without_stays_is_an_error(store: Path) -> None:
    with pytest.raises(ValueError, match="split 'x', 'y' has no episodes"):
        opened(store, "x", "y")


def test_a_large_source_gives_a_fixed_part(store: Path, stays: list[Episode]) -> None:
    def part(n: int | None) -> set[str]:
        return opened_ids([SourceConfig(store=store, splits=("a", "b"), max_episodes=n)])

    whole = {e.episode_id for e in stays[:5]}
    assert part(None) == part(99) == whole
    parts = [part(n) for n in (1, 2, 3)]
    assert [len(p) for p in parts] == [1, 2, 3]
    assert parts[0] < parts[1] < parts[2] < whole


def test_two_stores_of_one_name_are_refused(
    store: Path, stays: list[Episode], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    others = {
        "other stays": write_store(tmp_path / "fewer", stays[:4], vocabulary),
        "other terms": write_store(tmp_path / "terms", stays, vocabulary, licence="ODbL-1.0"),
    }
    for other in others.values():
        sources = [SourceConfig(store=s, splits=("a",)) for s in (store, other)]
        for training in (True, False):
            with pytest.raises(ValueError, match="different stores of one name, 'made up'") as e:
                open_sources(sources, training=training)
            assert str(store) in str(e.value)
            assert str(other) in str(e.value)
    named = write_store(tmp_path / "named", stays[:4], vocabulary, source="unit-7")
    sources = [SourceConfig(store=s, splits=("a",)) for s in (store, named)]
    assert [s.name for s in open_sources(sources, training=True)] == ["made up", "unit-7"]


def test_the_same_stays_are_not_read_twice(
    store: Path, stays: list[Episode], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    def pair(other: Path, *splits: str) -> list[SourceConfig]:
        return [
            SourceConfig(store=store, splits=("a",)),
            SourceConfig(store=other, splits=splits, labels=("mortality",)),
        ]

    copy = write_store(tmp_path / "copy", stays, vocabulary)
    for same in (store, copy):
        assert len(open_sources(pair(same, "b"), training=True)) == 2
        with pytest.raises(ValueError, match="3 stays would be read twice"):
            open_sources(pair(same, "a", "b"), training=True)
    named = write_store(tmp_path / "named", stays, vocabulary, source="unit-7")
    with pytest.raises(ValueError, match="the same stays under two names"):
        open_sources(pair(named, "b"), training=True)


def test_a_split_of_that_name_elsewhere_is_no_leak(store: Path) -> None:
    assert opened(store, "c")[0].episode_ids == {"stay-005"}


def test_only_the_chosen_splits_are_read(
    store: Path, preprocessing: Preprocessing, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    for splits, ids in (
        (("a",), ["stay-000", "stay-001"]),  # stay-002 has no hour
        (("b",), ["stay-003", "stay-004"]),
        (("a", "c"), ["stay-000", "stay-001", "stay-005"]),
    ):
        made = build_features(opened(store, *splits), preprocessing, vocabulary, tmp_path)
        assert made.episode_ids == ids


# Folds.


def test_the_fold_of_a_subject_is_the_same_everywhere() -> None:
    digest = hashlib.sha256(b"physionet2012/142732").digest()
    assert subject_fold("physionet2012/142732", 20) == int.from_bytes(digest[:8], "big") % 20
    assert subject_fold("physionet2012/142732", 1) == 0


def test_folds_follow_the_subject_and_are_of_similar_size(features: FeatureSet) -> None:
    fold = features.fold(5)
    assert features.subjects == ["made up/p0", "made up/p0", "made up/p1", "made up/p2"]
    assert fold[0] == fold[1]
    assert fold.tolist() == [subject_fold(s, 5) for s in features.subjects]
    many = np.bincount([subject_fold(f"s/{i}", 5) for i in range(2000)], minlength=5)
    assert (many > 300).all()
    assert many.sum() == 2000


# Fitting.


def test_normalisation_is_that_of_the_chosen_splits(store: Path, stays: list[Episode]) -> None:
    made, vocabulary = fit_preprocessing(
        opened(store, "a"), PreprocessingOptions(bin_edge="right"), max_codes=512
    )
    assert made.bin_edge == "right"
    chosen = stays[:3]
    variable = np.concatenate([e.obs_variable for e in chosen])
    value = np.concatenate([e.obs_value for e in chosen])
    for v in range(11):
        assert_allclose(made.mean[v], value[variable == v].mean(), rtol=1e-9)
        assert_allclose(made.std[v], value[variable == v].std(), rtol=1e-6)
    codes = np.concatenate([e.ev_code for e in chosen])
    assert {e.code: e.n for e in vocabulary.entries} == {
        code: int((codes == code).sum()) for code in set(codes.tolist())
    }


def test_a_variable_never_or_always_equally_measured_keeps_a_harmless_scale(
    make_episode: Stay, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    episode = make_episode(
        [("hr", 1, 80), ("hr", 2, 80)],
        [("LOCAL/rare", -1, 1.0), ("LOINC/2160-0", 3, 1.0), ("LOINC/2160-0", 4, 1.0)],
    )
    store = write_store(tmp_path / "store", [episode], vocabulary)
    made, fitted = fit_preprocessing(opened(store, "a"), PreprocessingOptions(), max_codes=512)
    hr = VARIABLE_INDEX["hr"]
    assert (made.mean[hr], made.std[hr]) == (80, 1)
    for v, variable in enumerate(VARIABLES):
        if v != hr:
            assert made.mean[v] == variable.normal
            assert made.std[v] == (variable.plausible_high - variable.plausible_low) / 8
    # What is imputed for them says nothing, and what another source measures is not cut off.
    series = featurise(episode, fitted, made, episode.n_hours).series
    assert not np.delete(series[:, : len(VARIABLES)], hr, axis=1).any()
    measured = make_episode([("glucose", 1, 250), ("ph", 1, 7.2)])
    series = featurise(measured, fitted, made, 3).series
    for name in ("glucose", "ph"):
        assert 0 < abs(series[2, VARIABLE_INDEX[name]]) < made.clip
    # Before admission nothing happened that the model could see.
    assert [(e.code, e.n) for e in fitted.entries] == [("LOINC/2160-0", 2)]
    _, none = fit_preprocessing(opened(store, "a"), PreprocessingOptions(), max_codes=0)
    assert len(none) == 0


# Features, batches, cache.


def test_features_are_those_of_the_one_preprocessing(
    features: FeatureSet, stays: list[Episode], preprocessing: Preprocessing, vocabulary: Vocabulary
) -> None:
    kept = [stays[i] for i in (0, 1, 3, 4)]
    assert features.lengths.tolist() == [12, 30, 7, 30]
    for i, episode in enumerate(kept):
        made = featurise(episode, vocabulary, preprocessing, episode.n_hours)
        tokens = event_tokens(episode, vocabulary, episode.n_hours, preprocessing)
        assert_array_equal(features.series[features.hours(i)], made.series)
        assert_array_equal(features.events(i, episode.n_hours), made.events)
        assert made.events.any()
        rows = slice(*features.token_offsets[i : i + 2])
        assert_array_equal(features.token_ids[rows], tokens.ids)
        assert_array_equal(features.token_hours[rows], tokens.hours)
    died = hourly_labels(
        Outcome(mortality=True, los_hours=40.0, death_hours_low=30.0, death_hours_high=40.0),
        30,
        first_observation=float(stays[1].obs_hours.min()),
    )
    expected = np.stack([getattr(died, column) for column in LABEL_COLUMNS], axis=1)
    assert_array_equal(features.labels[features.hours(1)], expected)
    assert_array_equal(features.valid[features.hours(1)], died.valid)
    assert np.isnan(expected[:4]).sum() == 8  # not asked in the first hours, but for mortality
    assert np.isnan(features.phenotypes).all()


def test_hours_that_are_not_read_change_nothing_not_even_by_interpolation(
    store: Path, stays: list[Episode], preprocessing: Preprocessing, vocabulary: Vocabulary,
    tmp_path: Path,
) -> None:  # fmt: skip
    linear = replace(preprocessing, imputation="linear")
    sources = opened(store, "a", "b")
    short, whole = (
        build_features(sources, linear, vocabulary, tmp_path, max_hours=n) for n in (11, None)
    )
    assert max(short.lengths) == 11
    expected = featurise(stays[1], vocabulary, linear, 11).series
    assert_array_equal(short.batch(np.array([1])).series[0], expected)
    cut = whole.batch(np.array([1])).series[0, :11]
    assert not np.array_equal(cut, expected), "no observation straddles hour 11"


@pytest.mark.parametrize("edge", ["left", "right"])
@pytest.mark.parametrize("n_hours", [3, 11, 30])
def test_event_channels_of_a_prefix_are_those_of_the_one_preprocessing(
    store: Path, stays: list[Episode], preprocessing: Preprocessing, vocabulary: Vocabulary,
    tmp_path: Path, edge: str, n_hours: int,
) -> None:  # fmt: skip
    chosen = replace(preprocessing, bin_edge=edge)
    sources = opened(store, "a", "b")
    made = build_features(sources, chosen, vocabulary, tmp_path, max_hours=n_hours)
    batch = made.batch(np.array([1, 3]))
    assert batch.series.shape[:2] == batch.labels.shape[:2] == batch.valid.shape == (2, n_hours)
    assert batch.hour_mask.all()
    for row, episode in enumerate((stays[1], stays[4])):
        expected = featurise(episode, vocabulary, chosen, n_hours)
        assert_array_equal(batch.events[row], expected.events)
        assert_array_equal(batch.series[row], expected.series)


def test_labels_are_taken_from_a_source_task_by_task(
    icu_store: Path, preprocessing: Preprocessing, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    def known(labels: tuple[str, ...] | None) -> set[str]:
        source = SourceConfig(store=icu_store, splits=("pretrain",), labels=labels)
        sources = open_sources([source], training=True)
        made = build_features(sources, preprocessing, vocabulary, tmp_path)
        hourly = {t for i, t in enumerate(LABEL_COLUMNS) if not np.isnan(made.labels[:, i]).all()}
        coded = ~np.isnan(made.phenotypes).all(1)
        assert coded.sum() in (0, 10)  # of 12 stays two were not coded
        return hourly | ({"phenotyping"} if coded.any() else set())

    assert known(None) == {*LABEL_COLUMNS, "phenotyping"}
    assert known(("mortality", "phenotyping")) == {"mortality", "phenotyping"}
    assert known(("remaining_los",)) == {"remaining_los"}
    assert known(()) == set()


def test_other_splits_move_neither_vocabulary_nor_normalisation(
    write_icu_store: Callable[..., Path], tmp_path: Path
) -> None:
    fitted = []
    for seed in (0, 1):
        path = write_icu_store(tmp_path / f"store{seed}", seed_of_test=seed)
        for splits in (("pretrain",), ("test",)):
            made = fit_preprocessing(opened(path, *splits), PreprocessingOptions(), max_codes=8)
            fitted.append(preprocessing_digest(*made))
    assert fitted[0] == fitted[2]
    assert len({fitted[0], fitted[1], fitted[3]}) == 3


def test_a_batch_is_padded_and_masked(features: FeatureSet) -> None:
    batch = features.batch(np.array([2, 1]), max_tokens=10_000)
    assert batch.series.shape == (2, 30, features.series.shape[1])
    assert batch.hour_mask.sum(1).tolist() == [7, 30]
    assert_array_equal(batch.series[0, :7], features.series[features.hours(2)])
    assert not batch.series[0, 7:].any()
    assert not batch.events[0, 7:].any()
    assert batch.labels[0, 7:].isnan().all()
    assert not batch.valid[0, 7:].any()
    assert batch.phenotypes.shape == (2, 25)
    counts = np.diff(features.token_offsets)[[2, 1]]
    assert batch.token_mask.sum(1).tolist() == counts.tolist()
    assert (batch.token_hours[0, counts[0] :] == -1).all()
    assert (batch.token_ids[0, counts[0] :] == 0).all()


def test_tokens_beyond_the_context_are_cut_at_the_end(features: FeatureSet) -> None:
    whole, cut = (features.batch(np.array([1, 2]), max_tokens=n) for n in (10_000, 5))
    assert cut.token_ids.shape == (2, 5)
    assert_array_equal(cut.token_ids, whole.token_ids[:, :5])
    assert_array_equal(cut.token_hours, whole.token_hours[:, :5])
    none = features.batch(np.array([1, 2]))
    assert not none.token_mask.any()
    assert_array_equal(none.series, whole.series)


def test_features_are_made_once(
    store: Path, preprocessing: Preprocessing, vocabulary: Vocabulary, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def build(*splits: str, labels: dict | None = None, **changes: object) -> FeatureSet:
        chosen = replace(preprocessing, **changes)
        options = LabelOptions(**labels or {})
        return build_features(opened(store, *splits), chosen, vocabulary, tmp_path, options)

    first = build("a", "b")
    assert len(list(tmp_path.iterdir())) == 1  # nothing partial stays
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "featurise", None)  # would fail if called
        again = build("b", "a")
    assert_array_equal(first.series, again.series)
    for n, change in enumerate(
        [
            {"labels": {"align": "bin_start"}},
            {"labels": {"min_history_hours": 0.0}},
            {"clip": 5.0},
            {"imputation": "linear"},
        ],
        start=2,
    ):
        build("a", "b", **change)
        assert len(list(tmp_path.iterdir())) == n
    build("a")
    assert len(list(tmp_path.iterdir())) == 6


def test_features_belong_to_the_name_of_the_store(
    store: Path, stays: list[Episode], preprocessing: Preprocessing, vocabulary: Vocabulary,
    tmp_path: Path,
) -> None:  # fmt: skip
    named = write_store(tmp_path / "store", stays, vocabulary, source="unit-7")
    for path, name in ((store, "made up"), (named, "unit-7")):
        made = build_features(opened(path, "a"), preprocessing, vocabulary, tmp_path / "cache")
        assert set(made.sources) == {name}
        assert made.subjects == [f"{name}/p0", f"{name}/p0"]


@given(
    lengths=st.lists(st.integers(1, 200), max_size=150),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_every_episode_comes_once_an_epoch(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    made = batches(np.array(lengths, np.int64), batch_size, seed, epoch)
    again = batches(np.array(lengths, np.int64), batch_size, seed, epoch)
    assert [b.tolist() for b in made] == [b.tolist() for b in again]
    assert sorted(i for b in made for i in b.tolist()) == list(range(len(lengths)))
    assert all(1 <= len(b) <= batch_size for b in made)


def test_epochs_and_seeds_shuffle_differently_and_lengths_stay_together() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 400)
    orders = {
        tuple(np.concatenate(batches(lengths, 8, seed, epoch)).tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4
    spread = np.mean([np.ptp(lengths[b]) for b in batches(lengths, 8, 0, 0)])
    assert spread < 30  # about 160 if batches were drawn at random
