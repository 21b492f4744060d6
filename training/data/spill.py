"""One pass over a big table: what a scan keeps, on disk, sorted by stay, and resumable.

The spill of a scan is a folder of Parquet parts, each sorted by stay with small row groups, so the
rows of a block of stays are found by their statistics. `state.json` beside them says how far the
pass has come; it is replaced after each part, so a pass that was stopped goes on behind the last
one. Memory is bounded by the size of a chunk and of a part, whatever the size of the table.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from training.data.extraction import Scan
from training.data.sources import SourceError, Tally

PART_BYTES = 96 * 2**20
_ROW_GROUP = 2**15
_STATE = "state.json"


@dataclass(slots=True)
class _State:
    """How far a pass has come."""

    rows: int = 0
    parts: int = 0
    done: bool = False
    refused: dict[str, int] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)


class Spill:
    """The spill of one scan in a folder."""

    def __init__(self, scan: Scan, folder: Path) -> None:
        self.scan = scan
        self._folder = folder
        self._state = _State()
        if (folder / _STATE).exists():
            self._state = _State(**json.loads((folder / _STATE).read_text()))

    @property
    def rows(self) -> int:
        """Rows of the table that were read."""
        return self._state.rows

    def fill(self, on_progress: Callable[[int, int], None]) -> None:
        """Pass over the rest of the table. `on_progress(bytes read, rows read)` after each chunk.

        Raises SourceError, as the table and the scan do; what was done until then stays.
        """
        if self._state.done:
            on_progress(self.scan.table.size, self._state.rows)
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        state = self._state
        tally = Tally(Counter(state.refused), Counter(state.repaired))
        waiting: list[pl.DataFrame] = []
        size = 0

        def write(*, done: bool) -> None:
            nonlocal waiting, size
            kept = pl.concat(waiting) if waiting else pl.DataFrame()
            if len(kept) or not state.parts:  # an empty part still tells the columns
                part = self._folder / f"part-{state.parts:05d}.parquet"
                unfinished = part.with_suffix(".unfinished")
                kept.sort("stay").write_parquet(
                    unfinished, compression="lz4", row_group_size=_ROW_GROUP
                )
                unfinished.replace(part)
                state.parts += 1
            state.done = done
            state.refused, state.repaired = dict(tally.refused), dict(tally.repaired)
            unfinished = self._folder / f"{_STATE}.unfinished"
            unfinished.write_text(json.dumps({k: getattr(state, k) for k in _State.__slots__}))
            unfinished.replace(self._folder / _STATE)
            waiting, size = [], 0

        for chunk in self.scan.table.chunks(state.rows):
            try:
                kept = self.scan.select(chunk.frame, tally)
            except pl.exceptions.PolarsError as error:
                where = f"{self.scan.table.path}: lines {chunk.first_line} and following"
                raise SourceError(f"{where}: {error}") from error
            waiting.append(kept)
            size += int(kept.estimated_size())
            state.rows += len(chunk.frame)
            on_progress(chunk.bytes_read, state.rows)
            if size >= PART_BYTES:
                write(done=False)
        write(done=True)

    def add_to(self, tally: Tally) -> None:
        """Add what the pass refused and repaired to a tally."""
        tally.refused.update(self._state.refused)
        tally.repaired.update(self._state.repaired)

    def read(self, first: int, end: int) -> pl.DataFrame:
        """The kept rows of the stays `first` to `end` - 1."""
        parts = [self._folder / f"part-{k:05d}.parquet" for k in range(self._state.parts)]
        return (
            pl.scan_parquet(parts, low_memory=True, cache=False)
            .filter(pl.col("stay").is_between(first, end - 1))
            .collect()
        )
