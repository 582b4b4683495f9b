from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from medm.config import validate
from medm.data.build import build_batches
from medm.data.check import check
from medm.data.collator import Collator
from medm.data.dataset import ExampleDataset
from medm.data.limits import LengthLimit
from medm.data.options import DataOptions
from medm.data.packing import PackedBatches, PackingCollator
from medm.data.records import Records
from medm.errors import DataError
from medm.types import IGNORE_INDEX
from tests.data.test_sampling import log_normal, smallest_gap
from tests.data.tiny import PAD, PLACEHOLDER, conversations, record, write_image, write_lines


def data(*weights: float | None, **fields: Any) -> DataOptions:
    sources = [
        {"path": f"{k}.json"} | ({} if w is None else {"weight": w}) for k, w in enumerate(weights)
    ]
    return validate(DataOptions, {"train": sources, **fields}, source="r.yaml")


@pytest.mark.parametrize(
    "fields", [{}, {"order": "length"}, {"balance_ranks": True}, {"packing": True}]
)
def test_records_that_the_check_leaves_out_are_never_drawn(fields: dict[str, Any]) -> None:
    lengths = log_normal(60)
    lengths[[0, 7, 59]] = 0
    batches = build_batches(data(None, None, **fields), [25, 35], batch_size=3, lengths=lengths)
    assert sorted(index for batch in batches for index in batch) == np.flatnonzero(lengths).tolist()
    assert isinstance(batches, PackedBatches) is bool(fields.get("packing"))


def test_weights_make_a_mixture_whose_indices_are_the_records() -> None:
    lengths = log_normal(500)
    lengths[:50] = 0
    batches = build_batches(data(1.0, 3.0, draws=400), [100, 400], batch_size=4, lengths=lengths)
    drawn = np.asarray([index for batch in batches for index in batch])
    assert (len(drawn), (drawn < 100).sum(), drawn.min()) == (400, 100, 50)


def test_a_mixture_sorted_by_length_repeats_nothing_within_a_step() -> None:
    lengths = np.r_[log_normal(40, 1), log_normal(4000, 2)]
    batches = build_batches(
        data(1.0, 3.0, order="length"), [40, 4000], batch_size=8, lengths=lengths
    )
    for batch in batches:
        assert len(set(batch)) == len(batch) == 8
    assert batches.window == (40 - 2) * 4 // 8
    wide = build_batches(data(1.0, 3.0), [40, 4000], batch_size=8)
    assert smallest_gap(np.asarray([index for batch in wide for index in batch])) >= 8


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(DataError, match="no record is left to train on"):
        build_batches(data(None), [3], batch_size=1, lengths=[0, 0, 0])
    with pytest.raises(DataError, match=r"1\.json: no record of this source can be used"):
        build_batches(data(1.0, 1.0), [1, 2], batch_size=1, lengths=[5, 0, 0])
    with pytest.raises(ValueError, match="2 lengths for 3 records"):
        build_batches(data(None), [3], batch_size=1, lengths=[1, 2])


def test_collators() -> None:
    needs_none = conversations(needs_mask=False)
    assert needs_none.training_collator(data(None)) == Collator(
        PAD, with_mask=False, with_label_positions=True
    )
    packed = data(None, packing=True, max_length=99)
    assert needs_none.training_collator(packed, padding_free=True) == PackingCollator(
        PAD, 99, padding_free=True, with_label_positions=True
    )
    assert needs_none.eval_collator() == Collator(PAD)


@pytest.mark.parametrize("fields", [{}, {"order": "length"}, {"packing": True, "max_length": 64}])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_from_a_file_to_batches_through_workers(
    tmp_path: Path, fields: dict[str, Any], num_workers: int
) -> None:
    """Every label of every record reaches the model exactly once an epoch, with its own image."""
    values = []
    for number in range(23):
        write_image(tmp_path / f"{number}.png", shade=10 * number)
        image = {"image": f"{number}.png"} if number % 3 else {}
        values.append(
            record("<image>?" if image else "?", chr(ord("a") + number) * (1 + number % 5), **image)
        )
    options = data(None, **fields)
    options = options.model_copy(
        update={
            "train": [
                options.train[0].model_copy(
                    update={"path": str(write_lines(tmp_path / "a.jsonl", *values))}
                )
            ]
        }
    )
    limit = LengthLimit(options.max_length)
    pipeline = conversations(needs_mask=False)
    report = check(options.train, pipeline, length_limit=limit)
    records = Records(options.train, pipeline)
    dataset = ExampleDataset(records, limit=limit)
    seen: list[tuple[str, float | None]] = []
    for rank in range(2):
        batches = build_batches(
            options, records.sizes, batch_size=2, rank=rank, world=2, lengths=report.lengths
        )
        collate = pipeline.training_collator(options)
        for batch in DataLoader(
            dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=collate
        ):
            pixels = batch.get("pixels", {}).get("image")
            shades = [] if pixels is None else pixels[:, 0, 0, 0].tolist()
            for ids, labels in zip(
                batch["input_ids"].flatten().tolist(),
                batch["labels"].flatten().tolist(),
                strict=True,
            ):
                if ids == PLACEHOLDER:
                    seen.append(("image", None))
                elif labels != IGNORE_INDEX:
                    seen.append((chr(labels - 2), None))
            seen += [("shade", round((shade + 1) / 2 * 255)) for shade in shades]
    letters = "".join(sorted(text for text, _ in seen if len(text) == 1))
    assert letters == "".join(chr(ord("a") + n) * (1 + n % 5) for n in range(23))
    assert sorted(value for text, value in seen if text == "shade") == [
        10 * n for n in range(23) if n % 3
    ]
    assert sum(text == "image" for text, _ in seen) == 5 * sum(n % 3 > 0 for n in range(23))
