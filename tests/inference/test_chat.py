"""Conversations: every turn sees the ones before it, and what is typed is text."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medm.errors import DataError
from medm.imaging import load_pixels
from medm.inference.chat import Conversation
from medm.inference.generator import Engine
from medm.inference.options import GenerationOptions
from tests.cli.runner import medm
from tests.inference.tiny import build_tiny, save_image


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    folder = tmp_path_factory.mktemp("chat")
    model, processor = build_tiny(folder)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    save_image(folder / "a.png", 1)
    save_image(folder / "b.png", 2)
    return model, processor, folder


def test_a_second_turn_is_the_whole_conversation(tiny: tuple[Any, Any, Path]) -> None:
    model, processor, folder = tiny
    conversation = Conversation(
        Engine(model, processor, GenerationOptions(max_new_tokens=6)), processor, system="Be brief."
    )
    conversation.show("image", folder / "a.png")
    first = "".join(conversation.ask("What is it?")).strip()
    conversation.show("image", folder / "b.png")
    second = "".join(conversation.ask("And <image> this?")).strip()

    control = processor.tokenizer.added_tokens_encoder
    start, end, image = control["<|im_start|>"], control["<|im_end|>"], [control["<image>"]] * 16

    def text(words: str) -> list[int]:
        return processor.tokenizer(words, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]

    ids = [start, *text("system\nBe brief."), end, *text("\n")]
    ids += [start, *text("user\n"), *image, *text("\nWhat is it?"), end, *text("\n")]
    ids += [start, *text(f"assistant\n{first}"), end, *text("\n")]
    ids += [
        start,
        *text("user\n"),
        *image,
        *text("\nAnd <image> this?"),
        end,
        *text("\n"),
        start,
        *text("assistant\n"),
    ]
    pixels = np.stack(
        [load_pixels(folder / name, processor.preprocess["image"]) for name in ("a.png", "b.png")]
    )
    expected = model.generate(
        input_ids=torch.tensor([ids]),
        pixels={"image": torch.from_numpy(pixels)},
        max_new_tokens=6,
        do_sample=False,
    )
    assert second == processor.text(expected[0, len(ids) :])

    conversation.reset()
    assert len(conversation.turns) == 1
    assert conversation.pixels == {}


def test_what_does_not_fit_is_reported_and_the_conversation_stays(
    tiny: tuple[Any, Any, Path],
) -> None:
    model, processor, folder = tiny
    conversation = Conversation(
        Engine(model, processor, GenerationOptions(max_new_tokens=2)), processor
    )
    with pytest.raises(DataError, match="the model takes no "):
        conversation.show("volume", folder / "a.nii.gz")
    with pytest.raises(DataError, match="cannot be opened"):
        conversation.show("image", folder / "none.png")
    with pytest.raises(DataError, match="the context is 512; start a new one"):
        next(conversation.ask("word " * 200))
    assert conversation.turns == []


def test_the_command_reads_a_pipe(
    tiny: tuple[Any, Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny[2]
    lines = [
        "",
        f"/image {folder / 'b.png'}",
        "What?",
        "/image nowhere.png",
        "/reset",
        "/what",
        "Again?",
        "/quit",
        "Not read",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    done = medm(
        "chat",
        "--model",
        str(folder / "model"),
        "--image",
        str(folder / "a.png"),
        "--max-new-tokens",
        "4",
        "--device",
        "cpu",
    )
    assert done.code == 0, done.err
    assert "Not for clinical use" in done.err
    assert "nowhere.png" in done.err
    assert "the conversation starts over" in done.err
    assert done.out.count("\n") >= 2
