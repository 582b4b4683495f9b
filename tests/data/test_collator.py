from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medm.data.collator import Collator
from medm.data.packing import PackingCollator
from medm.types import IGNORE_INDEX, Example


def item(value: float, shape: tuple[int, ...] = (1, 2, 2)) -> np.ndarray:
    return np.full(shape, value, np.float32)


FIRST = Example([5, 6, 7], [-100, 6, 7], {"image": [item(1), item(2)]}, task_id=3)
SECOND = Example([8], [8], {"volume": [item(9, (1, 2, 2, 2))]}, task_id=4)
THIRD = Example([4, 3], [-100, 3], {"image": [item(5)]}, task_id=1)


def test_a_batch_by_hand() -> None:
    batch = Collator(pad_id=0)([FIRST, SECOND, THIRD])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixels", "task_ids"}
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [4, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100], [-100, 3, -100]]
    assert batch["pixels"]["image"].shape == (3, 1, 2, 2)
    assert batch["pixels"]["image"][:, 0, 0, 0].tolist() == [1, 2, 5]
    assert batch["pixels"]["volume"].shape == (1, 1, 2, 2, 2)
    assert {branch: ids.tolist() for branch, ids in batch["task_ids"].items()} == {
        "image": [3, 3, 1],
        "volume": [4],
    }
    for key in ("input_ids", "attention_mask", "labels"):
        assert batch[key].dtype == torch.int64
    assert batch["pixels"]["image"].dtype == torch.float32
    assert batch["task_ids"]["image"].dtype == torch.int64


def test_positions_before_labels_by_hand() -> None:
    """The first token of a row is predicted from nothing."""
    batch = Collator(pad_id=0, with_mask=False, with_label_positions=True)([FIRST, SECOND, THIRD])
    assert batch["label_positions"].tolist() == [0, 1, 6]
    packed = PackingCollator(pad_id=0, capacity=4, with_label_positions=True)(
        [FIRST, SECOND, THIRD]
    )
    assert packed["labels"].tolist() == [[-100, 6, 7, -100], [-100, 3] + [-100] * 2]
    assert packed["label_positions"].tolist() == [0, 1, 4]


def test_left_padding_and_rounded_lengths() -> None:
    batch = Collator(pad_id=0, padding_side="left", pad_to_multiple_of=4)([FIRST, SECOND])
    assert batch["input_ids"].tolist() == [[0, 5, 6, 7], [0, 0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 7], [-100, -100, -100, 8]]


def test_the_pad_token_may_be_a_real_one() -> None:
    """Llama pads with its end token: the mask and the labels say what is real, not the id."""
    batch = Collator(pad_id=2)([Example([5, 2], [5, 2]), Example([5, 6, 2], [5, 6, 2])])
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[5, 2, -100], [5, 6, 2]]


def test_text_only_and_records_left_out() -> None:
    batch = Collator(pad_id=0)([None, Example([1, 2], [-100, 2]), None])
    assert batch["input_ids"].tolist() == [[1, 2]]
    assert "pixels" not in batch and "task_ids" not in batch


@pytest.mark.parametrize("examples", [[None, None], []])
def test_a_batch_of_nothing_teaches_nothing(examples: list[None]) -> None:
    batch = Collator(pad_id=9)(examples)
    assert batch["input_ids"].tolist() == [[9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX] * 2]


def test_features_stand_in_the_place_of_pixels() -> None:
    kept = Example([1], [1], features={"image": [item(3, (5, 4)), item(4, (5, 4))]}, task_id=2)
    batch = Collator(pad_id=0)([kept, SECOND])
    assert (
        batch["features"]["image"].shape == (2, 5, 4)
        and batch["features"]["image"].dtype == torch.float32
    )
    assert set(batch["pixels"]) == {"volume"}
    assert {branch: ids.tolist() for branch, ids in batch["task_ids"].items()} == {
        "image": [2, 2],
        "volume": [4],
    }
    with pytest.raises(
        ValueError, match=r"\['image'\]: some items of the batch are pixels and some features"
    ):
        Collator(pad_id=0)([kept, FIRST])


def test_items_of_different_shapes_are_refused_with_numbers() -> None:
    with pytest.raises(ValueError, match=r"image: items of shapes \[\(1, 2, 2\), \(1, 3, 3\)\]"):
        Collator(pad_id=0)([FIRST, Example([1], [1], {"image": [item(0, (1, 3, 3))]})])


@given(
    st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=6),
    st.sampled_from(["left", "right"]),
    st.sampled_from([None, 1, 8]),
)
def test_padding_hides_nothing(rows: list[list[int]], side: str, multiple: int | None) -> None:
    batch = Collator(pad_id=0, padding_side=side, pad_to_multiple_of=multiple)(
        [Example(row, row) for row in rows]
    )  # type: ignore[arg-type]
    mask = batch["attention_mask"].bool()
    assert [
        line[keep].tolist() for line, keep in zip(batch["input_ids"], mask, strict=True)
    ] == rows
    assert (batch["labels"][~mask] == IGNORE_INDEX).all()
    assert batch["input_ids"].shape[1] % (multiple or 1) == 0
