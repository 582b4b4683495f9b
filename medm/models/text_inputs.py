"""Texts of a processor: the check of what was given, and the tensors of their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medm.errors import DataError


def list_texts(texts: str | Sequence[str]) -> list[str]:
    """Return one or more texts as a list.

    Raises:
        DataError: no texts, or something that is no text.
    """
    rows = [texts] if isinstance(texts, str) else list(texts)
    if wrong := [row for row in rows if not isinstance(row, str)]:
        raise DataError(f"expected texts, found {type(wrong[0]).__name__}")
    if not rows:
        raise DataError("expected one or more texts, found none")
    return rows


def pad_texts(ids: Sequence[list[int]], pad_id: int, width: int = 1) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, (N, T) int64, padded on the right.

    `PreTrainedTokenizerBase.pad` refuses a tokenizer that names no padding token, as some of text
    encoders do.

    Args:
        ids: tokens of each text.
        pad_id: fills up short rows.
        width: least T.
    """
    width = max(width, *map(len, ids))
    return {
        "input_ids": torch.tensor([row + [pad_id] * (width - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
    }
