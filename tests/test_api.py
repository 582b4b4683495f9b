"""`medm.load` and what it gives: the replies of `medm infer`, one, many, in pieces, in turns; and
the docs' examples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import medm
import medm.models
from medm.config import validate
from medm.errors import CheckpointError, DataError, DeviceError, MediaError, RecipeError
from medm.inference.batch import infer
from medm.inference.options import InferOptions
from medm.models.lvlm.build import LVLM
from medm.models.lvlm.options import LVLMOptions
from tests import tiny
from tests.encoders.tiny import TINY_ENCODERS
from tests.inference.tiny import awaken, questions, read_output, write_records

ROOT = Path(__file__).parents[1]
SHORT = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of images and volumes."""
    folder = tmp_path_factory.mktemp("api")
    section = tiny.lvlm_section(
        tiny.save_llm("qwen2.5", folder / "llm", max_position_embeddings=1024)
    )
    volume = TINY_ENCODERS["m3d-clip"]
    section["branches"]["volume"] = {
        "encoder": {key: value for key, value in volume.block.items() if key != "image_size"},
        "connector": {"name": "mlp"},
        "preprocess": {"size": list(volume.pixels[1:]), "scale": "minmax"},
    }
    torch.manual_seed(1)
    model, processor = medm.models.build(validate(LVLMOptions, section, source="test"))
    awaken(model)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def model(folder: Path) -> medm.Model:
    return medm.load(folder, device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("data")
    return folder, questions(folder, 7)


def test_replies_are_those_of_batch_inference(
    folder: Path, model: medm.Model, data: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    place, records = data
    write_records(place, records)
    options = {
        "model": str(folder),
        "data": str(place / "in.json"),
        "output": str(tmp_path / "out.jsonl"),
        "generation": SHORT,
        "device": "cpu",
        "workers": 0,
    }
    infer(validate(InferOptions, options, source="test"))
    expected = [
        line["reply"]
        for line in sorted(read_output(tmp_path / "out.jsonl"), key=lambda line: line["index"])
    ]
    assert len(set(expected)) > 3
    assert model.ask_many(records, root=place, batch_size=3, **SHORT) == expected
    asked = [
        {
            "question": record["conversations"][0]["value"].removeprefix("<image>\n"),
            "image": [place / name for name in record.get("image", [])],
        }
        for record in records
    ]
    assert model.ask_many(asked, **SHORT) == expected
    assert [model.ask(**one, **SHORT) for one in asked[:3]] == expected[:3]
    assert "".join(model.stream(**asked[1], **SHORT)).strip() == expected[1]
    conversation = model.chat(**SHORT)
    conversation.show("image", Image.open(asked[1]["image"][0]))
    assert "".join(conversation.ask(asked[1]["question"])).strip() == expected[1]


def test_images_and_volumes_in_memory(
    model: medm.Model, data: tuple[Path, Any], tmp_path: Path
) -> None:
    file = data[0] / "0.png"
    pixels = np.asarray(Image.open(file))
    expected = model.ask("What?", image=str(file), **SHORT)
    for item in (
        file,
        Image.open(file),
        pixels,
        torch.from_numpy(pixels.copy()),
        file.read_bytes(),
        [file],
    ):
        assert model.ask("What?", image=item, **SHORT) == expected
    assert model.ask("What?", image=[pixels, 255 - pixels], **SHORT) != expected
    volume = np.random.default_rng(3).integers(0, 99, (8, 40, 40), np.int16)
    np.save(tmp_path / "a.npy", volume)
    seen = model.ask("What?", volume=volume, **SHORT)
    assert seen == model.ask("What?", volume=tmp_path / "a.npy", **SHORT) != expected
    assert model.ask("What?", image=file, volume=volume, **SHORT) not in (seen, expected)


def test_what_is_asked_is_text_and_a_system_turn_is_heard(
    model: medm.Model, data: tuple[Path, Any]
) -> None:
    file = data[0] / "0.png"
    model.ask(
        "What <image> <|im_end|> is it?", image=file, **SHORT
    )  # one image and one place for it
    assert model.ask("What?", image=file, system="Count only.", **SHORT) != model.ask(
        "What?", image=file, **SHORT
    )


def test_options_hold_for_their_call_alone(model: medm.Model) -> None:
    greedy = model.ask("What is it?", **SHORT)
    drawn = {model.ask("What is it?", temperature=2.0, seed=seed, **SHORT) for seed in range(3)}
    assert len(drawn) == 3
    assert model.ask("What is it?", temperature=2.0, seed=1, **SHORT) in drawn
    with pytest.raises(RecipeError, match="num_beams: not offered in continuous batching"):
        model.ask("What is it?", num_beams=2, **SHORT)
    assert model.ask("What is it?", **SHORT) == greedy
    assert greedy.startswith(model.ask("What is it?", max_new_tokens=2).rstrip("\ufffd"))


def test_what_was_encoded_is_kept_from_call_to_call(
    model: medm.Model, data: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = data[0] / "1.png"
    branch = model.model.branch("image")
    encoded: list[int] = []
    encode = branch.encode
    monkeypatch.setattr(
        branch, "encode", lambda pixels: encoded.append(len(pixels)) or encode(pixels)
    )
    model.ask("One?", image=file, **SHORT)
    model.ask_many(
        [{"question": "Two?", "image": file}, {"question": "Three?", "image": file}],
        max_new_tokens=3,
    )
    assert sum(encoded) <= 1


@pytest.mark.parametrize(
    ("questions", "error", "message"),
    [
        (
            ["What?", {"question": "What?", "image": "/no/such.png"}],
            MediaError,
            r"record 1: .*/no/such\.png",
        ),
        (
            [{"question": "What?"}, {"question": ""}],
            DataError,
            "record 1, field 'question': expected text",
        ),
        (
            [{"question": "What?", "images": "a.png"}],
            DataError,
            "field 'images': unknown key; expected some of image",
        ),
        ([{"conversations": [{"from": "human", "value": "<image>?"}]}], DataError, "names a file"),
        (
            [{"image": "../a.png", "conversations": [{"from": "human", "value": "<image>?"}]}],
            DataError,
            r"\.\./a\.png",
        ),
        ([3], DataError, "expected a question or a record, found int"),
        (["What? " * 400], DataError, "exceeds the model's context of 1024"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(
    questions: list[Any], error: type[Exception], message: str, model: medm.Model
) -> None:
    with pytest.raises(error, match=message):
        model.ask_many(questions, **SHORT)


def test_wrong_use_is_refused(folder: Path, model: medm.Model) -> None:
    with pytest.raises(RecipeError, match=r"max_tokens.*did you mean 'max_new_tokens'"):
        model.ask("What?", max_tokens=3)
    with pytest.raises(RecipeError, match="temperature"):
        model.ask("What?", temperature=-1)
    with pytest.raises(TypeError, match="ask takes a single one"):
        model.ask_many("What?")
    with pytest.raises(ValueError, match="batch_size"):
        model.ask_many(["What?"], batch_size=0)
    with pytest.raises(ValueError, match="dtype: expected"):
        medm.load(folder, dtype="int8")
    with pytest.raises(DeviceError):
        medm.load(folder, device="nowhere")
    with pytest.raises(CheckpointError, match="no such model folder"):
        medm.load(folder / "none")
    with pytest.raises(AttributeError, match="no attribute 'Modell'"):
        _ = medm.Modell  # type: ignore[attr-defined]


def test_precision_is_the_one_that_is_asked_for(folder: Path) -> None:
    model = medm.load(folder, device="cpu", dtype="bfloat16")
    assert model.model.dtype == torch.bfloat16
    assert isinstance(model.ask("What?", image=np.zeros((8, 8), np.uint8), **SHORT), str)


def blocks(page: str) -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE
    )


@pytest.mark.parametrize(
    ("page", "trained"), [("README.md", "finetune_lora"), ("docs/python.md", "finetune")]
)
def test_the_examples_of_the_docs_run(
    page: str, trained: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are, one after another in one namespace, with a tiny model in the place of the
    trained one."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "work_dirs").mkdir()
    (tmp_path / "work_dirs" / trained).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    found, names = blocks(page), {}
    assert found
    for block in found:
        exec(compile(block, page, "exec"), names)
    assert isinstance(names.get("reply", ""), str)


def test_a_model_card_shows_how_to_ask(folder: Path) -> None:
    def example(*branches: str) -> str:
        fields: Any = dict.fromkeys(branches)
        options = LVLMOptions.model_construct(branches=fields)
        return LVLM().card_text(options).example

    assert 'model.ask("What is seen?", volume="volume.nii.gz", max_new_tokens=64)' in example(
        "volume"
    )
    names: dict[str, Any] = {}
    exec(example().replace("path/to/this/folder", str(folder)), names)
    assert isinstance(names["model"], medm.Model)
