"""Mask heads of a recipe: sizes and preprocessing by the kind of file, and as a part of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import SiglipVisionConfig, SiglipVisionModel

from medm.config import validate
from medm.encoders.base import VisionEncoder
from medm.errors import RecipeError
from medm.heads import HEADS, HeadOptions
from medm.models import build, kind_of, load
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.models.lvlm.options import LVLMOptions, MaskOptions
from medm.models.lvlm.processing import LVLMProcessor
from medm.models.mask_heads import described_head
from medm.objectives import TermsOptions
from medm.objectives.segmentation import Segmentation
from medm.objectives.terms import terms_of
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import apply_parts
from medm.types import Kind
from tests import tiny
from tests.encoders.tiny import TINY_ENCODERS

UNET: dict[str, Any] = {"dim": 6, "features": 4, "channels": [4, 8], "strides": [2]}


def options(name: str, **given: Any) -> HeadOptions:
    found = validate(HEADS.entry(name).options, {"name": name, **given}, source="test")
    assert isinstance(found, HeadOptions)
    return found


@pytest.mark.parametrize(
    ("kind", "axes", "size"), [("image", 2, [16] * 2), ("volume", 3, [16] * 3)]
)
def test_the_kind_of_file_sets_the_axes_of_a_dot_product_head(
    kind: Kind, axes: int, size: list[int]
) -> None:
    head = options("dot-product", image_size=16, architecture=UNET)
    entry, preprocess = described_head(kind, head, {}, place="model.masks")
    assert entry == {
        "name": "dot-product",
        "network": "unet",
        "architecture": {**UNET, "axes": axes},
    }
    assert (preprocess.kind, preprocess.size) == (kind, size)
    assert HEADS.constructor(entry)().grid(tuple(size)) == tuple(size)
    wrong = options("dot-product", architecture={"axes": 5 - axes})
    with pytest.raises(RecipeError, match=rf"kind {kind} has {axes} axes, found {5 - axes}"):
        described_head(kind, wrong, {}, place="model.masks")


def test_vista3d_reads_volumes_alone() -> None:
    entry, preprocess = described_head("volume", options("vista3d"), {}, place="model.masks")
    assert entry["patch"] == preprocess.size == [128, 128, 128]
    with pytest.raises(RecipeError, match="reads volume, not image"):
        described_head("image", options("vista3d"), {}, place="model.masks")


def test_the_recipes_of_the_page_describe_heads() -> None:
    page = (Path(__file__).parents[2] / "docs" / "mask-heads.md").read_text("utf-8")
    sections = [yaml.safe_load(block.partition("```")[0]) for block in page.split("```yaml\n")[1:]]
    first, second = (section for section in sections if "head" not in section)
    heads = [section["head"] for section in sections if "head" in section]
    assert len(heads) > 5
    for head in heads:
        assert validate(MaskOptions, {"head": head}, source="page")
    grids = []
    for section in (first["model"]["masks"], second["masks"]):
        section["head"].pop("path", None)
        masks = validate(MaskOptions, section, source="page")
        entry, preprocess = described_head(
            masks.view, masks.head, masks.preprocess, place="model.masks"
        )
        assert preprocess.size is not None
        with torch.device("meta"):
            grids.append(HEADS.constructor(entry)().grid(tuple(preprocess.size)))
    assert grids == [(32, 96, 96), (128, 128, 128)]
    terms = terms_of(validate(TermsOptions, first["objective"], source="page"))
    assert terms.reads == {"loss_sum", "mask_logits", "mask_presence"}


@pytest.mark.parametrize("kind", ["image", "volume"])
def test_a_model_of_words_and_masks_learns_through_every_weight_of_the_head(
    llms: dict[str, Path], kind: Kind
) -> None:
    """With masks and without: the ranks of a run must agree on what has a gradient."""
    head = {"name": "dot-product", "image_size": 8, "architecture": UNET}
    section = tiny.lvlm_section(llms["qwen2.5"])
    section["masks"] = {"view": kind, "head": head}
    model, processor = build(validate(LVLMOptions, {"kind": "lvlm", **section}, source="test"))
    assert isinstance(model, LVLMForConditionalGeneration)
    assert isinstance(processor, LVLMProcessor)
    grid = (8,) * (2 if kind == "image" else 3)
    assert (processor.mask_view, processor.mask_grid) == (f"{kind}@masks", grid)
    assert model.masks is not None
    token = processor.control_token_ids["[SEG]"]
    ids = torch.tensor([[5, 6, token, 7, token]])
    words: dict[str, Any] = {"input_ids": ids, "labels": ids}
    masks = {
        "pixels": {f"{kind}@masks": torch.randn(1, 1, *grid)},
        "mask_tokens": torch.tensor([0, 1]),
        "mask_items": torch.tensor([0, 0]),
        "mask_targets": torch.ones(2, *grid, dtype=torch.uint8),
    }
    model.train()
    objective = Segmentation(points=30, presence=1.0)
    for batch, learned in (({**words, **masks}, True), (words, False)):
        model.zero_grad()
        output = model(**batch)
        loss = objective.loss(output, batch)
        loss.backward()
        assert (loss.item() > 0) == learned
        gradients = [p.grad for p in model.masks.parameters()]
        assert all(grad is not None for grad in gradients)
        assert any(grad.any() for grad in gradients if grad is not None) == learned


def of_encoder(name: str, upsample: int | list[int], **block: Any) -> dict[str, Any]:
    """A head of a tiny encoder, as a recipe has it."""
    encoder = TINY_ENCODERS[name].block | block
    sizes = {"dim": 6, "features": 5, "upsample": upsample}
    return {"name": "dot-product", "architecture": sizes, "encoder": encoder}


ENCODER_CASES = [
    ("image", "siglip", 4, (3, 16, 16), (8, 8)),
    ("image", "clip", 8, (3, 16, 16), (16, 16)),  # with a class token
    ("volume", "m3d-clip", [1, 2, 4], (1, 8, 16, 16), (2, 4, 8)),
    ("volume", "slices", [1, 4, 4], (3, 2, 16, 16), (2, 8, 8)),
]


@pytest.mark.parametrize(("kind", "name", "upsample", "pixels", "grid"), ENCODER_CASES)
def test_features_of_an_encoder_are_trained_saved_and_opened(
    llms: dict[str, Path],
    tmp_path: Path,
    kind: Kind,
    name: str,
    upsample: Any,
    pixels: tuple[int, ...],
    grid: tuple[int, ...],
) -> None:
    section = {"kind": "lvlm", **tiny.lvlm_section(llms["qwen2.5"])}
    head, size = of_encoder(name, upsample), list(pixels[1:])
    section["masks"] = {"view": kind, "head": head, "preprocess": {"size": size}}
    model, processor = build(validate(LVLMOptions, section, source="test"))
    assert isinstance(model, LVLMForConditionalGeneration)
    assert isinstance(processor, LVLMProcessor)
    assert processor.mask_grid == grid
    assert model.masks is not None
    assert isinstance(model.parts()["masks.encoder"], VisionEncoder)
    parts = {part: PartOptions(tune="full") for part in ("masks.decoder", "masks.projection")}
    apply_parts(model, parts, TrainOptions())
    ids = torch.tensor([[5, 6, processor.control_token_ids["[SEG]"], 7]])
    batch: dict[str, Any] = {
        "input_ids": ids,
        "labels": ids,
        "pixels": {f"{kind}@masks": torch.randn(1, *pixels)},
        "mask_tokens": torch.tensor([0]),
        "mask_items": torch.tensor([0]),
    }
    output = model.train()(**batch)
    (output.mask_logits.sum() + output.mask_presence.sum()).backward()
    assert all(weight.grad is not None for weight in model.parts()["masks.decoder"].parameters())
    assert all(weight.grad is None for weight in model.parts()["masks.encoder"].parameters())

    for part in (model.eval(), processor):
        part.save_pretrained(tmp_path)
    again, opened = load(str(tmp_path))
    assert isinstance(opened, LVLMProcessor)
    assert (opened.preprocess, opened.mask_grid) == (processor.preprocess, grid)
    with torch.inference_mode():
        found, expected = again(**batch).mask_logits, model(**batch).mask_logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # memory is aligned otherwise
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    # A recipe goes on with the folder, and the estimate is made of the same parts.
    given = validate(LVLMOptions, section, source="test")
    build(given, init_from=str(tmp_path))
    other = {"name": "dot-product", "architecture": UNET}
    section["masks"] = {**section["masks"], "head": other}
    with pytest.raises(RecipeError, match=rf"masks\.head\.encoder\.name '{name}', not None"):
        build(validate(LVLMOptions, section, source="test"), init_from=str(tmp_path))
    counted = kind_of(given).skeleton(given)
    assert {key: value.shape for key, value in counted.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_published_weights_and_pixels_of_the_encoder_are_used(
    llms: dict[str, Path], tmp_path: Path
) -> None:
    sizes = TINY_ENCODERS["siglip"].block["architecture"]
    published = SiglipVisionModel(SiglipVisionConfig(**sizes))
    published.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], '
        '"size": {"height": 16, "width": 16}}'
    )
    head = of_encoder("siglip", 4, path=str(tmp_path), architecture={})
    section = tiny.lvlm_section(llms["qwen2.5"]) | {"masks": {"head": head}}
    model, processor = build(validate(LVLMOptions, {"kind": "lvlm", **section}, source="test"))
    assert isinstance(processor, LVLMProcessor)
    preprocess: Any = processor.preprocess["image@masks"]
    assert (preprocess.size, preprocess.mean) == ([16, 16], [0.1, 0.2, 0.3])
    own = {tuple(weight.shape): weight for weight in model.parts()["masks.encoder"].parameters()}
    kernel = next(
        w for key, w in published.named_parameters() if key.endswith("patch_embedding.weight")
    )
    assert torch.equal(own[tuple(kernel.shape)], kernel)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": {"name": "siglpi"}}, r"masks\.head\.encoder.*siglpi.*siglip"),
        ({"encoder": {"name": "siglip", "layers": 3}}, r"masks\.head\.encoder.*'layers'"),
        ({"image_size": 32}, "image_size: with encoder, write it in the block of the encoder"),
    ],
)
def test_a_wrong_block_of_an_encoder_is_reported_with_its_key(
    llms: dict[str, Path], change: dict[str, Any], message: str
) -> None:
    head = of_encoder("siglip", 4) | change
    section = tiny.lvlm_section(llms["qwen2.5"]) | {"masks": {"head": head}}
    with pytest.raises(RecipeError, match=message):
        validate(LVLMOptions, {"kind": "lvlm", **section}, source="test")


@pytest.mark.parametrize(
    ("kind", "head", "message"),
    [
        ("volume", of_encoder("siglip", 4), r"encoder 'siglip' reads inputs of 2 axes"),
        ("image", of_encoder("siglip", 3), r"upsample: expected powers of 2, found 3"),
        ("image", of_encoder("siglip", [2, 2, 2]), r"upsample: .* or 2 of them"),
        ("image", of_encoder("clip", 4, tokens="cls"), r"gives no patches.*tokens: patch"),
        (
            "image",
            of_encoder("siglip", 4) | {"architecture": {"stride": 2}},
            r"unknown key 'stride'",
        ),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(
    llms: dict[str, Path], kind: Kind, head: dict[str, Any], message: str
) -> None:
    section = tiny.lvlm_section(llms["qwen2.5"]) | {"masks": {"view": kind, "head": head}}
    with pytest.raises(RecipeError, match=message):
        build(validate(LVLMOptions, {"kind": "lvlm", **section}, source="test"))
