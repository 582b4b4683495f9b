"""What every source of pairs must do, on a tiny made-up copy in its published layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from medm.data.left_out import LeftOut
from medm.data.options import SourceOptions
from medm.data.pairs import Pairs
from medm.data.records import Records
from medm.data.writing import write_records
from medm.errors import DataError
from medm.tasks.pair_sources import PAIR_SOURCES
from medm.tasks.pair_sources.base import MAX_LITERAL, read_list, read_paths
from medm.tasks.pair_sources.labels import CAPTIONS, wordings
from tests.cli.runner import medm
from tests.tasks.layouts import put_csv
from tests.tasks.pair_sources.layouts import LAYOUTS, images, list_rows, literal

NAMES = PAIR_SOURCES.names()
PUBLISHED = [name for name in NAMES if name.startswith("unimed/") and not name.endswith("-labels")]
FROM_TEMPLATES = [name for name in NAMES if name.endswith("-labels")]


def test_every_source_has_a_layout() -> None:
    assert set(NAMES) == set(LAYOUTS)
    assert len(PUBLISHED) == 13


@pytest.mark.parametrize("name", NAMES)
def test_rows_become_records_and_the_others_are_counted(name: str, tmp_path: Path) -> None:
    layout, source, left_out = LAYOUTS[name], PAIR_SOURCES.get(name), LeftOut()
    layout.build(tmp_path)
    records = list(source.records(tmp_path, left_out=left_out))
    found = [(row[source.branch], row["captions"], row.get("label")) for row in records]
    if name in FROM_TEMPLATES:  # several captions each; the first of them is in the table
        assert all(len(captions) == len(set(captions)) >= 5 for _, captions, _ in found)
        found = [(path, captions[:1], label) for path, captions, label in found]
    assert found == layout.expected
    assert left_out.counts == layout.left_out
    assert left_out.total == sum(layout.left_out.values())
    assert all((tmp_path / row[source.branch]).is_file() for row in records)
    assert len({row["id"] for row in records}) == len(records)
    assert {row["source"] for row in records} == {source.source}


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_annotation_file_is_named(name: str, tmp_path: Path) -> None:
    layout, source = LAYOUTS[name], PAIR_SOURCES.get(name)
    layout.build(tmp_path)
    missing = tmp_path / layout.annotations
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    with pytest.raises(DataError, match="is missing") as caught:
        list(source.records(tmp_path, left_out=LeftOut()))
    assert Path(layout.annotations).name in str(caught.value)
    assert source.layout in str(caught.value)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "unimed/radimagenet-labels"])
def test_a_set_without_its_images_is_refused_with_the_first_of_them(
    name: str, tmp_path: Path
) -> None:
    LAYOUTS[name].build(tmp_path)
    for file in [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.npy")]:
        file.unlink()
    with pytest.raises(DataError, match=r"no row of .* gives a pair: .*no image file; the first"):
        list(PAIR_SOURCES.get(name).records(tmp_path, left_out=LeftOut()))


@pytest.mark.parametrize("name", ["unimed/chexpert", "unimed/quilt-1m", "unimed/retina-part1"])
def test_another_table_is_refused_by_its_columns(name: str, tmp_path: Path) -> None:
    LAYOUTS[name].build(tmp_path)
    file = next(tmp_path.rglob("*.csv"))
    file.write_text("one,two\n1,2\n")
    with pytest.raises(DataError, match=r"column.*found \['one', 'two'\]"):
        list(PAIR_SOURCES.get(name).records(tmp_path, left_out=LeftOut()))


def test_two_files_of_different_lengths_are_refused(tmp_path: Path) -> None:
    LAYOUTS["unimed/openi"].build(tmp_path)
    (tmp_path / "openai_refined_concepts.json").write_text('{"refined_captions": [[]]}')
    with pytest.raises(DataError, match=r"5 annotations, but .* has 1 lists of variants"):
        list(PAIR_SOURCES.get("unimed/openi").records(tmp_path, left_out=LeftOut()))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nan",
        "'a'",
        "('a',)",
        "[1]",
        "['a'",
        "[" * 500,
        "-" * 5000,
        "open('x')",
        "[" + "'a', " * (MAX_LITERAL // 5) + "]",
    ],
    ids=["empty", "nan", "text", "tuple", "number", "open", "deep", "signs", "call", "long"],
)
def test_what_is_no_list_of_texts_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"a list of"):
        read_list(text)


def test_paths_are_as_written_with_backslashes_or_below_the_name_of_the_set(
    tmp_path: Path,
) -> None:
    images(tmp_path, "images/sub/a.png", "images/ä.png")
    rows = list_rows(["sub\\a.png", "a\u0308.png"])[:2]
    put_csv(tmp_path / "Chest-Xray8_with_captions.csv", rows)
    left_out = LeftOut()
    found = list(PAIR_SOURCES.get("unimed/chest-xray8").records(tmp_path, left_out=left_out))
    assert [row["image"] for row in found] == ["images/sub\\a.png", "images/a\u0308.png"]
    assert not left_out.total


@pytest.mark.parametrize("domain", sorted(file.stem for file in CAPTIONS.glob("*.yaml")))
def test_captions_are_sentences_and_several_for_each_class(domain: str) -> None:
    known = wordings(domain)
    pools = [*known.sentences.values(), known.templates, known.normal, known.plain]
    for pool in filter(None, pools):
        assert len(pool) == len(set(pool)) >= 5
        assert all(text == text.strip() and text[-1] == "." for text in pool)


def test_no_class_of_chest_findings_shares_a_sentence_with_another() -> None:
    sentences = {
        name: set(pool) for name, pool in wordings("chest").sentences.items() if name != "Effusion"
    }
    names = sorted(sentences)
    assert len(names) >= 21
    for one in names:
        assert not any(sentences[one] & sentences[other] for other in names if other != one)


@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_of_pairs_reads_the_records(name: str, tmp_path: Path) -> None:
    LAYOUTS[name].build(tmp_path)
    source = PAIR_SOURCES.get(name)
    written = list(source.records(tmp_path, left_out=LeftOut()))
    write_records(tmp_path / "pairs.jsonl", written)
    options = SourceOptions(path=str(tmp_path / "pairs.jsonl"), root=str(tmp_path))
    read = Records([options], Pairs())
    assert [(pair.id, list(pair.captions), pair.label) for pair in read] == [
        (row["id"], row["captions"], row.get("label")) for row in written
    ]
    assert all(read.media_path(index, pair.item).is_file() for index, pair in enumerate(read))


@pytest.mark.parametrize("name", ["unimed/chexpert", "unimed/rocov2", "m3d/cap"])
def test_the_command_writes_records_and_says_what_is_left_out(name: str, tmp_path: Path) -> None:
    LAYOUTS[name].build(tmp_path / "data")
    output = tmp_path / "pairs.jsonl"
    done = medm("data", "convert", str(output), "--task", name, "--data", str(tmp_path / "data"))
    assert done.code == 0, done.err
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == len(LAYOUTS[name].expected)
    text = " ".join(done.out.split())
    assert f"{len(records)} pairs of" in text
    assert "1 left out: no image file; the first:" in text
    one = tmp_path / "one.json"
    arguments = ("--task", name, "--data", str(tmp_path / "data"), "--limit", "1")
    assert medm("data", "convert", str(one), *arguments).code == 0
    assert json.loads(one.read_text()) == records[:1]


@pytest.mark.parametrize(
    ("name", "listed"),
    [  # as the rows have it, as the records have it, below the name of the set
        ("unimed/chexpert", "CheXpert-v1.0-small/train/p1/s1/view1_frontal.jpg"),
        ("unimed/chexpert", "train/p1/s1/view1_frontal.jpg"),
        ("unimed/chest-xray8", "00000001_000.png"),
        ("unimed/chest-xray8", "images/00000001_000.png"),
        ("unimed/openi", "CXR1_1"),
        ("unimed/chexpert-labels", "CheXpert-v1.0-small/train/p0/s1/view1_frontal.jpg"),
    ],
)
@pytest.mark.parametrize("form", ["txt", "csv"])
def test_files_of_a_list_are_left_out(name: str, listed: str, form: str, tmp_path: Path) -> None:
    LAYOUTS[name].build(tmp_path / "data")
    file = tmp_path / f"test.{form}"
    if form == "txt":
        file.write_text(f"{listed}\n\nother.png\n")
    else:
        put_csv(file, [{"": 0, "Path": listed, "Edema": 1}, {"": 1, "Path": "x", "Edema": 0}])
    output = tmp_path / "out.jsonl"
    arguments = ("--task", name, "--data", str(tmp_path / "data"), "--exclude", str(file))
    done = medm("data", "convert", str(output), *arguments)
    assert done.code == 0, done.err
    rest = [json.loads(line)["image"] for line in output.read_text().splitlines()]
    assert rest == [path for path, _, _ in LAYOUTS[name].expected[1:]]
    assert "1 left out: excluded" in " ".join(done.out.split())
    file.write_text("other.png\n" if form == "txt" else "Path\nother.png\n")
    done = medm("data", "convert", str(output), *arguments)
    assert "none of the 1 paths" in " ".join(done.out.split())


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_list_is_refused(text: str, tmp_path: Path) -> None:
    LAYOUTS["unimed/rocov2"].build(tmp_path)
    (tmp_path / "list.txt").write_text(text)
    (tmp_path / "list.csv").write_text("one,two\n1,2\n")
    for name, words in (("txt", "names no file"), ("csv", "a column Path or image")):
        with pytest.raises(DataError, match=words):
            read_paths(tmp_path / f"list.{name}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--task", "m3d-cap", "--exclude", "x"), "--exclude is for image-text pairs"),
        (("--task", "unimed/chexprt"), "did you mean 'unimed/chexpert'"),
        (("--task", "unimed/rocov2", "--split", "test"), "there is no split 'test'"),
        (("--task", "unimed/rocov2", "--seed", "1"), "captions are drawn in training"),
        (("--task", "unimed/rocov2"), "train_captions.csv"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    done = medm("data", "convert", str(output), "--data", str(tmp_path), *arguments)
    assert done.code != 0
    assert words in " ".join(done.err.replace("\u2502", " ").split())
    assert not output.exists()


def test_a_class_written_by_pandas_is_read_back() -> None:
    assert read_list(literal("it's", 'say "x"')) == ["it's", 'say "x"']
