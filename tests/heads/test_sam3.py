"""SAM 3 against transformers' own model, on its path for words, which runs without torchvision."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Sam3Config, Sam3Model

from medm.errors import CheckpointError
from medm.heads.base import Points
from medm.heads.sam3 import Sam3Head
from medm.models.published.weights import PretrainedSource, load_module
from tests.heads.tiny import TINY_SAM3, build_head


@pytest.fixture(scope="module")
def model() -> Sam3Model:
    torch.manual_seed(0)
    model = Sam3Model(
        Sam3Config(**TINY_SAM3, geometry_encoder_config=TINY_SAM3["detr_encoder_config"])
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight + 0.05 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def load(head: Sam3Head, tensors: dict[str, torch.Tensor]) -> Sam3Head:
    load_module(
        head, tensors, source="test", key_map=Sam3Head.key_map, ignored=Sam3Head.ignored_keys
    )
    return head.eval()


@pytest.mark.parametrize("instances", ["union", "best"])
def test_composition_equals_the_forward_of_transformers(model, instances):
    head = load(build_head("sam3", instances=instances), dict(model.state_dict()))
    pixels, prompts = torch.randn(2, 3, 112, 112), torch.randn(2, 32)
    with torch.no_grad():
        words = SimpleNamespace(pooler_output=prompts.unsqueeze(1))
        theirs = model(pixel_values=pixels, text_embeds=words)
        ours = head(pixels, prompts, torch.tensor([0, 1]))
    best = theirs.pred_logits.argmax(dim=1)
    expected = (
        theirs.semantic_seg[:, 0]
        if instances == "union"
        else theirs.pred_masks[torch.arange(2), best]
    )
    torch.testing.assert_close(ours.logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.presence, theirs.presence_logits[:, 0])
    torch.testing.assert_close(ours.quality, theirs.pred_logits.amax(dim=1).sigmoid())


@pytest.mark.parametrize("prefix", ["", "detector_model."])
def test_folders_load_with_a_report(model, tmp_path: Path, prefix):
    """Of the image model, and with the names of the detector in a video model."""
    model.save_pretrained(tmp_path)
    source = PretrainedSource(str(tmp_path))
    config = source.config()
    if prefix:
        config = {"model_type": "sam3_video", "detector_config": config}
    head = Sam3Head(architecture=Sam3Head.architecture_from(config))
    tensors = {prefix + name: tensor for name, tensor in source.tensors().items()}
    load(head, tensors)
    theirs = model.state_dict()["mask_decoder.semantic_projection.weight"]
    assert torch.equal(head.decoder.mask_decoder.semantic_projection.weight, theirs)


def test_what_it_is_not_is_refused():
    with pytest.raises(CheckpointError, match="found 'sam2'"):
        Sam3Head.architecture_from({"model_type": "sam2"})
    head = build_head("sam3")
    maps = head.encode(torch.randn(1, 3, 112, 112))
    with pytest.raises(ValueError, match="takes no points or boxes"):
        head.decode(
            maps,
            torch.randn(1, 32),
            torch.tensor([0]),
            Points(torch.ones(1, 1, 2), torch.ones(1, 1)),
        )
    assert Sam3Head.preprocess_from({}, {})["size"] == [1008, 1008]
    assert Sam3Head.preprocess_from({}, {})["mean"] == [0.5, 0.5, 0.5]
