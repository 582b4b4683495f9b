from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from medm.data.collator import Collator
from medm.data.dataset import ExampleDataset
from medm.data.limits import BadRecordsLimit, LengthLimit, TooLongError
from medm.data.options import SourceOptions
from medm.data.records import Records
from medm.errors import DataError, InputLostError, MediaError, RecipeError
from medm.imaging import Augment, load_pixels
from medm.types import IGNORE_INDEX, Example
from tests.data.tiny import (
    CONTROL,
    PAD,
    conversations,
    encode,
    human,
    record,
    write_image,
    write_lines,
)


def build(
    folder: Path,
    *values: Any,
    inference: bool = False,
    max_length: int | None = None,
    too_long: Any = "error",
    encode: Callable[..., Example] = encode,
    **settings: Any,
) -> ExampleDataset[Example]:
    for shade in (0, 255):
        write_image(folder / f"{shade}.png", shade)
    Image.linear_gradient("L").save(folder / "grey.png")
    file = write_lines(folder / "a.jsonl", *values)
    records = Records(
        [SourceOptions(path=str(file))], conversations(encode=encode, inference=inference)
    )
    return ExampleDataset(records, limit=LengthLimit(max_length, too_long), **settings)


IMAGE = record("<image>\nq", "A.", image="grey.png")


def test_an_example_with_its_pixels(tmp_path: Path) -> None:
    dataset = build(
        tmp_path, record("<image>q<image>", "A", image=["0.png", "255.png"]), record("q", "A")
    )
    example = dataset[0]
    assert example is not None
    assert example.input_ids == [1] * 5 + [ord("q") + 2] + [1] * 5 + [ord("A") + 2]
    assert example.labels == [IGNORE_INDEX] * 11 + [ord("A") + 2]
    assert [float(array.mean()) for array in example.pixels["image"]] == [-1.0, 1.0]
    assert all(
        array.shape == (3, 4, 4) and array.dtype == np.float32 for array in example.pixels["image"]
    )
    assert len(dataset) == 2 and dataset[1].pixels == {}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (record("<image>", "A", image="gone.png"), "image"),
        (record("<image><image>", "A", image=["0.png", "gone.png"]), "image.1"),
        (record("<image>", "A", image="empty.png"), "image"),
        (record("<volume>", "A", image3d="0.png"), "image3d"),
        (record("<image>", "A"), "conversations.0.value"),
        ({"conversations": []}, "conversations"),
    ],
)
def test_a_bad_record_stops_with_its_place_or_is_left_out_and_counted(
    tmp_path: Path, value: Any, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty.png").touch()
    dataset = build(tmp_path, IMAGE, value)
    with pytest.raises(DataError) as caught:
        dataset[1]
    assert (caught.value.file, caught.value.index, caught.value.field) in [
        (path, 1, field) for path in (tmp_path / "a.jsonl", str(tmp_path / "a.jsonl"))
    ]
    lenient = build(tmp_path, IMAGE, value, bad_records="skip")
    with caplog.at_level(logging.WARNING):
        assert lenient[1] is None
    assert f"record 1, field '{field}'" in caplog.text
    assert lenient[0] is not None
    assert lenient.counts == {"bad": 1, "too_long": 0, "truncated": 0}


def test_nothing_is_put_in_the_place_of_a_bad_record(tmp_path: Path) -> None:
    values = [record("q", str(i)) if i % 3 else {"conversations": []} for i in range(9)]
    dataset = build(tmp_path, *values, bad_records="skip")
    batches = list(DataLoader(dataset, batch_size=3, collate_fn=Collator(PAD)))  # type: ignore[arg-type]
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 2]
    learned = [chr(row[row != IGNORE_INDEX][0] - 2) for batch in batches for row in batch["labels"]]
    assert learned == ["1", "2", "4", "5", "7", "8"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_record_counts_once_however_often_it_is_drawn(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    values = [
        {"conversations": []} if i % 4 == 0 else record("q" * (1 + i % 2), str(i % 10))
        for i in range(16)
    ]
    dataset = build(tmp_path, *values, bad_records="skip", max_length=2, too_long="skip")
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=Collator(PAD))  # type: ignore[arg-type]
    for epoch in range(3):
        dataset.set_epoch(epoch)
        list(loader)
    assert dataset.counts == {"bad": 4, "too_long": 8, "truncated": 0}
    assert dataset.noted("bad") == [0, 4, 8, 12] and dataset.num_bad == 4
    if not workers:  # a worker's lines are its own
        assert len([line for line in caplog.messages if line.startswith("left out")]) == 4


FAULTS = [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT, errno.ENOMEM]


def failing(monkeypatch: pytest.MonkeyPatch, code: int, times: int) -> list[int]:
    """Opening an image fails so many times with a code of the operating system; the calls."""
    calls: list[int] = []
    opened = os.open

    def open_(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).endswith(".png") and len(calls) < times:
            calls.append(code)
            raise OSError(code, os.strerror(code))
        return opened(path, *rest, **more)

    monkeypatch.setattr("medm.imaging.images.os.open", open_)
    monkeypatch.setattr("medm.data.dataset.RETRY_SECONDS", (0.0, 0.0))
    return calls


@pytest.mark.parametrize("code", FAULTS, ids=errno.errorcode.get)
def test_a_fault_of_the_machine_is_waited_for_and_never_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    dataset = build(tmp_path, IMAGE, bad_records="skip")
    calls = failing(monkeypatch, code, 2)
    assert dataset[0] is not None and len(calls) == 2
    failing(monkeypatch, code, 99)
    with pytest.raises(InputLostError, match=rf"a\.jsonl, record 0: .*errno {code}.*--resume"):
        dataset[0]
    assert dataset.num_bad == 0


def test_a_fault_of_the_file_is_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = build(tmp_path, IMAGE, bad_records="skip")
    calls = failing(monkeypatch, errno.EACCES, 99)
    assert dataset[0] is None and len(calls) == 1 and dataset.num_bad == 1


def test_a_file_that_the_check_saw_is_lost_and_one_that_it_missed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medm.data.dataset.RETRY_SECONDS", (0.0,))
    gone = record("<image>\nq", "A.", image="gone.png")
    dataset = build(tmp_path, IMAGE, gone, gone, bad_records="skip", usable=[True, False, True])
    assert dataset[0] is not None and dataset[1] is None
    with pytest.raises(
        InputLostError, match=r"record 2: .*gone\.png.*no such file.*there when the run began"
    ):
        dataset[2]
    assert dataset.num_bad == 0


@pytest.mark.parametrize("change", ["rewritten", "shortened", "touched"])
def test_an_annotation_file_that_changes_is_no_bad_record(tmp_path: Path, change: str) -> None:
    dataset = build(tmp_path, record("q", "A"), record("q", "B"), bad_records="skip")
    assert dataset[0] is not None
    file = tmp_path / "a.jsonl"
    if change == "touched":
        os.utime(file, ns=(1, 1))
    else:
        content = file.read_text()
        file.write_text(content[: len(content) // 2] if change == "shortened" else content * 2)
    with pytest.raises(InputLostError, match="changed after it was opened"):
        dataset[1]
    assert dataset.num_bad == 0


@pytest.mark.parametrize(
    ("setting", "before", "bad", "exceeded"),
    [(0.1, 0, 10, False), (0.1, 0, 11, True), (0.1, 8, 3, True), (5, 0, 5, False), (5, 3, 3, True), (0, 0, 1, True),
     (0, 0, 0, False), (None, 50, 50, False)],
)  # fmt: skip
def test_how_many_bad_records_are_too_many(
    setting: float | None, before: int, bad: int, exceeded: bool
) -> None:
    """Of 100; below 1 the setting is a fraction."""
    assert BadRecordsLimit(setting, 100, before=before).exceeded(bad) == exceeded


def test_a_model_without_the_branch(tmp_path: Path) -> None:
    dataset = build(tmp_path, record("<volume>", "A", volume="0.png"))
    with pytest.raises(
        DataError, match="record 0, field 'volume': the model takes no volumes; it takes images"
    ):
        dataset[0]


def test_too_long_stops_whatever_the_policy_for_bad_records(tmp_path: Path) -> None:
    dataset = build(tmp_path, record("qqqq", "AAAA"), max_length=7, bad_records="skip")
    with pytest.raises(
        TooLongError, match=r"a\.jsonl, record 0: 8 tokens, .* but data\.max_length is 7"
    ):
        dataset[0]
    assert build(tmp_path, record("qqqq", "AAA"), max_length=7)[0] is not None


def test_too_long_left_out_and_counted(tmp_path: Path) -> None:
    dataset = build(
        tmp_path, record("qqqq", "AAAA"), record("q", "A"), max_length=7, too_long="skip"
    )
    assert dataset[0] is None and dataset[1] is not None
    assert dataset.counts == {"bad": 0, "too_long": 1, "truncated": 0}


def test_text_is_cut_at_the_end(tmp_path: Path) -> None:
    dataset = build(
        tmp_path,
        record("<image>q", "ABCDEF", image="0.png"),
        max_length=8,
        too_long="truncate_text",
    )
    example = dataset[0]
    assert example is not None
    assert example.input_ids == [1] * 5 + [ord("q") + 2, ord("A") + 2, ord("B") + 2]
    assert example.labels == [IGNORE_INDEX] * 6 + [ord("A") + 2, ord("B") + 2]
    assert len(example.pixels["image"]) == 1
    assert dataset.counts["truncated"] == 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        # in the middle of the run
        (record("long question<image>", "A", image="0.png"), "which are never cut"),
        ({"image": "0.png", "conversations": [human("q"), *record("A", "B")["conversations"][1:],
                                              human("and much later <image>"), *record("", "C")["conversations"][1:]]},
         "5 vision or control tokens stand beyond it"),
        (record("a question too long", "A"), "leave nothing of the reply to learn"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_bad(tmp_path: Path, value: Any, reason: str) -> None:
    limits: dict[str, Any] = {"max_length": 15, "too_long": "truncate_text"}
    with pytest.raises(DataError, match=reason) as caught:
        build(tmp_path, value, **limits)[0]
    assert caught.value.index == 0
    lenient = build(tmp_path, value, bad_records="skip", **limits)
    assert lenient[0] is None and lenient.counts["bad"] == 1


def test_a_control_token_is_not_cut(tmp_path: Path) -> None:
    masked = record("<image>", "at [SEG] or so", image="0.png", masks=["m.png"])
    example = build(tmp_path, masked, max_length=9, too_long="truncate_text")[0]
    assert example is not None
    assert example.input_ids[-1] == example.labels[-1] == CONTROL
    with pytest.raises(DataError, match="1 vision or control tokens stand beyond it"):
        build(tmp_path, masked, max_length=8, too_long="truncate_text")[0]


def test_a_record_that_teaches_nothing_is_bad(tmp_path: Path) -> None:
    def mask_all(*args: Any, **kwargs: Any) -> Any:
        example = encode(*args, **kwargs)
        example.labels = [IGNORE_INDEX] * len(example.labels)
        return example

    dataset = build(tmp_path, record(), encode=mask_all)
    with pytest.raises(DataError, match="no token of this record is learned"):
        dataset[0]


def test_generation_has_no_labels_and_needs_none(tmp_path: Path) -> None:
    dataset = build(tmp_path, record("q", "A"), inference=True)
    example = dataset[0]
    assert example is not None
    assert (example.input_ids, example.labels) == ([ord("q") + 2], [IGNORE_INDEX])


BRIGHTER = {"image": Augment(brightness=0.5, shift=0.3)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmentation_depends_on_seed_epoch_and_index_alone(
    tmp_path: Path, num_workers: int
) -> None:
    dataset = build(tmp_path, IMAGE, IMAGE, IMAGE, IMAGE, augmentation=BRIGHTER, seed=5)
    loader = DataLoader(
        dataset,
        batch_size=2,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=Collator(PAD),
    )  # type: ignore[call-overload]

    def epoch(number: int) -> np.ndarray:
        dataset.set_epoch(number)
        return np.concatenate([batch["pixels"]["image"].numpy() for batch in loader])

    first, second, again = epoch(0), epoch(1), epoch(0)
    assert np.array_equal(first, again) and not np.array_equal(first, second)
    assert not np.array_equal(first[0], first[1])
    dataset.set_epoch(1)
    alone = build(tmp_path, IMAGE, IMAGE, IMAGE, IMAGE, augmentation=BRIGHTER, seed=5)
    alone.set_epoch(1)
    example = alone[3]
    assert example is not None and np.array_equal(example.pixels["image"][0], second[3])
    other = build(tmp_path, IMAGE, augmentation=BRIGHTER, seed=6)[0]
    assert other is not None and not np.array_equal(other.pixels["image"][0], first[0])


def test_augmentation_of_an_unknown_branch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.augment: \['volume'\] are not branches"):
        build(tmp_path, IMAGE, augmentation={"volume": Augment()})


def test_a_cache_takes_the_place_of_the_reader(tmp_path: Path) -> None:
    seen: list[Path] = []

    def load(path: Path, preprocess: Any) -> np.ndarray:
        seen.append(path)
        return load_pixels(path, preprocess)

    dataset = build(tmp_path, IMAGE, load=load)
    assert dataset[0] is not None and seen == [tmp_path / "grey.png"]


def test_a_path_outside_the_root_is_never_opened(tmp_path: Path) -> None:
    def load(path: Path, preprocess: Any) -> np.ndarray:
        raise AssertionError(path)

    dataset = build(tmp_path, record("<image>", "A", image="../secret.png"), load=load)
    with pytest.raises(
        MediaError, match=r"record 0, field 'image': '../secret\.png': '\.\.' is refused"
    ):
        dataset[0]
