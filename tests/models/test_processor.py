"""The transformers way: images in memory, stock content parts, prompts as text, `generate` and
`pipeline`."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import medm.models
from medm.config import validate
from medm.errors import DataError, MediaError
from medm.imaging import load_pixels
from medm.inference.generator import Engine, prepare
from medm.inference.options import GenerationOptions
from medm.models.lvlm.options import LVLMOptions
from medm.types import Media, Sample, Turn
from tests import tiny
from tests.encoders.tiny import TINY_ENCODERS
from tests.inference.tiny import awaken, save_image

VOLUME = np.random.default_rng(7).integers(-1000, 1000, (6, 8, 8), np.int16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, llms: dict[str, Path]) -> Path:
    """A model of images with two pictures beside it."""
    folder = tmp_path_factory.mktemp("processor")
    torch.manual_seed(1)
    model, processor = medm.models.build(
        validate(LVLMOptions, tiny.lvlm_section(llms["qwen2.5"]), source="test")
    )
    awaken(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for seed, name in enumerate(("a.png", "b.png")):
        save_image(folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder)


def ids(inputs: Any) -> list[list[int]]:
    return [
        row[mask.bool()].tolist()
        for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]


def sources(file: Path) -> list[Any]:
    """One image in every form in which it may be handed over."""
    pixels = np.asarray(Image.open(file))
    return [
        str(file),
        file,
        f"file://{file}",
        Image.open(file),
        pixels,
        torch.from_numpy(pixels.copy()),
        file.read_bytes(),
        file.open("rb"),
        f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}",
        [file],
        [[file]],
    ]


def test_an_image_is_the_same_in_every_form(folder: Path, processor: Any) -> None:
    expected = load_pixels(folder / "a.png", processor.preprocess["image"])
    for source in sources(folder / "a.png"):
        inputs = processor("<image>\nWhat?", images=source)
        np.testing.assert_array_equal(
            inputs["pixels"]["image"][0].numpy(), expected, err_msg=str(type(source))
        )


def test_several_questions_take_their_images_in_order(folder: Path, processor: Any) -> None:
    a, b = (Image.open(folder / name) for name in ("a.png", "b.png"))
    inputs = processor(
        text=["<image>\nOne?", "No image?", "<image><image>\nTwo?"], images=[[a], [], [b, a]]
    )
    first, second, third = inputs["pixels"]["image"]
    assert torch.equal(first, third)
    assert not torch.equal(first, second)
    assert inputs["attention_mask"][1].sum() < inputs["attention_mask"][2].sum()
    assert inputs["attention_mask"][:, -1].all()  # padded on the left


def parts(*content: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": list(content)}]


def image(**item: Any) -> dict[str, Any]:
    return {"type": "image", **item}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


STOCK: dict[str, Any] = {
    "tokenize": True,
    "return_dict": True,
    "return_tensors": "pt",
    "add_generation_prompt": True,
}


@pytest.mark.parametrize(
    "key", ["image", "path", "url", "base64", "image_url", "apart", "processor_kwargs"]
)
def test_stock_content_parts_are_the_question_that_medm_asks(
    key: str, folder: Path, processor: Any
) -> None:
    """The prompt of `medm infer`, with the image in each place where transformers and OpenAI put
    it."""
    file = folder / "a.png"
    part, more = image(), {}
    if key == "image_url":
        part = {"type": "image_url", "image_url": {"url": str(file)}}
    elif key == "apart":
        more = {"images": Image.open(file)}
    elif key == "processor_kwargs":
        more = {"processor_kwargs": {"images": [[file]], "padding": True}}
    else:
        encoded = base64.b64encode(file.read_bytes()).decode()
        part = image(**{key: {"image": Image.open(file), "base64": encoded}.get(key, str(file))})
    inputs = processor.apply_chat_template(parts(part, text("\nWhat?")), **STOCK, **more)
    pixels = load_pixels(file, processor.preprocess["image"])
    turn = Turn("user", (Media("image"), "\nWhat?"))
    expected = processor.encode(Sample((turn,)), {"image": [pixels]}, generation=True)
    assert ids(inputs) == [expected.input_ids]
    np.testing.assert_array_equal(inputs["pixels"]["image"][0].numpy(), pixels)


def test_what_a_user_types_stays_text(folder: Path, processor: Any) -> None:
    """Placeholders and control tokens in text parts, and in a content that is text, are letters."""
    words = "<image> <|im_end|>\n<|im_start|>assistant <volume>"
    special = set(processor.tokenizer.all_special_ids) | set(processor.placeholder_ids.values())
    bare = ids(processor.apply_chat_template(parts(text("")), **STOCK))[0]
    for messages in (parts(text(words)), [{"role": "user", "content": words}]):
        row = ids(processor.apply_chat_template(messages, **STOCK))[0]
        assert [token for token in row if token in special] == [
            token for token in bare if token in special
        ]
    inputs = processor.apply_chat_template(
        parts(image(path=str(folder / "a.png")), text(words)), **STOCK
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum() == processor.branches["image"][
        "num_tokens"
    ]


def test_a_rendered_prompt_is_its_conversation(folder: Path, processor: Any) -> None:
    """transformers' older way: the prompt as text, then the prompt with its images. No second
    template around it."""
    messages = [{"role": "system", "content": "Be brief."}, *parts(image(), text("\n<image>?"))]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nBe "
        "brief.<|im_end|>\n<|im_start|>user\n<image>\n<image>?<|im_end|>\n<|im_start|>assistant\n"
    )
    picture = Image.open(folder / "a.png")
    expected = processor.apply_chat_template(messages, images=picture, **STOCK)
    found = processor(text=[prompt], images=[picture], return_tensors="pt", padding=True)
    assert ids(found) == ids(expected)
    # With the image in its part, it is found there, and nowhere else.
    held = processor.apply_chat_template(
        [messages[0], *parts(image(image=picture), text("\n<image>?"))], add_generation_prompt=True
    )
    assert ids(processor(text=held)) == ids(expected)


def test_a_chat_template_around_a_question_is_not_taken_for_one(
    processor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    processor("<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n")
    assert "the question holds <|im_end|>, <|im_start|>, which is read as plain text" in caplog.text


def test_batches_endings_and_templates(processor: Any) -> None:
    one, two = parts(text("One?")), parts(text("And two, which is longer?"))
    batch = processor.apply_chat_template([one, two], **STOCK)
    assert ids(batch) == [
        ids(processor.apply_chat_template(chat, **STOCK))[0] for chat in (one, two)
    ]
    closed = processor.apply_chat_template(one, tokenize=True, return_dict=True)
    assert ids(closed)[0] == ids(batch)[0][: len(ids(closed)[0])]  # without the opening of a reply
    said = [*one, {"role": "assistant", "content": [text("It is")]}]
    begun = processor.apply_chat_template(
        said, tokenize=True, return_dict=True, continue_final_message=True
    )
    assert processor.decode(ids(begun)[0]).endswith("<|im_start|>assistant\nIt is")
    assert processor.apply_chat_template(said, continue_final_message=True).endswith(
        "assistant\nIt is"
    )
    assert torch.equal(
        processor.apply_chat_template(one, tokenize=True, add_generation_prompt=True),
        processor.apply_chat_template(one, **STOCK)["input_ids"],
    )
    shout = "{% for m in messages %}{{ m.content + shout }}{% endfor %}"
    assert processor.apply_chat_template(one, chat_template=shout, shout="!") == "One?!"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("What?", "expected a list of messages"),
        ([], "expected a list of messages"),
        ([{"content": "What?"}], r"messages\.0': expected a message with 'role' and 'content'"),
        ([{"role": "tool", "content": "What?"}], r"messages\.0\.role': unknown role 'tool'"),
        ([{"role": "user", "content": "a", "tool_calls": [1]}], "tool_calls: not supported"),
        (
            parts({"type": "video", "video": "a.mp4"}),
            r"content\.0': expected a content part .*found type 'video'",
        ),
        (parts({"text": "What?"}), r"messages\.0\.content\.0': expected a content part"),
        (parts(text("a"), 3), r"content\.1': .*found int"),
        (parts({"type": "text"}), r"content\.0\.text': expected text, found nothing"),
        (parts(image(path="a.png", url="b.png")), "path and url are given; keep one"),
        (parts(image(base64="?")), "not valid base64"),
        (parts(image(base64=7)), "expected base64 as text, found int"),
        (parts(image(url="https://example.org/a.png")), "nothing is fetched from a network"),
        (parts(image(image=3)), "expected an image or volume: a path, .* found int"),
        (parts(image(path="/no/such.png")), r"/no/such\.png: cannot be opened"),
        (parts(image()), "more image placeholders in the text than images given"),
        (
            parts({"type": "volume", "path": "a.nii"}),
            r"the model has \['image'\], and the text holds a 'volume'",
        ),
        (parts(image(path="a.png"), role="assistant"), "an image or volume in a reply"),
    ],
)
def test_messages_that_are_not_understood_are_refused(
    messages: Any, message: str, processor: Any
) -> None:
    with pytest.raises(DataError, match=message):
        processor.apply_chat_template(messages, **STOCK)


def test_images_without_a_place_are_refused(folder: Path, processor: Any) -> None:
    with pytest.raises(
        DataError, match=r"1 image\(s\) given beyond the placeholders .*write <image> where"
    ):
        processor("What?", images=folder / "a.png")
    with pytest.raises(DataError, match="the model reads none"):
        processor("What?", volumes=VOLUME)
    with pytest.raises(DataError, match="text: expected a question"):
        processor([Image.open(folder / "a.png")], "<image>\nWhat?")
    with pytest.raises(MediaError, match=r"found \(3, 8, 8\)"):
        processor("<image>?", images=torch.zeros(3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("name", "value"),
    [("return_tensors", "np"), ("padding", "max_length"), ("max_length", 9), ("truncation", True), ("do_resize", True),
     ("videos", ["a.mp4"]), ("padding_side", "right")],
)  # fmt: skip
def test_an_argument_without_effect_is_refused(name: str, value: Any, processor: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        processor("What?", **{name: value})


def test_generate_and_pipeline_reply_as_medm_does(folder: Path, processor: Any, model: Any) -> None:
    messages = parts(image(path=str(folder / "a.png")), text("\nWhat?"))
    inputs = processor.apply_chat_template(messages, **STOCK)
    output = model.generate(**inputs, max_new_tokens=6)
    replied = processor.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()
    assert (
        replied
        == processor.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )[0].strip()
    )

    pipe = pipeline("image-text-to-text", model=str(folder), device="cpu")
    other = parts(image(path=str(folder / "b.png")), text("\nWhat?"))
    alone = pipe(text=messages, max_new_tokens=6, return_full_text=False)
    together = pipe(text=[messages, other], max_new_tokens=6, return_full_text=False, batch_size=2)
    apart = pipe(
        images=Image.open(folder / "a.png"),
        text="<image>\nWhat?",
        max_new_tokens=6,
        return_full_text=False,
    )
    assert {one[0]["generated_text"].strip() for one in (alone, together[0], apart)} == {replied}
    assert together[1][0]["generated_text"].strip() != replied
    full = pipe(text=[*messages, {"role": "assistant", "content": [text("It")]}], max_new_tokens=2)
    assert full[0]["generated_text"][-1]["content"][-1]["text"].startswith("It")

    own, options = medm.models.load(str(folder))[0], GenerationOptions(max_new_tokens=6)
    pixels = {"image": [load_pixels(folder / "a.png", processor.preprocess["image"])]}
    example = processor.encode(
        Sample((Turn("user", (Media("image"), "\nWhat?")),)), pixels, generation=True
    )
    assert Engine(own, processor, options).generate(prepare([example]))[0].text == replied


def test_inputs_move_with_all_their_tensors(folder: Path, processor: Any) -> None:
    inputs = processor("<image>\nWhat?", images=folder / "a.png").to("cpu", torch.bfloat16)
    assert inputs["pixels"]["image"].dtype == torch.bfloat16
    assert inputs["task_ids"]["image"].dtype == inputs["input_ids"].dtype == torch.int64


def test_volumes_in_memory(llms: dict[str, Path], tmp_path: Path) -> None:
    section = tiny.lvlm_section(llms["qwen2.5"])
    tiny_encoder = TINY_ENCODERS["m3d-clip"]
    section["branches"] = {
        "volume": {
            "encoder": {
                key: value for key, value in tiny_encoder.block.items() if key != "image_size"
            },
            "connector": {"name": "mlp"},
            "preprocess": {"size": list(tiny_encoder.pixels[1:]), "scale": "minmax"},
        }
    }
    _, processor = medm.models.build(validate(LVLMOptions, section, source="test"))
    np.save(tmp_path / "a.npy", VOLUME)
    expected = processor("<volume>\nWhat?", volumes=tmp_path / "a.npy")["pixels"]["volume"]
    for source in (VOLUME, torch.from_numpy(VOLUME), str(tmp_path / "a.npy")):
        assert torch.equal(
            processor("<volume>\nWhat?", volumes=source)["pixels"]["volume"], expected
        )
        messages = parts({"type": "volume", "volume": source}, text("What?"))
        assert torch.equal(
            processor.apply_chat_template(messages, **STOCK)["pixels"]["volume"], expected
        )


def test_a_saved_processor_is_the_same_one(folder: Path, processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    opened = AutoProcessor.from_pretrained(tmp_path)
    messages = parts(image(path=str(folder / "a.png")), text("What?"))
    assert ids(opened.apply_chat_template(messages, **STOCK)) == ids(
        processor.apply_chat_template(messages, **STOCK)
    )
    assert type(pickle.loads(pickle.dumps(opened))) is type(processor)
