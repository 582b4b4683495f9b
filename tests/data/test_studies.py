"""The pipeline of studies: records, examples and batches."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medm.data.check import check
from medm.data.options import SourceOptions
from medm.data.records import Records
from medm.data.studies import Studies, Study
from medm.errors import DataError
from medm.imaging import ImagePreprocess
from medm.types import IGNORE_INDEX, EncodedText, Media
from tests.data.tiny import PAD, write_image, write_lines

HERE = Path("a.jsonl")
LABELS = ("edema", "effusion", "mass")


def encode_target(text: str, prompt: str | None = None) -> EncodedText:
    """A character a token, with 1 before and 2 after the text."""
    given = [1, *map(ord, prompt or "")]
    learned = [*map(ord, text), 2]
    return EncodedText([*given, *learned], [*[IGNORE_INDEX] * len(given), *learned])


def processor(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "preprocess": {"image": ImagePreprocess(size=[4, 4])},
        "pad_id": PAD,
        "labels": LABELS,
        "views": 2,
        "reads_text": True,
        "answers": {},
        "encode_target": encode_target,
        "encode_knowledge": lambda triplets: [ord(one[0][0]) for one in triplets],
        "tokenizer": SimpleNamespace(decode=lambda ids: "".join(map(chr, ids))),
    }
    return SimpleNamespace(**fields | changes)


def read(record: object, **settings: Any) -> Study:
    return Studies(**settings).read(record, file=HERE, index=0)


def example(record: dict[str, Any], images: int = 1, **changes: Any) -> Any:
    pipeline = Studies(processor(**changes))
    sample = pipeline.read({"images": ["a.png"] * images, **record}, file=HERE, index=0)
    return pipeline.example(sample, {"image": [np.zeros((3, 4, 4), np.float32)] * images})


def test_a_record_is_read() -> None:
    study = read(
        {
            "id": 7, "images": ["a.png", "b.png"], "report": " No effusion. ", "split": "train",
            "labels": {"edema": 1, "mass": None}, "triplets": [["effusion", "in", "lung"]],
        }
    )  # fmt: skip
    assert study == Study(
        images=(Media("image", "a.png"), Media("image", "b.png")), report="No effusion.", id="7",
        labels={"edema": 1, "mass": None}, triplets=(("effusion", "in", "lung"),),
        extra={"split": "train"}, file="a.jsonl", index=0,
    )  # fmt: skip
    asked = read({"image": "a", "question": "Edema?", "answer": "no", "answer_type": "CLOSED"})
    assert (asked.text, asked.answer_type) == ("no", "CLOSED")


@pytest.mark.parametrize(
    ("record", "field", "reason"),
    [
        ([], None, "found list"),
        ({"report": "r"}, None, "found none; the record has report"),
        ({"image": "a", "images": ["b"], "report": "r"}, None, "found image and images"),
        ({"images": [], "report": "r"}, "images", "found an empty list"),
        ({"images": ["a", " "], "report": "r"}, "images.1", "found blank text"),
        ({"images": ["a"], "report": ""}, "report", "found empty text"),
        ({"images": ["a"]}, None, "nothing to learn"),
        ({"images": ["a"], "answer": "no"}, "answer", "without a question"),
        ({"images": ["a"], "question": "q"}, "question", "without an answer"),
        ({"images": ["a"], "labels": 3}, "labels", "found int"),
        ({"images": ["a"], "labels": {"mass": -1}}, "labels.mass", "found -1"),
        ({"images": ["a"], "labels": [1, True]}, "labels.1", "found True"),
        ({"images": ["a"], "report": "r", "triplets": [["a", "b"]]}, "triplets.0", "three texts"),
        ({"images": ["a"], "report": "r", "triplets": "a"}, "triplets", "expected a list"),
    ],
)
def test_a_bad_record_says_which_field(record: object, field: str | None, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        read(record)
    assert caught.value.field == field
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"effusion": 0, "mass": 1}, [None, 0, 1]),
        ([1, None, 0], [1, None, 0]),
        (["mass"], [0, 0, 1]),
        (None, [None, None, None]),
    ],
)
def test_labels_in_every_form(labels: object, expected: list[int | None]) -> None:
    found = example({"report": "r", "labels": labels}).label_targets
    assert [None if math.isnan(target) else target for target in found] == expected


def test_labels_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(DataError, match="2 labels without names, and the model has 3"):
        example({"report": "r", "labels": [1, 0]})
    with pytest.raises(DataError, match="'nodule' is none of the model's labels"):
        example({"report": "r", "labels": ["nodule"]})
    with pytest.raises(DataError, match="no finding is known; the model learns edema"):
        example({"report": "r", "labels": {"nodule": 1}}, reads_text=False)
    with pytest.raises(DataError, match="this record has none that is learned"):
        example({"labels": {"mass": 1}})


def test_a_question_is_given_and_its_answer_learned() -> None:
    made = example({"question": "ab", "answer": "c"})
    assert made.input_ids == [1, 97, 98, 99, 2]
    assert made.labels == [IGNORE_INDEX] * 3 + [99, 2]
    segments = Studies(processor()).preview(made)
    assert [(one.text, one.learned) for one in segments] == [("\1ab", False), ("c\2", True)]


def test_a_batch_by_hand() -> None:
    pipeline = Studies(processor())
    first = example({"report": "Ab", "labels": {"mass": 1}, "triplets": [["x", "y", "z"]]}, 2)
    second = example({"report": " ab. "})
    batch = pipeline.eval_collator()([first, None, second])
    assert batch["image_counts"].tolist() == [2, 1]
    assert batch["pixels"]["image"].shape == (3, 3, 4, 4)
    assert batch["input_ids"].tolist() == [[1, 65, 98, 2, PAD], [1, 97, 98, 46, 2]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 5]
    assert batch["labels"].tolist()[0] == [IGNORE_INDEX, 65, 98, 2, IGNORE_INDEX]
    assert batch["label_targets"].isnan().tolist() == [[True, True, False], [True] * 3]
    assert batch["knowledge_ids"].tolist() == [[120], [PAD]]
    assert batch["knowledge_mask"].tolist() == [[1], [0]]
    owners = batch["owners"].tolist()
    assert owners[0] == owners[1], "reports that differ in letter case alone are equal"


def test_a_batch_without_a_study_has_no_rows() -> None:
    batch = Studies(processor()).eval_collator()([None])
    assert batch["input_ids"].shape == (0, 2)
    assert batch["label_targets"].shape == (0, 3)
    assert batch["image_counts"].shape == batch["owners"].shape == (0,)
    assert "pixels" not in batch


def test_inference_needs_images_alone() -> None:
    pipeline = Studies(processor(), inference=True)
    sample = pipeline.read({"images": ["a", "b", "c"]}, file=HERE, index=0)
    made = pipeline.example(sample, {"image": [np.zeros((3, 4, 4), np.float32)] * 3})
    batch = pipeline.eval_collator()([made])
    assert batch["image_counts"].tolist() == [2]
    assert "input_ids" not in batch


def test_images_of_a_large_study_are_drawn_each_epoch_in_their_order() -> None:
    pipeline = Studies(processor())
    study = read({"images": list("abcd"), "report": "r"})
    drawn = {
        tuple(media.path for media in pipeline.draw(study, np.random.default_rng(seed)).images)
        for seed in range(50)
    }
    assert drawn == {(a, b) for a in "abcd" for b in "abcd" if a < b}
    asked = Studies(processor(), inference=True).draw(study, np.random.default_rng(0))
    assert [media.path for media in asked.images] == ["a", "b"], "the first ones in inference"


def test_a_check_reads_every_image_and_counts(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 0)
    records = [
        {"images": ["a.png"] * 3, "report": "r", "labels": {"mass": 1, "edema": None}},
        {"images": ["a.png", "gone.png"], "report": "r"},
    ]
    source = SourceOptions(path=str(write_lines(tmp_path / "s.jsonl", *records)))
    report = check([source], Studies(processor()))
    assert report.counts["report"] == 1
    assert report.counts["label"] == 2
    (bad,) = report.bad
    assert bad.field == "images.1"
    assert len(Records([source], Studies())) == 2
