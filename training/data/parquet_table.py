"""Large Parquet files as a stream of Polars frames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from training.data.extraction import Chunk
from training.data.prefetch import prefetch
from training.data.sources import SourceError

ROWS_AT_ONCE = 2**18


class ParquetTable:
    """One or more Parquet files with the same columns, read in the order given."""

    def __init__(
        self,
        paths: Sequence[Path],
        columns: Mapping[str, type[pl.DataType] | pl.DataType],
        *,
        absent_ok: Sequence[str] = (),
    ) -> None:
        """`columns` to read and the types they are cast to.

        A column of `absent_ok` that a file lacks is read as null. Raises SourceError if there is no
        file, or one that is not Parquet or lacks a column.
        """
        if not paths:
            raise SourceError("no Parquet file")
        self._paths = tuple(paths)
        self.path = self._paths[0].parent if len(paths) > 1 else self._paths[0]
        self.columns = dict(columns)
        for path in self._paths:
            try:
                names = pq.read_schema(path).names
            except (pa.ArrowException, OSError) as error:
                raise SourceError(f"{path}: not readable as Parquet: {error}") from error
            missing = [c for c in self.columns if c not in names and c not in absent_ok]
            if missing:
                raise SourceError(f"{path}: there is no column {missing[0]!r}")

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self._paths)

    def read(self) -> pl.DataFrame:
        """The whole table, for one that fits in memory."""
        return pl.concat([chunk.frame for chunk in self.chunks()])

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """See `Table`; `first_line` is the row number in its file, from 1 on."""
        row = 0
        for chunk in prefetch(self._chunks()):
            n = len(chunk.frame)
            if row + n > start or n == 0:
                skip = max(start - row, 0)
                yield Chunk(chunk.frame.slice(skip), chunk.first_line + skip, chunk.bytes_read)
            row += n

    def _chunks(self) -> Iterator[Chunk]:
        bytes_read = 0
        for path in self._paths:
            first_row = 1
            with pq.ParquetFile(path) as file:
                present = [c for c in self.columns if c in file.schema_arrow.names]
                size, n_rows = path.stat().st_size, max(file.metadata.num_rows, 1)
                try:
                    for batch in file.iter_batches(ROWS_AT_ONCE, columns=present):
                        rows_read = first_row - 1 + len(batch)
                        share = bytes_read + size * rows_read // n_rows
                        yield Chunk(self._typed(path, pl.DataFrame(batch)), first_row, share)
                        first_row += len(batch)
                except (pa.ArrowException, OSError) as error:
                    raise SourceError(f"{path}: row {first_row} or later: {error}") from error
            if first_row == 1:
                yield Chunk(self._typed(path, pl.DataFrame()), 1, bytes_read)
            bytes_read += size

    def _typed(self, path: Path, frame: pl.DataFrame) -> pl.DataFrame:
        try:
            return frame.select(
                (pl.col(c) if c in frame.columns else pl.lit(None)).cast(dtype).alias(c)
                for c, dtype in self.columns.items()
            )
        except pl.exceptions.PolarsError as error:
            raise SourceError(f"{path}: a column is not of the type expected: {error}") from error
