"""Large CSV files as a stream of Polars frames: bounded memory, errors that name the line.

There are two ways through a file. `chunks` lets Polars unpack and parse on all cores. `lines` cuts
the text itself, knows the line of every row and checks that each has as many fields as the header;
it takes four times as long. Big tables go the fast way, and only what fails there is looked for the
slow way.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl
from polars.exceptions import PolarsError

from training.data.extraction import Chunk
from training.data.prefetch import prefetch
from training.data.sources import SourceError

DType = type[pl.DataType] | pl.DataType

CHUNK_ROWS = 500_000
TEXT_BYTES = 32 * 2**20  # of text at once where lines count: a third of a million chart rows
_PIECE_BYTES = 2**17
# How far back from the end of a chunk to look for a line end that is not inside quotes. Where there
# is none, the odd quote is taken for a stray one, such as inches in free text.
_QUOTED_LINES_REACH = 2**20
_QUOTED = re.compile(rb'"[^"]*"')
_NOT_STRUCTURE = bytes(sorted(set(range(256)) - set(b',"\n')))
_BOM = b"\xef\xbb\xbf"


class CsvTable:
    """A .csv or .csv.gz file with a header; comma-separated, UTF-8.

    Column names are taken in lower case, whatever the case of the file. An empty field is null, and
    nothing else is: "None" is a score of the Glasgow coma scale.
    """

    def __init__(
        self,
        path: Path,
        columns: Mapping[str, DType],
        *,
        required: Sequence[str] = (),
        absent_ok: Sequence[str] = (),
        chunk_rows: int = CHUNK_ROWS,
        text_bytes: int = TEXT_BYTES,
    ) -> None:
        """`columns` to read and their types. A column of `required` may not be empty.

        A column of `absent_ok` that the file lacks is read as null. Raises SourceError if the file
        cannot be read or its header does not fit.
        """
        self.path = path
        self.columns = dict(columns)
        self._required = tuple(required)
        self._chunk_rows = chunk_rows
        self._text_bytes = text_bytes
        sample, sample_bytes = next(self._blocks(2**18), (b"", 0))
        self._bytes_per_row = sample_bytes / max(sample.count(b"\n"), 1)
        header, _, rows = sample.partition(b"\n")
        self._has_rows = bool(rows.strip())
        text = header.removeprefix(_BOM).decode("utf-8", "replace").strip()
        names = [name.strip().strip('"').lower() for name in text.split(",")]
        missing = [c for c in self.columns if c not in names and c not in absent_ok]
        if missing:
            other = next((d for d in ";\t|" if d in names[0]), None)
            hint = f"; the delimiter seems to be {other!r}, not a comma" if other else ""
            raise SourceError(f"{path}: line 1: there is no column {missing[0]!r}{hint}")
        self._present = [c for c in self.columns if c in names]
        self._n_columns = len(names)
        # Columns without a name of their own are never asked for, but the parser wants one for all.
        unique = [n if names.index(n) == i else f"{n}#{i}" for i, n in enumerate(names)]
        self._header = ",".join(f'"{n}"' for n in unique).encode() + b"\n"
        self._schema = {n: self.columns.get(n, pl.String) for n in unique}

    @classmethod
    def find(
        cls,
        folder: Path,
        name: str,
        columns: Mapping[str, DType],
        *,
        required: Sequence[str] = (),
        absent_ok: Sequence[str] = (),
    ) -> CsvTable | None:
        """The table `name`.csv or `name`.csv.gz of the folder in any case; None if there is none.

        Raises SourceError if the folder does not exist or holds the table twice.
        """
        wanted = {f"{name}.csv".lower(), f"{name}.csv.gz".lower()}
        try:
            found = sorted(path for path in folder.iterdir() if path.name.lower() in wanted)
        except OSError as error:
            raise SourceError(f"{folder}: {error.strerror}") from error
        if len(found) > 1:
            raise SourceError(f"{folder}: holds both {found[0].name} and {found[1].name}")
        if not found:
            return None
        return cls(found[0], columns, required=required, absent_ok=absent_ok)

    @property
    def _is_gzip(self) -> bool:
        return self.path.name.lower().endswith(".gz")

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    def read(self) -> pl.DataFrame:
        """The whole table, for one that fits in memory. Raises SourceError like `lines`."""
        return pl.concat([chunk.frame for chunk in self.lines()])

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """See `Table`. A line break inside quotes is not counted in `first_line`.

        Raises SourceError naming file and line for what cannot be read. A row with too many or too
        few fields is noticed where it shifts a number or empties a required column.
        """
        row, empty = start, True
        try:
            for frame in (
                self._scan()
                .slice(start)
                .collect_batches(maintain_order=True, chunk_size=self._chunk_rows)
            ):
                if any(frame[c].null_count() for c in self._required):
                    frame = _without_blank_end(frame)
                    if any(frame[c].null_count() for c in self._required):
                        raise ValueError("an empty field in a column that is required")
                yield Chunk(self._typed(frame), row + 2, self._share(row + len(frame)))
                row += len(frame)
                empty = False
            if row == start == 0 and self._has_rows:
                raise ValueError("no row can be told from the others")  # a quote without its end
            self._check_end()
        except (PolarsError, OSError, ValueError) as error:
            for _ in self.lines():  # raises the same error with its line
                pass
            raise SourceError(f"{self.path}: {error}") from error
        if empty:
            yield Chunk(pl.DataFrame(schema=self.columns), row + 2, self.size)

    def lines(self, start: int = 0) -> Iterator[Chunk]:
        """The same rows as `chunks`, with the line of the first row of each chunk.

        Raises SourceError naming file and line for a row that cannot be read, has too many or too
        few fields, or lacks a required value.
        """
        row = 0
        for body, first_line, bytes_read in prefetch(self._bodies()):
            frame = self._parse(body, first_line)
            if row + len(frame) > start or frame.is_empty():
                skip = max(start - row, 0)
                yield Chunk(frame.slice(skip), first_line + skip, bytes_read)
            row += len(frame)

    def _check_end(self) -> None:
        """Raise ValueError if a plain file was cut off in its last row. (gzip tells by itself.)"""
        if self._is_gzip:
            return
        with self.path.open("rb") as stream:
            stream.seek(max(self.size - 2**16, 0))
            text = stream.read().rstrip(b"\r\n")
        before, newline, last = text.rpartition(b"\n")
        if newline and before and b'"' not in last:
            self._check_fields(last)

    def _scan(self) -> pl.LazyFrame:
        # The header goes by position: its names may be in another case.
        rows = pl.scan_csv(self.path, schema=self._schema, has_header=False, skip_lines=1)
        return rows.select(self._present)

    def _share(self, rows: int) -> int:
        """About how much of the file that many rows are."""
        return min(int(rows * self._bytes_per_row), self.size)

    def _typed(self, frame: pl.DataFrame) -> pl.DataFrame:
        """With the columns that the file lacks, in the order asked for."""
        return frame.select(
            pl.col(c) if c in self._present else pl.lit(None, dtype).alias(c)
            for c, dtype in self.columns.items()
        )

    def _blocks(self, size: int) -> Iterator[tuple[bytes, int]]:
        """The text in pieces of `size` bytes, each with how much of the file was read by then."""
        line = 1
        try:
            with self.path.open("rb") as raw:
                stream = gzip.GzipFile(fileobj=raw) if self._is_gzip else raw
                pieces: list[bytes] = []
                # Small pieces, so that what can still be read of a damaged file tells the line.
                while piece := stream.read1(min(size, _PIECE_BYTES)):
                    pieces.append(piece)
                    line += piece.count(b"\n")
                    if sum(map(len, pieces)) >= size:
                        yield b"".join(pieces), raw.tell()
                        pieces = []
                if pieces:
                    yield b"".join(pieces), raw.tell()
        except EOFError as error:
            raise SourceError(
                f"{self.path}: line {line}: the gzip stream ends early; the file was not "
                "downloaded or copied to its end"
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise SourceError(f"{self.path}: line {line}: the gzip stream is damaged") from error
        except OSError as error:
            raise SourceError(f"{self.path}: {error.strerror}") from error

    def _bodies(self) -> Iterator[tuple[bytes, int, int]]:
        """Whole lines without the header, the number of the first one, bytes of the file read."""
        rest, line, bytes_read, in_header, any_rows = b"", 1, 0, True, False
        for block, bytes_read in self._blocks(self._text_bytes):
            text = rest + block
            if in_header:
                header, newline, text = text.partition(b"\n")
                if not newline:
                    rest = header
                    continue
                in_header, line = False, 2
            # Blank lines are kept back: at the end of the file they are none of its rows.
            filled = len(text[: _end_of_rows(text)].rstrip(b"\r\n"))
            cut = text.find(b"\n", filled) + 1 if filled else 0
            body, rest = text[:cut], text[cut:]
            if body:
                yield body, line, bytes_read
                line += body.count(b"\n")
                any_rows = True
        if in_header or not rest.strip():
            rest = b""  # a header without a line end; blank lines at the end
        if rest or not any_rows:
            yield rest, line, bytes_read

    def _parse(self, body: bytes, first_line: int) -> pl.DataFrame:
        try:
            self._check_fields(body)
            frame = self._read(body)
        except (PolarsError, ValueError) as error:
            raise self._located(body, first_line, error) from error
        for column in self._required:
            if frame[column].null_count():
                before = frame[: int(frame[column].is_null().arg_max() or 0)]
                line = first_line + len(before)
                raise SourceError(f"{self.path}: line {line}: column {column!r} is empty")
        return frame

    def _read(self, body: bytes) -> pl.DataFrame:
        frame = pl.read_csv(
            self._header + body,
            columns=self._present,
            schema_overrides={c: self.columns[c] for c in self._present},
            infer_schema=False,
            raise_if_empty=False,
        )
        return self._typed(frame)

    def _check_fields(self, body: bytes) -> None:
        """Raise ValueError if a row has more or fewer fields than the header."""
        plain = body.translate(None, _NOT_STRUCTURE)
        if plain.count(b'"') % 2 == 0:  # else which one is the stray matters
            plain = plain.replace(b'""', b"")  # quotes around text without structure: nearly all
        if b'"' in plain:
            plain = _QUOTED.sub(b"", plain)
        n_rows = plain.count(b"\n") + (body[-1:] not in (b"\n", b""))
        if plain.count(b",") != n_rows * (self._n_columns - 1):
            raise ValueError(f"not {self._n_columns} fields")

    def _located(self, body: bytes, first_line: int, error: Exception) -> SourceError:
        """The same error with the line that it is about. Never repeats what stands there."""
        lines = body.splitlines(keepends=True)
        low, high = 0, len(lines)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                part = b"".join(lines[low:middle])
                self._check_fields(part)
                self._read(part)
            except (PolarsError, ValueError) as narrower:
                high, error = middle, narrower
            else:
                low = middle
        text = str(error)
        column = re.search(r"at column '([^']+)'", text)
        if column:
            reason = f"column {column[1]!r} is not of type {self.columns[column[1]]}"
        elif "utf-8" in text:
            reason = "not valid UTF-8"
        else:
            n_fields = _QUOTED.sub(b"", lines[low]).count(b",") + 1
            reason = (
                f"{n_fields} fields, not {self._n_columns}"
                if n_fields != self._n_columns
                else "malformed row"
            )
        return SourceError(f"{self.path}: line {first_line + low}: {reason}")


def require(
    folder: Path,
    name: str,
    columns: Mapping[str, DType],
    *,
    required: Sequence[str] = (),
    absent_ok: Sequence[str] = (),
) -> CsvTable:
    """Like `CsvTable.find`, but raises SourceError where the table is absent."""
    table = CsvTable.find(folder, name, columns, required=required, absent_ok=absent_ok)
    if table is None:
        raise SourceError(f"{folder}: there is no {name}.csv or {name}.csv.gz")
    return table


def _end_of_rows(text: bytes) -> int:
    """Where the last complete row ends; a line end inside quotes does not end a row.

    0 where more text is needed to tell.
    """
    end = last = text.rfind(b"\n") + 1
    odd = text.count(b'"', 0, end) % 2
    while odd and end:
        if last - end > _QUOTED_LINES_REACH:
            return last
        previous = text.rfind(b"\n", 0, end - 1) + 1
        odd ^= text.count(b'"', previous, end) % 2
        end = previous
    return end


def _without_blank_end(frame: pl.DataFrame) -> pl.DataFrame:
    """Without the rows at the end in which nothing stands: blank lines."""
    filled = frame.select(pl.any_horizontal(pl.all().is_not_null())).to_series()
    last = len(filled) - 1 - (filled.reverse().arg_max() or 0) if filled.any() else -1
    return frame[: last + 1]
