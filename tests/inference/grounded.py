"""A tiny model with a mask head, and replies that hold `[SEG]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from medm.config import validate
from medm.inference.generator import Engine, Reply, Request, prepare
from medm.models import build
from medm.models.lvlm.options import LVLMOptions
from medm.types import Example, Media, Sample, Turn
from tests import tiny
from tests.inference.tiny import awaken
from tests.models import plain_head


def build_grounded(folder: Path, **masks: Any) -> tuple[Any, Any]:
    """A random model with a branch of images and the head of `tests.models.plain_head`."""
    section = tiny.lvlm_section(tiny.save_llm("qwen2.5", folder / "llm"))
    section["control_tokens"] = ["[SEG]", "<p>", "</p>"]
    section["masks"] = {"head": {"name": plain_head.NAME}, **masks}
    torch.manual_seed(1)
    model, processor = build(validate(LVLMOptions, section, source="test"))
    awaken(model.language_model)
    model.requires_grad_(False).eval()
    return model, processor


def ids_of(processor: Any, text: str) -> list[int]:
    """Token ids of a reply: marks are control tokens."""
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def question(processor: Any, text: str, *, images: int = 1, seed: int = 0) -> Example:
    """A prompt about some images of noise."""
    rng = np.random.default_rng(seed)
    content: list[Any] = [part for _ in range(images) for part in (Media("image"), "\n")]
    pixels = [rng.normal(size=(3, 16, 16)).astype(np.float32) for _ in range(images)]
    sample = Sample((Turn("user", (*content, text)),))
    return processor.encode(sample, {"image": pixels} if images else {}, generation=True)


def request(processor: Any, text: str, **shown: Any) -> Request:
    """The same as a request."""
    return prepare([question(processor, text, **shown)]).requests()[0]


def answering(monkeypatch: Any, processor: Any, *texts: str) -> None:
    """Let every engine reply these texts in turn: a random model writes no `[SEG]`."""
    replies = [tuple(ids_of(processor, text)) for text in texts]

    def generate(self: Engine, batch: Any, options: Any = None) -> list[Reply]:
        made = []
        for row in range(len(batch)):
            ids = replies[len(batch.input_ids[row]) % len(replies)]
            made.append(Reply(self.processor.text(list(ids)), len(ids), True, ids))
        return made

    monkeypatch.setattr(Engine, "generate", generate)


def streaming(monkeypatch: Any, processor: Any, text: str) -> None:
    """Let every engine stream this reply."""
    ids = tuple(ids_of(processor, text))

    def stream(self: Engine, request: Any, options: Any = None) -> Any:
        words = self.processor.text(list(ids))
        yield words
        return Reply(words, len(ids), True, ids)

    monkeypatch.setattr(Engine, "stream", stream)


def save_grounded(folder: Path, **masks: Any) -> tuple[Path, Any]:
    """The model of `build_grounded` in a folder, and its processor."""
    model, processor = build_grounded(folder, **masks)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model", processor
