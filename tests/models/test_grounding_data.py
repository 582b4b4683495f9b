"""Records with masks through the processor and the model of an LVLM with a mask head."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medm.data.check import check
from medm.data.collator import Collator
from medm.data.dataset import ExampleDataset
from medm.data.options import DataOptions, SourceOptions
from medm.data.pipelines import pipeline_for
from medm.data.records import Records
from medm.imaging import rle
from medm.models.lvlm.build import LVLM
from tests.data.tiny import record, write_lines
from tests.models import plain_head
from tests.models.test_grounding import VIEW, built


@pytest.fixture(autouse=True)
def head() -> Iterator[str]:
    with plain_head.registered() as name:
        yield name


def test_records_of_mixed_counts_train_a_mask_head(llms: dict[str, Path], tmp_path: Path) -> None:
    """0, 1 and 3 masks: the check accepts them, packed and padded rows give the same masks, and
    each is that of its own record alone."""
    inside = np.zeros((20, 30), bool)
    inside[:10, 15:] = True
    noise = np.random.default_rng(0).integers(0, 255, (3, 20, 30, 3), dtype=np.uint8)
    for number in range(3):
        Image.fromarray(noise[number]).save(tmp_path / f"{number}.png")
    Image.fromarray(inside.astype(np.uint8) * 4).save(tmp_path / "labels.png")
    code = {"rle": rle.encode(inside)}
    lines = write_lines(
        tmp_path / "a.jsonl",
        record("<image>?", "Nothing.", image="0.png"),
        record("<image><image>?", "<p>mass</p> [SEG].", image=["0.png", "1.png"], masks=[code]),
        record(
            "<image>[SEG]<image>",
            "A [SEG], a [SEG], a [SEG]",
            image=["1.png", "2.png"],
            masks=[{**code, "image": 0}, None, {"file": "labels.png", "value": 4}],
        ),
    )
    model, processor = built(llms)
    pipeline = pipeline_for(LVLM(), processor)
    sources = [SourceOptions(path=str(lines))]
    report = check(sources, pipeline, decode=True)
    assert report.ok, report.bad
    assert (report.media["mask"], report.media["absent target"]) == (4, 1)
    data = ExampleDataset(Records(sources, pipeline))
    examples = [example for example in (data[index] for index in range(3)) if example is not None]
    assert [len(example.input_ids) for example in examples] == report.lengths
    assert [len(example.pixels.get(VIEW, [])) for example in examples] == [0, 1, 2]

    padded = Collator(processor.pad_id, with_mask=False)(examples)
    assert padded["mask_tokens"].tolist() == [0, 1, 2, 3]
    assert padded["mask_items"].tolist() == [0, 1, 2, 2]
    quarter = torch.zeros(8, 8, dtype=torch.uint8)
    quarter[:4, 4:] = 1
    empty = torch.zeros_like(quarter)
    assert torch.equal(padded["mask_targets"], torch.stack([quarter, quarter, empty, quarter]))

    with torch.inference_mode():
        together = model(**padded).mask_logits
        apart = [model(**Collator(processor.pad_id)([one])).mask_logits for one in examples[1:]]
        options = DataOptions(packing=True, max_length=sum(report.lengths) - 1)
        rows = pipeline.training_collator(options)(examples)
        assert rows["input_ids"].shape[0] == 2
        packed = model(**rows).mask_logits
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=0)
    torch.testing.assert_close(packed, together[_packed_order(rows, padded)], atol=1e-5, rtol=0)


def _packed_order(rows: dict[str, torch.Tensor], padded: dict[str, torch.Tensor]) -> list[int]:
    """Of each mask of packed rows its number in the padded batch, by the image that it lies in."""
    images = [batch["pixels"][VIEW][batch["mask_items"]] for batch in (rows, padded)]  # type: ignore[index]
    order: list[int] = []
    for image in images[0]:
        order.append(
            next(
                number
                for number, other in enumerate(images[1])
                if number not in order and torch.equal(image, other)
            )
        )
    return order
