"""What an episode store holds: column schemas, labels, description, and stays as Arrow tables.

`llm4ehr.store` writes and reads the folder; this module knows only what stands in its files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llm4ehr.episode import Episode, Statics
from llm4ehr.variables import VARIABLE_INDEX, VARIABLES

SCHEMA_VERSION = 2

_TERM = pa.dictionary(pa.int32(), pa.string())


def _column(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


SCHEMAS: Mapping[str, pa.Schema] = {
    "episodes.parquet": pa.schema(
        [
            _column("episode_id", pa.string()),
            _column("subject_id", pa.string()),
            _column("split", pa.string()),
            ("benchmark_split", pa.string()),  # the split of a published benchmark, if in one
            _column("n_hours", pa.int16()),
            ("age_years", pa.float64()),
            ("sex", pa.string()),
            ("unit_type", pa.string()),
            ("height_cm", pa.float64()),
            ("weight_kg", pa.float64()),
            ("mortality", pa.bool_()),  # died in hospital
            ("los_hours", pa.float64()),  # from ICU admission to the end the source can label
            ("death_hours_low", pa.float64()),  # the death lies in [low, high)
            ("death_hours_high", pa.float64()),
            ("phenotypes", pa.list_(pa.string())),
        ]
    ),
    "observations.parquet": pa.schema(
        [
            _column("episode_id", _TERM),
            _column("variable", _TERM),
            _column("hours", pa.float64()),
            ("available_hours", pa.float64()),  # null: known as soon as it was true
            _column("value", pa.float64()),  # canonical unit of the variable
            _column("priority", pa.int8()),
        ]
    ),
    "events.parquet": pa.schema(
        [
            _column("episode_id", _TERM),
            _column("code", _TERM),
            _column("hours", pa.float64()),
            ("available_hours", pa.float64()),
            ("value", pa.float64()),  # in the unit of the code; null: an event without a value
        ]
    ),
    "codes.parquet": pa.schema(
        [_column("code", pa.string()), _column("descriptor", pa.string()), ("unit", pa.string())]
    ),
}
INFO_FILE = "store.json"
BLOCK_FILES = ("episodes.parquet", "observations.parquet", "events.parquet")


class StoreError(ValueError):
    """A store cannot be written or read; the message names the file and what is wrong with it."""


class CodeInfo(NamedTuple):
    """What an event code means: plain words, and the UCUM unit of its values (None: no value)."""

    descriptor: str
    unit: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """Where a store comes from and what is in it.

    `label_notes` says for each task how the source labels it; `options` are the choices it was read
    with. `refused` and `repaired` count items by reason. `counts` and `digests` (SHA-256 of each
    Parquet file) are filled in by the writer.
    """

    source: str
    licence: str
    citation: str
    created_by: str
    label_notes: Mapping[str, str]
    options: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    repaired: Mapping[str, int] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Text of `store.json`; the same information always gives the same bytes."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> StoreInfo:
        """Inverse of `to_json`. Raises StoreError for another version, missing or unknown keys."""
        try:
            body = json.loads(text)
        except ValueError as error:
            raise StoreError(f"{INFO_FILE}: not valid JSON: {error}") from error
        if not isinstance(body, dict):
            raise StoreError(f"{INFO_FILE}: not a JSON object")
        if (version := body.get("schema_version")) != SCHEMA_VERSION:
            raise StoreError(
                f"{INFO_FILE}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}"
            )
        for f in dataclasses.fields(cls):
            if f.name not in body:
                raise StoreError(f"{INFO_FILE}: key {f.name!r} is missing")
            kind = str if f.type == "str" else int if f.type == "int" else dict
            if not isinstance(body[f.name], kind):
                raise StoreError(f"{INFO_FILE}: key {f.name!r} is not of type {kind.__name__}")
        if unknown := sorted(body.keys() - {f.name for f in dataclasses.fields(cls)}):
            raise StoreError(f"{INFO_FILE}: unknown key {unknown[0]!r}")
        return cls(**body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Labels of a stay; None where the source does not tell.

    `mortality` is death in hospital. `los_hours` runs from ICU admission to the end that the source
    can label (`StoreInfo.label_notes` says which). The death lies in
    [`death_hours_low`, `death_hours_high`).
    """

    mortality: bool | None = None
    los_hours: float | None = None
    death_hours_low: float | None = None
    death_hours_high: float | None = None
    phenotypes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        low, high = self.death_hours_low, self.death_hours_high
        if (low is None) != (high is None) or (
            low is not None and high is not None and low >= high
        ):
            raise ValueError(f"[{low}, {high}) is no interval of the time of death")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpisodeRecord:
    """One stay of a store: the episode, whose it is, which part of the source it is in, labels.

    `benchmark_split` is its part in the published benchmark of the source, if it is in one.
    """

    episode: Episode
    subject_id: str
    split: str
    benchmark_split: str | None = None
    outcome: Outcome = field(default_factory=Outcome)


def check_episode(episode: Episode, codes: Mapping[str, CodeInfo]) -> None:
    """Raise StoreError unless the arrays of the episode fit the schema."""
    of = f"episode {episode.episode_id!r}"
    if not 0 <= episode.n_hours <= np.iinfo(np.int16).max:
        raise StoreError(f"{of}: n_hours is {episode.n_hours}")
    observed = (episode.obs_variable, episode.obs_hours, episode.obs_value, episode.obs_priority)
    if len({len(a) for a in observed}) != 1:
        raise StoreError(f"{of}: observation arrays differ in length")
    if len({len(a) for a in (episode.ev_code, episode.ev_hours, episode.ev_value)}) != 1:
        raise StoreError(f"{of}: event arrays differ in length")
    variable = episode.obs_variable
    if variable.size and (variable.min() < 0 or variable.max() >= len(VARIABLES)):
        raise StoreError(f"{of}: variable index outside 0..{len(VARIABLES) - 1}")
    for times_or_values in (episode.obs_hours, episode.obs_value, episode.ev_hours):
        if not np.isfinite(times_or_values).all():
            raise StoreError(f"{of}: a time or an observed value is not finite")
    if np.isinf(episode.ev_value).any():
        raise StoreError(f"{of}: the value of an event is infinite")
    if unknown := set(episode.ev_code) - codes.keys():
        raise StoreError(f"{of}: code {min(unknown)!r} is not in the table of codes")


def tables_from_records(block: Sequence[EpisodeRecord]) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Episodes, observations and events of a block of stays."""
    episodes = [r.episode for r in block]
    rows = [
        {"episode_id": r.episode.episode_id, "subject_id": r.subject_id, "split": r.split}
        | {"benchmark_split": r.benchmark_split, "n_hours": r.episode.n_hours}
        | {f.name: getattr(r.episode.statics, f.name) for f in dataclasses.fields(Statics)}
        | {f.name: getattr(r.outcome, f.name) for f in dataclasses.fields(Outcome)}
        for r in block
    ]
    ids = pa.array([e.episode_id for e in episodes], pa.string())

    def owner(sizes: list[int]) -> pa.DictionaryArray:
        index = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        return pa.DictionaryArray.from_arrays(index, ids)

    n_obs = [len(e.obs_value) for e in episodes]
    observations = [
        owner(n_obs),
        pa.DictionaryArray.from_arrays(
            np.concatenate([e.obs_variable for e in episodes]).astype(np.int32),
            pa.array([v.name for v in VARIABLES], pa.string()),
        ),
        np.concatenate([e.obs_hours for e in episodes]),
        pa.nulls(sum(n_obs), pa.float64()),
        np.concatenate([e.obs_value for e in episodes]),
        np.concatenate([e.obs_priority for e in episodes]).astype(np.int8),
    ]
    n_events = [len(e.ev_value) for e in episodes]
    events = [
        owner(n_events),
        pa.array(np.concatenate([e.ev_code for e in episodes]), pa.string()).dictionary_encode(),
        np.concatenate([e.ev_hours for e in episodes]),
        pa.nulls(sum(n_events), pa.float64()),
        pa.array(np.concatenate([e.ev_value for e in episodes]), from_pandas=True),  # NaN -> null
    ]
    return (
        pa.Table.from_pylist(rows, schema=SCHEMAS["episodes.parquet"]),
        pa.Table.from_arrays(
            [pa.array(a) for a in observations], schema=SCHEMAS["observations.parquet"]
        ),
        pa.Table.from_arrays([pa.array(a) for a in events], schema=SCHEMAS["events.parquet"]),
    )


def records_from_tables(
    episodes: pa.Table, observations: pa.Table, events: pa.Table, *, where: str
) -> list[EpisodeRecord]:
    """Inverse of `tables_from_records`.

    An item stands at the later of its effective and its available time. An item that was history
    when it became known, because one of its kind (and priority) with a later effective time was
    known by then, is left out. Raises StoreError, with `where`, if the tables do not belong
    together.
    """
    ids = episodes["episode_id"].to_pylist()
    observations, obs_owner, obs_hours = _as_known(
        observations, ids, ("variable", "priority"), f"{where}: observations"
    )
    events, ev_owner, ev_hours = _as_known(events, ids, ("code",), f"{where}: events")
    obs_start, ev_start = (
        np.searchsorted(owner, np.arange(len(ids) + 1)) for owner in (obs_owner, ev_owner)
    )
    names, name_of = _terms(observations["variable"])
    if unknown := set(names) - VARIABLE_INDEX.keys():
        raise StoreError(f"{where}: observations of the unknown variable {min(unknown)!r}")
    variable = np.array([VARIABLE_INDEX[n] for n in names], dtype=np.int16)[name_of]
    obs_value = observations["value"].to_numpy()
    priority = observations["priority"].to_numpy()
    codes, code_of = _terms(events["code"])
    code = np.array(codes, dtype=object)[code_of]
    ev_value = events["value"].to_numpy()

    records = []
    for i, row in enumerate(episodes.to_pylist()):
        obs, ev = slice(*obs_start[i : i + 2]), slice(*ev_start[i : i + 2])
        phenotypes = row["phenotypes"]
        episode = Episode(
            episode_id=row["episode_id"],
            n_hours=row["n_hours"],
            obs_variable=variable[obs],
            obs_hours=obs_hours[obs],
            obs_value=obs_value[obs],
            obs_priority=priority[obs],
            ev_code=code[ev],
            ev_hours=ev_hours[ev],
            ev_value=ev_value[ev],
            statics=Statics(**{f.name: row[f.name] for f in dataclasses.fields(Statics)}),
        )
        outcome = Outcome(
            **{f.name: row[f.name] for f in dataclasses.fields(Outcome) if f.name != "phenotypes"},
            phenotypes=None if phenotypes is None else tuple(phenotypes),
        )
        records.append(
            EpisodeRecord(
                episode=episode,
                subject_id=row["subject_id"],
                split=row["split"],
                benchmark_split=row["benchmark_split"],
                outcome=outcome,
            )
        )
    return records


def _terms(column: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int32]]:
    """Distinct values of a dictionary column, and which of them each row has."""
    encoded = column.unify_dictionaries().combine_chunks()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()


def _as_known(
    items: pa.Table, ids: Sequence[str], kind: tuple[str, ...], where: str
) -> tuple[pa.Table, NDArray[np.int64], NDArray[np.float64]]:
    """The items that count, the episode (position in `ids`) of each, and when it was known.

    Raises StoreError if rows are not in the order of the episodes.
    """
    position = {episode_id: i for i, episode_id in enumerate(ids)}
    terms, term_of = _terms(items["episode_id"])
    owner = np.array([position.get(t, -1) for t in terms], dtype=np.int64)[term_of]
    if (owner < 0).any() or (np.diff(owner) < 0).any():
        raise StoreError(f"{where} are not those of the episodes in their order")
    hours = items["hours"].to_numpy()
    known: NDArray[np.float64] = np.fmax(hours, items["available_hours"].to_numpy())
    if not (known > hours).any():
        return items, owner, known
    kinds = [
        _terms(items[name])[1] if pa.types.is_dictionary(items[name].type) else items[name]
        for name in kind
    ]
    group = np.zeros(len(owner), dtype=np.int64)
    for key in (owner, *(np.asarray(k) for k in kinds)):
        _, number = np.unique(key, return_inverse=True)
        _, group = np.unique(group * (number.max() + 1) + number, return_inverse=True)
    _, rank = np.unique(hours, return_inverse=True)  # whole numbers: exact in the running maximum
    # In the order in which a kind became known, the latest effective time so far.
    order = np.lexsort((rank, known, group))
    step = group * (rank.max() + 1) + rank
    latest = np.maximum.accumulate(step[order])
    same_instant = (np.diff(group[order]) == 0) & (np.diff(known[order]) == 0)
    last = np.append(~same_instant, True)
    instant_end = np.flatnonzero(last)[np.cumsum(last) - last]
    current = np.zeros(len(order), dtype=bool)
    current[order] = step[order] == latest[instant_end]
    return items.filter(pa.array(current)), owner[current], known[current]
