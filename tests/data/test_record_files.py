from __future__ import annotations

import json
import os
import pickle
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medm.data import record_files
from medm.data.record_files import RecordFile
from medm.errors import DataError, InputLostError
from tests.data.tiny import write_json, write_lines

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.text('a"\\,[]{}\n\r\t:é中\u2028', max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text('k"\\,{', max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


def read_all(path: Path) -> list[Any]:
    """Every record, or the reason why it is none."""
    file = RecordFile(path)
    found: list[Any] = []
    for index in range(len(file)):
        try:
            found.append(file[index])
        except DataError as error:
            assert error.file == path and error.index == index
            found.append(error.reason)
    return found


@settings(max_examples=150, deadline=None)
@given(
    records=st.lists(
        st.dictionaries(st.text('k"\\', max_size=3), VALUES, max_size=3), min_size=1, max_size=6
    ),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 3]),
    bom=st.booleans(),
)
def test_any_array_comes_back_whatever_the_chunk(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[Any],
    chunk: int,
    indent: int | None,
    bom: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    text = json.dumps(records, ensure_ascii=False, indent=indent)
    path.write_text(text, encoding="utf-8-sig" if bom else "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_files, "_CHUNK", chunk)
        assert list(RecordFile(path)) == records


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lines_with_bom_crlf_and_blanks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes, bom: bytes, chunk: int
) -> None:
    monkeypatch.setattr(record_files, "_CHUNK", chunk)
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        bom + end.join([b'{"a": 1}', b"", b"   ", '{"b": "é,]"}'.encode(), b'{"c": 3}'])
    )
    assert read_all(path) == [{"a": 1}, {"b": "é,]"}, {"c": 3}]
    assert RecordFile(path).line(1) == 4


@pytest.mark.parametrize("content", [b"", b" \n\t\n", b"[]", b"[ \n ]", b"\xef\xbb\xbf"])
def test_a_file_without_records_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"a\.json: the file (is empty|holds no records); expected a JSON array"
    ) as caught:
        RecordFile(path)
    assert caught.value.file == path


def test_a_missing_file_a_folder_and_other_forms_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        RecordFile(tmp_path / "none.json")
    with pytest.raises(DataError, match="is a folder; name the annotation file in it"):
        RecordFile(tmp_path)
    (tmp_path / "one.json").write_text('{\n  "train": []\n}')
    with pytest.raises(DataError, match="one JSON object over several lines"):
        RecordFile(tmp_path / "one.json")
    (tmp_path / "wide.json").write_text("[1]", encoding="utf-16")
    with pytest.raises(DataError, match="UTF-16; save it as UTF-8"):
        RecordFile(tmp_path / "wide.json")


CSV = b"id;image;question;answer\n1;a.png;Is there an effusion?;yes\n"
ZIP = b"PK\x03\x04"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", CSV, "looks like CSV; docs/data-format.md shows how"),
        ("a.json", b"\xef\xbb\xbf" + CSV, "looks like CSV"),
        ("a.json", CSV.replace(b";", b","), "looks like CSV"),
        ("a.csv", b"image\n" + b"a.png\n" * 2000, "looks like CSV"),
        ("a.txt", CSV.replace(b";", b"\t"), "a table with tabs"),
        ("a.xlsx", ZIP + b"\x14\0[Content_Types].xml", "an Excel file; docs/data-format.md"),
        ("a.json", ZIP + b"\x14\0xl/workbook.xml", "an Excel file"),
        ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel file"),
        ("a.zip", ZIP + b"\x14\0a.json", "a zip archive: unpack it"),
        ("a.parquet", b"PAR1\x15\x04\n{\n", "a Parquet file; docs/data-format.md"),
        ("a.json.gz", b"\x1f\x8b\x08\0\n{", "packed with gzip"),
        ("a.pkl", b"\x80\x04\x95", "a pickle"),
        ("a.json", b"<!DOCTYPE html>\n<html>", "a web page or XML"),
        (
            "a.json",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a Git LFS pointer",
        ),
        ("a.yaml", b"- image: a.png\n", "looks like YAML"),
        (
            "dataset_info.json",
            b'{\n  "mine": {"file_name": "a.json"}\n}',
            "LLaMA-Factory's list of data sets",
        ),
        ("instances.json", b'{"info": {},\n"images": [],\n"annotations": []}', "COCO's format"),
        (
            "a.json",
            b'{"train": [\n  "a",\n{"id": 1}\n]}',
            "one JSON object over several lines: if it holds",
        ),
    ],
)
def test_a_file_of_another_format_is_named_once(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: .*{reason}"):
        RecordFile(tmp_path / name)


@pytest.mark.parametrize(
    "first", [b"garbage, and more", b'"id": 1}', b"\x00\xff", b"x" * 5000 + b", y"]
)
def test_a_damaged_first_line_is_one_bad_record(tmp_path: Path, first: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(first + b'\n{"id": 2}\n')
    found = read_all(tmp_path / "a.jsonl")
    assert isinstance(found[0], str) and found[1] == {"id": 2}


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "link"])
def test_what_never_ends_is_not_read(tmp_path: Path, kind: str) -> None:
    path = Path(kind)
    if kind == "pipe":
        os.mkfifo(path := tmp_path / "pipe.jsonl")
    elif kind == "link":
        (path := tmp_path / "link.jsonl").symlink_to("/dev/null")
    with pytest.raises(DataError, match="is a device or pipe; write its records to a file"):
        RecordFile(path)


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        ('{"a": {"b": [0, "x\\ud800"]}}', "a.b.1", "half of a surrogate pair at character 1"),
        ('{"\\udc00": 1}', "\\udc00", "half of a surrogate pair at character 0"),
        ('{"\\ud800": 1, "\\ud800": 2}', "\\ud800", "written twice"),
        ('{"a": 1e999}', None, "the number 1e999 is too large"),
        ('{"a": [-1e999]}', None, "the number -1e999 is too large"),
    ],
)
def test_what_could_not_be_written_again_is_refused(
    tmp_path: Path, line: str, field: str | None, reason: str
) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=reason) as caught:
        RecordFile(tmp_path / "a.jsonl")[0]
    assert caught.value.field == field
    str(caught.value).encode("utf-8")


def test_whole_surrogate_pairs_are_letters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "\\ud83d\\ude00", "b": 1e3}\n')
    assert RecordFile(tmp_path / "a.jsonl")[0] == {"a": "\U0001f600", "b": 1000.0}


def test_many_keys_take_time_by_their_number_only(tmp_path: Path) -> None:
    keys = ", ".join(f'"k{i}": 0' for i in range(200_000))
    (tmp_path / "a.jsonl").write_text(f'{{{keys}, "k199999": 1}}\n')
    start = time.process_time()
    with pytest.raises(DataError, match="written twice"):
        RecordFile(tmp_path / "a.jsonl")[0]
    assert time.process_time() - start < 5  # by its square: minutes


LINES = [
    (b'{"a": 1, "a": 2}', "line 2: the key is written twice"),
    (b'{"a": NaN}', "line 2: NaN is not JSON"),
    (b'{"a": -Infinity}', "line 2: -Infinity is not JSON"),
    (b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "line 2: nested too deeply"),
    (b'{"a": "caf\xe9"}', "line 2: not valid UTF-8 at byte 10"),
    (b'{"a": 1,}', "line 2: not valid JSON: .* at character"),
    (b'{"a": ', "line 2: not valid JSON: Expecting value at character"),
    (b'{"a": ' + b"9" * 5000 + b"}", "line 2: not valid JSON: Exceeds the limit"),
    (b"\x00", "line 2: not valid JSON"),
]


@pytest.mark.parametrize(("line", "reason"), LINES)
def test_a_bad_line_is_named_and_the_others_are_read(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 0}\n' + line + b'\n{"a": 2}')
    found = read_all(path)
    assert found[0] == {"a": 0} and found[2] == {"a": 2}
    with pytest.raises(DataError, match=reason):
        RecordFile(path)[1]


@pytest.mark.parametrize(("line", "reason"), LINES)
def test_a_bad_member_of_an_array_is_named_and_those_before_it_are_read(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": 0},\n' + line + b',\n{"a": 2}]')
    file = RecordFile(path)
    assert file[0] == {"a": 0}
    with pytest.raises(DataError, match=r"record 1.*: line 2: "):
        file[1]


def test_the_field_of_a_double_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"image": "a.png", "image": "b.png"}\n')
    with pytest.raises(DataError) as caught:
        RecordFile(path)[0]
    assert (caught.value.file, caught.value.index, caught.value.field) == (path, 0, "image")


@pytest.mark.parametrize(
    ("content", "good", "reason"),
    [
        ('[{"a": 0}, {"a": "x', 1, "the file ends inside the array"),
        ('[{"a": 0}, {"a": 1}', 1, "the file ends inside the array"),
        ('[{"a": 0},', 1, "the file ends inside the array"),
        ('[{"a": 0}, {"a": 1}}, {"a": 2}]', 1, "a '}' without its '{'"),
        ('[{"a": 0}, {"a": 1}] {"a": 2}', 1, "text after the array's closing"),
        ('[{"a": 0}, {"a: 1}, {"a": 2}]', 1, "the file ends inside the array"),
        ('[{"a": 0}, {"a": 1}, ]', 2, "not valid JSON"),
        ('[{"a": 0}, , {"a": 2}]', 1, "not valid JSON"),
    ],
)
def test_a_broken_array_gives_what_stands_before_the_break(
    tmp_path: Path, content: str, good: int, reason: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    found = read_all(path)
    assert found[:good] == [{"a": index} for index in range(good)]
    assert reason in found[good]


def test_a_runaway_record_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": "')
        for _ in range(17):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"a": 1}\n')
    opened = RecordFile(path)
    assert opened[1] == {"a": 1}
    with pytest.raises(DataError, match=r"a record of 17,825,801 bytes; at most 16,777,216"):
        opened[0]


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"a": 1}, {"a": 2})
    opened = RecordFile(path)
    assert opened[1] == {"a": 2}
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputLostError, match=r"a\.jsonl: the file changed after it was opened"):
        opened[1]


def test_it_travels_to_workers(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [{"a": index} for index in range(50)])
    opened = pickle.loads(pickle.dumps(RecordFile(path)))
    assert [opened[index]["a"] for index in (49, 0, -1)] == [49, 0, 49]
    with pytest.raises(IndexError):
        opened[50]


def test_five_hundred_mutations_give_named_errors_only(tmp_path: Path) -> None:
    """Bytes flipped, dropped and doubled: every outcome is a record or a `DataError`, never another
    exception."""
    rng = random.Random(7)
    text = json.dumps(
        [{"id": str(i), "t": ['a"b', {"c": "\\"}], "n": i} for i in range(6)]
    ).encode()
    path = tmp_path / "a.json"
    named = 0
    for _ in range(500):
        damaged = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(damaged))
            action = rng.randrange(3)
            if action == 0:
                damaged[place] ^= 1 << rng.randrange(8)
            elif action == 1:
                del damaged[place : place + rng.randint(1, 9)]
            else:
                damaged[place:place] = damaged[place : place + rng.randint(1, 9)]
        path.write_bytes(damaged)
        try:
            named += any(isinstance(found, str) for found in read_all(path))
        except DataError as error:
            assert error.file == path
            named += 1
    assert named > 250
