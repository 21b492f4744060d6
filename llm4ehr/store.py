"""The episode store: ICU stays of any source in one Parquet layout that everything else reads.

A store is a folder: `store.json` (what it is, licence, counts, digests), `episodes.parquet` (one
row a stay: statics and labels), `observations.parquet`, `events.parquet` and `codes.parquet` (what
each event code means). Rows are sorted by episode id, in the same order everywhere, and row group k
of the first three files covers the same block of episodes, so a reader holds one block at a time.

All hours are float hours since ICU admission; null stands for "not known".
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llm4ehr.store_tables import (
    BLOCK_FILES,
    INFO_FILE,
    SCHEMAS,
    CodeInfo,
    EpisodeRecord,
    Outcome,
    StoreError,
    StoreInfo,
    check_episode,
    records_from_tables,
    tables_from_records,
)

__all__ = [
    "EPISODES_PER_GROUP",
    "CodeInfo",
    "EpisodeRecord",
    "EpisodeStore",
    "Outcome",
    "StoreError",
    "StoreInfo",
    "StoreWriter",
]

EPISODES_PER_GROUP = 512


class StoreWriter:
    """Writes a store block by block; nothing stands at `path` before `close` has succeeded.

    Records come with strictly increasing episode ids. As a context manager it closes at the end of
    the block, or removes what it wrote if the block raises.
    """

    def __init__(
        self,
        path: Path,
        info: StoreInfo,
        *,
        codes: Mapping[str, CodeInfo] | None = None,
        episodes_per_group: int = EPISODES_PER_GROUP,
    ) -> None:
        """`codes`: what the events of `add` can carry.

        Raises StoreError if `path` is a file or a folder that is not empty.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise StoreError(f"{path}: exists and is not an empty folder")
        if episodes_per_group < 1:
            raise ValueError("episodes_per_group must be at least 1")
        self._path = path.absolute()
        self._partial = self._path.with_name(self._path.name + ".partial")
        self._info = info
        self._codes = dict(codes or {})
        self._episodes_per_group = episodes_per_group
        self._block: list[EpisodeRecord] = []
        self._last_id: str | None = None
        self._closed = False
        self._counts = dict.fromkeys(("episodes", "observations", "events", "deaths"), 0)
        self._remove_partial()  # left by a run that was killed
        self._partial.mkdir(parents=True)
        self._files = {
            name: pq.ParquetWriter(self._partial / name, SCHEMAS[name], compression="zstd")
            for name in BLOCK_FILES
        }

    def add(self, record: EpisodeRecord) -> None:
        """Append a stay. Raises StoreError if it is out of order, malformed or of unknown codes."""
        self._check(record)
        self._block.append(record)
        if len(self._block) == self._episodes_per_group:
            self._flush()

    def add_block(
        self,
        episodes: pa.Table,
        observations: pa.Table,
        events: pa.Table,
        codes: Mapping[str, CodeInfo],
    ) -> None:
        """Append a block of stays as tables of `SCHEMAS`; `codes` are those of its events.

        Unlike `add`, this keeps the available time of items. Raises StoreError like `add`, and for
        a code that an earlier block gave another unit.
        """
        for code, info in codes.items():
            known = self._codes.setdefault(code, info)
            if known.unit != info.unit:
                raise StoreError(f"code {code!r} in {known.unit!r} and in {info.unit!r}")
        # What is written is what a reader will see.
        for record in records_from_tables(episodes, observations, events, where="block"):
            self._check(record)
        if self._block:
            self._flush()
        self._write(episodes, observations, events)

    def close(
        self,
        *,
        refused: Mapping[str, int] | None = None,
        repaired: Mapping[str, int] | None = None,
    ) -> StoreInfo:
        """Write what is pending, seal the store and move it to its place.

        `refused` and `repaired` count the items that the reader left out or mended, by reason.
        """
        if self._block:
            self._flush()
        for file in self._files.values():
            file.close()
        codes = [{"code": code, **info._asdict()} for code, info in sorted(self._codes.items())]
        pq.write_table(
            pa.Table.from_pylist(codes, schema=SCHEMAS["codes.parquet"]),
            self._partial / "codes.parquet",
            compression="zstd",
        )
        info = dataclasses.replace(
            self._info,
            counts=self._counts,
            refused=dict(refused or {}),
            repaired=dict(repaired or {}),
            digests={name: _digest(self._partial / name) for name in SCHEMAS},
        )
        (self._partial / INFO_FILE).write_text(info.to_json(), encoding="utf-8")
        self._partial.replace(self._path)
        self._closed = True
        return info

    def abort(self) -> None:
        """Drop everything written so far."""
        for file in self._files.values():
            file.close()
        self._remove_partial()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abort()
        elif not self._closed:
            self.close()

    def _check(self, record: EpisodeRecord) -> None:
        """Raise StoreError if a stay is out of order or does not fit the schema."""
        episode = record.episode
        if self._last_id is not None and episode.episode_id <= self._last_id:
            raise StoreError(
                f"episode {episode.episode_id!r} after {self._last_id!r}: ids must increase"
            )
        check_episode(episode, self._codes)
        self._last_id = episode.episode_id

    def _flush(self) -> None:
        self._write(*tables_from_records(self._block))
        self._block = []

    def _write(self, episodes: pa.Table, observations: pa.Table, events: pa.Table) -> None:
        self._counts["deaths"] += pc.sum(episodes["mortality"]).as_py() or 0
        for name, table in zip(BLOCK_FILES, (episodes, observations, events), strict=True):
            self._counts[name.removesuffix(".parquet")] += len(table)
            # One row group, also for an empty table: group k must exist in all three files.
            self._files[name].write_table(table, row_group_size=max(len(table), 1))

    def _remove_partial(self) -> None:
        if not self._partial.exists():
            return
        for name in (*SCHEMAS, INFO_FILE):
            (self._partial / name).unlink(missing_ok=True)
        try:
            self._partial.rmdir()
        except OSError as error:
            raise StoreError(f"{self._partial}: holds files of another origin") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeStore:
    """Reads a store. Holds no open file and no episode, so other processes may have copies."""

    path: Path
    info: StoreInfo
    n_blocks: int
    codes: Mapping[str, CodeInfo]

    @classmethod
    def open(cls, path: Path, *, verify: bool = False) -> EpisodeStore:
        """Open a store and check its version, files, columns and row groups.

        With `verify` also the SHA-256 digest of every file. Raises StoreError.
        """
        info = StoreInfo.from_json(_read_text(path / INFO_FILE))
        n_groups: dict[str, int] = {}
        for name, schema in SCHEMAS.items():
            file = path / name
            if not file.is_file():
                raise StoreError(f"{file}: missing")
            if verify and _digest(file) != info.digests.get(name):
                raise StoreError(f"{file}: SHA-256 differs from the one in {INFO_FILE}")
            n_groups[name], n_rows = _check_columns(file, schema)
            if name in BLOCK_FILES and n_rows != info.counts.get(file.stem):
                raise StoreError(f"{file}: {n_rows} rows, not the number in {INFO_FILE}")
        n_blocks = n_groups["episodes.parquet"]
        for name in BLOCK_FILES:
            if n_groups[name] != n_blocks:
                raise StoreError(f"{path / name}: {n_groups[name]} row groups, not {n_blocks}")
        rows = pq.read_table(path / "codes.parquet").to_pylist()
        codes = {row["code"]: CodeInfo(row["descriptor"], row["unit"]) for row in rows}
        return cls(path=path, info=info, n_blocks=n_blocks, codes=codes)

    @property
    def n_episodes(self) -> int:
        """Number of stays."""
        return self.info.counts["episodes"]

    @property
    def labels(self) -> pa.Table:
        """The whole of `episodes.parquet`: ids, split, statics and labels, one row a stay."""
        return pq.read_table(self.path / "episodes.parquet")

    def block(self, k: int) -> list[EpisodeRecord]:
        """The stays of row group k, 0 <= k < `n_blocks`."""
        tables = []
        for name in BLOCK_FILES:
            with pq.ParquetFile(self.path / name) as file:
                tables.append(file.read_row_group(k, use_threads=False))
        return records_from_tables(*tables, where=f"{self.path}, row group {k}")

    def blocks(self) -> Iterator[list[EpisodeRecord]]:
        """All stays in the order of their ids, one row group at a time."""
        return (self.block(k) for k in range(self.n_blocks))

    def __iter__(self) -> Iterator[EpisodeRecord]:
        for block in self.blocks():
            yield from block

    def __len__(self) -> int:
        return self.n_episodes


def _check_columns(file: Path, schema: pa.Schema) -> tuple[int, int]:
    """Numbers of row groups and rows; raises StoreError unless it is Parquet of that schema."""
    try:
        with pq.ParquetFile(file) as parquet:
            found, metadata = parquet.schema_arrow, parquet.metadata
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{file}: not readable as Parquet: {error}") from error
    for wanted in schema:
        index = found.get_field_index(wanted.name)
        if index < 0:
            raise StoreError(f"{file}: column {wanted.name!r} is missing")
        if found.field(index).type != wanted.type:
            raise StoreError(
                f"{file}: column {wanted.name!r} is {found.field(index).type}, not {wanted.type}"
            )
    return metadata.num_row_groups, metadata.num_rows


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{file}: {error.strerror}") from error


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
