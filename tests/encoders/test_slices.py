"""Slices: every slice is what the 2-D encoder makes of it alone, in the order of the grid."""

import pytest
import torch

from medm.config import validate
from medm.encoders import SlicesOptions
from medm.encoders.slices import SlicesEncoder
from medm.errors import RecipeError
from medm.imaging.options import VolumePreprocess
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
    block = {"name": "efficientnet-lite", "stages": [3], "architecture": {"width": 0.1, "depth": 0.3, "stem": 8}}
    encoder = build_encoder({"name": "slices", "encoder": block}).eval()
    volumes = torch.randn(2, 3, 5, 32, 32)
    features = encoder(volumes)
    assert features.grid == (5, 4, 4)
    pooled = torch.stack([encoder.encoder(volumes[:, :, i]).pooled for i in range(5)]).mean(dim=0)
    torch.testing.assert_close(features.pooled, pooled, atol=1e-5, rtol=1e-5)


def test_class_tokens_have_no_place():
    clip = {"name": "clip", "architecture": SIGLIP["architecture"], "tokens": "cls_patch"}
    with pytest.raises(RecipeError, match="use tokens 'patch'"):
        build_encoder({"name": "slices", "encoder": clip})


def test_a_volume_encoder_cannot_be_sliced():
    with pytest.raises(RecipeError, match="expected an encoder of 2-D images, found 'slices'"):
        build_encoder({"name": "slices", "encoder": {"name": "slices", "encoder": SIGLIP}})


def test_weights_belong_to_the_inner_block():
    with pytest.raises(RecipeError, match="belong in the inner block"):
        validate(SlicesOptions, {"name": "slices", "path": "x", "encoder": "siglip"}, source="recipe")
    assert validate(SlicesOptions, {"name": "slices", "encoder": {"name": "siglip", "path": "x"}}, source="recipe")


def test_an_unknown_option_of_the_inner_encoder_is_named():
    with pytest.raises(RecipeError, match="unknown key 'layers': did you mean 'layer'"):
        validate(SlicesOptions, {"name": "slices", "encoder": {"name": "siglip", "layers": 1}}, source="recipe")


def test_preprocessing_is_that_of_the_inner_encoder_for_each_slice():
    inner = {"size": [256, 256], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2], "channels": 3, "fit": "squash"}
    described = VolumePreprocess.model_validate(SlicesEncoder.preprocess_from(inner, {}))
    assert described.size == [32, 256, 256]
    assert (described.num_channels, described.mean, described.std) == (3, inner["mean"], inner["std"])
    assert SlicesEncoder.preprocess_from(inner, {}, [8, 64, 64])["size"] == [8, 64, 64]
