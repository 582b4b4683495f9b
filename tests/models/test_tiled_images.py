"""Images that are cut into tiles: every path from a file to a reply counts the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import medm
import medm.models
from medm.config import validate
from medm.data.check import check
from medm.data.collator import Collator
from medm.data.conversations import Conversations
from medm.data.dataset import ExampleDataset
from medm.data.options import SourceOptions
from medm.data.records import Records
from medm.data.volume_cache import MediaCache
from medm.errors import ExportError, RecipeError
from medm.imaging import Augment, load_pixels
from medm.inference.chat import Conversation
from medm.inference.generator import Engine, prepare
from medm.inference.options import GenerationOptions
from medm.models.dual_encoder.options import DualEncoderOptions
from medm.models.estimate import estimate
from medm.models.export.llava import refuse_what_differs
from medm.models.lvlm.options import LVLMOptions
from medm.training.feature_caching import cache_features
from medm.types import Example, Media, Sample, Turn
from tests.inference.tiny import awaken, save_image, write_records
from tests.models.dual_encoder.tiny import save_tokenizer
from tests.models.dual_encoder.tiny import section as dual_section
from tests.models.plain_head import registered
from tests.tiny import lvlm_section

SIZES = {"wide": (20, 60), "tall": (61, 22), "small": (16, 16), "large": (40, 60)}
"""Height and width of the images."""
ITEMS = {"wide": 4, "tall": 4, "small": 1, "large": 7}
"""3 / 1, 1 / 3, one tile without a thumbnail, and 2 rows of 3."""
TOKENS = 16
"""Of a tile: a grid of 4 x 4."""


def tiled(llm: Path, **branch: Any) -> dict[str, Any]:
    section = lvlm_section(llm)
    section["branches"]["image"] |= {"preprocess": {"tiles": {}}, "wrap": ["<img>", "</img>"]}
    section["branches"]["image"] |= branch
    return section


@pytest.fixture(scope="module")
def llm(llms: dict[str, Path]) -> Path:
    return llms["qwen2.5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiled")
    for seed, (name, size) in enumerate(SIZES.items()):
        save_image(folder / f"{name}.png", seed, size=size)
    return folder


@pytest.fixture(scope="module")
def built(llm: Path) -> tuple[Any, Any]:
    torch.manual_seed(1)
    model, processor = medm.models.build(validate(LVLMOptions, tiled(llm), source="test"))
    awaken(model)
    return model, processor


def example(processor: Any, folder: Path, *names: str, text: str = "What?") -> Example:
    media = [Media("image", f"{name}.png") for name in names]
    arrays = [load_pixels(folder / f"{name}.png", processor.preprocess["image"]) for name in names]
    pixels = {"image": arrays} if arrays else {}
    return processor.encode(Sample((Turn("user", (*media, text)),)), pixels, generation=True)


def test_each_tile_takes_the_tokens_of_an_item_inside_one_wrap(
    built: tuple[Any, Any], folder: Path
) -> None:
    processor = built[1]
    made = example(processor, folder, "wide", "small")
    token = processor.placeholder_ids["image"]
    before, after = (processor.tokenizer(text)["input_ids"] for text in ("<img>", "</img>"))
    start = made.input_ids.index(token) - len(before)
    expected = [*before, *[token] * 4 * TOKENS, *after, *before, *[token] * TOKENS, *after]
    assert made.input_ids[start : start + len(expected)] == expected
    assert made.input_ids.count(token) == 5 * TOKENS
    wide = load_pixels(folder / "wide.png", processor.preprocess["image"])
    assert [array.shape for array in made.pixels["image"]] == [(3, 16, 16)] * 5
    np.testing.assert_array_equal(np.stack(made.pixels["image"][:4]), wide)


def test_a_batch_of_unlike_images_equals_each_alone(built: tuple[Any, Any], folder: Path) -> None:
    model, processor = built
    examples = [
        example(processor, folder, "wide"),
        example(processor, folder),
        example(processor, folder, "small", "large"),
        example(processor, folder, "tall"),
    ]
    together = processor.pad(examples)
    with torch.no_grad():
        logits = model(**together).logits[:, -1]
        for row, one in enumerate(examples):
            alone = model(**processor.pad([one])).logits[0, -1]
            torch.testing.assert_close(logits[row], alone, atol=2e-4, rtol=2e-4)
    assert (logits[0] - logits[3]).abs().max() > 1e-3, "the image changes nothing"
    mixed = Collator(processor.pad_id)(examples)
    assert mixed["pixels"]["image"].shape == (16, 3, 16, 16)


def test_the_order_of_the_tiles_is_seen(built: tuple[Any, Any], folder: Path) -> None:
    model, processor = built
    made = example(processor, folder, "wide")
    with torch.no_grad():
        as_cut = model(**processor.pad([made])).logits[0, -1]
        made.pixels["image"] = made.pixels["image"][::-1]
        reversed_ = model(**processor.pad([made])).logits[0, -1]
    assert (as_cut - reversed_).abs().max() > 1e-3


def test_engine_chat_and_generate_agree(built: tuple[Any, Any], folder: Path) -> None:
    model, processor = built
    options = GenerationOptions(max_new_tokens=8)
    examples = [example(processor, folder, name) for name in SIZES]
    together = Engine(model, processor, options).generate(prepare(examples))
    for name, one, reply in zip(SIZES, examples, together, strict=True):
        inputs = processor.pad([one])
        plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert reply.text == processor.text(plain[0, len(one.input_ids) :])
        called = processor("<image>What?", images=folder / f"{name}.png")
        assert called["input_ids"][0].tolist() == one.input_ids
        torch.testing.assert_close(called["pixels"]["image"], inputs["pixels"]["image"])
    assert len({reply.text for reply in together}) > 1
    talk = Conversation(Engine(model, processor, options), processor)
    talk.show("image", folder / "large.png")
    first = "".join(talk.ask("What?"))
    shown = example(processor, folder, "large", text="\nWhat?")
    assert first == Engine(model, processor, options).generate(prepare([shown]))[0].text
    talk.show("image", folder / "tall.png")
    assert "".join(talk.ask("And this?")) is not None
    assert len(talk.pixels["image"]) == 2, "arrays by image, not by tile"


def test_questions_in_python_take_images_of_any_shape(
    built: tuple[Any, Any], folder: Path, tmp_path: Path
) -> None:
    for part in built:
        part.save_pretrained(tmp_path)
    model = medm.load(str(tmp_path), device="cpu")
    with Image.open(folder / "tall.png") as opened:
        found = model.ask("What?", image=opened.convert("RGB"), max_new_tokens=8)
    record = {"image": "tall.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
    assert model.ask_many([record], root=folder, max_new_tokens=8) == [found]
    other = model.ask("What?", image=folder / "wide.png", max_new_tokens=8)
    assert other != found


def source(folder: Path) -> SourceOptions:
    records = [
        {
            "image": f"{name}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "A scan."},
            ],
        }
        for name in SIZES
    ]
    return SourceOptions(path=str(write_records(folder, records)))


def test_the_check_counts_the_tokens_of_training_without_decoding(
    built: tuple[Any, Any], folder: Path
) -> None:
    pipeline = Conversations(built[1])
    report = check([source(folder)], pipeline)
    assert report.ok
    dataset = ExampleDataset(Records([source(folder)], pipeline))
    examples = [dataset[index] for index in range(len(dataset))]
    assert report.lengths == [len(made.input_ids) for made in examples if made is not None]
    assert [len(made.pixels["image"]) for made in examples if made is not None] == list(
        ITEMS.values()
    )
    with pytest.raises(RecipeError, match=r"data.augment.image: images are cut into tiles"):
        ExampleDataset(
            Records([source(folder)], pipeline), augmentation={"image": Augment(shift=0.1)}
        )


def test_cached_features_and_cached_pixels_are_those_of_the_file(
    built: tuple[Any, Any], folder: Path, tmp_path: Path
) -> None:
    model, processor = built
    pipeline = Conversations(processor)
    records = Records([source(folder)], pipeline)
    model.branch("image").encoder.requires_grad_(False)
    try:
        stores = cache_features(
            model, tmp_path / "features", processor.preprocess, [records], device=model.device
        )
    finally:
        model.branch("image").encoder_bypassed = False
    cache = MediaCache(tmp_path / "pixels", 10**8)
    for name, count in ITEMS.items():
        pixels = load_pixels(folder / f"{name}.png", processor.preprocess["image"])
        with torch.no_grad():
            expected = model.branch("image").encode(torch.from_numpy(pixels)).tokens
        found = stores["image"].get(folder / f"{name}.png")
        assert found is not None and found.shape[0] == count
        torch.testing.assert_close(torch.from_numpy(found.copy()), expected)
        for _ in range(2):
            again = cache.load(folder / f"{name}.png", processor.preprocess["image"])
            np.testing.assert_array_equal(again, pixels)
    dataset = ExampleDataset(records, features=stores)
    made = dataset[3]
    assert made is not None and [array.shape for array in made.features["image"]] == [(16, 24)] * 7
    assert made.input_ids.count(processor.placeholder_ids["image"]) == 7 * TOKENS
    batch = Collator(processor.pad_id)([made])
    plain = Collator(processor.pad_id)([ExampleDataset(records)[3]])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**plain).loss)


def test_estimates_are_of_the_most_tiles(llm: Path) -> None:
    costs = {
        most: estimate(
            validate(LVLMOptions, tiled(llm, preprocess={"tiles": {"max": most}}), source="test"),
            choose=lambda model: None,
            length=400,
        )
        for most in (1, 4, 12)
    }
    assert [cost.tokens["image"] for cost in costs.values()] == [16, 5 * 16, 13 * 16]
    assert [cost.items["image"] for cost in costs.values()] == [1, 5, 13]
    kept = [cost.memory[0].activations for cost in costs.values()]
    assert kept[0] < kept[1] < kept[2]


def test_a_saved_model_keeps_its_tiles_and_a_recipe_changes_them(
    built: tuple[Any, Any], llm: Path, tmp_path: Path
) -> None:
    model, processor = built
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    saved = medm.models.load_processor(str(tmp_path))
    assert saved.preprocess == processor.preprocess
    assert saved.branches["image"]["before"] == "<img>"
    plain = validate(LVLMOptions, lvlm_section(llm), source="test")
    kept = medm.models.processor_of(plain, init_from=str(tmp_path))
    assert kept.branches == processor.branches
    changed = tiled(llm, preprocess={"tiles": {"max": 2}}, wrap=["", ""])
    adapted = medm.models.processor_of(
        validate(LVLMOptions, changed, source="test"), init_from=str(tmp_path)
    )
    assert adapted.preprocess["image"].max_items == 3
    assert adapted.branches["image"]["before"] == ""
    whole = tiled(llm, preprocess={"tiles": None})
    one = medm.models.processor_of(
        validate(LVLMOptions, whole, source="test"), init_from=str(tmp_path)
    )
    assert one.preprocess["image"].max_items == 1


def test_who_cannot_take_tiles_says_so(built: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cut into up to 13 tiles") as refused:
        refuse_what_differs(*built)
    assert "this model's have <img> and </img>" in str(refused.value)
    section = dual_section(save_tokenizer(tmp_path))
    section["image"]["preprocess"] = {"tiles": {}, "fit": "squash"}
    with pytest.raises(RecipeError, match=r"model.image.preprocess.tiles: .*set tiles: null"):
        medm.models.build(validate(DualEncoderOptions, section, source="test"))


def test_masks_beside_tiles_are_of_the_whole_image(llm: Path, folder: Path) -> None:
    """Tiles go to the language model, the mask head reads the image once."""
    target = np.zeros(SIZES["large"], np.uint8)
    target[10:30, 30:50] = 255
    Image.fromarray(target).save(folder / "mask.png")
    turns = [
        {"from": "human", "value": "<image>\nWhere?"},
        {"from": "gpt", "value": "Here [SEG]."},
    ]
    records = [
        {"image": "large.png", "conversations": turns, "masks": ["mask.png"]},
        {"image": "wide.png", "conversations": turns, "masks": [None]},
    ]
    file = write_records(folder, records, name="masks.json")
    with registered() as head:
        section = tiled(llm) | {"masks": {"head": {"name": head}}}
        torch.manual_seed(1)
        model, processor = medm.models.build(validate(LVLMOptions, section, source="test"))
        pipeline = Conversations(processor)
        sources = [SourceOptions(path=str(file), root=str(folder))]
        report = check(sources, pipeline)
        assert report.ok, report.bad
        dataset = ExampleDataset(Records(sources, pipeline))
        examples = [dataset[index] for index in range(2)]
        assert report.lengths == [len(made.input_ids) for made in examples if made is not None]
        assert examples[0] is not None
        assert [len(examples[0].pixels[view]) for view in ("image", "image@masks")] == [7, 1]
        assert examples[0].masks is not None
        # 16 x 16 pixels, logits on 8 x 8: rows 2 to 5 of 8, columns 4 to 6 of 8 (40 x 60 pixels).
        rows, columns = np.nonzero(examples[0].masks.arrays[0])
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 5, 4, 6)
        batch = Collator(processor.pad_id)(examples)
        assert batch["pixels"]["image"].shape[0] == ITEMS["large"] + ITEMS["wide"]
        output = model(**batch)
    assert output.mask_logits.shape == (2, 8, 8)
    assert torch.isfinite(output.mask_logits).all()
