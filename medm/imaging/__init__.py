"""Files to pixels: images and volumes, read safely and prepared by one saved description.

Knows nothing of tokens, prompts or models. Importing this package is cheap; readers are loaded when
used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from medm.config import validate
from medm.errors import MediaError, RecipeError, suggest
from medm.imaging.options import Augment, ImagePreprocess, VolumePreprocess
from medm.imaging.paths import resolve_inside

if TYPE_CHECKING:
    import numpy as np

    from medm.imaging.placement import Prepared

__all__ = [
    "Augment",
    "ImagePreprocess",
    "Preprocess",
    "VolumePreprocess",
    "fingerprint",
    "load_pixels",
    "prepare",
    "preprocess_from_dict",
    "resolve_inside",
]

Preprocess: TypeAlias = ImagePreprocess | VolumePreprocess

_KINDS: dict[str, type[ImagePreprocess] | type[VolumePreprocess]] = {
    "image": ImagePreprocess,
    "volume": VolumePreprocess,
}

_VERSION = 2
"""Version of the arithmetic: raised when it changes pixels, so that old cache entries are not used."""


def prepare(source: object, preprocess: Preprocess, *, device: str = "cpu") -> Prepared:
    """Return an image or volume as the model takes it, and its placement in the file.

    Args:
        source: a path; for an image also a stream, an image of Pillow or an array (H, W) or (H, W,
            3), for a volume an array (D, H, W); see `medm.imaging.sources`. Arrays are taken as a
            .npy file of them would be. A `MarkedImage` has regions drawn on it.
        preprocess: the preprocessing.
        device: where a volume is computed.

    Raises:
        MediaError: the file is missing, damaged, unsafe or not what `preprocess` declares.
    """
    from medm.imaging.marks import MarkedImage
    from medm.imaging.sources import as_source

    marked = source if isinstance(source, MarkedImage) else None
    source = as_source(source if marked is None else marked.source)
    if isinstance(preprocess, ImagePreprocess):
        from medm.imaging.images import prepare_image, read_image
        from medm.imaging.tiles import prepare_tiles

        image = read_image(source) if marked is None else marked.read(preprocess)
        return (prepare_image if preprocess.tiles is None else prepare_tiles)(preprocess, image)
    import numpy as np

    from medm.imaging.transforms import prepare_volume
    from medm.imaging.volumes import read_volume

    if not isinstance(source, (Path, np.ndarray)):
        raise MediaError(
            f"volume: expected a path or an array (D, H, W), found {type(source).__name__}"
        )
    return prepare_volume(preprocess, read_volume(source, several=preprocess.series), device=device)


def load_pixels(source: object, preprocess: Preprocess, *, device: str = "cpu") -> np.ndarray:
    """Return the pixels of `prepare`, float32 in host memory. Raises as `prepare`.

    They are (C, *spatial), and (T, C, height, width) where an image is cut into T tiles.
    """
    return prepare(source, preprocess, device=device).pixels


def preprocess_from_dict(value: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing of a checkpoint or recipe, by `kind`. Raises `RecipeError`."""
    kind = value.get("kind")
    if kind not in _KINDS:
        raise RecipeError(f"preprocess: unknown kind {kind!r}{suggest(str(kind), _KINDS)}")
    return validate(_KINDS[kind], value, source=f"preprocess ({kind})")


def fingerprint(preprocess: Preprocess) -> str:
    """Return a stable short name of a description, equal for equal descriptions only."""
    text = json.dumps({"version": _VERSION, **preprocess.model_dump(mode="json")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
