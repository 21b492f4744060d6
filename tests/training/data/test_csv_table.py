"""Large CSV files: same rows whatever the chunks, and errors that name file and line."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.csv_table import CsvTable, require
from training.data.sources import SourceError

COLUMNS = {"stay": pl.Int64, "value": pl.String}
HEADER = "row_id,STAY,Value,note\n"


def write(folder: Path, text: str | bytes, name: str = "events.csv") -> Path:
    path = folder / name
    content = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def table(path: Path, **options: object) -> CsvTable:
    return CsvTable(path, COLUMNS, **options)  # type: ignore[arg-type]


def rows(n: int) -> str:
    return HEADER + "".join(f"{i},{100 + i},v{i},\n" for i in range(n))


@pytest.mark.parametrize("name", ["events.csv", "events.csv.gz"])
@pytest.mark.parametrize("way", ["chunks", "lines"])
@pytest.mark.parametrize("size", [7, 30, 10_000])
def test_the_rows_do_not_depend_on_the_chunks(
    tmp_path: Path, name: str, way: str, size: int
) -> None:
    csv = table(write(tmp_path, rows(50), name), chunk_rows=size, text_bytes=size)
    found = pl.concat([chunk.frame for chunk in getattr(csv, way)()])
    assert found["stay"].to_list() == [100 + i for i in range(50)]
    assert found["value"].to_list() == [f"v{i}" for i in range(50)]
    assert found.schema == pl.Schema({"stay": pl.Int64, "value": pl.String})


@pytest.mark.parametrize("way", ["chunks", "lines"])
def test_a_chunk_knows_its_first_line(tmp_path: Path, way: str) -> None:
    csv = table(write(tmp_path, rows(40)), chunk_rows=9, text_bytes=100)
    chunks = list(getattr(csv, way)())
    assert len(chunks) > 3
    for chunk in chunks:
        assert chunk.frame["stay"][0] == 100 + chunk.first_line - 2
    read = [chunk.bytes_read for chunk in chunks]
    assert read == sorted(read)
    assert read[-1] == pytest.approx(csv.size, rel=0.1)


@pytest.mark.parametrize("way", ["chunks", "lines"])
@pytest.mark.parametrize("start", [0, 1, 9, 10, 39, 40])
def test_rows_can_be_skipped(tmp_path: Path, way: str, start: int) -> None:
    csv = table(write(tmp_path, rows(40)), chunk_rows=9, text_bytes=100)
    frames = [chunk.frame for chunk in getattr(csv, way)(start)]
    found = [stay for frame in frames for stay in frame["stay"].to_list()]
    assert found == [100 + i for i in range(start, 40)]


@pytest.mark.parametrize(
    "text",
    [
        HEADER.replace("\n", "\r\n") + "1,2,a,\r\n",
        "\ufeff" + HEADER + "1,2,a,\n",
        HEADER + "1,2,a,",  # no line end
        HEADER + "1,2,a,\n\n",
        HEADER + "1,2,a,\r\n\r\n\n",
        '"ROW_ID","stay","VALUE","NOTE"\n1,"2","a",""\n',
    ],
)
def test_common_spellings_of_a_file_are_read(tmp_path: Path, text: str) -> None:
    csv = table(write(tmp_path, text), required=["stay"])
    assert csv.read().rows() == [(2, "a")]
    assert [row for chunk in csv.chunks() for row in chunk.frame.rows()] == [(2, "a")]


def test_only_an_empty_field_is_missing(tmp_path: Path) -> None:
    """The word None is a score of the Glasgow coma scale, NA may be a unit."""
    csv = table(write(tmp_path, HEADER + "1,1,None,\n2,2,,\n3,3,NA,\n4,4,nan,\n"))
    (chunk,) = csv.chunks()
    for frame in (csv.read(), chunk.frame):
        assert frame["value"].to_list() == ["None", None, "NA", "nan"]


@given(
    values=st.lists(
        st.text(alphabet=st.sampled_from('ab,"\n é'), min_size=1, max_size=6),
        min_size=1,
        max_size=20,
    ),
    size=st.integers(5, 60),
)
def test_quoted_commas_quotes_and_line_ends_are_data(
    tmp_path_factory: pytest.TempPathFactory, values: list[str], size: int
) -> None:
    body = "".join(f'{i},{i},"{v.replace(chr(34), chr(34) * 2)}",\n' for i, v in enumerate(values))
    path = write(tmp_path_factory.mktemp("csv"), HEADER + body)
    csv = table(path, text_bytes=size, chunk_rows=size)
    for way in (csv.lines, csv.chunks):
        assert [v for chunk in way() for v in chunk.frame["value"].to_list()] == values


def test_a_stray_quote_does_not_swallow_the_file(tmp_path: Path) -> None:
    """Without it being quoted, 5'2" has an odd quote; memory must not grow with what follows."""
    text = HEADER + "1,1,5'2\",\n" + "".join(f"{i},{i},b,\n" for i in range(2, 3000))
    chunks = []
    with pytest.raises(SourceError, match=r"events\.csv: line \d+: "):
        chunks.extend(table(write(tmp_path, text), text_bytes=500).lines())


def test_a_table_without_rows_has_its_columns(tmp_path: Path) -> None:
    csv = table(write(tmp_path, HEADER))
    (chunk,) = csv.chunks()
    for frame in (csv.read(), chunk.frame):
        assert frame.schema == pl.Schema(COLUMNS)
        assert frame.is_empty()


def test_a_column_that_may_be_absent_is_null(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + "1,2,a,\n")
    csv = CsvTable(path, COLUMNS | {"unit": pl.String}, absent_ok=["unit"])
    (chunk,) = csv.chunks()
    for frame in (csv.read(), chunk.frame):
        assert frame.rows() == [(2, "a", None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: there is no column 'stay'"),
        ("row_id,STAY\n", "line 1: there is no column 'value'"),
        (rows(2).replace(",", ";"), "line 1: .*delimiter seems to be ';'"),
        (rows(2).replace(",", "\t"), r"line 1: .*delimiter seems to be '\\t'"),
        (rows(30) + "x,twelve,v,\n" + "1,1,v,\n", "line 32: column 'stay' is not of type Int64"),
        (rows(30) + "1,1\n", "line 32: 2 fields, not 4"),
        (rows(30) + "1,1,a,b,c\n" + "2,2,a,\n", "line 32: 5 fields, not 4"),
        (rows(30) + "1,,a,\n", "line 32: column 'stay' is empty"),
    ],
)
@pytest.mark.parametrize("size", [64, 10_000])
def test_a_malformed_file_is_named_with_its_line(
    tmp_path: Path, text: str, message: str, size: int
) -> None:
    with pytest.raises(SourceError, match=rf"events\.csv: {message}"):
        table(write(tmp_path, text), text_bytes=size, required=["stay"]).read()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,twelve,v,\n", "line 32: column 'stay' is not of type Int64"),
        ("1,,a,\n", "line 32: column 'stay' is empty"),
        ("1\n", "line 32: 1 fields, not 4"),
        ("1,5' 2,a,b,c,d\n", "line 32: 6 fields, not 4"),  # the comma shifts a word to a number
    ],
)
def test_the_fast_way_names_the_line_too(tmp_path: Path, row: str, message: str) -> None:
    csv = table(write(tmp_path, rows(30) + row + "1,1,v,\n"), required=["stay"])
    with pytest.raises(SourceError, match=rf"events\.csv: {message}"):
        list(csv.chunks())


@pytest.mark.parametrize("quoted", ["5'2\" tall", '"tall'])
@pytest.mark.parametrize("n", [1, 3000])
def test_a_quote_without_its_end_does_not_empty_the_file(
    tmp_path: Path, quoted: str, n: int
) -> None:
    text = HEADER + f"1,1,{quoted},\n" + "".join(f"{i},{i},b,\n" for i in range(2, n))
    with pytest.raises(SourceError, match=r"events\.csv: line 2: "):
        list(table(write(tmp_path, text)).chunks())


def test_a_plain_file_cut_off_in_a_row_is_named(tmp_path: Path) -> None:
    text = rows(50)
    path = write(tmp_path, text[: text.rindex(",v")])
    with pytest.raises(SourceError, match=r"events\.csv: line 51: 2 fields, not 4"):
        list(table(path).chunks())


@pytest.mark.parametrize("way", ["chunks", "read"])
def test_bad_encoding_is_named_with_its_line(tmp_path: Path, way: str) -> None:
    text = rows(30).encode() + b"30,30,temp\xe9rature,\n" + b"31,31,v,\n"
    with pytest.raises(SourceError, match=r"events\.csv: line 32: not valid UTF-8"):
        list(getattr(table(write(tmp_path, text)), way)())


@pytest.mark.parametrize("way", ["chunks", "read"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_truncated_gzip_is_named(tmp_path: Path, share: float, way: str) -> None:
    path = write(tmp_path, rows(5000), "events.csv.gz")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(SourceError, match=r"events\.csv\.gz: line \d+: .*ends early"):
        list(getattr(table(path, text_bytes=1000), way)())


def test_the_line_of_a_truncated_gzip_is_the_one_that_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path, rows(200_000), "events.csv.gz")
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(half)
    readable = zlib.decompressobj(wbits=31).decompress(half).count(b"\n")
    with pytest.raises(SourceError) as error:
        list(table(path).chunks())
    line = int(str(error.value).partition("line ")[2].partition(":")[0])
    assert readable - 5000 < line <= readable + 1


@pytest.mark.parametrize("way", ["chunks", "read"])
def test_a_damaged_gzip_is_named(tmp_path: Path, way: str) -> None:
    path = write(tmp_path, rows(5000), "events.csv.gz")
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF  # the checksum
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"events\.csv\.gz: line \d+: .*damaged"):
        list(getattr(table(path, text_bytes=1000), way)())


def test_an_error_never_repeats_what_stands_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as error:
        table(write(tmp_path, rows(3) + "1,JohnDoe,secret,\n")).read()
    assert "JohnDoe" not in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["EVENTS.csv.gz", "events.csv", "Events.CSV"])
def test_a_table_is_found_in_any_case(tmp_path: Path, name: str) -> None:
    write(tmp_path, rows(1), name)
    found = CsvTable.find(tmp_path, "Events", COLUMNS)
    assert found is not None
    assert found.read().rows() == [(100, "v0")]


def test_an_absent_table_is_none_or_an_error(tmp_path: Path) -> None:
    assert CsvTable.find(tmp_path, "events", COLUMNS) is None
    with pytest.raises(SourceError, match=r"there is no events\.csv or events\.csv\.gz"):
        require(tmp_path, "events", COLUMNS)
    with pytest.raises(SourceError, match="No such file"):
        require(tmp_path / "nowhere", "events", COLUMNS)


def test_a_table_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, rows(1))
    write(tmp_path, rows(1), "EVENTS.csv.gz")
    with pytest.raises(SourceError, match="holds both"):
        CsvTable.find(tmp_path, "events", COLUMNS)
