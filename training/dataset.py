"""Episodes of one or more stores as model input, ready for a training loop.

Series are made once by `llm4ehr.episode.featurise` and kept as flat arrays on disk, memory-mapped,
under a name made of everything they depend on. Event channels would be many times as large (three
for every code of the vocabulary, at every hour): the events themselves are kept, and a batch is
expanded by `llm4ehr.episode.event_channels`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm4ehr.episode import (
    EVENT_CHANNELS,
    MAX_HOURS,
    N_VARIABLES,
    Preprocessing,
    empty_episode,
    event_channels,
    event_tokens,
    featurise,
    preprocessing_digest,
)
from llm4ehr.hourly import hour_of
from llm4ehr.model import TASKS, Task
from llm4ehr.store import EpisodeRecord
from llm4ehr.variables import VARIABLES
from llm4ehr.vocabulary import Vocabulary, fit_vocabulary
from training.config import PreprocessingOptions
from training.labels import DEFAULT_LABELS, LabelOptions, phenotype_flags, record_labels
from training.sources import Source, records, subject_fold

_HOURLY = ("series", "labels", "valid")
_EVENTS = ("event_code", "event_hours", "event_value")
_TOKENS = ("token_ids", "token_hours")
_OFFSETS = ("hour_offsets", "event_offsets", "token_offsets")
_FEATURES_VERSION = 2  # of the arrays in the cache
LABEL_COLUMNS: tuple[Task, ...] = ("decompensation", "mortality", "remaining_los")


def fit_preprocessing(
    sources: Sequence[Source], options: PreprocessingOptions, max_codes: int
) -> tuple[Preprocessing, Vocabulary]:
    """Normalisation and vocabulary of the chosen stays, and of nothing else in the stores."""
    sums = np.zeros((3, N_VARIABLES))  # count, sum, sum of squares
    values: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    descriptors: dict[str, tuple[str, str | None]] = {}
    for source, record in records(sources, "fitting normalisation and vocabulary"):
        episode = record.episode
        for power in range(3):
            np.add.at(sums[power], episode.obs_variable, episode.obs_value**power)
        inside = hour_of(episode.ev_hours, options.bin_edge) >= 0
        codes, code_of = np.unique(episode.ev_code[inside].astype(str), return_inverse=True)
        for i, code in enumerate(codes.tolist()):
            values[code].append(episode.ev_value[inside][code_of == i])
            descriptors.setdefault(code, source.store.codes[code])
    count = np.maximum(sums[0], 1)
    mean = sums[1] / count
    std = np.sqrt(np.maximum(sums[2] / count - mean**2, 0))
    std = np.where(std > 1e-6, std, 1.0)
    # A variable that no source has is imputed by its normal value everywhere, which must come out
    # as 0; and a patient who has it later must not come out at the clip.
    never = sums[0] == 0
    mean = np.where(never, [v.normal for v in VARIABLES], mean)
    std = np.where(never, [(v.plausible_high - v.plausible_low) / 8 for v in VARIABLES], std)
    preprocessing = Preprocessing(
        mean=tuple(float(m) for m in mean),
        std=tuple(float(s) for s in std),
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
    events: Tensor | None  # [B, T, E], None where the network does not read them hour by hour
    hour_mask: Tensor  # [B, T]
    labels: Tensor  # [B, T, 3], NaN = unknown; columns LABEL_COLUMNS
    valid: Tensor  # [B, T], hours at which tasks are asked
    phenotypes: Tensor  # [B, 25], NaN = unknown
    token_ids: Tensor  # [B, N]
    token_hours: Tensor  # [B, N], -1 = padding
    token_mask: Tensor  # [B, N]
    hide_events: Tensor  # [B], true where the network must do without the events of a stay
    event_patches: Tensor | None = None  # [B, P, H] of a frozen EHR pass, computed before

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True), self.index)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies without waiting."""
        return self._with(lambda tensor: tensor.pin_memory(), self.index)

    def part(self, rows: slice | NDArray[np.int64]) -> Batch:
        """Some of the stays, without the padding that only the others need."""
        part = self._with(lambda tensor: tensor[rows], self.index[rows])
        hours, tokens = (max(int(m.sum(1).max()), 1) for m in (part.hour_mask, part.token_mask))

        def trimmed(name: str, length: int) -> Tensor | None:
            tensor: Tensor | None = getattr(part, name)
            return None if tensor is None else tensor[:, :length]

        by_hour = ("series", "events", "hour_mask", "labels", "valid")
        by_token = ("token_ids", "token_hours", "token_mask")
        changes: dict[str, Any] = {name: trimmed(name, hours) for name in by_hour}
        changes |= {name: trimmed(name, tokens) for name in by_token}
        return replace(part, **changes)

    def _with(self, change: Callable[[Tensor], Tensor], index: NDArray[np.int64]) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "index"}
        changed: dict[str, Any] = {
            name: None if t is None else change(t) for name, t in tensors.items()
        }
        return Batch(index=index, **changed)


# Stays whose tokens are read together. Batches are made of stays of similar length in hours, and
# the numbers of their tokens differ tenfold all the same.
_TOKEN_GROUP = 8


def token_groups(token_mask: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Rows of a batch in groups of similar numbers of tokens, and the width that each group needs.

    Read in one piece, every row would be padded to the longest: on the open data that is three
    times the tokens, and seven times the pairs that attend to each other.
    """
    counts = token_mask.sum(1)
    for rows in counts.argsort(stable=True).split(_TOKEN_GROUP):
        yield rows, max(int(counts[rows[-1]]), 1)


class FeatureSet:
    """Model input of many episodes as flat memory-mapped arrays with offsets."""

    def __init__(self, folder: Path, preprocessing: Preprocessing, vocabulary: Vocabulary) -> None:
        meta = json.loads((folder / "episodes.json").read_text())
        self.episode_ids: list[str] = meta["episode_ids"]
        self.subjects: list[str] = meta["subjects"]
        self.sources: list[str] = meta["sources"]
        for name in (*_HOURLY, *_EVENTS, *_TOKENS, *_OFFSETS, "phenotypes"):
            setattr(self, name, np.load(folder / f"{name}.npy", mmap_mode="r"))
        self._bin_edge = preprocessing.bin_edge
        self._vocabulary = vocabulary
        self._codes = np.array([entry.code for entry in vocabulary.entries], dtype=object)

    series: NDArray[np.float32]
    labels: NDArray[np.float32]
    valid: NDArray[np.bool_]
    phenotypes: NDArray[np.float32]  # [episodes, 25]
    event_code: NDArray[np.int16]
    event_hours: NDArray[np.float64]
    event_value: NDArray[np.float64]
    token_ids: NDArray[np.int32]
    token_hours: NDArray[np.int16]
    hour_offsets: NDArray[np.int64]
    event_offsets: NDArray[np.int64]
    token_offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.episode_ids)

    def hours(self, i: int) -> slice:
        """Rows of episode i in `series`, `labels` and `valid`."""
        return slice(int(self.hour_offsets[i]), int(self.hour_offsets[i + 1]))

    def events(self, i: int, n_hours: int) -> NDArray[np.float32]:
        """Event channels [n_hours, E] of episode i, the same as those of `featurise`."""
        rows = slice(int(self.event_offsets[i]), int(self.event_offsets[i + 1]))
        episode = replace(
            empty_episode(self.episode_ids[i], n_hours),
            ev_code=self._codes[self.event_code[rows]],
            ev_hours=np.asarray(self.event_hours[rows]),
            ev_value=np.asarray(self.event_value[rows]),
        )
        return event_channels(episode, self._vocabulary, n_hours, self._bin_edge)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Hours of each episode."""
        return np.diff(self.hour_offsets)

    def fold(self, n_folds: int) -> NDArray[np.int64]:
        """Fold of each episode, by subject."""
        return np.array([subject_fold(s, n_folds) for s in self.subjects], dtype=np.int64)

    def batch(
        self,
        index: NDArray[np.int64],
        max_tokens: int = 0,
        *,
        with_events: bool = True,
        hide_events: NDArray[np.bool_] | None = None,
    ) -> Batch:
        """Collate the given episodes.

        Tokens beyond `max_tokens` are cut off. Event channels, the widest part by far, are made
        only `with_events`.
        """
        lengths = self.lengths[index]
        n, longest = len(index), int(lengths.max())
        tokens = np.minimum(np.diff(self.token_offsets)[index], max_tokens)
        widest = max(int(tokens.max()), 1)
        series = np.zeros((n, longest, self.series.shape[1]), np.float32)
        width = len(self._vocabulary) * EVENT_CHANNELS
        events = np.zeros((n, longest, width), np.float32) if with_events else None
        labels = np.full((n, longest, len(LABEL_COLUMNS)), np.nan, np.float32)
        valid = np.zeros((n, longest), bool)
        token_ids = np.zeros((n, widest), np.int64)
        token_hours = np.full((n, widest), -1, np.int64)
        for row, i in enumerate(index):
            length = int(lengths[row])
            hours = slice(self.hours(i).start, self.hours(i).start + length)
            series[row, :length] = self.series[hours]
            if events is not None:
                events[row, :length] = self.events(i, length)
            labels[row, :length] = self.labels[hours]
            valid[row, :length] = self.valid[hours]
            start = self.token_offsets[i]
            token_ids[row, : tokens[row]] = self.token_ids[start : start + tokens[row]]
            token_hours[row, : tokens[row]] = self.token_hours[start : start + tokens[row]]
        return Batch(
            index=index,
            series=torch.from_numpy(series),
            events=None if events is None else torch.from_numpy(events),
            hour_mask=torch.from_numpy(np.arange(longest) < lengths[:, None]),
            labels=torch.from_numpy(labels),
            valid=torch.from_numpy(valid),
            phenotypes=torch.from_numpy(self.phenotypes[index]),
            token_ids=torch.from_numpy(token_ids),
            token_hours=torch.from_numpy(token_hours),
            token_mask=torch.from_numpy(np.arange(widest) < tokens[:, None]),
            hide_events=torch.from_numpy(np.zeros(n, bool) if hide_events is None else hide_events),
        )


def build_features(
    sources: Sequence[Source],
    preprocessing: Preprocessing,
    vocabulary: Vocabulary,
    cache: Path,
    options: LabelOptions = DEFAULT_LABELS,
    max_hours: int | None = None,
) -> FeatureSet:
    """Featurise the chosen stays, or reuse what was made from the very same inputs before.

    Of every stay the first `max_hours` hours are read, and nothing that is later: what interpolates
    would otherwise carry later values into them.
    """
    key = [
        _FEATURES_VERSION,
        preprocessing_digest(preprocessing, vocabulary),
        [
            (
                s.name,
                s.store.info.digests,
                sorted(s.episode_ids),
                sorted(filter(s.labels_taken, TASKS)),
            )
            for s in sources
        ],
        asdict(options),
        max_hours,
    ]
    folder = cache / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    if not folder.exists():
        _write_features(sources, preprocessing, vocabulary, options, max_hours, folder)
    return FeatureSet(folder, preprocessing, vocabulary)


def _write_features(
    sources: Sequence[Source],
    preprocessing: Preprocessing,
    vocabulary: Vocabulary,
    options: LabelOptions,
    max_hours: int | None,
    folder: Path,
) -> None:
    columns = (*_HOURLY, *_EVENTS, *_TOKENS)
    parts: dict[str, list[NDArray[np.generic]]] = {name: [] for name in columns}
    phenotypes: list[NDArray[np.float32]] = []
    meta: dict[str, list[str]] = {"episode_ids": [], "subjects": [], "sources": []}
    for source, record in records(sources, "featurising"):
        episode = record.episode
        n_hours = min(episode.n_hours, preprocessing.max_hours, max_hours or MAX_HOURS)
        if n_hours < 1:
            continue
        parts["series"].append(featurise(episode, vocabulary, preprocessing, n_hours).series)
        for name, array in _labels(source, record, n_hours, options).items():
            parts[name].append(array)
        flags = phenotype_flags(record.outcome)
        phenotypes.append(flags if source.labels_taken("phenotyping") else flags * np.nan)
        code = vocabulary.indices(episode.ev_code)
        hour = hour_of(episode.ev_hours, preprocessing.bin_edge)
        keep = (code >= 0) & (hour >= 0) & (hour < n_hours)
        parts["event_code"].append(code[keep].astype(np.int16))
        parts["event_hours"].append(episode.ev_hours[keep])
        parts["event_value"].append(episode.ev_value[keep])
        tokens = event_tokens(episode, vocabulary, n_hours, preprocessing)
        parts["token_ids"].append(tokens.ids)
        parts["token_hours"].append(tokens.hours)
        meta["episode_ids"].append(episode.episode_id)
        meta["subjects"].append(source.key(record.subject_id))
        meta["sources"].append(source.name)
    if not phenotypes:
        raise ValueError("no episodes with an hour to learn from in the chosen splits")
    partial = folder.with_name(folder.name + f".{os.getpid()}.partial")
    partial.mkdir(parents=True)
    for name, arrays in parts.items():
        np.save(partial / f"{name}.npy", np.concatenate(arrays))
    np.save(partial / "phenotypes.npy", np.stack(phenotypes))
    for name, of in zip(_OFFSETS, ("series", "event_code", "token_ids"), strict=True):
        np.save(partial / f"{name}.npy", np.cumsum([0, *(len(array) for array in parts[of])]))
    (partial / "episodes.json").write_text(json.dumps(meta))
    partial.rename(folder)


def _labels(
    source: Source, record: EpisodeRecord, n_hours: int, options: LabelOptions
) -> dict[str, NDArray[np.generic]]:
    """`labels` [T, 3] of the tasks that the source labels, and `valid` [T]."""
    made = record_labels(record, n_hours, options)
    unknown = np.full(n_hours, np.nan, np.float32)
    columns = {
        "decompensation": made.decompensation,
        "mortality": made.mortality,
        "remaining_los": made.remaining_los,
    }
    taken = [columns[task] if source.labels_taken(task) else unknown for task in LABEL_COLUMNS]
    return {"labels": np.stack(taken, axis=1), "valid": made.valid}


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
