"""Slices: every slice is what the 2-D encoder makes of it alone, in the order of the grid."""

import json

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

import medm.models
from medm.config import validate
from medm.encoders import SlicesOptions
from medm.encoders.slices import SlicesEncoder
from medm.errors import RecipeError
from medm.imaging.options import VolumePreprocess
from medm.models.lvlm.options import LVLMOptions
from tests import tiny
from tests.encoders.tiny import VIT, build_encoder

SIGLIP = {"name": "siglip", "architecture": VIT | {"image_size": 16, "patch_size": 8}}


def test_every_slice_is_the_image_of_the_inner_encoder():
    encoder = build_encoder({"name": "slices", "encoder": SIGLIP}).eval()
    volumes = torch.randn(2, 3, 4, 16, 24)
    features = encoder(volumes)
    assert features.grid == (4, 2, 3)
    cells = features.tokens.unflatten(1, features.grid)  # (B, slices, rows, columns, dim)
    for index in range(4):
        alone = encoder.encoder(volumes[:, :, index]).tokens.unflatten(1, (2, 3))
        torch.testing.assert_close(cells[:, index], alone, atol=1e-5, rtol=1e-5)


def test_a_cnn_can_be_the_inner_encoder():
    block = {
        "name": "efficientnet-lite",
        "stages": [3],
        "architecture": {"width": 0.1, "depth": 0.3, "stem": 8},
    }
    encoder = build_encoder({"name": "slices", "encoder": block}).eval()
    volumes = torch.randn(2, 3, 5, 32, 32)
    features = encoder(volumes)
    assert features.grid == (5, 4, 4)
    pooled = torch.stack([encoder.encoder(volumes[:, :, i]).pooled for i in range(5)]).mean(dim=0)
    torch.testing.assert_close(features.pooled, pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_slices_of_another_size_are_said_once(name, caplog):
    encoder = build_encoder({"name": "slices", "encoder": SIGLIP | {"name": name}}).eval()
    encoder(torch.randn(1, 3, 2, 16, 16))
    assert not caplog.text
    for _ in range(2):
        encoder(torch.randn(1, 3, 2, 16, 24))
    assert caplog.text.count("position embeddings of grid (2, 2) are interpolated to (2, 3)") == 1


def test_class_tokens_have_no_place():
    clip = {"name": "clip", "architecture": SIGLIP["architecture"], "tokens": "cls_patch"}
    with pytest.raises(RecipeError, match="use tokens 'patch'"):
        build_encoder({"name": "slices", "encoder": clip})


def test_a_volume_encoder_cannot_be_sliced():
    with pytest.raises(RecipeError, match="expected an encoder of 2-D images, found 'slices'"):
        build_encoder({"name": "slices", "encoder": {"name": "slices", "encoder": SIGLIP}})


def test_weights_belong_to_the_inner_block():
    with pytest.raises(RecipeError, match="belong in the inner block"):
        validate(
            SlicesOptions, {"name": "slices", "path": "x", "encoder": "siglip"}, source="recipe"
        )
    assert validate(
        SlicesOptions,
        {"name": "slices", "encoder": {"name": "siglip", "path": "x"}},
        source="recipe",
    )


def test_an_unknown_option_of_the_inner_encoder_is_named():
    with pytest.raises(RecipeError, match="unknown key 'layers': did you mean 'layer'"):
        validate(
            SlicesOptions,
            {"name": "slices", "encoder": {"name": "siglip", "layers": 1}},
            source="recipe",
        )


def test_preprocessing_is_that_of_the_inner_encoder_for_each_slice():
    inner = {
        "size": [256, 256],
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.2, 0.2],
        "channels": 3,
        "fit": "squash",
    }
    described = VolumePreprocess.model_validate(SlicesEncoder.preprocess_from(inner, {}))
    assert described.size == [32, 256, 256]
    assert (described.num_channels, described.mean, described.std) == (
        3,
        inner["mean"],
        inner["std"],
    )
    assert SlicesEncoder.preprocess_from(inner, {}, [8, 64, 64])["size"] == [8, 64, 64]


def test_a_recipe_loads_the_inner_encoder_from_its_published_folder(tmp_path):
    torch.manual_seed(0)
    published = SiglipVisionModel(SiglipVisionConfig(**tiny.VIT))
    published.save_pretrained(tmp_path / "siglip")
    (tmp_path / "siglip/preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3})
    )
    section = tiny.lvlm_section(tiny.save_llm("qwen2.5", tmp_path / "llm"))
    section["branches"] = {
        "volume": {
            "encoder": {
                "name": "slices",
                "image_size": [4, 16, 16],
                "encoder": {"name": "siglip", "path": str(tmp_path / "siglip"), "layer": -2},
            },
            "connector": {"name": "attention-pooling", "heads": 2},
        }
    }
    model, processor = medm.models.build(validate(LVLMOptions, section, source="test"))
    described = processor.preprocess["volume"]
    assert (described.size, described.num_channels, described.mean) == ([4, 16, 16], 3, [0.1] * 3)
    encoder = model.branch("volume").encoder
    volume = torch.randn(1, 3, 4, 16, 16)
    expected = published.eval()(volume[:, :, 2], output_hidden_states=True).hidden_states[-2]
    tokens = encoder(volume).tokens.unflatten(1, (4, 16))
    torch.testing.assert_close(tokens[:, 2], expected, atol=1e-5, rtol=1e-5)
    assert model.branch("volume").num_tokens == 16

    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert str(tmp_path / "siglip") not in (tmp_path / "saved/config.json").read_text()
    again = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(again.branch("volume").encoder(volume).tokens, encoder(volume).tokens)
