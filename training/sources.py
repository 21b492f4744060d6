"""The stores that a run reads: which stays, whose, on which terms, and what must not be mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from llm4ehr.model import Task
from llm4ehr.store import EpisodeRecord, EpisodeStore, StoreInfo
from training.config import SourceConfig
from training.data.prepare import OWN_DATA
from training.progress import track

# Never trained on, not even without labels: the evaluation set of the challenge.
_EVALUATION_ONLY = {("physionet2012", "c")}


class LeakageError(ValueError):
    """A training run would read data that is kept for evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An open store with the stays to read from it."""

    store: EpisodeStore
    config: SourceConfig
    episode_ids: frozenset[str]

    @property
    def name(self) -> str:
        """The data set. Sources of one name are of one store."""
        return self.store.info.source

    def key(self, name: str) -> str:
        """A stay or a patient of this source among those of all sources."""
        return f"{self.name}/{name}"

    def labels_taken(self, task: Task) -> bool:
        """Whether the labels of a task are taken from here."""
        return self.config.labels is None or task in self.config.labels


def open_sources(configs: Sequence[SourceConfig], *, training: bool) -> list[Source]:
    """Open the stores and choose the stays to read.

    Raises LeakageError when `training` would read what is for evaluation only, under whatever name,
    and ValueError when a store has no stays in the splits, when stores cannot be told apart by
    their names, or when a stay would be read twice.
    """
    opened = []
    for config in configs:
        store = EpisodeStore.open(config.store)
        rows = store.labels.select(["episode_id", "split", "benchmark_split"]).to_pylist()
        chosen = [row for row in rows if row[config.split_column] in config.splits]
        named = config.splits if config.split_column == "split" else ()
        for split in sorted({*named, *(row["split"] for row in chosen)}):
            if training and (store.info.source, split) in _EVALUATION_ONLY:
                raise LeakageError(
                    f"split {split!r} of {store.info.source} is for evaluation only; "
                    "it must not be trained on, not even without labels"
                )
        ids = [row["episode_id"] for row in chosen]
        if not ids:
            splits = ", ".join(repr(split) for split in config.splits)
            raise ValueError(f"{config.store}: {config.split_column} {splits} has no episodes")
        if config.max_episodes is not None:
            ids = sorted(ids, key=lambda i: _hash(f"{store.info.source}/{i}"))[
                : config.max_episodes
            ]
        opened.append(Source(store=store, config=config, episode_ids=frozenset(ids)))
    for one, other in combinations(opened, 2):
        _check_distinct(one, other)
    return opened


def _check_distinct(one: Source, other: Source) -> None:
    """Raise ValueError if results or patients of the two could be mixed up."""
    both = f"{one.store.path} and {other.store.path}"
    if one.name == other.name and one.store.info != other.store.info:
        raise ValueError(
            f"{both} are different stores of one name, {one.name!r}, so their patients cannot be "
            "told apart; name the stores of your own data with `prepare --name`"
        )
    if one.name != other.name and one.store.info.digests == other.store.info.digests:
        raise ValueError(f"{both} hold the same stays under two names")
    if one.name == other.name and (twice := one.episode_ids & other.episode_ids):
        raise ValueError(f"{both}: {len(twice)} stays would be read twice")


def origins(sources: Sequence[Source]) -> dict[str, dict[str, str]]:
    """What the result of a run says of its data sets, by name: licence, citation, store digest."""
    infos = [source.store.info for source in sources]
    return {
        "licences": {info.source: info.licence for info in infos},
        "citations": {info.source: info.citation for info in infos},
        "stores": {info.source: _store_digest(info) for info in infos},
    }


def _store_digest(info: StoreInfo) -> str:
    return hashlib.sha256(json.dumps(dict(info.digests), sort_keys=True).encode()).hexdigest()


def is_another(info: StoreInfo, stores: Mapping[str, str]) -> bool:
    """Whether a run that read `stores` (name -> digest) read other data under the name of this.

    The name of a published data set, or one that was given, says which data they are, and a store
    of them may be made anew. The names in `OWN_DATA` stand for anything.
    """
    read = stores.get(info.source)
    return info.source in OWN_DATA and read is not None and read != _store_digest(info)


def records(sources: Sequence[Source], description: str) -> Iterator[tuple[Source, EpisodeRecord]]:
    """All chosen episodes, with a progress bar."""
    total = sum(source.store.n_episodes for source in sources)
    everything = ((source, r) for source in sources for r in source.store)
    for source, record in track(everything, description, total):
        if record.episode.episode_id in source.episode_ids:
            yield source, record


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def subject_fold(subject: str, n_folds: int) -> int:
    """Fold of a subject, the same in every run: all stays of one patient fall into one fold."""
    return _hash(subject) % n_folds


def fold_of(source: Source, fold: int, n_folds: int) -> Source:
    """The source with the stays of one fold only; there may be none."""
    rows = source.store.labels.select(["episode_id", "subject_id"]).to_pylist()
    inside = {
        row["episode_id"]
        for row in rows
        if subject_fold(source.key(row["subject_id"]), n_folds) == fold
    }
    return replace(source, episode_ids=source.episode_ids & inside)
