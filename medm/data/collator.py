"""Conversations to the batch that a model's forward takes (`medm.types.ConversationBatch`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from medm.types import IGNORE_INDEX, ConversationBatch, Example, MediaExample


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads examples to the longest of them.

    Records that were left out come as None and make the batch smaller. If none is left, the batch
    is one row of padding without labels: every rank has to make the step.
    """

    pad_id: int
    """Token of padding. Masks say what is padding, so it may be a real token too (Llama pads with
    its end token)."""
    padding_side: Literal["left", "right"] = "right"
    """"left" for generation, where every row has to end where its reply begins."""
    pad_to_multiple_of: int | None = None
    """Lengths are rounded up to it (tensor cores, compiled shapes)."""
    with_mask: bool = True
    """The batch has an `attention_mask`. Causal attention with padding on the right needs none,
    since no token sees the padding behind it, and is faster without."""
    with_label_positions: bool = False
    """The batch has `label_positions`, so that the model does not wait for the GPU to find them."""

    def __post_init__(self) -> None:
        if not self.with_mask and self.padding_side == "left":
            raise ValueError(
                "padding on the left needs a mask; batches for training are padded on the right"
            )

    def __call__(self, examples: Sequence[Example | None]) -> ConversationBatch:
        """Return a batch of one row per example."""
        kept = [example for example in examples if example is not None]
        kept = kept or [dummy_example(self.pad_id)]
        width = round_up(max(len(example.input_ids) for example in kept), self.pad_to_multiple_of)
        side = self.padding_side
        labels = padded([example.labels for example in kept], width, IGNORE_INDEX, side=side)
        batch = ConversationBatch(
            input_ids=padded(
                [example.input_ids for example in kept], width, self.pad_id, side=side
            ),
            labels=labels,
        )
        if self.with_label_positions:
            batch["label_positions"] = label_positions(labels)
        if self.with_mask:
            mask = [[1] * len(example.input_ids) for example in kept]
            batch["attention_mask"] = padded(mask, width, 0, side=side)
        return {**batch, **stack_media(kept), **stack_masks(kept)}


def padded(
    rows: Sequence[Sequence[int]], width: int, fill: int, *, side: Literal["left", "right"]
) -> Tensor:
    """Rows of different lengths as (B, width) int64, filled up on one side."""
    table = np.full((len(rows), width), fill, np.int64)
    for line, row in zip(table, rows, strict=True):
        line[slice(None, len(row)) if side == "right" else slice(width - len(row), None)] = row
    return torch.from_numpy(table)


def label_positions(labels: Tensor) -> Tensor:
    """Return the positions (L,) among the B * T from which a label is predicted.

    The first position of a row predicts none.
    """
    rows, columns = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return rows * labels.shape[1] + columns


def dummy_example(pad_id: int) -> Example:
    """Return an example without labels, for a batch whose records were all left out.

    Two tokens, so that shifted labels are not of length 0.
    """
    return Example([pad_id] * 2, [IGNORE_INDEX] * 2)


def round_up(length: int, multiple: int | None) -> int:
    """Return the next multiple, or the length itself."""
    return length if multiple is None else -(-length // multiple) * multiple


def stack_media(examples: Sequence[MediaExample]) -> ConversationBatch:
    """Return `pixels`, `features` and `task_ids` by branch, items of all examples in order.

    Raises:
        ValueError: the items of a branch differ in shape, or some come as pixels and some as
            features.
    """
    tasks: dict[str, list[int]] = {}
    for example in examples:
        for branch, items in [*example.pixels.items(), *example.features.items()]:
            if items:
                tasks.setdefault(branch, []).extend([example.task_id] * len(items))
    pixels = _stack([example.pixels for example in examples])
    features = _stack([example.features for example in examples])
    if mixed := sorted(pixels.keys() & features.keys()):
        raise ValueError(
            f"{mixed}: some items of the batch are pixels and some features; a branch has one or "
            "the other"
        )
    batch = ConversationBatch()
    if pixels:
        batch["pixels"] = pixels
    if features:
        batch["features"] = features
    if tasks:
        batch["task_ids"] = {branch: torch.tensor(ids) for branch, ids in tasks.items()}
    return batch


def stack_masks(examples: Sequence[Example]) -> ConversationBatch:
    """Return `mask_targets`, `mask_tokens` and `mask_items` of all examples in order.

    Every `[SEG]` of an example has a mask, and so has every item of its mask view: their numbers go
    on from one example to the next. Without masks there is no entry.

    Raises:
        ValueError: masks of several sizes.
    """
    arrays: list[np.ndarray] = []
    tokens: list[int] = []
    items: list[int] = []
    first_token = first_item = 0
    for masks in (example.masks for example in examples):
        if masks is None or not masks.arrays:
            continue
        arrays += masks.arrays
        tokens += [first_token + token for token in masks.tokens]
        items += [first_item + item for item in masks.items]
        first_token += max(masks.tokens) + 1
        first_item += max(masks.items) + 1
    if not arrays:
        return ConversationBatch()
    if len(shapes := {array.shape for array in arrays}) > 1:
        raise ValueError(f"masks of sizes {sorted(shapes)} in one batch; a head has one grid")
    return ConversationBatch(
        mask_targets=torch.from_numpy(np.stack(arrays)),
        mask_tokens=torch.tensor(tokens),
        mask_items=torch.tensor(items),
    )


def _stack(by_example: Sequence[Mapping[str, list[np.ndarray]]]) -> dict[str, Tensor]:
    """Stack the items of each branch: (N, C, *spatial) or (N, tokens, D), in float32.

    A branch without items has no entry.
    """
    arrays: dict[str, list[np.ndarray]] = {}
    for of_example in by_example:
        for branch, items in of_example.items():
            arrays.setdefault(branch, []).extend(items)
    for branch, items in arrays.items():
        shapes = {item.shape for item in items}
        if len(shapes) > 1:
            raise ValueError(
                f"{branch}: items of shapes {sorted(shapes)} in one batch; preprocessing must "
                "give them one size"
            )
    return {
        branch: torch.from_numpy(np.stack(items).astype(np.float32, copy=False))
        for branch, items in arrays.items()
        if items
    }
