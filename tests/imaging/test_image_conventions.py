"""Published preprocessing of images by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from medm.errors import RecipeError
from medm.imaging import ImagePreprocess, fingerprint, load_pixels, preprocess_from_dict
from medm.imaging.options import changed


def picture() -> Image.Image:
    rows, columns = np.mgrid[0:60, 0:90]
    pixels = np.stack([rows * 4, columns * 2, (rows + columns) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "side", "mean", "std"),
    [("medsiglip-448", 448, 0.5, 0.5), ("medgemma-896", 896, 0.5, 0.5)],
)
def test_medsiglip_and_medgemma_squash(name: Any, side: int, mean: float, std: float) -> None:
    pixels = load_pixels(picture(), ImagePreprocess(convention=name))
    resized = picture().resize((side, side), Image.Resampling.BILINEAR)
    expected = (np.asarray(resized, dtype=np.float32) / 255 - mean) / std
    np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1), atol=1e-5)


def test_raddino_crops_the_center() -> None:
    pixels = load_pixels(picture(), ImagePreprocess(convention="raddino-518"))
    resized = picture().resize((777, 518), Image.Resampling.BICUBIC)
    left = (777 - 518) // 2
    box = np.asarray(resized, dtype=np.float32)[:, left : left + 518]
    expected = (box / 255 - 0.5307) / 0.2583
    assert pixels.shape == (3, 518, 518)
    # A pixel of rounding of the crop moves a gradient by less than this.
    np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1), atol=0.1)


@pytest.mark.parametrize("name", ["medsiglip-448", "medgemma-896", "raddino-518"])
def test_a_saved_description_holds_the_fields_alone(name: Any) -> None:
    """So that older versions open it, and caches do not depend on how it was written."""
    named = ImagePreprocess(convention=name)
    saved = named.model_dump(mode="json")
    assert "convention" not in saved
    assert preprocess_from_dict(saved) == named
    assert fingerprint(preprocess_from_dict(saved)) == fingerprint(named)


def test_a_written_field_wins_and_the_size_belongs_to_the_encoder() -> None:
    assert ImagePreprocess(convention="raddino-518", fit="squash").fit == "squash"
    encoder = {"kind": "image", "size": [224, 224], "mean": [0.5] * 3, "fit": "squash"}
    found = preprocess_from_dict(changed(encoder, {"convention": "raddino-518"}))
    assert (found.size, found.mean, found.fit) == ([224, 224], [0.5307] * 3, "crop")


def test_an_unknown_name_is_refused_with_the_list() -> None:
    with pytest.raises(RecipeError, match="medsiglip-448"):
        preprocess_from_dict({"kind": "image", "convention": "medsiglip"})
