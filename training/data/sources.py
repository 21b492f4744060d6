"""What the readers share: record files in a folder or tar archive, and the tally of bad items."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from llm4ehr.store import CodeInfo, EpisodeRecord, StoreInfo

if TYPE_CHECKING:  # which imports this module
    from training.data.extraction import Expected

_Parsed = TypeVar("_Parsed")
_ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")


class SourceError(ValueError):
    """The source is not what its publisher released; the message names the file."""


@dataclass(slots=True)
class Tally:
    """Items left out (`refused`) and mended (`repaired`), counted by reason."""

    refused: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)

    def refuse(self, reason: str, names: Sequence[str], index: NDArray[np.integer]) -> None:
        """Count the items `index` (positions in `names`) under "reason:name"."""
        for i, n in zip(*np.unique(index, return_counts=True), strict=True):
            self.refused[f"{reason}:{names[i]}"] += int(n)


@runtime_checkable
class Dataset(Protocol):
    """A data set of one record file a stay, found at its source."""

    @property
    def info(self) -> StoreInfo:
        """Name, licence, citation and how its labels are to be understood."""

    @property
    def expected(self) -> Expected:
        """What a sound copy of it holds."""

    @property
    def codes(self) -> Mapping[str, CodeInfo]:
        """Every event code that its records can carry."""

    @property
    def n_episodes(self) -> int:
        """Number of records that `records` yields."""

    def records(self, tally: Tally) -> Iterator[EpisodeRecord]:
        """Yield every stay in the order of its id. Raises SourceError for a malformed file."""


@dataclass(frozen=True, slots=True)
class RecordFile:
    """One stay as published: the stem of its file name, and the bytes."""

    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class RecordSet:
    """A folder or tar archive of record files; `names` are their stems in rising order."""

    path: Path
    suffix: str
    names: tuple[str, ...]
    in_order: bool  # whether the archive holds its files in the order of `names`

    @classmethod
    def find(cls, source: Path, name: str, suffix: str) -> RecordSet | None:
        """The record set `name` in `source`, or `source` itself where that is the set.

        A folder goes before an archive. Raises SourceError if there is a set without records.
        """
        source = source.absolute()
        file_names = (name, *(name + s for s in _ARCHIVE_SUFFIXES))
        candidates = [source] if source.name in file_names else [source / f for f in file_names]
        path = next((c for c in candidates if c.exists()), None)
        if path is None:
            return None
        if path.is_dir():
            stems = [p.stem for p in path.iterdir() if _is_record(p.name, suffix)]
        else:
            stems = [file.name for file in _contents(path, suffix, read=False)]
        names = tuple(sorted(stems))
        if not names:
            raise SourceError(f"{path}: holds no *{suffix} record")
        if len(set(names)) != len(names):
            raise SourceError(f"{path}: holds a record twice")
        return cls(path, suffix, names, in_order=path.is_dir() or list(names) == stems)

    def __iter__(self) -> Iterator[RecordFile]:
        """All files in the order of their names."""
        if self.path.is_dir():
            for name in self.names:
                yield RecordFile(name, (self.path / (name + self.suffix)).read_bytes())
        elif self.in_order:
            yield from _contents(self.path, self.suffix)
        else:
            # An archive cannot be read out of order without unpacking it many times over; the
            # published ones are below 200 MB unpacked, so an unsorted one fits in memory.
            yield from sorted(_contents(self.path, self.suffix), key=lambda file: file.name)


CREDENTIALED = "PhysioNet Credentialed Health Data License 1.5.0"


def licence_of(source: Path) -> str:
    """Licence of a PhysioNet folder: the open demos come with the text of theirs, the ODbL."""
    for file in sorted(source.glob("LICENSE*")):
        if "Open Database License" in file.read_text(encoding="utf-8", errors="replace"):
            return "ODbL-1.0"
    return CREDENTIALED


def chunks(files: Iterable[RecordFile], size: int) -> Iterator[list[RecordFile]]:
    """Consecutive groups of `size` files, the last one possibly shorter."""
    group: list[RecordFile] = []
    for file in files:
        group.append(file)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def parse_group(
    files: Sequence[RecordFile], parse: Callable[[Sequence[RecordFile]], _Parsed]
) -> _Parsed:
    """`parse(files)`. If that raises ValueError, raises SourceError naming the file to blame."""
    try:
        return parse(files)
    except ValueError as error:
        if len(files) == 1:
            raise SourceError(f"{files[0].name}: {error}") from error
        for file in files:
            parse_group([file], parse)
        raise


def slices_by_stay(stay: NDArray[np.int64], n_stays: int) -> list[slice]:
    """Where the rows of each stay lie, given the rising stay number of every row."""
    start = np.searchsorted(stay, np.arange(n_stays + 1)).tolist()
    return [slice(low, high) for low, high in pairwise(start)]


def _is_record(file_name: str, suffix: str) -> bool:
    return file_name.endswith(suffix) and not file_name.startswith(".")


def _contents(path: Path, suffix: str, *, read: bool = True) -> Iterator[RecordFile]:
    """The record files of an archive in the order in which they stand there."""
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if not (member.isfile() and _is_record(name.name, suffix)):
                    continue
                stream = archive.extractfile(member) if read else None
                yield RecordFile(name.stem, stream.read() if stream else b"")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SourceError(f"{path}: not readable as a tar archive: {error}") from error
