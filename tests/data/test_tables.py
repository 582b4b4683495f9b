"""Tables as annotation files: rows by column name, wherever chunks, quotes and line breaks fall."""

from __future__ import annotations

import csv
import io
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medm.data import record_files
from medm.data.tables import TableFile, check_header
from medm.errors import DataError

CELLS = st.text("a\"',;\n\t é中", max_size=6)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(CELLS, CELLS, CELLS).filter(any), min_size=1, max_size=6),
    delimiter=st.sampled_from(",;\t"),
    chunk=st.integers(1, 40),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_any_table_comes_back_whatever_the_chunk(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str, str]],
    delimiter: str,
    chunk: int,
    end: str,
    bom: bool,
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("image", "caption", "id"), *rows])
    path = tmp_path_factory.mktemp("t") / "a.csv"
    write(path, (b"\xef\xbb\xbf" if bom else b"") + text.getvalue().encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_files, "_CHUNK", chunk)
        found = list(TableFile(path))
    assert found == [
        {
            name: cell
            for name, cell in zip(("image", "caption", "id"), row, strict=True)
            if cell.strip()
        }
        for row in rows
    ]


QUOTED = CELLS.map(lambda text: '"' + text.replace('"', '""') + '"')
PLAIN = st.text("a\"' é中", max_size=6).filter(lambda text: not text.startswith('"'))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(QUOTED | PLAIN, QUOTED | PLAIN), min_size=1, max_size=6),
    delimiter=st.sampled_from(",;\t"),
    chunk=st.integers(1, 40),
)
def test_rows_are_those_of_the_csv_module_where_quotes_stand_in_plain_cells(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    delimiter: str,
    chunk: int,
) -> None:
    lines = [("n", "image", "caption"), *((f"r{n}", *row) for n, row in enumerate(rows))]
    text = "".join(delimiter.join(cells) + "\n" for cells in lines)
    path = write(tmp_path_factory.mktemp("t") / "a.csv", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_files, "_CHUNK", chunk)
        found = list(TableFile(path))
    names, *expected = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    assert len(expected) == len(rows)
    assert found == [
        {name: cell for name, cell in zip(names, row, strict=True) if cell.strip()}
        for row in expected
    ]


def test_inch_marks_in_plain_cells_join_no_rows(tmp_path: Path) -> None:
    text = 'id,image,caption\n1,a.png,5" tube\n2,b.png,normal\n3,c.png,7" tube\n4,d.png,"8"" x"\n'
    found = [row["caption"] for row in TableFile(write(tmp_path / "a.csv", text))]
    assert found == ['5" tube', "normal", '7" tube', '8" x']
    header = write(tmp_path / "b.csv", 'image,size (")\na.png,5\nb.png,7\n')
    assert [row['size (")'] for row in TableFile(header)] == ["5", "7"]


def test_a_carriage_return_that_hides_a_row_is_an_error(tmp_path: Path) -> None:
    table = TableFile(write(tmp_path / "a.csv", "image,caption\na,b\rc,d\ne,f\n"))
    assert table[1] == {"image": "e", "caption": "f"}
    with pytest.raises(DataError, match="record 0: line 2: 2 rows where one is expected"):
        table[0]


def test_columns_stand_for_fields_and_others_keep_their_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "filepath\ttitle\tsex\nx.png\tClear, both.\tF\n")
    table = TableFile(path, {"image": "filepath", "caption": "title"})
    assert table[0] == {"image": "x.png", "caption": "Clear, both.", "sex": "F"}
    assert pickle.loads(pickle.dumps(table))[0] == table[0]


@pytest.mark.parametrize(
    ("text", "columns", "reason"),
    [
        ("image,title\na,b\n", {"caption": "report"}, "row 1: no column 'report', which"),
        ("image,image\na,b\n", None, "row 1: two columns stand for 'image'"),
        ("image,file\na,b\n", {"image": "file"}, "row 1: two columns stand for 'image'"),
        ("image,b\na,b\n", {"image": "b", "caption": "b"}, "one column for two fields"),
        ("image,,c\na,b,c\n", None, "row 1: column 2 of 3 has no name"),
        ("image,caption\n", None, "the file holds no records"),
        ('"image"x\na\n', None, "row 1: a broken quote"),
        ("image,caption\ra,b\rc,d\r", None, "row 1: 3 rows where one is expected; a carriage"),
        ("", None, "the file is empty; expected a table"),
        (b"PAR1....", None, "looks like a Parquet file"),
        (b"\xff\xfei\0", None, "UTF-16; save it as UTF-8"),
        (b"im\xe9,b\na,b\n", None, "not valid UTF-8 at byte 2"),
    ],
)
def test_a_table_that_cannot_be_used_says_why_at_opening(
    tmp_path: Path, text: str | bytes, columns: dict[str, str] | None, reason: str
) -> None:
    with pytest.raises(DataError) as caught:
        TableFile(write(tmp_path / "a.csv", text), columns)
    assert str(caught.value).startswith(str(tmp_path / "a.csv"))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("x.png", "record 1: line 4: the row has 1 cells, and the header 2 columns"),
        ("x.png,a,b", "the row has 3 cells"),
        (b"x.png,\xe9", "not valid UTF-8 at byte 6 of the row"),
        ('x.png,"a"b', "a broken quote"),
    ],
)
def test_a_bad_row_is_one_bad_record_with_its_line(
    tmp_path: Path, row: str | bytes, reason: str
) -> None:
    body = row if isinstance(row, bytes) else row.encode()
    path = write(tmp_path / "a.csv", b'image,caption\na.png,"two\nlines"\n' + body + b"\nb.png,c\n")
    table = TableFile(path)
    assert table[0] == {"image": "a.png", "caption": "two\nlines"}
    with pytest.raises(DataError) as caught:
        table[1]
    assert reason in str(caught.value)
    assert caught.value.index == 1
    if '"a"b' not in str(row):
        assert table[2] == {"image": "b.png", "caption": "c"}


def test_a_quote_that_is_never_closed_is_named(tmp_path: Path) -> None:
    table = TableFile(write(tmp_path / "a.csv", 'image,caption\na,b\nc,"d\ne,f\n'))
    assert len(table) == 2
    with pytest.raises(DataError, match=r"record 1: line 3: a quote is opened in this row"):
        table[1]


def test_the_header_alone_can_be_checked(tmp_path: Path) -> None:
    check_header(write(tmp_path / "a.csv", "image,caption\n"))
    with pytest.raises(DataError, match="no such file"):
        check_header(tmp_path / "none.csv")


def test_a_row_costs_sixteen_bytes(tmp_path: Path) -> None:
    rows = 200_000
    path = write(tmp_path / "a.csv", "image,caption\n" + "a.png,Clear.\n" * rows)
    tracemalloc.start()
    table: Any = TableFile(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == rows
    assert held < 20 * rows
    assert table[rows - 1] == {"image": "a.png", "caption": "Clear."}
