"""Mask heads of a recipe: sizes and preprocessing by the kind of file, and as a part of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from medm.config import validate
from medm.errors import RecipeError
from medm.heads import HEADS, HeadOptions
from medm.models import build
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.models.lvlm.options import LVLMOptions, MaskOptions
from medm.models.lvlm.processing import LVLMProcessor
from medm.models.mask_heads import described_head
from medm.objectives import TermsOptions
from medm.objectives.segmentation import Segmentation
from medm.objectives.terms import terms_of
from medm.types import Kind
from tests import tiny

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
    first, second, *heads = (
        yaml.safe_load(block.partition("```")[0]) for block in page.split("```yaml\n")[1:]
    )
    assert all(options(**section["head"]) for section in heads)
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
