"""`TrainingData` with the pipeline of a kind of model: what is checked, drawn and batched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from medm.data.options import DataOptions, SourceOptions
from medm.data.pipelines import PIPELINES
from medm.errors import DataError, RecipeError
from medm.training.data import TrainingData
from medm.training.options import TrainOptions
from tests.data.pairs import pair, pairs
from tests.data.tiny import conversations, record, write_image, write_lines


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    with PIPELINES.temporary():
        yield


def options(folder: Path, *values: Any, **fields: Any) -> DataOptions:
    write_image(folder / "a.png")
    source = SourceOptions(path=str(write_lines(folder / "p.jsonl", *values)))
    return DataOptions(train=[source], eval=[source], bad_records_limit=None, **fields)


def batches(data: TrainingData) -> list[Any]:
    collate: Any = data.collate
    return list(DataLoader(data.train, batch_sampler=data.sampler, collate_fn=collate))


TRAIN = TrainOptions(per_device_train_batch_size=2)


def test_pairs_are_checked_drawn_and_batched_without_a_label(tmp_path: Path) -> None:
    values = [pair(caption="x" * length) for length in (1, 2, 30, 4)] + [pair("gone.png")]
    section = options(tmp_path, *values, bad_records="skip", max_length=20, too_long="skip")
    data = TrainingData(section, TRAIN, pairs(tmp_path), rank=0, world=1)
    made = batches(data)
    assert sorted(
        length for batch in made for length in batch["attention_mask"].sum(1).tolist()
    ) == [1, 2, 4]
    assert sum(len(batch["pixels"]["image"]) for batch in made) == 3
    assert data.counts == {"left_out_by_check": 2, "bad": 0, "too_long": 0, "truncated": 0}
    assert data.evaluation is not None and data.eval_collate([data.evaluation[0]])[
        "input_ids"
    ].shape == (1, 1)


def test_a_bad_pair_stops_a_run_with_its_place(tmp_path: Path) -> None:
    section = options(tmp_path, pair(), pair(caption=7))
    with pytest.raises(
        DataError, match=r"1 of 2 training records are bad; the first: .*record 1, field 'caption'"
    ):
        TrainingData(section, TRAIN, pairs(tmp_path), rank=0, world=1)


def test_packing_is_refused_before_data_is_read(tmp_path: Path) -> None:
    section = options(tmp_path, packing=True)
    Path(section.train[0].path).unlink()
    with pytest.raises(RecipeError, match=r"data\.packing: Pairs puts one record in a row"):
        TrainingData(section, TRAIN, pairs(tmp_path), rank=0, world=1)
    with pytest.raises(RecipeError, match=r"data\.packing: .* needs the mask"):
        TrainingData(section, TRAIN, conversations(), rank=0, world=1)


@pytest.mark.parametrize("needs_mask", [True, False])
def test_conversations_carry_the_mask_that_the_kind_needs(tmp_path: Path, needs_mask: bool) -> None:
    section = options(tmp_path, record("q", "A"), record("qq", "AA"))
    data = TrainingData(section, TRAIN, conversations(needs_mask=needs_mask), rank=0, world=1)
    (batch,) = batches(data)
    assert ("attention_mask" in batch) is needs_mask
    assert "attention_mask" in data.eval_collate([data.train[0]])
