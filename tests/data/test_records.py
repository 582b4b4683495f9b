from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from medm.data.conversations import Conversations
from medm.data.options import SourceOptions
from medm.data.records import Records
from medm.errors import DataError, MediaError
from tests.data.tiny import gpt, record, write_image, write_json, write_lines


def test_records_of_several_files_are_one_sequence(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", record("a0"), record("a1", task="own"), record("a2"))
    second = write_json(tmp_path / "b.json", [record("b0"), record("b1")])
    sources = [
        SourceOptions(path=str(first), limit=2, task="vqa"),
        SourceOptions(path=str(second), root="/data"),
    ]
    records = Records(sources, Conversations())
    assert (len(records), records.sizes) == (4, (2, 2))
    assert [sample.turns[0].text for sample in records] == ["a0", "a1", "b0", "b1"]
    assert [sample.task for sample in records] == ["vqa", "own", None, None]
    assert [(records[i].file, records[i].index) for i in (1, 3)] == [
        (str(first), 1),
        (str(second), 1),
    ]
    assert records.locate(2) == (1, 0)
    assert (records.root(0), records.root(2)) == (tmp_path, Path("/data"))
    with pytest.raises(IndexError):
        records[4]


def test_errors_name_the_file_and_the_place_in_it(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", record("a0"))
    second = write_lines(tmp_path / "b.jsonl", record("b0"), {"conversations": []}, record("b2"))
    records = Records(
        [SourceOptions(path=str(first)), SourceOptions(path=str(second))], Conversations()
    )
    with pytest.raises(
        DataError, match=rf"{second}, record 1, field 'conversations': the conversation is empty"
    ):
        records[2]
    assert records[3].turns[0].text == "b2"


@pytest.mark.parametrize(
    "path",
    [
        "../a.png",
        "/etc/passwd",
        "link.png",
        "a\x00.png",
        "a\n.png",
        "pipe",
        "http://host/a.png",
        "missing.png",
    ],
)
def test_paths_stay_inside_the_root(tmp_path: Path, path: str) -> None:
    import os

    root = tmp_path / "root"
    write_image(root / "good.png")
    write_image(tmp_path / "a.png")
    (root / "link.png").symlink_to(tmp_path / "a.png")
    os.mkfifo(root / "pipe")
    file = write_lines(
        tmp_path / "a.jsonl", record("<image>", image="good.png"), record("<image>", image=path)
    )
    records = Records([SourceOptions(path=str(file), root=str(root))], Conversations())
    assert records.media_path(0, records[0].media[0]) == root / "good.png"
    with pytest.raises(MediaError):
        records.media_path(1, records[1].media[0])


def test_the_field_that_names_a_file_is_found(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "a.jsonl",
        record("<volume><image><image>", images=["a", "b"], image3d="v"),
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "a"}]}, gpt("x")]},
    )
    records = Records([SourceOptions(path=str(file))], Conversations())
    assert [records.media_field(0, k) for k in range(3)] == ["image3d", "images.0", "images.1"]
    assert records.media_field(1, 0) == "messages"


def test_reading_records_needs_no_torch(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", record())
    code = (
        "import sys; from medm.data.pipelines import PIPELINES; from medm.data.check import check; "
        "from medm.data.options import SourceOptions as S; "
        "pipeline = PIPELINES.get('conversations')(); "
        f"assert check([S(path={str(file)!r})], pipeline).ok; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
