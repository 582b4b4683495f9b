"""Conversations with a model that answers with masks, and `medm chat` with them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import medm as package
from medm.inference.chat import Conversation
from medm.inference.generator import Engine
from medm.inference.segmenter import Segmenter
from medm.types import ControlToken
from tests.cli.runner import medm
from tests.inference.grounded import answering, save_grounded, streaming
from tests.inference.tiny import save_image
from tests.models import plain_head

REPLY = "<p>left lung</p>[SEG] is large."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    with plain_head.registered():
        yield save_grounded(tmp_path_factory.mktemp("grounded"))


@pytest.fixture(scope="module")
def loaded(made: tuple[Path, Any]) -> Any:
    return package.load(made[0], device="cpu")


def test_predict_returns_text_spans_and_masks(
    loaded: Any, made: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, made[1], REPLY)
    save_image(tmp_path / "a.png", 1, size=(20, 30))
    found = loaded.predict("Where?", image=tmp_path / "a.png", soft=True)
    assert found.text == "left lung is large."
    assert found.raw == REPLY
    assert [found.text[span.start : span.end] for span in found.spans] == ["left lung"]
    assert found.masks[0].mask.shape == (20, 30)
    assert found.masks[0].mask.dtype == bool
    assert ((found.masks[0].probabilities > 0.5) == found.masks[0].mask).all()
    # The same from memory, from an opened file, and with a threshold that nothing reaches.
    with Image.open(tmp_path / "a.png") as image:
        own = loaded.predict("Where?", image=np.asarray(image))
    opened = loaded.predict("Where?", image=io.BytesIO((tmp_path / "a.png").read_bytes()))
    for other in (own, opened):
        assert (other.masks[0].mask == found.masks[0].mask).all()
    absent = loaded.predict(
        "Where?", image=tmp_path / "a.png", segmentation={"presence_threshold": 1.0}
    )
    assert absent.masks[0].absent
    assert not absent.masks[0].mask.any()
    assert loaded.predict("Where?").masks == ()
    volume = np.random.default_rng(0).integers(-900, 900, (7, 12, 10)).astype(np.int16)
    sliced = loaded.predict("Where?", volume=volume, segmentation={"slices": 2})
    assert sliced.masks[0].mask.shape == (7, 12, 10)


def test_the_next_prompt_holds_the_tokens_of_earlier_replies(
    loaded: Any, made: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streaming(monkeypatch, made[1], REPLY)
    save_image(tmp_path / "a.png", 1, size=(20, 30))
    engine: Engine = loaded.engine
    talk = Conversation(engine, engine.processor, segmenter=Segmenter(engine))
    talk.show("image", tmp_path / "a.png")
    assert "".join(talk.ask("Where?")) == engine.processor.text(
        engine.processor.tokenizer(REPLY)["input_ids"]
    )
    assert talk.grounded is not None
    assert len(talk.grounded.masks) == 1
    first = talk.grounded.masks[0].mask
    tokens = [part.token for part in talk.turns[-1].content if isinstance(part, ControlToken)]
    assert tokens == ["<p>", "</p>", "[SEG]"]
    assert talk.turns[-1].as_written == REPLY
    list(talk.ask("And now?"))  # the earlier token is not taken for one of this reply
    assert talk.grounded is not None
    assert len(talk.grounded.masks) == 1
    assert talk.grounded.masks[0].mask.shape == first.shape
    assert talk.replies == 2
    talk.reset()
    assert talk.grounded is None
    talk.show("volume", np.arange(7 * 12 * 10, dtype=np.int16).reshape(7, 12, 10))
    list(talk.ask("Where?"))
    assert talk.grounded is not None
    assert talk.grounded.masks[0].mask.shape == (7, 12, 10)


def test_the_command_saves_masks_in_a_folder(
    made: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streaming(monkeypatch, made[1], REPLY)
    save_image(tmp_path / "a.png", 1, size=(20, 30))
    monkeypatch.setattr("sys.stdin", io.StringIO("Where?\n/reset\n"))
    done = medm(
        "chat", "--model", str(made[0]), "--image", str(tmp_path / "a.png"), "--device", "cpu",
        "--masks", str(tmp_path / "saved"),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "left lung" in done.out
    assert "[SEG]" not in done.out
    with Image.open(tmp_path / "saved" / "reply-01_0.png") as mask:
        assert mask.size == (30, 20)
    assert (tmp_path / "saved" / "reply-01_overlay.png").is_file()
    assert "reply-01_0.png" in (done.out + done.err).replace("\n", "")
