from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medm.data import files
from medm.data.files import RecordFile
from medm.errors import DataError
from tests.data.tiny import write_json, write_lines

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text('a"\\,[]{}\n\r\t:é中\u2028', max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('k"\\,{', max_size=2), inner, max_size=3),
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
    records=st.lists(st.dictionaries(st.text('k"\\', max_size=3), VALUES, max_size=3), min_size=1, max_size=6),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 3]),
    bom=st.booleans(),
)
def test_any_array_comes_back_whatever_the_chunk(
    tmp_path_factory: pytest.TempPathFactory, records: list[Any], chunk: int, indent: int | None, bom: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    text = json.dumps(records, ensure_ascii=False, indent=indent)
    path.write_text(text, encoding="utf-8-sig" if bom else "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CHUNK", chunk)
        assert list(RecordFile(path)) == records


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lines_with_bom_crlf_and_blanks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes, bom: bytes, chunk: int
) -> None:
    monkeypatch.setattr(files, "_CHUNK", chunk)
    path = tmp_path / "a.jsonl"
    path.write_bytes(bom + end.join([b'{"a": 1}', b"", b"   ", '{"b": "é,]"}'.encode(), b'{"c": 3}']))
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
    with pytest.raises(DataError, match=r"none\.json: cannot be read \(No such file"):
        RecordFile(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory"):
        RecordFile(tmp_path)
    (tmp_path / "one.json").write_text('{\n  "train": []\n}')
    with pytest.raises(DataError, match="one JSON object over several lines"):
        RecordFile(tmp_path / "one.json")
    (tmp_path / "wide.json").write_text("[1]", encoding="utf-16")
    with pytest.raises(DataError, match="UTF-16; save it as UTF-8"):
        RecordFile(tmp_path / "wide.json")


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
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, reason: str) -> None:
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
    with pytest.raises(DataError, match="the file changed after it was opened"):
        opened[1]


def test_it_travels_to_workers(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [{"a": index} for index in range(50)])
    opened = pickle.loads(pickle.dumps(RecordFile(path)))
    assert [opened[index]["a"] for index in (49, 0, -1)] == [49, 0, 49]
    with pytest.raises(IndexError):
        opened[50]


def test_five_hundred_mutations_give_named_errors_only(tmp_path: Path) -> None:
    """Bytes flipped, dropped and doubled: every outcome is a record or a `DataError`, never another exception."""
    rng = random.Random(7)
    text = json.dumps([{"id": str(i), "t": ['a"b', {"c": "\\"}], "n": i} for i in range(6)]).encode()
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
