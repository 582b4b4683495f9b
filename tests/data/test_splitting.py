"""Splits without a patient in two of them, and what splits have in common."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medm.data.leaks import Contents, RecordFacts, find_shared, read_contents, read_facts
from medm.data.splitting import split_file
from medm.errors import DataError, RecipeError
from medm.imaging.image_hash import image_hash
from tests.cli.runner import medm


def picture(path: Path, seed: int, *, size: int = 64, quality: int = 95) -> None:
    """Smooth noise: large shapes, as images have."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    image.save(path, quality=quality) if path.suffix == ".jpg" else image.save(path)


def record(image: str, text: str = "A report.", **further: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": text}]
    return {"image": image, "conversations": turns, **further}


def write(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(one) + "\n" for one in records))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """20 patients with 1 to 5 images each, 60 records."""
    records = []
    for patient in range(20):
        for number in range(1 + patient % 5):
            name = f"{patient}-{number}.png"
            picture(tmp_path / name, len(records))
            records.append(record(name, f"Report {name}", patient=f"P{patient}"))
    return write(tmp_path / "all.jsonl", records)


def test_no_patient_is_in_two_splits_and_no_record_is_lost(data: Path) -> None:
    done = split_file(data, by="patient", val=0.2, test=0.1, seed=1)
    parts = {name: read(path) for name, path in done.files.items()}
    assert {name: len(part) for name, part in parts.items()} == done.counts
    assert 10 <= done.counts["val"] <= 12 and 4 <= done.counts["test"] <= 6
    patients = {name: {one["patient"] for one in part} for name, part in parts.items()}
    assert sum(map(len, patients.values())) == 20 == sum(done.groups.values())
    together = [json.dumps(one) for part in parts.values() for one in part]
    assert Counter(together) == Counter(json.dumps(one) for one in read(data))
    assert not done.shared and not done.duplicates
    again = split_file(data, by="patient", val=0.2, test=0.1, seed=1, output=data.parent / "b")
    assert all(
        again.files[name].read_text() == path.read_text() for name, path in done.files.items()
    )
    other = split_file(data, by="patient", val=0.2, test=0.1, seed=2, output=data.parent / "c")
    assert other.files["val"].read_text() != done.files["val"].read_text()
    report = json.loads(done.report.read_text())
    assert report["by"] == "patient" and report["records"] == dict(done.counts)
    assert '"P1"' not in done.report.read_text()


def test_the_order_of_the_records_does_not_matter(data: Path) -> None:
    first = split_file(data, by="patient", val=0.2)
    turned = write(data.with_name("turned.jsonl"), read(data)[::-1])
    second = split_file(turned, by="patient", val=0.2)
    for name in ("train", "val"):
        one, two = (
            {json.dumps(record) for record in read(split.files[name])} for split in (first, second)
        )
        assert one == two


def test_groups_that_share_a_file_stay_together(tmp_path: Path) -> None:
    """0 and 1 share a path, 1 and 2 share a content, so that 0, 1, 2 are one group."""
    for number in range(12):
        picture(tmp_path / f"{number}.png", number)
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes())
    records = [record(f"{n}.png", f"Text {n}", patient=n) for n in range(12)]
    records.insert(1, record("1.png", "Text 0b", patient=0))
    file = write(tmp_path / "a.jsonl", records)
    for seed in range(4):
        done = split_file(file, by="patient", val=0.4, seed=seed)
        assert done.joined == 2 and "path" not in done.shared and "content" not in done.shared
        owner = {one["patient"]: name for name, path in done.files.items() for one in read(path)}
        assert owner[0] == owner[1] == owner[2]
    assert done.duplicates["path"].count == 1 and done.duplicates["content"].count == 2
    by_path = split_file(file, by="patient", val=0.4, contents=False)
    assert by_path.joined == 1


def test_leaks_between_given_splits_are_named(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / f"{number}.png", number)
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    picture(tmp_path / "small.jpg", 3, size=48, quality=60)
    train = write(
        tmp_path / "train.jsonl",
        [record(f"{n}.png", f"Text {n}", patient=f"Secret{n}", study=f"s{n}") for n in range(4)],
    )
    test = write(
        tmp_path / "test.jsonl",
        [
            record("0.png", "other 1", patient="Secret9"),
            record("copy.png", "other 2", patient="Secret8"),
            record("small.jpg", "TEXT  2", patient="Secret2", study="s2"),
        ],
    )
    done = medm("data", "leaks", str(train), str(test), "--near-duplicates")
    assert done.code == 1
    expected = {
        "leak: patient: 1 (train.jsonl, record 2 = test.jsonl, record 2)",
        "leak: study: 1 (train.jsonl, record 2 = test.jsonl, record 2)",
        "leak: path: 1 (train.jsonl, record 0 = test.jsonl, record 0)",
        "leak: content: 1 (train.jsonl, record 1 = test.jsonl, record 1)",
        "look at: text: 1 (train.jsonl, record 2 = test.jsonl, record 2)",
        "look at: near duplicate: 1 (train.jsonl, record 3 = test.jsonl, record 2)",
    }
    assert set(done.out.splitlines()) == expected
    assert "Secret" not in done.out + done.err
    clean = write(tmp_path / "clean.jsonl", [record("copy.png", "new", patient="n")])
    done = medm("data", "leaks", str(clean), str(test), "--skip-content")
    assert done.code == 1 and "path: 1" in done.out
    other = write(tmp_path / "other.jsonl", [record("3.png", "new")])
    done = medm("data", "leaks", str(clean), str(other))
    assert done.code == 0 and "no leak between 2 files of 2 records" in done.out
    assert "1 of 2 records have no field 'patient'" in done.err
    assert medm("data", "leaks", str(clean)).code == 2


def test_near_duplicates_are_those_that_look_alike(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "a.jpg", 1, size=200, quality=50)
    picture(tmp_path / "b.png", 2)
    Image.new("L", (40, 40), 7).save(tmp_path / "flat.png")
    bits = {name: image_hash(tmp_path / name) for name in ("a.png", "a.jpg", "b.png", "flat.png")}
    assert (bits["a.png"] ^ bits["a.jpg"]).bit_count() <= 6
    assert (bits["a.png"] ^ bits["b.png"]).bit_count() > 60
    assert bits["flat.png"] == 0
    one = write(tmp_path / "one.jsonl", [record("a.png"), record("flat.png")])
    two = write(tmp_path / "two.jsonl", [record("a.jpg"), record("b.png"), record("flat.png")])
    splits = {file.stem: read_facts(file, root=None) for file in (one, two)}
    facts = [record for records in splits.values() for record in records]
    found = find_shared(splits, read_contents(facts, near_duplicates=True))
    assert found["near duplicate"].examples == ["one.jsonl, record 0 = two.jsonl, record 0"]


def test_pairs_and_studies_are_split_too(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / f"{number}.png", number)
    pairs = [{"image": f"{n}.png", "caption": f"c{n}", "study": n} for n in range(6)]
    done = split_file(write(tmp_path / "p.jsonl", pairs), by="study", val=0.3)
    assert (done.counts["train"], done.counts["val"]) == (4, 2)
    studies = [{"images": [f"{n}.png"], "report": "Normal.", "patient": n} for n in range(6)]
    done = split_file(write(tmp_path / "s.jsonl", studies), by="patient", val=0.3)
    assert done.shared["text"].count == 1 and done.duplicates["text"].count == 5


def test_what_cannot_be_split(tmp_path: Path, data: Path) -> None:
    records = read(data)
    del records[3]["patient"]
    file = write(data.with_name("hole.jsonl"), records)
    with pytest.raises(DataError, match="1 of 60 records have no 'patient'") as raised:
        split_file(file, by="patient", val=0.1)
    assert raised.value.index == 3
    assert not data.with_name("hole.train.jsonl").exists()
    done = split_file(file, by="patient", val=0.1, allow_missing=True)
    assert done.missing == 1 and sum(done.counts.values()) == 60
    for val, test in ((0, 0), (0.6, 0.5), (1, 0)):
        with pytest.raises(RecipeError, match="leave records to train on"):
            split_file(file, by="patient", val=val, test=test)
    lonely = write(data.with_name("one.jsonl"), [records[0], {**records[1], "patient": "P0"}])
    with pytest.raises(DataError, match="1 groups by 'patient' are too few"):
        split_file(lonely, by="patient", val=0.5)
    done = medm("data", "split", str(file), "--by", "patient")
    assert done.code == 1 and "--allow-missing" in done.err
    done = medm("data", "split", str(data), "--by", "patient", "--val", "0.2")
    assert done.code == 0 and "all.val.jsonl: 12 records" in done.out


def studies(file: Path, groups: dict[str, int], **further: Any) -> Path:
    """Records of patients, as many each as given; images need not exist."""
    return write(
        file,
        [
            record(f"{patient}-{n}.png", f"{patient} {n}", patient=patient, **further)
            for patient, count in groups.items()
            for n in range(count)
        ],
    )


def test_a_record_without_the_field_stays_with_its_study_or_patient(tmp_path: Path) -> None:
    records = [
        {**record(f"{s}-{n}.png", f"{s} {n}"), "study": f"S{s}", **({"patient": s} if n else {})}
        for s in range(20)
        for n in range(3)
    ]
    file = write(tmp_path / "a.jsonl", records)
    for seed in range(3):
        done = split_file(file, by="patient", val=0.3, seed=seed, allow_missing=True)
        assert not done.shared and done.missing == 20
        assert done.joined == 20
    by_patient = [
        {**record(f"{p}-{n}.png", f"{p} {n}"), "patient": p, **({"study": f"{p}-{n}"} if n else {})}
        for p in range(20)
        for n in range(3)
    ]
    done = split_file(
        write(tmp_path / "b.jsonl", by_patient), by="study", val=0.3, allow_missing=True
    )
    assert not done.shared and done.missing == 20


def test_a_split_of_an_earlier_run_is_not_left_beside_new_ones(tmp_path: Path) -> None:
    file = studies(tmp_path / "a.jsonl", {f"p{n}": 1 for n in range(10)})
    first = split_file(file, by="patient", val=0.2, test=0.2)
    train = first.files["train"].read_text()
    with pytest.raises(DataError, match=r"a\.test\.jsonl: .*no test set is asked for"):
        split_file(file, by="patient", val=0.2, seed=1)
    assert first.files["train"].read_text() == train
    with pytest.raises(DataError, match=r"a\.val\.jsonl: .*no val set is asked for"):
        split_file(file, by="patient", val=0, test=0.2)
    first.files["test"].unlink()
    assert set(split_file(file, by="patient", val=0.2, seed=1).files) == {"train", "val"}


def test_a_large_group_does_not_fill_a_small_split(tmp_path: Path) -> None:
    sizes = {"large": 30, **{f"p{n}": 1 for n in range(10)}}
    file = studies(tmp_path / "a.jsonl", sizes)
    for seed in range(8):
        done = split_file(file, by="patient", val=0.1, seed=seed)
        assert done.counts == {"train": 36, "val": 4} and not done.large


def test_a_split_that_no_group_fits_gets_the_smallest_and_a_warning(tmp_path: Path) -> None:
    file = studies(tmp_path / "a.jsonl", {"a": 30, "b": 12, "c": 10})
    for seed in range(4):
        done = split_file(file, by="patient", val=0.1, test=0.1, seed=seed)
        assert done.counts == {"train": 30, "val": 12, "test": 10}
        assert done.large == {"val": 0.1, "test": 0.1}
    done = medm("data", "split", str(file), "--by", "patient", "--test", "0.1")
    assert done.code == 0 and "warning: val has 23% of the records, 10% were asked for" in done.out


def volume(path: str, **further: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<volume>\n?"}, {"from": "gpt", "value": path}]
    return {"volume": path, "conversations": turns, **further}


def test_a_folder_without_a_mark_is_each_of_its_series(tmp_path: Path) -> None:
    for folder, content in (("ct", b"a"), ("copy", b"a"), ("mr", b"b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.dcm").write_bytes(content)

    def shared(train: str, test: str) -> set[str]:
        files = [
            write(tmp_path / f"{name}.jsonl", [volume(path)])
            for name, path in (("train", train), ("test", test))
        ]
        splits = {file.stem: read_facts(file, root=None) for file in files}
        facts = [one for records in splits.values() for one in records]
        return set(find_shared(splits, read_contents(facts)))

    assert shared("ct", "copy#3") == {"content"}
    assert shared("copy#3", "ct") == {"content"}
    assert shared("ct", "ct#3") == {"path"} | (shared("ct", "ct") - {"path", "text"})
    assert shared("ct#3", "copy#3") == {"content"}
    assert shared("ct#3", "copy#4") == shared("ct#3", "ct#4") == shared("ct", "mr#3") == set()


def test_images_with_uniform_borders_are_not_each_compared_with_each() -> None:
    compared = 0

    class Bits(int):
        def __xor__(self, other: int) -> int:
            nonlocal compared
            compared += 1
            return int(self) ^ int(other)

    rng = np.random.default_rng(0)
    hashes: dict[Path, int] = {}
    splits: dict[str, list[RecordFacts]] = {"train": [], "test": []}
    for number in range(400):
        for name in ("train", "test"):
            # Six bands of 19 bits between three and four of zeros; three images are in both.
            if name == "train" or number >= 3:
                bits = int.from_bytes(rng.bytes(14), "little") << 57
            path = Path(f"{name}/{number}.png")
            hashes[path] = Bits(bits ^ (name == "test") << 70)
            splits[name].append(RecordFacts(Path(f"{name}.jsonl"), number, images=(path,)))
    found = find_shared(splits, Contents(hashes=hashes))
    assert found["near duplicate"].count == 3
    assert compared < 400
