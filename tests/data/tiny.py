"""Small records, files and an encoder that is a character a token."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from medm.data.conversations import Conversations
from medm.imaging import ImagePreprocess, Preprocess
from medm.types import IGNORE_INDEX, ControlToken, Example, Media, Sample

PAD, PLACEHOLDER, CONTROL = 0, 1, 2
PREPROCESS: dict[str, Preprocess] = {"image": ImagePreprocess(size=[4, 4])}
NUM_VISION_TOKENS = 5


def human(value: Any) -> dict[str, Any]:
    return {"from": "human", "value": value}


def gpt(value: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": value}


def record(
    question: str = "Is there an effusion?", reply: str = "Yes.", /, **fields: Any
) -> dict[str, Any]:
    return {"conversations": [human(question), gpt(reply)], **fields}


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path: Path, *values: Any) -> Path:
    path.write_text(
        "".join(f"{json.dumps(value, ensure_ascii=False)}\n" for value in values), encoding="utf-8"
    )
    return path


def write_image(path: Path, shade: int = 0, size: tuple[int, int] = (6, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)
    return path


def encode(
    sample: Sample, pixels: Mapping[str, list[np.ndarray]], *, generation: bool = False
) -> Example:
    """Every character is its code point plus 2, an item is five placeholders; replies are
    learned."""
    ids: list[int] = []
    labels: list[int] = []
    for turn in sample.turns:
        for part in turn.content:
            if isinstance(part, Media):
                new = [PLACEHOLDER] * NUM_VISION_TOKENS
            else:
                new = [CONTROL] if isinstance(part, ControlToken) else [ord(c) + 2 for c in part]
            ids += new
            labels += (
                new if turn.role == "assistant" and not generation else [IGNORE_INDEX] * len(new)
            )
    assert sum(map(len, pixels.values())) == len(sample.media)
    return Example(ids, labels, {branch: list(items) for branch, items in pixels.items()})


def to_text(ids: list[int]) -> str:
    names = {PLACEHOLDER: "<image>", CONTROL: "[SEG]"}
    return "".join(names.get(token) or chr(token - 2) for token in ids)


def conversations(
    preprocess: Mapping[str, Preprocess] = PREPROCESS,
    *,
    encode: Callable[..., Example] = encode,
    **settings: Any,
) -> Conversations:
    """The pipeline of a model whose processor is `encode`."""
    processor: Any = SimpleNamespace(
        preprocess=dict(preprocess),
        placeholder_ids={"image": PLACEHOLDER},
        control_token_ids={"[SEG]": CONTROL},
        mask_view=None,
        mask_grid=None,
        pad_id=PAD,
        encode=encode,
        tokenizer=SimpleNamespace(decode=to_text),
    )
    return Conversations(processor, **settings)
