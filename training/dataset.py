"""Episodes of one or more stores as model input, ready for a training loop.

Features are made once by `llm4ehr.episode.featurise` and kept as flat arrays on disk,
memory-mapped, under a name made of everything they depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm4ehr.episode import (
    N_VARIABLES,
    Preprocessing,
    event_tokens,
    featurise,
    hour_of,
    preprocessing_digest,
)
from llm4ehr.store import EpisodeRecord, EpisodeStore
from llm4ehr.vocabulary import Vocabulary, fit_vocabulary
from training.config import PreprocessingOptions, SourceConfig
from training.labels import LabelAlign, hourly_labels
from training.progress import track

# Never trained on, not even without labels: the evaluation set of the challenge.
_EVALUATION_ONLY = {("physionet2012", "c")}

_ARRAYS = (
    "series",
    "events",
    "labels",
    "token_ids",
    "token_hours",
    "hour_offsets",
    "token_offsets",
)
LABEL_COLUMNS = ("decompensation", "mortality", "remaining_los")


class LeakageError(ValueError):
    """A training run would read data that is kept for evaluation."""


def open_sources(
    sources: Sequence[SourceConfig], *, training: bool
) -> list[tuple[EpisodeStore, set[str]]]:
    """Open the stores with the splits to read.

    Raises LeakageError when `training` and a split is for evaluation only.
    """
    opened = []
    for source in sources:
        store = EpisodeStore.open(source.store)
        for split in source.splits:
            if training and (store.info.source, split) in _EVALUATION_ONLY:
                raise LeakageError(
                    f"split {split!r} of {store.info.source} is for evaluation only; "
                    "it must not be trained on, not even without labels"
                )
        opened.append((store, set(source.splits)))
    return opened


def records(
    sources: Sequence[tuple[EpisodeStore, set[str]]], description: str
) -> Iterator[tuple[EpisodeStore, EpisodeRecord]]:
    """All episodes of the chosen splits, with a progress bar."""
    total = sum(store.n_episodes for store, _ in sources)
    everything = ((store, splits, r) for store, splits in sources for r in store)
    for store, splits, record in track(everything, description, total):
        if record.split in splits:
            yield store, record


def subject_fold(subject: str, n_folds: int) -> int:
    """Fold of a subject, the same in every run: all stays of one patient fall into one fold."""
    return int.from_bytes(hashlib.sha256(subject.encode()).digest()[:8], "big") % n_folds


def fit_preprocessing(
    sources: Sequence[tuple[EpisodeStore, set[str]]], options: PreprocessingOptions, max_codes: int
) -> tuple[Preprocessing, Vocabulary]:
    """Normalisation and vocabulary of the training split."""
    sums = np.zeros((3, N_VARIABLES))  # count, sum, sum of squares about the normal value
    values: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    descriptors: dict[str, tuple[str, str | None]] = {}
    for store, record in records(sources, "fitting normalisation and vocabulary"):
        episode = record.episode
        for power in range(3):
            np.add.at(sums[power], episode.obs_variable, episode.obs_value**power)
        inside = hour_of(episode.ev_hours, options.bin_edge) >= 0
        codes, code_of = np.unique(episode.ev_code[inside].astype(str), return_inverse=True)
        for i, code in enumerate(codes.tolist()):
            values[code].append(episode.ev_value[inside][code_of == i])
            descriptors.setdefault(code, store.codes[code])
    count = np.maximum(sums[0], 1)
    mean = sums[1] / count
    std = np.sqrt(np.maximum(sums[2] / count - mean**2, 0))
    preprocessing = Preprocessing(
        # A variable that the source never has keeps a harmless scale.
        mean=tuple(float(m) for m in mean),
        std=tuple(float(s) if s > 1e-6 else 1.0 for s in std),
        **options.model_dump(),
    )
    vocabulary = fit_vocabulary(
        {code: np.concatenate(parts) for code, parts in values.items()}, descriptors, max_codes
    )
    return preprocessing, vocabulary


def subsample(index: NDArray[np.int64], at_most: int | None, seed: int) -> NDArray[np.int64]:
    """At most so many of the given episodes, drawn by the seed, in their order."""
    if at_most is None:
        return index
    return np.sort(np.random.default_rng(seed).permutation(index)[:at_most])


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Padded tensors. Shapes: B episodes, T hours of the longest, N tokens of the longest."""

    index: NDArray[np.int64]  # [B] rows of the feature set
    series: Tensor  # [B, T, S]
    events: Tensor  # [B, T, E]
    hour_mask: Tensor  # [B, T]
    labels: Tensor  # [B, T, 3], NaN = unknown; columns LABEL_COLUMNS
    token_ids: Tensor  # [B, N]
    token_hours: Tensor  # [B, N], -1 = padding
    token_mask: Tensor  # [B, N]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in self.__slots__
            if name != "index"
        }
        return Batch(index=self.index, **moved)


class FeatureSet:
    """Model input of many episodes as flat memory-mapped arrays with offsets."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "episodes.json").read_text())
        self.episode_ids: list[str] = meta["episode_ids"]
        self.subjects: list[str] = meta["subjects"]
        self.sources: list[str] = meta["sources"]
        for name in _ARRAYS:
            setattr(self, name, np.load(folder / f"{name}.npy", mmap_mode="r"))

    series: NDArray[np.float32]
    events: NDArray[np.float32]
    labels: NDArray[np.float32]
    token_ids: NDArray[np.int32]
    token_hours: NDArray[np.int16]
    hour_offsets: NDArray[np.int64]
    token_offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.episode_ids)

    def hours(self, i: int) -> slice:
        """Rows of episode i in `series`, `events` and `labels`."""
        return slice(int(self.hour_offsets[i]), int(self.hour_offsets[i + 1]))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Hours of each episode."""
        return np.diff(self.hour_offsets)

    def fold(self, n_folds: int) -> NDArray[np.int64]:
        """Fold of each episode, by subject."""
        return np.array([subject_fold(s, n_folds) for s in self.subjects], dtype=np.int64)

    def batch(self, index: NDArray[np.int64], max_tokens: int = 0) -> Batch:
        """Collate the given episodes; events beyond `max_tokens` are cut off (M20)."""
        lengths = self.lengths[index]
        n, longest = len(index), int(lengths.max())
        tokens = np.minimum(np.diff(self.token_offsets)[index], max_tokens)
        widest = max(int(tokens.max()), 1)
        series = np.zeros((n, longest, self.series.shape[1]), np.float32)
        events = np.zeros((n, longest, self.events.shape[1]), np.float32)
        labels = np.full((n, longest, len(LABEL_COLUMNS)), np.nan, np.float32)
        token_ids = np.zeros((n, widest), np.int64)
        token_hours = np.full((n, widest), -1, np.int64)
        for row, i in enumerate(index):
            hours = self.hours(i)
            series[row, : lengths[row]] = self.series[hours]
            events[row, : lengths[row]] = self.events[hours]
            labels[row, : lengths[row]] = self.labels[hours]
            start = self.token_offsets[i]
            token_ids[row, : tokens[row]] = self.token_ids[start : start + tokens[row]]
            token_hours[row, : tokens[row]] = self.token_hours[start : start + tokens[row]]
        return Batch(
            index=index,
            series=torch.from_numpy(series),
            events=torch.from_numpy(events),
            hour_mask=torch.from_numpy(np.arange(longest) < lengths[:, None]),
            labels=torch.from_numpy(labels),
            token_ids=torch.from_numpy(token_ids),
            token_hours=torch.from_numpy(token_hours),
            token_mask=torch.from_numpy(np.arange(widest) < tokens[:, None]),
        )


def build_features(
    sources: Sequence[tuple[EpisodeStore, set[str]]],
    preprocessing: Preprocessing,
    vocabulary: Vocabulary,
    cache: Path,
    align: LabelAlign = "bin_end",
) -> FeatureSet:
    """Featurise the chosen splits, or reuse what was made from the very same inputs before."""
    key = [
        preprocessing_digest(preprocessing, vocabulary),
        [(store.info.digests, sorted(splits)) for store, splits in sources],
        align,
    ]
    folder = cache / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    if not folder.exists():
        _write_features(sources, preprocessing, vocabulary, align, folder)
    return FeatureSet(folder)


def _write_features(
    sources: Sequence[tuple[EpisodeStore, set[str]]],
    preprocessing: Preprocessing,
    vocabulary: Vocabulary,
    align: LabelAlign,
    folder: Path,
) -> None:
    parts: dict[str, list[NDArray[np.generic]]] = {name: [] for name in _ARRAYS[:5]}
    meta: dict[str, list[str]] = {"episode_ids": [], "subjects": [], "sources": []}
    lengths, token_counts = [], []
    for store, record in records(sources, "featurising"):
        n_hours = min(record.episode.n_hours, preprocessing.max_hours)
        if n_hours < 1:
            continue
        features = featurise(record.episode, vocabulary, preprocessing, n_hours)
        tokens = event_tokens(record.episode, vocabulary, n_hours, preprocessing)
        labels = hourly_labels(record.outcome, n_hours, align)
        parts["series"].append(features.series)
        parts["events"].append(features.events)
        parts["labels"].append(np.stack([getattr(labels, c) for c in LABEL_COLUMNS], axis=1))
        parts["token_ids"].append(tokens.ids)
        parts["token_hours"].append(tokens.hours)
        lengths.append(n_hours)
        token_counts.append(len(tokens.ids))
        meta["episode_ids"].append(record.episode.episode_id)
        meta["subjects"].append(f"{store.info.source}/{record.subject_id}")
        meta["sources"].append(store.info.source)
    if not lengths:
        raise ValueError("no episodes with an hour to learn from in the chosen splits")
    partial = folder.with_name(folder.name + f".{os.getpid()}.partial")
    partial.mkdir(parents=True)
    for name, arrays in parts.items():
        np.save(partial / f"{name}.npy", np.concatenate(arrays))
    np.save(partial / "hour_offsets.npy", np.cumsum([0, *lengths]))
    np.save(partial / "token_offsets.npy", np.cumsum([0, *token_counts]))
    (partial / "episodes.json").write_text(json.dumps(meta))
    partial.rename(folder)


def batches(
    lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Shuffled batches of episodes of similar length; a pure function of its arguments.

    Every episode comes once an epoch. Episodes are shuffled, sorted by length inside chunks of 16
    batches so that little is padding, then the batches are shuffled.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    chunk = 16 * batch_size
    made = []
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        part = part[np.argsort(lengths[part], kind="stable")]
        made += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [made[i] for i in rng.permutation(len(made))]
